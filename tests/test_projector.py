"""The projector against PyTorch: tiny-audio's own module where it is at hand, and ours."""

import functools
import importlib.util
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from convert.load import load_projector_params
from convert.models import PROJECTOR
from convert.torch_projector import ResidualAudioProjector as TorchProjector
from convert.trees import flatten
from flax_projector.config import MeshConfig, ProjectorConfig
from flax_projector.lengths import num_audio_tokens
from flax_projector.models.projector import ResidualAudioProjector, ResidualMLP
from flax_projector.sharding import make_mesh, strip_axes
from tests.checkpoints import UPSTREAM
from tests.models import make_projector_pair, projector_to_flax
from tests.parity import assert_close, assert_relative_l2

pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("test_projector")]

SEED_MODULE = Path(__file__).parents[2] / "shared/seed/residual_audio_projector.py"

ENCODER_DIM, LLM_DIM, HIDDEN_DIM = 7, 13, 29


def make_config(**overrides: Any) -> ProjectorConfig:
    sizes = {"encoder_dim": ENCODER_DIM, "llm_dim": LLM_DIM, "projector_hidden_dim": HIDDEN_DIM}
    return ProjectorConfig(**{**sizes, "projector_pool_stride": 3, **overrides})


def random_frames(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


ORACLES = [
    pytest.param(name, marks=pytest.mark.variant(f"{name} module"))
    for name in ("our", "tiny-audio's")
]


@pytest.fixture(scope="module", params=ORACLES)
def torch_class(request) -> Any:
    """The PyTorch module to compare with."""
    if request.param == "our":
        return TorchProjector
    if not SEED_MODULE.exists():
        pytest.skip("tiny-audio's module is not beside this repository")
    spec = importlib.util.spec_from_file_location("seed_projector", SEED_MODULE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ResidualAudioProjector


@functools.partial(jax.jit, static_argnums=0)
def forward(module: ResidualAudioProjector, params: dict, frames: Any) -> jax.Array:
    return jnp.asarray(module.apply({"params": params}, frames))


@functools.partial(jax.jit, static_argnums=0)
def weighted_gradients(module: ResidualAudioProjector, params: dict, frames: Any, weights: Any):
    """Gradients of sum(y * weights) with respect to the parameters and the frames, and y."""

    def weighted_sum(params, frames):
        y = forward(module, params, frames)
        return jnp.sum(y * weights), y

    return jax.grad(weighted_sum, (0, 1), has_aux=True)(params, frames)


LENGTHS = [(k, 2 * k + remainder) for k in range(1, 6) for remainder in range(k)]


@pytest.mark.parity("PyTorch")
@pytest.mark.parametrize(("stride", "length"), [*LENGTHS, (4, 1), (5, 3)])
def test_forward_equals_torch_for_every_remainder(torch_class, stride, length) -> None:
    config = make_config(projector_pool_stride=stride)
    module, params = make_projector_pair(torch_class, config)
    frames = random_frames(2, length, ENCODER_DIM)
    y = forward(ResidualAudioProjector(config), params, frames)
    assert_close(y, module(torch.from_numpy(frames)), 1e-5)


@pytest.mark.parity("PyTorch")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("num_layers", "hidden_dim"), [(0, 5), (1, None), (2, 0), (3, 5), (4, 17)])
def test_forward_equals_torch_for_every_depth(torch_class, num_layers, hidden_dim, batch) -> None:
    config = make_config(projector_num_layers=num_layers, projector_hidden_dim=hidden_dim)
    module, params = make_projector_pair(torch_class, config)
    frames = random_frames(batch, 11, ENCODER_DIM)
    y = forward(ResidualAudioProjector(config), params, frames)
    assert_close(y, module(torch.from_numpy(frames)), 1e-5)


@pytest.mark.parity("PyTorch")
@pytest.mark.parametrize("num_layers", [0, 2])
def test_forward_equals_torch_in_f64(num_layers) -> None:
    # Ours only: the norms of tiny-audio's module are in f32 whatever the dtype.
    config = make_config(projector_num_layers=num_layers)
    module, params = make_projector_pair(TorchProjector, config)
    frames = random_frames(2, 11, ENCODER_DIM).astype(np.float64)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        flax_module = ResidualAudioProjector(config, jnp.float64, jnp.float64)
        y = forward(flax_module, params, jnp.asarray(frames))
    assert_close(y, module.double()(torch.from_numpy(frames)), 1e-10)


def bf16_forward(config: ProjectorConfig, params: dict, frames: Any, param_dtype: Any) -> jax.Array:
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, param_dtype), params)
    y = forward(ResidualAudioProjector(config, jnp.bfloat16, param_dtype), params, frames)
    assert y.dtype == jnp.bfloat16
    return y


# With f32 masters, as we train, and with bf16 weights, as upstream runs.
PARAM_DTYPES = [jnp.float32, jnp.bfloat16]


@pytest.mark.parity("PyTorch")
@pytest.mark.parametrize("param_dtype", PARAM_DTYPES)
def test_bf16_forward_is_near_torch(torch_class, param_dtype) -> None:
    config = make_config()
    module, params = make_projector_pair(torch_class, config)
    frames = random_frames(3, 50, ENCODER_DIM)
    expected = module.bfloat16()(torch.from_numpy(frames)).float()
    assert_relative_l2(bf16_forward(config, params, frames, param_dtype), expected, 1e-2)


@pytest.mark.consistency("ours in f32")
@pytest.mark.parametrize("param_dtype", PARAM_DTYPES)
def test_bf16_forward_is_near_f32(param_dtype) -> None:
    config = make_config()
    _, params = make_projector_pair(TorchProjector, config)
    frames = random_frames(3, 50, ENCODER_DIM)
    expected = forward(ResidualAudioProjector(config), params, frames)
    assert_relative_l2(bf16_forward(config, params, frames, param_dtype), expected, 1e-2)


@pytest.mark.parity("PyTorch")
@pytest.mark.parametrize(("stride", "num_layers"), [(1, 0), (2, 1), (4, 2), (5, 3)])
def test_every_gradient_equals_torch(torch_class, stride, num_layers) -> None:
    config = make_config(projector_pool_stride=stride, projector_num_layers=num_layers)
    module, params = make_projector_pair(torch_class, config)
    frames = random_frames(2, 11, ENCODER_DIM)
    weights = random_frames(2, num_audio_tokens(11, stride), LLM_DIM)
    flax_module = ResidualAudioProjector(config)
    (param_grads, frame_grad), _ = weighted_gradients(flax_module, params, frames, weights)
    torch_frames = torch.from_numpy(frames).requires_grad_()
    (module(torch_frames) * torch.from_numpy(weights)).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert_same_gradients(param_grads, projector_to_flax(config, grads))
    assert_relative_l2(frame_grad, torch_frames.grad, 1e-4, what="gradient of the frames")


def test_no_parameter_is_cast_before_its_product() -> None:
    """Its gradient would be summed in bf16: see `models.trained`."""
    config = make_config(projector_num_layers=3)
    _, params = make_projector_pair(TorchProjector, config)
    module = ResidualAudioProjector(config, jnp.bfloat16)
    program = jax.make_jaxpr(functools.partial(forward, module))(params, random_frames(2, 11, 7))
    calls = re.findall(r"custom_vjp_call\[\s*name=(\w+)", str(program))
    assert Counter(calls) == {"affine": 7, "scaled": 4}  # input_proj, and two in every block


def assert_same_gradients(got: dict, expected: dict) -> None:
    got, expected = flatten(got), flatten(expected)
    assert got.keys() == expected.keys()
    for name, leaf in expected.items():
        assert_relative_l2(got[name], leaf, 1e-4, name, what="gradients of the parameters")


@pytest.mark.parity("what it recorded")
def test_checkpoint_of_tiny_audio_computes_what_it_computed() -> None:
    config = PROJECTOR.read_config(UPSTREAM)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = load_projector_params(UPSTREAM, config, PROJECTOR.abstract_params(config, mesh=mesh))
    with np.load(UPSTREAM / "io.npz") as file:
        io = dict(file)
    (param_grads, frame_grad), y = weighted_gradients(
        ResidualAudioProjector(config), params, io["x"], io["w"]
    )
    assert_close(y, io["y"], 1e-5, what="output")
    assert_relative_l2(frame_grad, io["dx"], 1e-4, what="gradient of the frames")
    grads = {n[5:]: torch.from_numpy(g) for n, g in io.items() if n.startswith("grad.")}
    assert_same_gradients(param_grads, projector_to_flax(config, grads))


@pytest.fixture(scope="module")
def initial_leaves() -> dict[str, Any]:
    config = ProjectorConfig(61, 83, projector_hidden_dim=149, projector_init_std=0.07)
    frames = jnp.zeros((1, 4, 61))
    variables = jax.jit(ResidualAudioProjector(config).init)(jax.random.key(0), frames)
    return flatten(strip_axes(variables["params"]))


def test_initialisation_is_that_of_torch(initial_leaves) -> None:
    stds = {"input_proj": 0.07, "fc1": 0.07, "fc2": 0.007}
    for name, leaf in initial_leaves.items():
        *_, layer, kind = name.split("/")
        if kind == "kernel":
            assert math.isclose(leaf.std(), stds[layer], rel_tol=0.03), name
            assert abs(leaf.mean()) < 0.03 * stds[layer], name
        else:
            assert (leaf == {"bias": 0, "scale": 1}[kind]).all(), name


def test_initial_statistics_are_those_of_torch_over_many_seeds(torch_class) -> None:
    """Mean and standard deviation of each tensor, pooled over seeds: 20,000 elements and more."""
    config = ProjectorConfig(13, 23, projector_hidden_dim=37, projector_init_std=0.05)
    module, frames, num_seeds = ResidualAudioProjector(config), jnp.zeros((1, 4, 13)), 40
    init = jax.jit(jax.vmap(lambda key: strip_axes(module.init(key, frames)["params"])))
    ours = flatten(init(jax.random.split(jax.random.key(1), num_seeds)))
    torch.manual_seed(1)
    draws = [
        flatten(projector_to_flax(config, torch_class(config).state_dict()))
        for _ in range(num_seeds)
    ]
    for name, leaf in jax.tree.map(np.float64, ours).items():
        theirs = np.stack([draw[name] for draw in draws]).astype(np.float64)
        assert leaf.shape == theirs.shape
        error = 4 * theirs.std() * (2 / theirs.size) ** 0.5  # four standard errors
        assert abs(leaf.mean() - theirs.mean()) <= error, name
        assert abs(leaf.std() - theirs.std()) <= error, name
    block = {kind: float(ours[f"layers_1/{kind}/kernel"].std()) for kind in ("fc1", "fc2")}
    assert math.isclose(block["fc1"], 10 * block["fc2"], rel_tol=0.02)


def test_every_kernel_starts_different(initial_leaves) -> None:
    starts = [np.ravel(leaf)[:5] for name, leaf in initial_leaves.items() if "kernel" in name]
    assert len(starts) == 5
    scaled = [start / np.linalg.norm(start) for start in starts]
    assert len(np.unique(np.round(scaled, 3), axis=0)) == 5


def test_block_with_fc2_zeroed_is_the_identity() -> None:
    config = make_config()
    _, params = make_projector_pair(TorchProjector, config)
    block = {**params["layers_0"], "fc2": jax.tree.map(np.zeros_like, params["layers_0"]["fc2"])}
    x = random_frames(2, 5, LLM_DIM)
    y = ResidualMLP(config).apply({"params": block}, jnp.asarray(x), deterministic=True)
    np.testing.assert_array_equal(np.asarray(y), x)


def run_with_dropout(config: ProjectorConfig, params: dict, frames: np.ndarray, seed: int = 0):
    """Output, and what each dropout kept, in the order of the calls."""
    kept = []

    def record(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if isinstance(context.module, nn.Dropout):
            kept.append(np.asarray(out) != 0)
        return out

    with nn.intercept_methods(record):
        y = ResidualAudioProjector(config).apply(
            {"params": params},
            jnp.asarray(frames),
            deterministic=False,
            rngs={"dropout": jax.random.key(seed)},
        )
    return np.asarray(y), kept


@pytest.mark.parity("PyTorch")
def test_dropout_is_where_torch_has_it(torch_class, monkeypatch) -> None:
    config = make_config(projector_dropout=0.3)
    module, params = make_projector_pair(torch_class, config)
    frames = random_frames(3, 50, ENCODER_DIM)
    y, kept = run_with_dropout(config, params, frames)
    hidden, output = (3, 17, HIDDEN_DIM), (3, 17, LLM_DIM)
    assert [mask.shape for mask in kept] == [hidden, output, hidden, output, output]

    masks = iter(kept)

    def dropout(x, p, training, _inplace):
        assert training and p == 0.3
        return x * torch.from_numpy(next(masks)) / (1 - p)

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    assert_close(y, module.train()(torch.from_numpy(frames)), 1e-5)
    assert next(masks, None) is None


def test_dropout_drops_its_rate_with_masks_of_their_own() -> None:
    config = make_config(projector_dropout=0.3, projector_hidden_dim=LLM_DIM)
    _, params = make_projector_pair(TorchProjector, config)
    frames = random_frames(3, 300, ENCODER_DIM)
    y, kept = run_with_dropout(config, params, frames)
    for mask in kept:
        assert math.isclose(mask.mean(), 0.7, abs_tol=0.03)
        assert sum(np.array_equal(mask, other) for other in kept) == 1
    np.testing.assert_array_equal(y, run_with_dropout(config, params, frames)[0])
    assert not np.array_equal(y, run_with_dropout(config, params, frames, seed=1)[0])


@pytest.mark.parametrize(("rate", "deterministic"), [(0.0, False), (0.9, True)])
def test_without_dropout_nothing_is_dropped(rate, deterministic) -> None:
    config = make_config(projector_dropout=rate)
    _, params = make_projector_pair(TorchProjector, config)
    frames = random_frames(2, 11, ENCODER_DIM)
    plain = forward(ResidualAudioProjector(make_config()), params, frames)
    apply = jax.jit(ResidualAudioProjector(config).apply, static_argnames="deterministic")
    rngs = {"dropout": jax.random.key(0)}
    y = apply({"params": params}, frames, deterministic=deterministic, rngs=rngs)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(plain))


@pytest.mark.parametrize("stride", range(1, 8))
def test_num_audio_tokens_is_the_real_length(stride) -> None:
    module = ResidualAudioProjector(
        make_config(projector_pool_stride=stride, projector_num_layers=0)
    )
    frames = jnp.zeros((1, stride, ENCODER_DIM))
    variables = jax.eval_shape(module.init, jax.random.key(0), frames)
    for length in [*range(1, 2 * stride + 2), 1499, 1500, 1501]:
        x = jax.ShapeDtypeStruct((1, length, ENCODER_DIM), jnp.float32)
        y: Any = jax.eval_shape(module.apply, variables, x)
        assert y.shape == (1, num_audio_tokens(length, stride), LLM_DIM), length


def test_wrong_encoder_width_is_an_error() -> None:
    module = ResidualAudioProjector(make_config())
    with pytest.raises(ValueError, match=r"width 9 .*encoder_dim 7"):
        module.init(jax.random.key(0), jnp.zeros((1, 6, 9)))
