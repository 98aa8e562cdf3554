"""Meshes, logical axes and the shardings that follow."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType

from convert.trees import flatten
from flax_projector.config import LlamaConfig, MeshConfig, ProjectorConfig, WhisperConfig
from flax_projector.models.llama import LlamaDecoder, abstract_decoder
from flax_projector.models.projector import ResidualAudioProjector, abstract_projector
from flax_projector.models.whisper import WhisperEncoder, abstract_encoder
from flax_projector.sharding import LOGICAL_RULES, local_rows, make_mesh

PROJECTOR = ProjectorConfig(encoder_dim=6, llm_dim=8)
WHISPER = WhisperConfig(
    num_mel_bins=80, d_model=12, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=20
)
LLAMA = LlamaConfig(
    vocab_size=18,
    hidden_size=8,
    intermediate_size=10,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=6,
)
MODULES = {
    "projector": (ResidualAudioProjector(PROJECTOR), jnp.zeros((1, 4, 6)), abstract_projector),
    "encoder": (WhisperEncoder(WHISPER), jnp.zeros((1, 80, 4)), abstract_encoder),
    "llm": (LlamaDecoder(LLAMA), jnp.zeros((1, 2), jnp.int32), abstract_decoder),
}


@pytest.mark.parametrize("name", MODULES)
def test_every_parameter_has_axis_names_that_the_table_knows(name):
    module, inputs, _ = MODULES[name]
    boxed = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    known = {axis for axis, _ in LOGICAL_RULES}
    for path, leaf in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box):
        where = jax.tree_util.keystr(path)
        assert is_box(leaf), f"{where} has no axis names"
        assert len(leaf.names) == leaf.value.ndim, where
        assert set(leaf.names) <= known, f"{where}: unknown axis in {leaf.names}"


def test_mesh_axes_are_used_where_they_divide():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = flatten(abstract_projector(PROJECTOR, mesh=mesh))
    expected = {
        "input_proj/kernel": (None, "fsdp"),
        "input_proj/bias": ("fsdp",),
        "ln_input/scale": (None,),
        "layers_1/fc1/kernel": ("fsdp", "tensor"),
        "layers_1/fc1/bias": ("tensor",),
        "layers_1/fc2/kernel": ("tensor", "fsdp"),
        "layers_1/fc2/bias": ("fsdp",),
        "layer_norms_1/scale": (None,),
    }
    assert {path: tuple(params[path].sharding.spec) for path in expected} == expected
    decoder = abstract_decoder(LLAMA, mesh=make_mesh(MeshConfig(tensor=4)))
    # 18 columns of q do not divide over 4 devices.
    assert decoder["layers"]["self_attn"]["q_proj"]["kernel"].sharding.spec[-1] is None
    assert decoder["layers"]["mlp"]["down_proj"]["kernel"].sharding.spec[2] == "fsdp"


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(fsdp=4), (2, 4, 1)),
        (MeshConfig(data=1, fsdp=-1), (1, 8, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2)),
    ],
)
def test_mesh_takes_all_devices(config, shape):
    assert tuple(make_mesh(config).shape.values()) == shape


@pytest.mark.parametrize("config", [MeshConfig(fsdp=3), MeshConfig(data=4), MeshConfig(data=16)])
def test_a_mesh_that_does_not_fit_is_an_error(config):
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        make_mesh(config)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What JAX looks at when it lays out a mesh."""

    id: int
    slice_index: int
    process_index: int
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def tpu_slices(count: int, size: int) -> list[FakeDevice]:
    """Slices of size * size chips, four of them on each host."""
    return [
        FakeDevice(1000 * s + size * y + x, s, s * 100 + (size * y + x) // 4, (x, y, 0))
        for s, y, x in itertools.product(range(count), range(size), range(size))
    ]


def gpu_machines(*sizes: int) -> list[FakeDevice]:
    """Machines, which are the slices of GPUs."""
    numbered = enumerate(s for s, size in enumerate(sizes) for _ in range(size))
    return [FakeDevice(i, s, s, platform="gpu", device_kind="NVIDIA H100") for i, s in numbered]


SLICES = {
    "data": (MeshConfig(), tpu_slices(2, 4), (32, 1, 1)),
    "fsdp": (MeshConfig(fsdp=4), tpu_slices(2, 4), (8, 4, 1)),
    "fsdp and tensor": (MeshConfig(data=8, fsdp=2, tensor=4), tpu_slices(4, 4), (8, 2, 4)),
    "a slice for each replica": (MeshConfig(data=3, fsdp=-1), tpu_slices(3, 4), (3, 16, 1)),
    "one slice": (MeshConfig(fsdp=16), tpu_slices(1, 4), (1, 16, 1)),
    "machines with GPUs": (MeshConfig(fsdp=8), gpu_machines(8, 8), (2, 8, 1)),
}


@pytest.mark.parametrize("case", SLICES)
def test_only_data_goes_across_slices(case):
    config, devices, shape = SLICES[case]
    num_slices = len({device.slice_index for device in devices})
    mesh = make_mesh(config, [*devices[1::2], *devices[::2]])  # in any order
    assert tuple(mesh.shape.values()) == shape == mesh.devices.shape
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert set(mesh.devices.flat) == set(devices)
    indices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    # Each slice is a contiguous part of the data axis, which replicas never cross.
    expected = np.repeat(np.arange(num_slices), shape[0] // num_slices)
    np.testing.assert_array_equal(indices, np.broadcast_to(expected[:, None, None], shape))


TOO_LARGE = {
    "fsdp": (MeshConfig(fsdp=32), tpu_slices(2, 4), "2 slices of 16 devices: .* product, 32, must"),
    "fsdp takes all": (MeshConfig(data=1, fsdp=-1), tpu_slices(2, 4), "must divide 16"),
    "fsdp with tensor": (MeshConfig(fsdp=8, tensor=4), tpu_slices(4, 4), "4 slices .* 32, must"),
    "does not divide a slice": (MeshConfig(fsdp=3), gpu_machines(8, 8, 8), "3, must divide 8"),
    "unequal slices": (MeshConfig(), gpu_machines(8, 4), "there are 8 in slice 0, 4 in slice 1"),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_a_mesh_that_does_not_fit_its_slices_is_an_error(case):
    config, devices, message = TOO_LARGE[case]
    with pytest.raises(ValueError, match=message):
        make_mesh(config, devices)


def test_one_process_provides_all_rows():
    np.testing.assert_array_equal(local_rows(make_mesh(MeshConfig(fsdp=2)), 16), np.arange(16))
