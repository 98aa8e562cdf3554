"""Flax folders: what is written comes back, and damaged files are refused."""

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from convert.checkpoint import DTYPES, TensorInfo, in_memory
from convert.errors import ConversionError
from convert.flax_files import is_flax_folder, load_params, open_flax, write_flax
from convert.trees import flatten, unflatten
from tests.checkpoints import assert_same_arrays, random_tensors
from tests.tiny import read_all


def write_tree(folder: Path, tree: dict, **kwargs: Any) -> None:
    """A Flax folder of these arrays."""
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}
    write_flax(folder, in_memory(leaves), '{"b": 1}', **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_params_come_back(tmp_path, dtype) -> None:
    tree = unflatten({"a/kernel": random_tensors(DTYPES[dtype])["b.weight"]})
    write_tree(tmp_path / "x", tree)
    assert is_flax_folder(tmp_path / "x")
    checkpoint = open_flax(tmp_path / "x")
    assert checkpoint.infos == {"a/kernel": TensorInfo((3, 5), DTYPES[dtype])}
    assert_same_arrays(read_all(checkpoint), flatten(tree))
    assert (tmp_path / "x/config.json").read_text() == '{"b": 1}'
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def sharded(tree, *spec):
    """Abstract arrays like those of `tree`, sharded over all devices."""
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def test_params_come_back_sharded(tmp_path) -> None:
    tree = {"a": np.arange(48, dtype=ml_dtypes.bfloat16).reshape(16, 3)}
    write_tree(tmp_path / "x", jax.tree.map(jax.numpy.asarray, tree))
    abstract = sharded(tree, "x")
    loaded = load_params(tmp_path / "x", abstract)
    assert loaded["a"].sharding == abstract["a"].sharding
    assert_same_arrays(loaded, tree)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"a": np.zeros((3, 2))}, r"a  got float32\[2, 3\], expected float64\[3, 2\]"),
        ({"a": np.zeros((2, 3), np.float16)}, r"a  got float32\[2, 3\], expected float16\[2, 3\]"),
        ({"b": np.zeros(2)}, r"a  got float32\[2, 3\], expected nothing"),
    ],
)
def test_other_params_than_asked_for_are_an_error(tmp_path, asked, message) -> None:
    write_tree(tmp_path / "x", {"a": np.zeros((2, 3), np.float32)})
    with pytest.raises(ConversionError, match=message):
        load_params(tmp_path / "x", asked)


def test_folder_without_params_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="is not a Flax folder"):
        open_flax(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ocdbt.process_0", None, "is damaged"),
        ("_METADATA", None, "is not a complete Orbax checkpoint"),
        *(
            ("_METADATA", content, "is not a complete Orbax checkpoint")
            for content in (b"", b"junk", b"[]", b"{}", b"\xff", b'{"tree_metadata": {"x": {}}}')
        ),
        ("manifest.ocdbt", b"", "is not a complete Orbax checkpoint"),
        ("manifest.ocdbt", b"junk", "is not a complete Orbax checkpoint"),
    ],
)
def test_damaged_folder_is_refused(tmp_path, name, content, message) -> None:
    rng = np.random.default_rng(0)
    write_tree(tmp_path / "x", {"a": rng.normal(size=(300, 70))})
    file = tmp_path / "x/params" / name
    file.rename(tmp_path / "lost")
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"x/params {message}"):
        read_all(open_flax(tmp_path / "x"))


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff"])
def test_damaged_marker_is_not_needed_to_read(tmp_path, content) -> None:
    write_tree(tmp_path / "x", {"a": np.ones(3)})
    (tmp_path / "x/params/_CHECKPOINT_METADATA").write_bytes(content)
    assert_same_arrays(read_all(open_flax(tmp_path / "x")), {"a": np.ones(3)})


def test_existing_folder_is_kept_unless_asked(tmp_path) -> None:
    write_tree(tmp_path / "x", {"a": np.zeros(2)})
    with pytest.raises(ValueError, match=r"x exists: choose another destination or pass --over"):
        write_tree(tmp_path / "x", {"a": np.ones(2)})
    assert_same_arrays(read_all(open_flax(tmp_path / "x")), {"a": np.zeros(2)})
    write_tree(tmp_path / "x", {"a": np.ones(2)}, overwrite=True)
    assert_same_arrays(read_all(open_flax(tmp_path / "x")), {"a": np.ones(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_folder_with_other_files_is_never_overwritten(tmp_path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").touch()
    with pytest.raises(ValueError, match=r"home will not be .* it is a folder with thesis.tex in"):
        write_tree(tmp_path / "home", {"a": np.ones(2)}, overwrite=True)
    assert (tmp_path / "home/thesis.tex").exists()
