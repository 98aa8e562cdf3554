"""The engine loses no bit in either direction, and refuses whatever does not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import engine
from convert.checkpoint import DTYPES, Checkpoint, TensorInfo, in_memory
from convert.errors import ConversionError
from convert.models import KINDS, LLAMA, PROJECTOR, WHISPER_ENCODER, ModelKind
from convert.round_trip import check_round_trip, is_same
from convert.rules import IDENTITY, Rule, Table, transpose
from convert.trees import unflatten
from flax_projector.config import ProjectorConfig
from flax_projector.models.projector import ResidualAudioProjector
from tests.checkpoints import CONFIGS, random_bits
from tests.tiny import read_all, torch_infos

TIED = dataclasses.replace(CONFIGS[LLAMA], tie_word_embeddings=True)

all_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def make_checkpoint(kind: ModelKind, config, *, dtype="float32", prefix=None):
    """A random torch checkpoint of the model, and its headers."""
    infos = torch_infos(kind, config, dtype, prefix=prefix)
    return random_bits(infos), infos


def plan(kind: ModelKind, config, infos):
    return engine.plan_to_flax(kind.table, infos, kind.leaves(config))


@pytest.mark.parametrize("dtype", DTYPES)
@all_kinds
def test_round_trip_keeps_every_bit(kind: ModelKind, dtype) -> None:
    tensors, infos = make_checkpoint(kind, CONFIGS[kind], dtype=dtype)
    assert any(np.isnan(t.astype(np.float32)).any() for t in tensors.values())
    forward = plan(kind, CONFIGS[kind], infos)
    leaves = in_memory(read_all(engine.as_flax(forward, in_memory(tensors))))
    assert leaves.infos == forward.params

    backward = engine.plan_to_torch(kind.table, forward.params, kind.leaves(CONFIGS[kind]))
    returned = read_all(engine.as_torch(backward, leaves))
    assert {k: (t.dtype, t.shape, t.tobytes()) for k, t in returned.items()} == {
        k: (t.dtype, t.shape, t.tobytes()) for k, t in tensors.items()
    }
    streamed = dict(engine.as_torch(backward, leaves).stream())  # what files are written from
    assert all(t.flags.c_contiguous for t in streamed.values())
    assert all(is_same(t, returned[k]) for k, t in streamed.items())
    check_round_trip(in_memory(tensors), in_memory(returned))


def test_values_land_where_the_module_reads_them() -> None:
    tensors, infos = make_checkpoint(WHISPER_ENCODER, CONFIGS[WHISPER_ENCODER])
    forward = plan(WHISPER_ENCODER, CONFIGS[WHISPER_ENCODER], infos)
    leaves = read_all(engine.as_flax(forward, in_memory(tensors)))
    for path, key, turned in (
        ("conv1/kernel", "conv1.weight", lambda t: t.transpose(2, 1, 0)),
        ("embed_positions/embedding", "embed_positions.weight", lambda t: t),
        ("layer_norm/scale", "layer_norm.weight", lambda t: t),
    ):
        np.testing.assert_array_equal(leaves[path], turned(tensors[f"model.encoder.{key}"]))
    for layer in range(3):
        key = f"model.encoder.layers.{layer}.fc1.weight"
        np.testing.assert_array_equal(leaves["layers/fc1/kernel"][layer], tensors[key].T)


def test_each_leaf_is_read_once_and_one_is_kept() -> None:
    kind, config, reads = WHISPER_ENCODER, CONFIGS[WHISPER_ENCODER], []
    tensors, infos = make_checkpoint(kind, config)
    leaves = in_memory(read_all(engine.as_flax(plan(kind, config, infos), in_memory(tensors))))

    def read(path: str) -> np.ndarray:
        reads.append(path)
        return leaves.read(path)

    backward = engine.plan_to_torch(kind.table, leaves.infos, kind.leaves(config))
    as_torch = engine.as_torch(backward, Checkpoint(leaves.infos, read))
    read_all(as_torch)
    assert reads == list(leaves.infos)
    reads.clear()
    for name in ("0.fc1", "1.fc1", "0.fc2", "1.fc1"):
        as_torch.read(f"model.encoder.layers.{name}.weight")
    assert reads == [f"layers/{name}/kernel" for name in ("fc1", "fc2", "fc1")]


@pytest.mark.parametrize("prefix", ["model.encoder.", "encoder.", ""])
def test_every_prefix_is_accepted_and_the_first_is_written(prefix) -> None:
    kind, config = WHISPER_ENCODER, CONFIGS[WHISPER_ENCODER]
    _, infos = make_checkpoint(kind, config, prefix=prefix)
    forward = plan(kind, config, infos)
    backward = engine.plan_to_torch(kind.table, forward.params, kind.leaves(config))
    assert set(backward.tensors) == {f"model.encoder.{k.removeprefix(prefix)}" for k in infos}


def test_leaves_are_in_the_order_of_their_paths() -> None:
    """Whatever the order of the target: files are written in that of the plan."""
    _, infos = make_checkpoint(PROJECTOR, CONFIGS[PROJECTOR])
    leaves = PROJECTOR.leaves(CONFIGS[PROJECTOR])
    for order in (sorted(leaves), sorted(leaves, reverse=True)):
        forward = engine.plan_to_flax(
            PROJECTOR.table, infos, {path: leaves[path] for path in order}
        )
        assert list(forward.params) == sorted(leaves)


@pytest.mark.parametrize(
    ("kind", "names", "message"),
    [
        (
            WHISPER_ENCODER,
            ["model.decoder.layers.9.fc1.bias", "proj_out.weight"],
            "left out 1 tensors model.decoder.*: the decoder is not used",
        ),
        (
            LLAMA,
            [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(3)],
            "left out 3 tensors *.rotary_emb.inv_freq: recomputed from rope_theta",
        ),
    ],
    ids=["whisper", "llama"],
)
def test_what_is_not_used_is_left_out_with_its_reason(kind, names, message, caplog) -> None:
    _, infos = make_checkpoint(kind, CONFIGS[kind])
    extra = dict.fromkeys(names, TensorInfo((3,), DTYPES["float32"]))
    with caplog.at_level("INFO", logger="convert"):
        forward = plan(kind, CONFIGS[kind], infos | extra)
    assert set(forward.tensors) == set(infos)
    assert message in caplog.text


def test_tied_head_may_be_absent_or_a_copy_and_is_not_written(caplog) -> None:
    tensors, infos = make_checkpoint(LLAMA, TIED)
    assert "lm_head.weight" not in infos
    with caplog.at_level("INFO", logger="convert"):
        plan(LLAMA, TIED, infos)
    assert not caplog.text

    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    infos["lm_head.weight"] = infos["model.embed_tokens.weight"]
    with caplog.at_level("INFO", logger="convert"):
        forward = plan(LLAMA, TIED, infos)
    assert "left out lm_head.weight: the config says that it is the same as" in caplog.text
    assert "lm_head/kernel" not in engine.as_flax(forward, in_memory(tensors)).infos
    assert "lm_head.weight" not in forward.tensors

    tensors["lm_head.weight"][3, 2] += 1
    with pytest.raises(ConversionError, match=r"lm_head.weight  differs from model.embed_tokens"):
        engine.as_flax(forward, in_memory(tensors))


def without(names, infos):
    return {k: v for k, v in infos.items() if k not in names}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda infos: without({"projector.layers.1.fc2.bias"}, infos),
            "missing  projector.layers.1.fc2.bias  [7] -> layers_1/fc2/bias",
        ),
        (
            lambda infos: infos | {"projector.gate.weight": infos["projector.input_proj.bias"]},
            "unexpected  projector.gate.weight  [7] is not part of a projector; if that comp",
        ),
        (
            lambda infos: (
                infos | {"projector.layers.2.fc1.bias": infos["projector.layers.1.fc1.bias"]}
            ),
            "unexpected  projector.layers.2.fc1.bias  [11] the config has no place for it",
        ),
        (
            lambda infos: (
                infos | {"projector.input_proj.weight": TensorInfo((7, 20), DTYPES["float32"])}
            ),
            "shape  projector.input_proj.weight  got [7, 20], expected [7, 15] -> input_proj/ker",
        ),
        (
            lambda infos: without({k for k in infos if "layers.0." in k}, infos),
            "gap      projector.layers.*             has 1 but not 0",
        ),
        (
            lambda infos: infos | {"projector.ln_input.weight": TensorInfo((7,), np.dtype("i8"))},
            "dtype  projector.ln_input.weight  int64 is not one of bfloat16, float16, float32",
        ),
    ],
    ids=["missing", "no rule", "too many layers", "shape", "gap", "dtype"],
)
def test_checkpoint_that_does_not_fit_is_an_error(damage, message) -> None:
    _, infos = make_checkpoint(PROJECTOR, CONFIGS[PROJECTOR])
    with pytest.raises(ConversionError) as caught:
        plan(PROJECTOR, CONFIGS[PROJECTOR], damage(infos))
    assert message in str(caught.value)


def test_all_problems_are_reported_together_and_sorted() -> None:
    _, infos = make_checkpoint(PROJECTOR, CONFIGS[PROJECTOR])
    del infos["projector.layers.1.fc2.bias"], infos["projector.input_proj.bias"]
    infos["projector.extra"] = TensorInfo((3, 2), DTYPES["float32"])
    with pytest.raises(ConversionError) as caught:
        plan(PROJECTOR, CONFIGS[PROJECTOR], infos)
    assert str(caught.value).splitlines() == [
        "projector: the checkpoint does not fit the config: use all of its files, and the "
        "config.json that came with them (3 problems)",
        "  missing     projector.input_proj.bias    [7] -> input_proj/bias",
        "  missing     projector.layers.1.fc2.bias  [7] -> layers_1/fc2/bias",
        "  unexpected  projector.extra              [3, 2] is not part of a projector; "
        "if that computes the same without it, `to-flax --ignore 'projector.extra'` leaves it out",
    ]


def test_a_stack_of_two_dtypes_is_an_error() -> None:
    _, infos = make_checkpoint(LLAMA, TIED)
    key = "model.layers.1.mlp.up_proj.weight"
    infos[key] = TensorInfo(infos[key].shape, DTYPES["bfloat16"])
    with pytest.raises(ConversionError, match=r"mlp/up_proj/kernel  stacks bfloat16 \(model"):
        plan(LLAMA, TIED, infos)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda leaves: without({"ln_input/scale"}, leaves), "missing  ln_input/scale  [7]"),
        (
            lambda leaves: leaves | {"extra/kernel": leaves["ln_input/scale"]},
            "unexpected  extra/kernel  [7] has no place in the model",
        ),
        (
            lambda leaves: leaves | {"extra/kernel": TensorInfo((3,), np.dtype(np.complex64))},
            "unexpected  extra/kernel  [3] has no place in the model",  # its dtype does not matter
        ),
        (
            lambda leaves: leaves | {"ln_input/scale": TensorInfo((8,), DTYPES["float32"])},
            "shape  ln_input/scale  got [8], expected [7]",
        ),
    ],
)
def test_parameters_that_do_not_fit_are_an_error(damage, message) -> None:
    target = PROJECTOR.leaves(CONFIGS[PROJECTOR])
    leaves = {p: TensorInfo(x.shape, DTYPES["float32"]) for p, x in target.items()}
    with pytest.raises(ConversionError) as caught:
        engine.plan_to_torch(PROJECTOR.table, damage(leaves), target)
    assert str(caught.value).splitlines()[1:] == [f"  {message}"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [Rule("a", "b/kernel", IDENTITY)],
            "a/kernel  0 rows of convert/tables.py lead to this leaf",
        ),
        ([Rule("a", "a/kernel", IDENTITY), Rule("b", "a/kernel", IDENTITY)], "a/kernel  2 rows"),
        ([Rule("a", "a/kernel", transpose())], "[3]: transpose moves 2 axes, the tensor has 1"),
    ],
)
def test_wrong_table_is_an_error(rules, message) -> None:
    leaf = TensorInfo((3,), DTYPES["float32"])
    with pytest.raises(ConversionError) as caught:
        engine.plan_to_flax(Table("toy", ("",), tuple(rules)), {"a": leaf}, {"a/kernel": leaf})
    assert message in str(caught.value)


def test_one_key_for_two_leaves_is_an_error() -> None:
    leaf = TensorInfo((3,), DTYPES["float32"])
    table = Table("toy", ("",), (Rule("a", "b/scale", IDENTITY), Rule("a", "c/scale", IDENTITY)))
    with pytest.raises(ConversionError, match="a  used by 2 leaves"):
        engine.plan_to_flax(table, {"a": leaf}, {"b/scale": leaf, "c/scale": leaf})


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({}, "missing  a  did not come back"),
        ({"a": np.array([1, np.nan], "f4"), "b": np.zeros(1)}, "new  b"),
        ({"a": np.array([1, np.nan], "f8")}, "float32[2] -> float64[2]"),
        ({"a": np.array([[1, np.nan]], "f4")}, "float32[2] -> float32[1, 2]"),
        ({"a": np.array([0x3F800000, 0x7FC00001], "u4").view("f4")}, "bytes  a"),
    ],
)
def test_round_trip_check_sees_every_change(returned, message) -> None:
    before = in_memory({"a": np.array([1, np.nan], "f4")})
    check_round_trip(before, before)
    with pytest.raises(ConversionError) as caught:
        check_round_trip(before, in_memory(returned))
    assert message in str(caught.value)


def swapped(table: Table, a: str, b: str) -> Table:
    """The table with the Flax paths of two rows exchanged."""
    other = {a: b, b: a}
    flax = {rule.torch: rule.flax for rule in table.rules}
    rules = [
        dataclasses.replace(rule, flax=flax[other.get(rule.torch, rule.torch)])
        for rule in table.rules
    ]
    return dataclasses.replace(table, rules=tuple(rules))


@pytest.mark.torch
def test_only_the_forward_pass_catches_swapped_rows_of_equal_shape() -> None:
    import torch

    from convert.torch_projector import ResidualAudioProjector as TorchProjector

    config = ProjectorConfig(5, 7, projector_pool_stride=3, projector_hidden_dim=7)
    module = TorchProjector(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
        frames = torch.randn(2, 8, 5, generator=generator)
        expected = module(frames).numpy()
    tensors = in_memory({k: t.numpy() for k, t in module.state_dict().items()})
    target = PROJECTOR.leaves(config)

    def project(table: Table) -> np.ndarray:
        forward = engine.plan_to_flax(table, tensors.infos, target)
        leaves = engine.as_flax(forward, tensors)
        check_round_trip(tensors, engine.as_torch(forward, leaves))  # satisfied either way
        with jax.default_matmul_precision("highest"):
            inputs = jnp.asarray(frames.numpy())
            y = ResidualAudioProjector(config).apply(
                {"params": unflatten(read_all(leaves))}, inputs
            )
        return np.asarray(y)

    np.testing.assert_allclose(project(PROJECTOR.table), expected, rtol=1e-5, atol=1e-5)
    wrong = swapped(PROJECTOR.table, "layers.{i}.fc1.weight", "layers.{i}.fc2.weight")
    assert np.abs(project(wrong) - expected).max() > 0.1


@pytest.mark.parametrize("dtype", ["complex64", "float8_e4m3fn", "float8_e5m2", "int8", "bool"])
def test_a_cast_that_would_lose_more_than_digits_is_refused(dtype) -> None:
    """An imaginary part, or the scales that belong to the numbers."""
    _, infos = make_checkpoint(PROJECTOR, CONFIGS[PROJECTOR])
    odd = {**infos, "projector.ln_input.weight": TensorInfo((7,), np.dtype(dtype))}
    zeros = {key: np.zeros(*info) for key, info in odd.items()}
    cast = in_memory(zeros).cast(DTYPES["float16"])
    assert cast.read("projector.ln_input.weight").dtype == dtype
    assert cast.read("projector.input_proj.bias").dtype == np.float16
    with pytest.raises(ConversionError, match=f"{dtype} is not one of .*: it cannot be cast"):
        plan(PROJECTOR, CONFIGS[PROJECTOR], cast.infos)
