"""Transforms are bijections; templates match whole names; tables cover the modules."""

import numpy as np
import pytest

from convert.checkpoint import DTYPES, TensorInfo
from convert.models import KINDS, WHISPER_ENCODER, ModelKind
from convert.rules import IDENTITY, Ignore, Rule, permute, transpose
from tests.checkpoints import CONFIGS


@pytest.mark.parametrize("transform", [IDENTITY, transpose(), permute(2, 1, 0), permute(1, 2, 0)])
def test_inverse_undoes_forward(transform) -> None:
    shape = (2, 3, 5)[: len(transform.axes or (0,))]
    tensor = np.random.default_rng(0).random(shape)
    leaf = transform.forward(tensor)
    np.testing.assert_array_equal(transform.inverse(leaf), tensor)
    assert transform.forward_shape(shape) == leaf.shape
    assert transform.inverse_shape(leaf.shape) == shape


def test_permute_names_the_torch_axis_of_each_flax_axis() -> None:
    tensor = np.arange(30).reshape(2, 3, 5)
    assert permute(1, 2, 0).forward(tensor)[2, 4, 1] == tensor[1, 2, 4]


@pytest.mark.parametrize("axes", [(0, 2), (1, 1), (-1, 0)])
def test_permute_refuses_what_is_not_a_permutation(axes) -> None:
    with pytest.raises(ValueError, match="not a permutation"):
        permute(*axes)


def test_transform_refuses_another_rank() -> None:
    with pytest.raises(ValueError, match="transpose moves 2 axes, the tensor has 1"):
        transpose().forward(np.zeros(3))


@pytest.mark.parametrize(
    ("key", "layer"),
    [
        ("layers.0.fc1.weight", "0"),
        ("layers.12.fc1.weight", "12"),
        ("layers.01.fc1.weight", None),
        ("layers.-1.fc1.weight", None),
        ("layers.x.fc1.weight", None),
        ("layers.1.fc1.weight.1", None),
        ("old.layers.1.fc1.weight", None),
        ("layers.1.fc1xweight", None),
    ],
)
def test_template_matches_whole_keys_only(key, layer) -> None:
    rule = Rule("layers.{i}.fc1.weight", "layers/fc1/kernel", transpose())
    assert rule.layer_of(key) == layer


def test_layer_number_on_both_sides_is_one_leaf_per_layer() -> None:
    rule = Rule("norms.{i}.weight", "norms_{i}/scale", IDENTITY)
    assert rule.torch_keys("norms_4/scale", (7,)) == ("norms.4.weight",)
    assert rule.torch_keys("norms_4/bias", (7,)) is None
    assert rule.tensor_shape((7,)) == (7,)


def test_layer_number_on_the_torch_side_only_is_a_stack() -> None:
    rule = Rule("layers.{i}.fc.weight", "layers/fc/kernel", transpose())
    assert rule.torch_keys("layers/fc/kernel", (2, 3, 5)) == (
        "layers.0.fc.weight",
        "layers.1.fc.weight",
    )
    assert rule.tensor_shape((2, 3, 5)) == (5, 3)


@pytest.mark.parametrize(("torch", "flax"), [("a.weight", "a_{i}/scale"), ("{i}.{i}", "a")])
def test_rule_that_cannot_be_reversed_is_refused(torch, flax) -> None:
    with pytest.raises(ValueError, match="at most one"):
        Rule(torch, flax, IDENTITY)


def test_ignore_matches_whole_keys() -> None:
    ignore = Ignore("decoder.*", "unused")
    assert ignore.matches("decoder.layers.0.fc1.weight")
    assert not ignore.matches("my.decoder.layers.0.fc1.weight")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_tensor_info_counts_bytes(dtype) -> None:
    assert TensorInfo((3, 5), dtype).nbytes == np.zeros((3, 5), dtype).nbytes


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_row_is_used_by_the_module_and_every_leaf_has_one_row(kind: ModelKind) -> None:
    leaves = kind.leaves(CONFIGS[kind])
    rows = {
        path: [rule for rule in kind.table.rules if rule.torch_keys(path, leaf.shape)]
        for path, leaf in leaves.items()
    }
    assert {path: len(found) for path, found in rows.items()} == dict.fromkeys(rows, 1)
    assert {rule for found in rows.values() for rule in found} == set(kind.table.rules)


@pytest.mark.parametrize("prefix", ["model.encoder.", "encoder.", ""])
def test_prefix_is_found(prefix) -> None:
    keys = [f"{prefix}conv1.weight", f"{prefix}layers.0.fc1.bias", "decoder.layer_norm.weight"]
    assert WHISPER_ENCODER.table.prefix_of(keys) == prefix
