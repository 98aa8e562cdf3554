"""`verify` sees whatever makes two checkpoints different models, and nothing else."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from convert import api, compare
from convert.__main__ import main
from convert.models import LLAMA
from convert.torch_files import open_torch
from flax_projector.config import LlamaConfig
from tests.checkpoints import change_tensor, write_weights
from tests.tiny import make_projector, read_all, torch_infos

pytestmark = pytest.mark.torch


@pytest.fixture
def hf(tmp_path) -> Path:
    """A random projector in an HF folder."""
    return make_projector(tmp_path / "hf")


@pytest.fixture
def flax(tmp_path, hf) -> Path:
    """The same in Flax."""
    return api.to_flax(hf, tmp_path / "flax")


def test_both_sides_of_a_conversion_are_the_same_model(hf, flax, capsys) -> None:
    for a, b in ((hf, flax), (flax, hf), (flax, flax), (hf, hf)):
        assert main(["verify", str(a), str(b)]) == 0
        out = capsys.readouterr().out
        names = [line.split()[0] for line in out.splitlines() if "same bytes" in line]
        assert len(names) == 8 and names == sorted(names)
        assert out.endswith("\nthe same model, bit for bit\n")
    error = api.verify(hf, flax).output_error
    assert error is not None and 0 < error < 1e-5


def test_one_changed_element_is_found(hf, flax, capsys) -> None:
    key = "projector.layers.0.fc2.weight"
    before = open_torch(hf).read(key)[4, 2]
    change_tensor(hf, key, (4, 2), np.nextafter(before, 9, dtype=np.float32))
    assert main(["verify", str(hf), str(flax)]) == 1
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if "DIFFERS" in line] == [
        "layers.0.fc2.weight"
    ]
    assert out.endswith("\nNOT the same model: 1 tensors differ\n")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_differ(hf, flax, value) -> None:
    change_tensor(hf, "projector.input_proj.bias", (3,), value)
    result = api.verify(hf, flax)
    assert not result.is_same
    (pair,) = [pair for pair in result.tensors if not pair.is_same]
    assert not np.isfinite(pair.max_abs_error or 0)


@pytest.mark.parametrize(
    "changed",
    [
        lambda x: np.zeros_like(x),
        lambda x: np.full_like(x, np.nan),
        lambda x: np.where(np.arange(x.size).reshape(x.shape) == 2, np.inf, x),
    ],
    ids=["zero", "NaN", "one infinity"],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_whatever_the_values_a_model_is_the_same_as_itself(tmp_path, hf, changed) -> None:
    """The last norm's weight scales every output."""
    key = "projector.layer_norms.0.weight"
    tensors = read_all(open_torch(hf))
    write_weights(hf, tensors | {key: changed(tensors[key])})
    assert api.verify(hf, api.to_flax(hf, tmp_path / "x")).is_same


def test_outputs_that_are_no_numbers_on_one_side_differ(hf, flax, monkeypatch) -> None:
    run = compare._run_flax
    monkeypatch.setattr(compare, "_run_flax", lambda *args: run(*args) * np.float32("nan"))
    assert api.verify(hf, flax).output_error == np.inf


def test_another_dtype_is_another_checkpoint(tmp_path, hf, flax, capsys) -> None:
    half = api.to_torch(flax, tmp_path / "half", dtype="bfloat16")
    assert main(["verify", str(hf), str(half)]) == 1
    assert "float32[7] against bfloat16[7]" in capsys.readouterr().out


def test_missing_and_new_tensors_are_named(tmp_path, hf, flax, capsys) -> None:
    tensors = read_all(open_torch(hf))
    del tensors["projector.ln_input.weight"]
    tensors["projector.gate.bias"] = np.ones(3, np.float32)
    write_weights(hf, tensors)
    assert main(["verify", str(hf), str(flax)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "ln_input.weight only in B DIFFERS" in out
    assert "gate.bias only in A DIFFERS" in out
    assert "outputs" not in out


@pytest.mark.parametrize(
    ("field", "value", "other"),
    [("rms_norm_eps", 1e-6, 1e-2), ("projector_pool_stride", 3, 5), ("encoder_dim", 5, 3)],
)
def test_another_config_is_another_model(tmp_path, hf, field, value, other, capsys) -> None:
    folder = shutil.copytree(hf, tmp_path / "other")
    config = json.loads((hf / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: other}))
    assert main(["verify", str(hf), str(folder)]) == 1
    assert f"config: {field} is {value!r} in A, {other!r} in B\n" in capsys.readouterr().out


def test_what_only_training_reads_makes_no_difference(tmp_path, hf) -> None:
    other = shutil.copytree(hf, tmp_path / "other")
    config = json.loads((hf / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"projector_dropout": 0.5}))
    assert api.verify(hf, other).is_same


def test_one_config_serves_both(tmp_path, hf, flax) -> None:
    bare = shutil.copy(hf / "model.safetensors", tmp_path / "bare.safetensors")
    assert api.verify(bare, flax).is_same
    with pytest.raises(ValueError, match=r"bare.safetensors has no config.json: .* \(3 problems\)"):
        api.verify(bare, bare)
    given = {"encoder_dim": 5, "rms_norm_eps": 1e-6, "projector_dropout": 0.0}
    assert api.verify(bare, bare, given=given).is_same


def test_outputs_are_compared_and_not_only_bytes(hf, flax, monkeypatch) -> None:
    run = compare._run_flax
    monkeypatch.setattr(compare, "_run_flax", lambda *args: run(*args) + 1e-4)
    result = api.verify(hf, flax)
    assert all(pair.is_same for pair in result.tensors)
    assert not result.is_same


def test_a_step_is_of_the_side_that_has_steps(tmp_path, hf, flax) -> None:
    shutil.copytree(hf, tmp_path / "out/checkpoint-5")
    make_projector(tmp_path / "out/checkpoint-6", seed=6)
    for a, b in (("out", flax), (flax, "out"), ("out", "out")):
        assert api.verify(tmp_path / a, tmp_path / b, step=5).is_same
    assert not api.verify(tmp_path / "out", flax).is_same  # the latest
    with pytest.raises(ValueError, match=r"out has no checkpoint of step 7, only of 5, 6"):
        api.verify(flax, tmp_path / "out", step=7)
    with pytest.raises(ValueError, match=r"no step 5: neither .*hf nor .*flax is a folder of"):
        api.verify(hf, flax, step=5)


def test_copy_of_a_tied_tensor_is_no_difference_and_towers_are_not_run(tmp_path, caplog) -> None:
    config = LlamaConfig(13, 10, 7, 2, 4, 2, head_dim=6, tie_word_embeddings=True)
    rng = np.random.default_rng(0)
    infos = torch_infos(LLAMA, config)
    tensors = {key: rng.normal(size=info.shape).astype(info.dtype) for key, info in infos.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_weights(tmp_path / "llm", tensors)
    data = {"model_type": "llama", **dataclasses.asdict(config)}
    (tmp_path / "llm/config.json").write_text(json.dumps(data))
    flax = api.to_flax(tmp_path / "llm", tmp_path / "llm-flax")
    with caplog.at_level("INFO", logger="convert"):
        result = api.verify(tmp_path / "llm", flax)
    assert "left out lm_head.weight, a copy of model.embed_tokens.weight" in caplog.text
    assert (result.is_same, result.output_error) == (True, None)


def test_an_error_is_no_difference(tmp_path, flax, capsys) -> None:
    assert main(["verify", str(tmp_path / "nowhere"), str(flax)]) == 2
    assert capsys.readouterr().out == ""


def test_models_of_two_kinds_cannot_be_compared(tmp_path, hf) -> None:
    other = shutil.copytree(hf, tmp_path / "other")
    (other / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"hf is a projector, but .*other is a llama"):
        api.verify(hf, other)
