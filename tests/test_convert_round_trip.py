"""A checkpoint that is converted and converted back is the same, byte for byte."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert import api, round_trip
from convert.checkpoint import DTYPES, in_memory
from convert.flax_files import fill_flax, open_flax
from convert.models import PROJECTOR
from convert.torch_files import open_torch
from tests.checkpoints import UPSTREAM, assert_same_tensors, is_same_file, write_weights
from tests.tiny import make_projector, read_all


@pytest.fixture
def projector(tmp_path) -> Path:
    """A random projector in an HF folder, whose config.json is formatted in an odd way."""
    folder = make_projector(tmp_path / "projector")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, separators=(" ,", ":  ")))
    return folder


@pytest.fixture
def flax(tmp_path, projector) -> Path:
    """The same projector as a Flax folder."""
    return api.to_flax(projector, tmp_path / "flax")


def test_tiny_audio_s_checkpoint_comes_back_as_the_same_files(tmp_path) -> None:
    api.to_flax(UPSTREAM, tmp_path / "flax")
    api.to_torch(tmp_path / "flax", tmp_path / "hf")
    assert is_same_file(UPSTREAM / "model.safetensors", tmp_path / "hf/model.safetensors")
    assert is_same_file(UPSTREAM / "config.json", tmp_path / "hf/config.json")


@pytest.mark.torch
def test_pytorch_projector_computes_what_tiny_audio_computes() -> None:
    import torch

    from convert.torch_projector import ResidualAudioProjector

    config = PROJECTOR.read_config(UPSTREAM)
    module = ResidualAudioProjector.from_tensors(config, open_torch(UPSTREAM))
    with np.load(UPSTREAM / "io.npz") as io, torch.no_grad():
        assert io["x"].shape[1] % config.projector_pool_stride  # the tail is padded
        y = module(torch.tensor(io["x"]))
        np.testing.assert_allclose(y.numpy(), io["y"], rtol=1e-5, atol=1e-5)


def test_projector_comes_back_as_the_same_files(tmp_path, projector, flax) -> None:
    api.to_torch(flax, tmp_path / "hf")
    assert is_same_file(projector / "model.safetensors", tmp_path / "hf/model.safetensors")
    assert is_same_file(projector / "config.json", tmp_path / "hf/config.json")


def test_single_file_is_written_and_read_with_its_prefix(tmp_path, projector) -> None:
    api.to_flax(projector / "model.safetensors", tmp_path / "flax")
    api.to_torch(tmp_path / "flax", tmp_path / "bare.safetensors")
    assert is_same_file(projector / "model.safetensors", tmp_path / "bare.safetensors")


@pytest.mark.torch
def test_pt_file_converts_like_safetensors(tmp_path, projector) -> None:
    import torch

    checkpoint = open_torch(projector)
    state = {k.removeprefix("projector."): checkpoint.read(k) for k in checkpoint.infos}
    torch.save({k: torch.tensor(v) for k, v in state.items()}, projector / "best.pt")
    api.to_flax(projector / "best.pt", tmp_path / "flax")
    api.to_torch(tmp_path / "flax", tmp_path / "hf")
    assert_same_tensors(tmp_path / "hf", projector)


@pytest.mark.torch
def test_pt_file_is_the_same_whenever_it_is_written(tmp_path, flax) -> None:
    first = api.to_torch(flax, tmp_path / "a.pt").read_bytes()
    assert api.to_torch(flax, tmp_path / "b.pt").read_bytes() == first


@pytest.mark.torch
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("prefix", [None, ""])
def test_torch_file_is_written_for_torch(tmp_path, projector, suffix, prefix) -> None:
    import torch

    api.to_flax(projector, tmp_path / "half", dtype="bfloat16", verify=False)
    file = api.to_torch(tmp_path / "half", tmp_path / f"x{suffix}", prefix=prefix)
    state = torch.load(file, weights_only=True)
    tensors = read_all(open_torch(projector))
    expected = {key: torch.tensor(x).bfloat16() for key, x in tensors.items()}
    assert list(state) == sorted(state)
    assert len(state) == len(expected)
    for key, tensor in state.items():
        full = key if prefix is None else f"projector.{key}"
        assert torch.equal(tensor, expected[full]), key


def test_unknown_prefix_is_an_error(tmp_path, flax) -> None:
    with pytest.raises(ValueError, match=r"prefix 'proj' of a projector is not one of 'projector."):
        api.to_torch(flax, tmp_path / "x.safetensors", prefix="proj")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_casts_and_logs_it_and_updates_the_config(tmp_path, projector, dtype, caplog) -> None:
    with caplog.at_level("INFO", logger="convert"):
        api.to_flax(projector, tmp_path / "flax", dtype=dtype)
    assert f"casting float32 to {dtype}: not bit for bit" in caplog.text
    assert {info.dtype for info in open_flax(tmp_path / "flax").infos.values()} == {DTYPES[dtype]}
    assert json.loads((tmp_path / "flax/config.json").read_text())["model_dtype"] == dtype

    api.to_torch(tmp_path / "flax", tmp_path / "hf", dtype="float32")
    key = "projector.layers.0.fc1.weight"
    expected = open_torch(projector).read(key).astype(DTYPES[dtype]).astype(np.float32)
    np.testing.assert_array_equal(open_torch(tmp_path / "hf").read(key), expected)


def test_dtype_that_the_tensors_have_already_changes_nothing(tmp_path, projector, caplog) -> None:
    with caplog.at_level("INFO", logger="convert"):
        api.to_flax(projector, tmp_path / "flax", dtype="float32")
    assert "casting" not in caplog.text
    api.to_torch(tmp_path / "flax", tmp_path / "hf")
    assert is_same_file(projector / "model.safetensors", tmp_path / "hf/model.safetensors")


def test_cast_that_overflows_is_an_error(tmp_path, projector) -> None:
    tensors = read_all(open_torch(projector))
    bias = np.array([1, -1e5, np.inf, 0, 0, 0, 0], np.float32)
    write_weights(projector, tensors | {"projector.input_proj.bias": bias})
    message = r"input_proj.bias holds -100000, but the largest float16 is 65504"
    with pytest.raises(ValueError, match=message):
        api.to_flax(projector, tmp_path / "flax", dtype="float16")
    assert not (tmp_path / "flax").exists()
    api.to_flax(projector, tmp_path / "flax", dtype="bfloat16")


def test_verification_reads_what_was_written(tmp_path, projector, monkeypatch) -> None:
    """A writer that drops bits is detected, and nothing is left behind."""

    def lossy(folder, leaves, text) -> None:
        arrays = read_all(leaves)
        arrays["ln_input/scale"] = arrays["ln_input/scale"].astype(ml_dtypes.bfloat16)
        arrays["input_proj/bias"] = arrays["input_proj/bias"] + np.eye(7, dtype=np.float32)[3]
        fill_flax(folder, in_memory(arrays), text)

    monkeypatch.setattr(api, "fill_flax", lossy)
    with pytest.raises(ValueError, match="the round trip changed the checkpoint") as caught:
        api.to_flax(projector, tmp_path / "flax")
    assert "bytes   projector.input_proj.bias" in str(caught.value)
    assert "header  projector.ln_input.weight  float32[7] -> bfloat16[7]" in str(caught.value)
    assert not (tmp_path / "flax").exists()
    api.to_flax(projector, tmp_path / "flax", verify=False)
    assert (tmp_path / "flax").exists()


ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)
NAN = np.array([0x7FC00001, 0x7FC00002], np.uint32).view(np.float32)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (ROWS, np.asfortranarray(ROWS), True),
        (ROWS, ROWS.view(np.int32), False),  # the same bytes
        (ROWS[0].astype(ml_dtypes.bfloat16), ROWS[0].astype(np.float16), False),
        (np.zeros(3, ml_dtypes.bfloat16), np.zeros(3, np.float16), False),
        (np.zeros(4, bool), np.zeros(4, np.uint8), False),
        (np.zeros(9, bool), np.zeros(9, bool), True),  # compared byte by byte
        (np.zeros(9, bool), np.arange(9) == 8, False),
        (ROWS, ROWS.reshape(3, 4), False),
        (ROWS, ROWS[:3], False),
        (ROWS, np.where(ROWS == 11, 0, ROWS), False),  # in the last row
        (ROWS[0], ROWS[0].copy(), True),
        (np.zeros(3), -np.zeros(3), False),
        (NAN, NAN.copy(), True),
        (NAN, NAN[::-1], False),  # with other payloads
        (np.float32(3), np.float32(3), True),
        (np.float32(0), np.float32(-0.0), False),
        (np.zeros((0, 3)), np.zeros((0, 3)), True),
        (np.zeros((0, 3)), np.zeros((3, 0)), False),
        (np.zeros((0, 3)), np.zeros((0, 3), np.int64), False),
    ],
)
@pytest.mark.parametrize("block_bytes", [1, 24, 1 << 20])
def test_same_means_dtype_shape_and_every_byte(monkeypatch, block_bytes, a, b, expected) -> None:
    """In blocks of one row, of two, and of all."""
    monkeypatch.setattr(round_trip, "_BLOCK_BYTES", block_bytes)
    a, b = np.asarray(a), np.asarray(b)
    assert round_trip.is_same(a, b) == round_trip.is_same(b, a) == expected


def test_a_round_trip_names_every_tensor_that_changed() -> None:
    before = {"gone": ROWS, "cast": ROWS, "reshaped": ROWS, "changed": ROWS, "kept": ROWS}
    after = {
        "new": ROWS,
        "cast": ROWS.astype(np.float16),
        "reshaped": ROWS.T,
        "changed": ROWS + 1,
        "kept": ROWS.copy(),
    }
    with pytest.raises(ValueError, match="the round trip changed the checkpoint") as caught:
        round_trip.check_round_trip(in_memory(before), in_memory(after))
    assert [" ".join(line.split()) for line in str(caught.value).splitlines()[1:]] == [
        "bytes changed came back with other values",
        "header cast float32[4, 3] -> float16[4, 3]",
        "header reshaped float32[4, 3] -> float32[3, 4]",
        "missing gone did not come back",
        "new new was not there before",
    ]
    round_trip.check_round_trip(in_memory(before), in_memory(dict(before)))
