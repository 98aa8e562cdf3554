"""PyTorch files: what is written comes back, and damaged files are refused."""

import json
import shutil
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import api
from convert.checkpoint import DTYPES, TensorInfo, in_memory
from convert.torch_files import open_torch, write_safetensors
from convert.torch_save import write_torch
from tests.checkpoints import assert_same_arrays, assert_same_tensors, random_tensors
from tests.tiny import make_projector, read_all


@pytest.fixture
def hf(tmp_path) -> Path:
    """A random projector in an HF folder."""
    return make_projector(tmp_path / "hf")


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_come_back(tmp_path, dtype) -> None:
    tensors = random_tensors(DTYPES[dtype])
    write_safetensors(tmp_path / "x.safetensors", in_memory(tensors))
    checkpoint = open_torch(tmp_path / "x.safetensors")
    assert checkpoint.infos == {k: TensorInfo(t.shape, t.dtype) for k, t in tensors.items()}
    assert_same_arrays(read_all(open_torch(tmp_path / "x.safetensors")), tensors)


def test_views_are_written_in_order(tmp_path) -> None:
    kernel = np.arange(15, dtype=np.float32).reshape(3, 5)
    write_safetensors(tmp_path / "x.safetensors", in_memory({"a": kernel.T, "b": kernel[:, ::2]}))
    assert_same_arrays(load_file(tmp_path / "x.safetensors"), {"a": kernel.T, "b": kernel[:, ::2]})


def test_order_of_tensors_does_not_change_the_file(tmp_path) -> None:
    tensors = random_tensors()
    write_safetensors(tmp_path / "1.safetensors", in_memory(tensors))
    write_safetensors(tmp_path / "2.safetensors", in_memory(dict(reversed(tensors.items()))))
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_written_file_is_as_readable_as_any_other(tmp_path) -> None:
    write_safetensors(tmp_path / "x.safetensors", in_memory(random_tensors()))
    (tmp_path / "other").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


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
    assert_same_arrays(read_all(open_torch(tmp_path)), tensors)
    assert_same_arrays(read_all(open_torch(tmp_path / "model.safetensors.index.json")), tensors)


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


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        "{",
        '{"weight_map": 3}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": null}}',
    ],
)
def test_broken_index_is_an_error(tmp_path, content) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index.json is not the index of a checkpoint"):
        open_torch(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", "does not exist"),
        ("model.safetensors.index.json", "begins with"),
        ("x" * 300, "cannot be used as a path: .*too long"),
        ("\0", "cannot be used as a path: embedded null byte"),
        ("\ud800", "is not UTF-8"),
    ],
)
def test_index_that_names_no_file_of_weights_is_an_error(tmp_path, name, message) -> None:
    index = json.dumps({"weight_map": {"a": name}})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=rf"{tmp_path}.* {message}"):
        open_torch(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:40],
        lambda data: data[:5],
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
    assert_same_arrays(read_all(open_torch(tmp_path)), random_tensors())
    write_safetensors(tmp_path / "other.safetensors", in_memory(random_tensors()))
    with pytest.raises(ValueError, match=r"found other\.safetensors, projector\.safetensors"):
        open_torch(tmp_path)


@pytest.mark.torch
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_sharded_projector_converts(tmp_path, hf, suffix) -> None:
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    shutil.copy(hf / "config.json", sharded)
    tensors = {key: tensor.copy() for key, tensor in read_all(open_torch(hf)).items()}
    weight_map = {key: f"weights-{number % 3}{suffix}" for number, key in enumerate(tensors)}
    write = write_torch if suffix == ".bin" else write_safetensors
    for name in set(weight_map.values()):
        write(
            sharded / name, in_memory({k: t for k, t in tensors.items() if weight_map[k] == name})
        )
    stem = "pytorch_model.bin" if suffix == ".bin" else "model.safetensors"
    (sharded / f"{stem}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    api.to_torch(api.to_flax(sharded, tmp_path / "flax"), tmp_path / "back")
    assert_same_tensors(hf, tmp_path / "back")
