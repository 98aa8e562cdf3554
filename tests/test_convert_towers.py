"""Whisper encoders and Llama models of Hugging Face come back, and compute the same in Flax."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from convert import api
from convert.flax_files import open_flax
from convert.models import LLAMA, WHISPER_ENCODER
from convert.torch_files import open_torch
from flax_projector.models.llama import LlamaDecoder
from flax_projector.models.whisper import WhisperEncoder
from tests.checkpoints import assert_same_tensors, is_same_file
from tests.hf_models import tiny_llama, tiny_whisper
from tests.tiny import read_params

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shard_size", ["1KB", "1GB"])
def test_llama_comes_back_and_hugging_face_takes_it(tmp_path, dtype, is_tied, shard_size) -> None:
    model = tiny_llama(is_tied).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "hf", max_shard_size=shard_size)
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) == (shard_size == "1KB")

    api.to_flax(tmp_path / "hf", tmp_path / "flax")
    api.to_torch(tmp_path / "flax", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", tmp_path / "hf")
    assert ("lm_head/kernel" in open_flax(tmp_path / "flax").infos) == (not is_tied)

    result: Any = LlamaForCausalLM.from_pretrained(
        tmp_path / "back", dtype="auto", output_loading_info=True
    )
    loaded, report = result
    assert not any(report.values())
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("form", ["WhisperModel", "WhisperForConditionalGeneration", "encoder"])
def test_whisper_encoder_comes_back(tmp_path, form, caplog) -> None:
    model = tiny_whisper(form)
    model.save_pretrained(tmp_path / "hf")
    with caplog.at_level("INFO", logger="convert"):
        api.to_flax(tmp_path / "hf", tmp_path / "flax")
    api.to_torch(tmp_path / "flax", tmp_path / "back")
    left_out = "decoder.*: the decoder is not used: the LLM takes its place"
    assert (left_out in caplog.text) == (form != "encoder")

    before, after = open_torch(tmp_path / "hf"), open_torch(tmp_path / "back")
    prefix = {"WhisperModel": "encoder.", "encoder": ""}.get(form, "model.encoder.")
    encoder = {key for key in before.infos if key.startswith(prefix) and "decoder" not in key}
    assert {f"model.encoder.{key.removeprefix(prefix)}" for key in encoder} == set(after.infos)
    for key in encoder:
        back = after.read(f"model.encoder.{key.removeprefix(prefix)}")
        assert back.tobytes() == before.read(key).tobytes(), key
    assert is_same_file(tmp_path / "hf/config.json", tmp_path / "back/config.json")


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_converted_llama_computes_the_same(tmp_path, is_tied) -> None:
    """The round trip cannot see two rows exchanged; the forward pass can."""
    model = tiny_llama(is_tied)
    model.save_pretrained(tmp_path / "hf")
    params = read_params(api.to_flax(tmp_path / "hf", tmp_path / "flax", verify=False))
    tokens = np.arange(14).reshape(2, 7) * 5 % 31
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    with jax.default_matmul_precision("highest"):
        decoder = LlamaDecoder(LLAMA.read_config(tmp_path / "flax"))
        logits = decoder.apply({"params": params}, jnp.asarray(tokens))
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=1e-4, atol=1e-4)


def test_converted_whisper_encoder_computes_the_same(tmp_path) -> None:
    model = tiny_whisper("encoder")
    model.save_pretrained(tmp_path / "hf")
    params = read_params(api.to_flax(tmp_path / "hf", tmp_path / "flax", verify=False))
    mel = np.random.default_rng(0).normal(size=(2, 5, 38)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.tensor(mel)).last_hidden_state.numpy()
    with jax.default_matmul_precision("highest"):
        encoder = WhisperEncoder(WHISPER_ENCODER.read_config(tmp_path / "flax"))
        frames = encoder.apply({"params": params}, jnp.asarray(mel))
    np.testing.assert_allclose(np.asarray(frames), expected, rtol=1e-4, atol=1e-4)
