"""`verify` on models that do not fit their config, or only without some tensors."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert import api
from convert.__main__ import main
from convert.checkpoint import in_memory
from convert.models import LLAMA, WHISPER_ENCODER
from convert.torch_files import open_torch
from convert.torch_save import write_torch
from tests.checkpoints import CONFIGS, random_bits, write_weights
from tests.tiny import make_projector, read_all, torch_infos

pytestmark = pytest.mark.torch

Tensors = dict[str, np.ndarray]


@pytest.fixture
def hf(tmp_path) -> Path:
    """A random projector in an HF folder."""
    return make_projector(tmp_path / "hf")


def changed(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """The folder with other tensors, in a file of torch.save, which has all dtypes."""
    tensors = {key: tensor.copy() for key, tensor in read_all(open_torch(folder)).items()}
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        file.unlink()
    write_torch(folder / "pytorch_model.bin", in_memory(change(tensors)))
    return folder


def without(*keys: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: x for k, x in tensors.items() if k not in keys}


NORM, BIAS = "projector.ln_input.weight", "projector.input_proj.bias"
ONES = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(NORM), r"missing  ln_input.weight  \[7\]"),
        (without(NORM, BIAS), r"\(2 problems\)"),
        (lambda tensors: {}, "fit no single model|has no tensor of this model"),
        (lambda tensors: tensors | {"projector.gate.bias": ONES}, "unexpected  gate.bias"),
        (lambda tensors: tensors | {NORM: ONES}, r"shape  ln_input.weight  got \[3\], expected"),
        (
            lambda tensors: tensors | {NORM: np.ones(7, np.complex64)},
            r"dtype  ln_input.weight  complex64 is not one of",
        ),
        (lambda tensors: tensors | {NORM: np.ones(7, np.int8)}, r"int8 is not one of"),
    ],
)
def test_two_models_that_do_not_fit_their_config_are_not_the_same(
    tmp_path, hf, change, message, capsys
) -> None:
    changed(hf, change)
    copy = shutil.copytree(hf, tmp_path / "copy")
    for other in (hf, copy):
        with pytest.raises(ValueError, match=message):
            api.verify(hf, other)
        assert main(["verify", str(hf), str(other)]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", [WHISPER_ENCODER, LLAMA], ids=lambda kind: kind.name)
def test_towers_that_lack_a_tensor_are_not_the_same(tmp_path, kind) -> None:
    config = dataclasses.replace(
        CONFIGS[kind],
        **({"qkv_bias": False, "o_bias": False, "qk_norm": False} if kind is LLAMA else {}),
    )
    tensors = random_bits(torch_infos(kind, config))
    folder = write_weights(tmp_path / "x", tensors)
    data = {"model_type": kind.model_types[0], **dataclasses.asdict(config)}
    (folder / "config.json").write_text(json.dumps(data))
    assert api.verify(folder, folder).is_same
    changed(folder, without(min(tensors)))
    with pytest.raises(ValueError, match=r"missing  "):
        api.verify(folder, folder)


def test_if_one_fits_the_differences_are_shown(tmp_path, hf, capsys) -> None:
    copy = shutil.copytree(hf, tmp_path / "copy")
    changed(copy, without(NORM))
    for a, b, where in ((hf, copy, "A"), (copy, hf, "B")):
        assert main(["verify", str(a), str(b)]) == 1
        out = " ".join(capsys.readouterr().out.split())
        assert f"ln_input.weight only in {where} DIFFERS" in out


@pytest.mark.parametrize("dtype", [np.float64, ml_dtypes.bfloat16])
def test_dtypes_that_need_a_cast_are_compared(hf, dtype) -> None:
    changed(hf, lambda tensors: {k: x.astype(dtype) for k, x in tensors.items()})
    assert api.verify(hf, hf).is_same


def test_an_odd_dtype_on_one_side_is_a_difference(tmp_path, hf, recwarn) -> None:
    copy = shutil.copytree(hf, tmp_path / "copy")
    changed(copy, lambda tensors: tensors | {NORM: (1 + 2j) * tensors[NORM]})
    (pair,) = [pair for pair in api.verify(hf, copy).tensors if not pair.is_same]
    norm = read_all(open_torch(hf))[NORM].astype(np.float64)
    assert pair.max_abs_error == pytest.approx(np.abs(2 * norm).max())
    assert not [warning for warning in recwarn if "Complex" in str(warning.message)]


def test_what_was_converted_with_ignore_verifies_with_ignore(tmp_path, hf, capsys, caplog) -> None:
    extra = {f"projector.gate.{name}": ONES for name in ("weight", "bias")}
    changed(hf, lambda tensors: tensors | extra)
    flax, ignore = str(tmp_path / "flax"), ["--ignore", "*.gate.*"]
    assert main(["to-flax", str(hf), flax, *ignore]) == 0
    assert main(["verify", str(hf), flax]) == 1
    assert "gate.bias" in capsys.readouterr().out
    for a, b in ((str(hf), flax), (flax, str(hf)), (str(hf), str(hf))):
        with caplog.at_level("INFO", logger="convert"):
            assert main(["verify", a, b, *ignore]) == 0
        assert "gate" not in capsys.readouterr().out
        assert (
            "left out by --ignore *.gate.*: projector.gate.bias, projector.gate.weight"
            in caplog.text
        )
    one = shutil.copytree(hf, tmp_path / "one")  # the other has only one of them
    changed(one, without("projector.gate.bias"))
    assert main(["verify", str(hf), str(one), *ignore]) == 0


@pytest.mark.parametrize(
    ("pattern", "code"),
    [("*.nothing", 2), ("*/kernel", 2), ("*.fc1.bias", 1), ("*", 1)],
)
def test_ignore_means_what_it_means_in_conversions(tmp_path, hf, pattern, code) -> None:
    """It must match something, never a leaf of Flax, and what is ignored is missing."""
    flax = api.to_flax(hf, tmp_path / "flax")
    assert main(["verify", str(hf), str(flax), "--ignore", pattern]) == code
    assert main(["verify", str(flax), str(flax), "--ignore", pattern]) == 2
