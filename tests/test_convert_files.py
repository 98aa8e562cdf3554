"""Files of both sides: what is written comes back, and what is damaged is refused."""

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from convert.checkpoint import DTYPES, TensorInfo, in_memory
from convert.errors import ConversionError
from convert.flax_files import is_flax_folder, load_params, open_flax, write_flax
from convert.models import PROJECTOR, detect
from convert.paths import replacing
from convert.sources import open_source
from convert.torch_files import open_torch, write_safetensors
from convert.trees import flatten, unflatten
from tests.tiny import make_projector, read_all


def random_tensors(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "b.weight": rng.normal(size=(3, 5)).astype(dtype),
        "a.bias": rng.normal(size=7).astype(dtype),
    }


def assert_same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(np.asarray(got[name]), array, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_come_back(tmp_path, dtype) -> None:
    tensors = random_tensors(DTYPES[dtype])
    write_safetensors(tmp_path / "x.safetensors", in_memory(tensors))
    checkpoint = open_torch(tmp_path / "x.safetensors")
    assert checkpoint.infos == {k: TensorInfo(t.shape, t.dtype) for k, t in tensors.items()}
    assert checkpoint.metadata == {"format": "pt"}
    assert_same(read_all(open_torch(tmp_path / "x.safetensors")), tensors)


def test_views_are_written_in_order(tmp_path) -> None:
    kernel = np.arange(15, dtype=np.float32).reshape(3, 5)
    write_safetensors(tmp_path / "x.safetensors", in_memory({"a": kernel.T, "b": kernel[:, ::2]}))
    assert_same(load_file(tmp_path / "x.safetensors"), {"a": kernel.T, "b": kernel[:, ::2]})


def test_order_of_tensors_does_not_change_the_file(tmp_path) -> None:
    tensors = random_tensors()
    write_safetensors(tmp_path / "1.safetensors", in_memory(tensors))
    write_safetensors(tmp_path / "2.safetensors", in_memory(dict(reversed(tensors.items()))))
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_written_file_is_as_readable_as_any_other(tmp_path) -> None:
    write_safetensors(tmp_path / "x.safetensors", in_memory(random_tensors()))
    (tmp_path / "other").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def write_tree(folder: Path, tree: dict, **kwargs: Any) -> None:
    """A Flax folder of these arrays."""
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}
    write_flax(folder, in_memory(leaves), '{"b": 1}', **kwargs)


def write_sharded(folder: Path) -> dict[str, np.ndarray]:
    tensors = random_tensors(ml_dtypes.bfloat16)
    weight_map = {}
    for number, (key, tensor) in enumerate(tensors.items()):
        weight_map[key] = f"model-{number}.safetensors"
        save_file({key: tensor}, folder / weight_map[key])
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    return tensors


def test_sharded_set_reads_as_one(tmp_path) -> None:
    tensors = write_sharded(tmp_path)
    assert_same(read_all(open_torch(tmp_path)), tensors)
    assert_same(read_all(open_torch(tmp_path / "model.safetensors.index.json")), tensors)


def test_missing_shard_is_named(tmp_path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-1.safetensors does not exist"):
        open_torch(tmp_path)


def test_index_that_disagrees_with_its_files_is_an_error(tmp_path) -> None:
    write_sharded(tmp_path)
    save_file({"c": np.ones(3)}, tmp_path / "model-1.safetensors")
    with pytest.raises(ValueError, match=r"index.json and its files disagree about a.bias, c"):
        open_torch(tmp_path)


def test_broken_index_is_an_error(tmp_path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index.json is not the index of a checkpoint"):
        open_torch(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:40],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: b"this is no checkpoint",
        lambda data: struct.pack("<Q", 2**40) + data[8:],
    ],
)
def test_damaged_safetensors_are_refused_by_name(tmp_path, damage) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, in_memory(random_tensors()))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"x\.safetensors is not a complete safetensors file"):
        open_torch(path)


def test_tensor_of_unknown_dtype_is_named(tmp_path) -> None:
    save_file({"a": np.ones(3, ml_dtypes.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="tensor a has dtype F8_E4M3"):
        open_torch(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "does not exist"),
        ("notes.txt", "is not a checkpoint"),
        (".", "is not a PyTorch"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, name, message) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=message):
        open_torch(tmp_path / name)


def test_folder_with_one_safetensors_of_any_name_is_a_checkpoint(tmp_path) -> None:
    write_safetensors(tmp_path / "projector.safetensors", in_memory(random_tensors()))
    assert_same(read_all(open_torch(tmp_path)), random_tensors())
    write_safetensors(tmp_path / "other.safetensors", in_memory(random_tensors()))
    with pytest.raises(ValueError, match=r"found other\.safetensors, projector\.safetensors"):
        open_torch(tmp_path)


@pytest.mark.torch
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_files_come_back(tmp_path, suffix, dtype) -> None:
    import torch

    weight = torch.randn(3, 5).to(getattr(torch, dtype))
    state = {"w": weight, "view": weight.T, "scalar": weight[1, 2]}
    torch.save(state, tmp_path / f"x{suffix}")
    got = read_all(open_torch(tmp_path / f"x{suffix}"))
    assert {t.dtype for t in got.values()} == {DTYPES[dtype]}
    for key, tensor in state.items():
        np.testing.assert_array_equal(got[key].astype(np.float32), tensor.float().numpy())


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.torch
def test_pickled_code_is_refused_and_not_run(tmp_path) -> None:
    import torch

    torch.save({"w": torch.ones(3), "x": Bomb(tmp_path / "boom")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt needs unpickling, which .*: refused"):
        open_torch(tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(pickle.dumps({"x": Bomb(tmp_path / "boom")}))
    with pytest.raises(ValueError, match=r"y\.pt needs unpickling"):
        open_torch(tmp_path / "y.pt")
    assert not (tmp_path / "boom").exists()


@pytest.mark.torch
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a complete file"),
        (b"hello world", "is not a complete file"),
        (None, "is not a complete file"),
        ([1, 2], r"holds list, expected a dictionary of tensors"),
        ({"epoch": 3}, r"holds dict of epoch, expected a dictionary of tensors"),
    ],
)
def test_damaged_torch_files_are_refused_by_name(tmp_path, content, message) -> None:
    import torch

    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content or {"a": torch.ones(300)}, path)
    if content is None:
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=rf"x\.pt {message}"):
        open_torch(path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_params_come_back(tmp_path, dtype) -> None:
    tree = unflatten({"a/kernel": random_tensors(DTYPES[dtype])["b.weight"]})
    write_tree(tmp_path / "x", tree)
    assert is_flax_folder(tmp_path / "x")
    checkpoint = open_flax(tmp_path / "x")
    assert checkpoint.infos == {"a/kernel": TensorInfo((3, 5), DTYPES[dtype])}
    assert_same(read_all(checkpoint), flatten(tree))
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
    assert_same(loaded, tree)


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
    with pytest.raises(ValueError, match="is not a converted checkpoint"):
        open_flax(tmp_path)


@pytest.mark.parametrize(
    ("lost", "message"),
    [("_METADATA", "is not a complete Orbax checkpoint"), ("ocdbt.process_0", "is damaged")],
)
def test_incomplete_folder_is_refused(tmp_path, lost, message) -> None:
    rng = np.random.default_rng(0)
    write_tree(tmp_path / "x", {"a": rng.normal(size=(300, 70))})
    (tmp_path / "x/params" / lost).rename(tmp_path / "lost")
    with pytest.raises(ValueError, match=rf"x/params {message}"):
        read_all(open_flax(tmp_path / "x"))


def test_existing_folder_is_kept_unless_asked(tmp_path) -> None:
    write_tree(tmp_path / "x", {"a": np.zeros(2)})
    with pytest.raises(ValueError, match=r"x exists: choose another destination or pass --over"):
        write_tree(tmp_path / "x", {"a": np.ones(2)})
    assert_same(read_all(open_flax(tmp_path / "x")), {"a": np.zeros(2)})
    write_tree(tmp_path / "x", {"a": np.ones(2)}, overwrite=True)
    assert_same(read_all(open_flax(tmp_path / "x")), {"a": np.ones(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_folder_with_other_files_is_never_overwritten(tmp_path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").touch()
    with pytest.raises(ValueError, match=r"it also holds thesis.tex"):
        write_tree(tmp_path / "home", {"a": np.ones(2)}, overwrite=True)
    assert (tmp_path / "home/thesis.tex").exists()


@pytest.mark.parametrize("is_folder", [True, False])
def test_failed_write_leaves_the_old_one(tmp_path, is_folder) -> None:
    dst = tmp_path / "model.safetensors"
    if is_folder:
        dst.mkdir()
    else:
        dst.write_text("old")
    with pytest.raises(OSError, match="disk full"), replacing(dst, overwrite=True) as part:
        part.write_text("new")
        raise OSError("disk full")
    assert dst.is_dir() if is_folder else dst.read_text() == "old"
    assert list(tmp_path.iterdir()) == [dst]


def test_detect_by_the_names_of_tensors(tmp_path) -> None:
    folder = make_projector(tmp_path)
    (folder / "config.json").unlink()
    assert detect(open_source(folder)) is PROJECTOR


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "unknown  names  of the 2 tensors do not tell which model it is, supported: "),
        ({"model_type": "gpt2"}, "unsupported  model_type  = 'gpt2', supported: "),
    ],
)
def test_unknown_model_is_an_error(tmp_path, config, message) -> None:
    write_safetensors(tmp_path / "model.safetensors", in_memory(random_tensors()))
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"is no model that can be converted") as caught:
        detect(open_source(tmp_path))
    assert f"{message}projector (asr_model), whisper encoder (whisper), ll" in str(caught.value)
