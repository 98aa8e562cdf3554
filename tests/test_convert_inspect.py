"""`inspect` shows which model a checkpoint holds, and whether it converts."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from convert import api
from convert.__main__ import main
from convert.checkpoint import in_memory
from convert.torch_files import write_safetensors
from tests.checkpoints import write_weights
from tests.hf_models import tiny_llama, tiny_whisper
from tests.tiny import make_projector


@pytest.fixture
def projector(tmp_path) -> Path:
    """A random projector in an HF folder."""
    return make_projector(tmp_path / "projector")


@pytest.mark.parametrize("form", ["torch", "flax", "bare"])
def test_headers_are_listed(tmp_path, projector, capsys, form) -> None:
    path = projector
    if form == "flax":
        path = api.to_flax(projector, tmp_path / "flax", verify=False)
    elif form == "bare":
        path = shutil.copy(projector / "model.safetensors", tmp_path / "bare.safetensors")
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    bare = "projector: supported, but this one cannot be converted as it is"
    verdict = bare if form == "bare" else "asr_model (ASRModel): supported"
    assert out.splitlines()[0] == f"model   {verdict}"
    assert ("pass --rms-norm-eps" in out) == (form == "bare")
    assert ("encoder_dim = 5" in out) == (form != "bare")
    name = "input_proj/kernel" if form == "flax" else "projector.input_proj.weight"
    assert name in out
    assert "total   8 tensors, 298 parameters, 1,192 bytes" in out


GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (None, "unknown  names  of the 1 tensors fit no single model, supported: projector"),
        ({}, "unsupported  model_type  = None, supported: projector (asr_model), whisper encoder"),
        (GPT2, "unsupported  model_type  = 'gpt2', supported: projector"),
        ({"model_type": ["gpt2"], "architectures": 3}, "model_type  = ['gpt2'], supported: proj"),
    ],
)
def test_what_cannot_be_converted_is_shown_as_well(tmp_path, capsys, config, line) -> None:
    write_safetensors(tmp_path / "x.safetensors", in_memory({"w": np.zeros((3, 2), np.float16)}))
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 0
    out = capsys.readouterr().out
    name = "gpt2 (GPT2LMHeadModel)" if config == GPT2 else "['gpt2']" if config else "unknown"
    assert out.startswith(f"model   {name}: not supported\n")
    assert line in out
    assert "\nw  float16   [3, 2]\n" in out


@pytest.mark.torch
@pytest.mark.parametrize(
    ("is_whisper", "changes", "verdict", "problems"),
    [
        (True, {}, "whisper (WhisperModel): supported", []),
        (False, {}, "llama (LlamaForCausalLM): supported", []),
        (
            True,
            {"activation_function": "relu"},
            "whisper (WhisperModel): not supported",
            ["unsupported  activation_function  = 'relu', supported: 'gelu'"],
        ),
        (
            True,
            {"d_model": 13, "encoder_layers": 0},
            "whisper (WhisperModel): not supported",
            [
                "config.json: WhisperConfig.encoder_layers = 0: must be at least 1",
                "WhisperConfig.d_model = 13: must be a multiple of encoder_attention_heads = 3",
            ],
        ),
        (
            False,
            {"hidden_act": "gelu", "sliding_window": 128},
            "llama (LlamaForCausalLM): not supported",
            ["hidden_act      = 'gelu', supported: 'silu'", "sliding_window  = 128, supported: N"],
        ),
        (
            False,
            {"model_type": "qwen3", "architectures": None},
            "qwen3: supported, but this one cannot be converted as it is",
            ["missing  model.layers.0.self_attn.k_norm.weight  [6] -> layers/self_attn/k_norm/sca"],
        ),
    ],
)
def test_verdict_says_whether_an_architecture_is_supported(
    tmp_path, capsys, is_whisper, changes, verdict, problems
) -> None:
    model = tiny_whisper("WhisperModel") if is_whisper else tiny_llama(True)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"model   {verdict}"
    assert not [problem for problem in problems if problem not in out]


def test_it_says_what_to_flax_would_refuse(tmp_path, projector, capsys) -> None:
    config = json.loads((projector / "config.json").read_text())
    (projector / "config.json").write_text(json.dumps(config | {"projector_pool_stride": 4}))
    shape = "shape  projector.input_proj.weight  got [7, 15], expected [7, 20]"
    write_weights(tmp_path / "whisper", {"conv1.weight": np.ones((6, 5, 3), np.float32)})
    absent = "a whisper encoder cannot be converted without its config.json, put it there"
    for path, name, text in (
        (projector, "asr_model (ASRModel)", shape),
        (tmp_path / "whisper", "whisper encoder", absent),
    ):
        assert main(["inspect", str(path)]) == 0
        first, *others = capsys.readouterr().out.splitlines()
        assert first == f"model   {name}: supported, but this one cannot be converted as it is"
        assert any(text in line for line in others)
        with pytest.raises(ValueError, match=re.escape(text)):
            api.to_flax(path, tmp_path / "x")
