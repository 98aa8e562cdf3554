"""No number and no text in a file makes the converter run for long, or out of memory."""

import json
from pathlib import Path

import numpy as np
import pytest

from convert import api
from convert.checkpoint import TensorInfo
from convert.errors import ConversionError, Problem
from convert.hf_config import parse_llama
from convert.models import LLAMA, PROJECTOR, WHISPER_ENCODER
from convert.torch_files import open_torch
from flax_projector.config import LlamaConfig
from tests.checkpoints import CONFIGS, random_bits, write_weights
from tests.tiny import make_projector, torch_infos

LLAMA_JSON = {
    "model_type": "llama",
    "vocab_size": 13,
    "hidden_size": 10,
    "intermediate_size": 7,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-6,
}
WHISPER_JSON = {
    "model_type": "whisper",
    "num_mel_bins": 5,
    "d_model": 6,
    "encoder_layers": 3,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 11,
    "max_source_positions": 13,
}
HUGE = [0, -1, -3, 10**5, 2**31, 2**33, 10**9, 10**400, 1e308, float("inf"), float("nan")]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """HF folders of a projector, an encoder and a decoder, whose configs may be changed."""
    folder = tmp_path_factory.mktemp("models")
    configs = {
        "llama": (LLAMA, LlamaConfig(13, 10, 7, 3, 4, 2, head_dim=6), LLAMA_JSON),
        "whisper": (WHISPER_ENCODER, CONFIGS[WHISPER_ENCODER], WHISPER_JSON),
    }
    for name, (kind, config, data) in configs.items():
        write_weights(folder / name, random_bits(torch_infos(kind, config)))
        (folder / name / "config.json").write_text(json.dumps(data))
    make_projector(folder / "projector")
    return {name: folder / name for name in ("llama", "whisper", "projector")}


FIELDS = [
    *(("llama", name) for name in LLAMA_JSON if name != "model_type"),
    *(("whisper", name) for name in WHISPER_JSON if name != "model_type"),
    *(
        ("projector", name)
        for name in ("encoder_dim", "llm_dim", "projector_pool_stride", "projector_num_layers")
    ),
]


@pytest.mark.parametrize(("model", "name"), FIELDS)
@pytest.mark.parametrize("family", ["llama", "smollm3"])
def test_a_number_that_no_model_has_is_one_clear_error(models, tmp_path, model, name, family):
    if model != "llama" and family == "smollm3":
        return
    file = models[model] / "config.json"
    original = file.read_text()
    change = {} if model != "llama" else {"model_type": family}
    try:
        for value in HUGE:
            if name == "rms_norm_eps" and 0 < value <= 2**33:
                continue  # a poor choice, but possible
            file.write_text(json.dumps({**json.loads(original), **change, name: value}))
            with pytest.raises(ValueError, match=r"\w") as caught:
                api.to_flax(models[model], tmp_path / "x")
            assert len(str(caught.value)) < 20_000, (name, value)
            assert not (tmp_path / "x").exists()
    finally:
        file.write_text(original)


def test_both_what_was_found_and_what_was_expected_are_named() -> None:
    with pytest.raises(ConversionError, match=r"num_hidden_layers  = 1000000000, expected at most"):
        parse_llama({**LLAMA_JSON, "num_hidden_layers": 10**9})
    with pytest.raises(
        ConversionError, match=r"vocab_size  = 100000000000\.\.\. \(401 digits\), exp"
    ):
        parse_llama({**LLAMA_JSON, "vocab_size": 10**400})


def test_sizes_are_compared_with_the_tensors_before_the_model_is_laid_out(models) -> None:
    summary = api.inspect(models["projector"])
    assert summary.problem is None
    file = models["projector"] / "config.json"
    original = file.read_text()
    file.write_text(json.dumps({**json.loads(original), "projector_num_layers": 9000}))
    message = r"size  projector_num_layers  = 9000, but nothing in the checkpoint is above 8"
    with pytest.raises(ConversionError, match=message):
        api.to_flax(models["projector"], models["projector"].parent / "x")
    file.write_text(original)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("bracket", ["[", '{"a":'])
def test_a_file_of_brackets_is_one_clear_error(tmp_path, name, bracket) -> None:
    folder = make_projector(tmp_path / "hf")
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(bracket * 100_000)
    with pytest.raises(ValueError, match=rf"{name} is not .*nested too deeply"):
        api.to_flax(folder, tmp_path / "x")


def test_a_layer_of_a_huge_number_is_one_clear_error(tmp_path) -> None:
    folder = make_projector(tmp_path / "hf")
    tensors = {key: open_torch(folder).read(key).copy() for key in open_torch(folder).infos}
    key = f"projector.layers.{10**12}.fc1.bias"
    write_weights(folder, tensors | {key: np.ones(11, np.float32)})
    with pytest.raises(ConversionError, match=r"gap  *projector.layers"):
        api.to_flax(folder, tmp_path / "x")


def test_messages_are_capped() -> None:
    problems = [Problem("missing", f"layers.{i}", "x" * 9999) for i in range(20_000)]
    error = ConversionError("title", problems)
    assert len(error.problems) == 20_000
    lines = str(error).splitlines()
    assert (lines[0], lines[-1]) == ("title (20000 problems)", "  and 19900 more")
    assert len(str(error)) < 60_000


def test_the_sizes_of_a_checkpoint_that_fits_pass() -> None:
    """Whatever the model: leaves of Flax, and tensors of torch."""
    from convert.bounds import check_sizes

    for kind, config in CONFIGS.items():
        leaves = {p: TensorInfo(x.shape, x.dtype) for p, x in kind.leaves(config).items()}
        check_sizes(config, leaves, "x")
        check_sizes(config, torch_infos(kind, config), "x")
    assert PROJECTOR in CONFIGS
