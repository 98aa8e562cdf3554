"""A file that is not what its name promises is named, with the way out, by every reader."""

import bz2
import gzip
import io
import lzma
import shutil
import tarfile
from pathlib import Path

import flax.serialization
import numpy as np
import pytest

from convert import api
from convert.models import PROJECTOR
from convert.stored import open_stored
from flax_projector.chat.tokenizer import load_tokenizer
from flax_projector.file_types import recognise, recognise_any
from flax_projector.run_folder import RunFolder
from tests.checkpoints import CONFIGS, write_run
from tests.tiny import make_projector, make_tokenizer, read_params

LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"), io.BytesIO())
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones(3))
    return file.getvalue()


KINDS = {
    "LFS": (LFS, "is a pointer of Git LFS, .*`git lfs pull`"),
    "HTML": (b"<!DOCTYPE html>\n<html>", "is a web page, .*/resolve/"),
    "html": (b"\n <!-- x -->\n<HTML lang='en'>", "is a web page"),
    "XML": (b"<?xml version='1.0'?><Error/>", "is XML"),
    "GGUF": (b"GGUF\x03\x00\x00\x00", r"is in the format of llama.cpp \(GGUF\)"),
    "GGML": (b"tjgg\x03\x00\x00\x00", r"is in the format of llama.cpp \(GGUF\)"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\x00", "is an HDF5 file, of Keras or TensorFlow"),
    "SavedModel": (b"\x08\x01\x12\xf4\x02", "is a SavedModel of TensorFlow"),
    "ONNX": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0", "is an ONNX model"),
    "ONNX of nobody": (b"\x08\x08:\x9f\x01\x0a", "is an ONNX model"),
    "TFLite": (b"\x1c\x00\x00\x00TFL3\x14", "is a TensorFlow Lite model"),
    "msgpack": (flax.serialization.to_bytes({"a": np.ones(3)}), "is in Flax's older format"),
    "msgpack of many": (
        flax.serialization.to_bytes({f"{i}": np.ones(3) for i in range(40)}),
        "is in Flax's older format",
    ),
    "npy": (npy(), r"is an array of NumPy \(\.npy\)"),
    "gzip": (gzip.compress(b"x"), "is compressed with gzip: unpack it first"),
    "bzip2": (bz2.compress(b"x"), "is compressed with bzip2: unpack it first"),
    "xz": (lzma.compress(b"x"), "is compressed with xz: unpack it first"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04", "is compressed with zstd: unpack it first"),
    "7z": (b"7z\xbc\xaf\x27\x1c\x00", "is a 7z archive: unpack it first"),
    "RAR": (b"Rar!\x1a\x07\x00", "is a RAR archive: unpack it first"),
    "tar": (tar(), "is a tar archive: unpack it first"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is a text in UTF-16: save it in UTF-8"),
    "zeros": (b"\x00" * 1000, "begins with zeros, .*: copy or download it again"),
    "empty": (b"", "is empty: copy or download it again"),
}

every_kind = pytest.mark.parametrize(("content", "message"), KINDS.values(), ids=KINDS)


@every_kind
@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x.safetensors", "x"])
def test_weights_in_another_format_are_named(tmp_path, content, message, name) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        open_stored(tmp_path / name)


@every_kind
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_json_file_in_another_format_is_named(tmp_path, content, message, name) -> None:
    folder = make_projector(tmp_path / "hf")
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        open_stored(folder)


@every_kind
def test_a_tokenizer_in_another_format_is_named(tmp_path, content, message) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"tokenizer.json {message}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"{}", b'{"model": 3}', b"junk", b"[[[", b"3"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_cannot_be_read_is_one_clear_error(tmp_path, name, content) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    if name == "tokenizer_config.json" and content.startswith(b"{"):
        assert load_tokenizer(tmp_path)
        return
    with pytest.raises(ValueError, match=f"the tokenizer in {tmp_path} cannot be read: "):
        load_tokenizer(tmp_path)


def test_a_pointer_among_the_files_of_a_tokenizer_is_named(tmp_path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(LFS)
    with pytest.raises(ValueError, match=r"tokenizer_config.json is a pointer of Git LFS"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "prompt.json"])
@pytest.mark.parametrize("content", [LFS, b"{}", b"3", b"junk", b'{"date": 3}', b"[" * 10**5])
def test_a_run_in_which_a_file_is_replaced_is_one_clear_error(tmp_path, name, content) -> None:
    run = tmp_path / "run"
    leaves = PROJECTOR.abstract_params(CONFIGS[PROJECTOR])
    write_run(run, CONFIGS[PROJECTOR], zeros_like(leaves), steps=[5])
    (run / name).write_bytes(content)
    if content == LFS:
        expected = "is a pointer of Git LFS"
    else:
        expected = f"is not the {'config' if name == 'config.json' else 'prompt'} of a training run"
    with pytest.raises(ValueError, match=f"{name} {expected}"):
        open_stored(run)
    if name == "config.json":
        with pytest.raises(ValueError, match=f"{name} {expected}"):
            RunFolder(run).read_config()


def zeros_like(tree: dict) -> dict:
    return {
        name: zeros_like(x) if isinstance(x, dict) else np.zeros(x.shape, np.float32)
        for name, x in tree.items()
    }


def test_pointers_in_a_flax_folder_are_named(tmp_path) -> None:
    """Of all files, or only of the large ones, as the hub stores them."""
    flax = api.to_flax(make_projector(tmp_path / "hf"), tmp_path / "flax")
    files = [path for path in (flax / "params").rglob("*") if path.is_file()]
    assert len(files) > 4
    for damaged in (files, [path for path in files if path.parent.name == "d"]):
        copy = tmp_path / "copy"
        shutil.copytree(flax, copy)
        for path in damaged:
            (copy / path.relative_to(flax)).write_bytes(LFS)
        with pytest.raises(ValueError, match=r"copy/params/.* is a pointer of Git LFS"):
            read_params(copy)
        shutil.rmtree(copy)


def test_the_files_of_checkpoints_are_not_mistaken(tmp_path) -> None:
    api.to_flax(make_projector(tmp_path / "hf"), tmp_path / "flax")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert recognise_any(files) is None


def test_the_first_of_several_files_is_named(tmp_path) -> None:
    for name, content in {"a": b"fine", "b": LFS, "c": b""}.items():
        (tmp_path / name).write_bytes(content)
    paths = [Path(tmp_path / name) for name in "cab"]
    assert (recognise_any(paths) or "").startswith(f"{tmp_path / 'b'} is a pointer")
    assert recognise(tmp_path / "a") is None
    assert recognise_any([tmp_path / "missing", tmp_path]) is None
