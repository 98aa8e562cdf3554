"""Published models, built on torch's meta device: their configs are read, their tensors placed."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SmolLM3ForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from convert import engine
from convert.checkpoint import TensorInfo
from convert.models import LLAMA, WHISPER_ENCODER

pytestmark = pytest.mark.torch


def whisper(d_model: int, layers: int, **others: Any) -> dict[str, Any]:
    return {
        "d_model": d_model,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": d_model // 64,
        "decoder_attention_heads": d_model // 64,
        "encoder_ffn_dim": 4 * d_model,
        "decoder_ffn_dim": 4 * d_model,
        **others,
    }


def llm(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, **others: Any) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **others,
    }


def llama3(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


SMOLLM2 = {"vocab_size": 49_152, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
LLAMA3 = {"vocab_size": 128_256, "rms_norm_eps": 1e-5, "head_dim": 64}
QWEN = {"vocab_size": 151_936, "tie_word_embeddings": True, "rope_parameters": rope(1e6)}

# The number of parameters is the published one: it guards the values typed here.
WHISPERS = {
    "tiny": (37_760_640, whisper(384, 4)),
    "tiny.en": (37_760_256, whisper(384, 4, vocab_size=51_864)),
    "base": (72_593_920, whisper(512, 6)),
    "small": (241_734_912, whisper(768, 12)),
    "medium": (763_857_920, whisper(1024, 24)),
    "large-v2": (1_543_304_960, whisper(1280, 32)),
    "large-v3": (1_543_490_560, whisper(1280, 32, num_mel_bins=128, vocab_size=51_866)),
    "large-v3-turbo": (
        808_878_080,
        whisper(1280, 32, num_mel_bins=128, vocab_size=51_866, decoder_layers=4),
    ),
}
LLMS = {
    "SmolLM2-135M": (
        LlamaForCausalLM,
        134_515_008,
        llm(576, 1536, 30, 9, 3, rope_parameters=rope(1e5), **SMOLLM2),
    ),
    "SmolLM2-360M": (
        LlamaForCausalLM,
        361_821_120,
        llm(960, 2560, 32, 15, 5, rope_parameters=rope(1e5), **SMOLLM2),
    ),
    "SmolLM2-1.7B": (
        LlamaForCausalLM,
        1_711_376_384,
        llm(2048, 8192, 24, 32, 32, rope_parameters=rope(130_000.0), **SMOLLM2),
    ),
    "SmolLM3-3B": (
        SmolLM3ForCausalLM,
        3_075_098_624,
        llm(2048, 11_008, 36, 16, 4, vocab_size=128_256, rope_parameters=rope(5e6)),
    ),
    "Llama-3.2-1B": (
        LlamaForCausalLM,
        1_235_814_400,
        llm(
            *(2048, 8192, 16, 32, 8),
            **LLAMA3,
            rope_parameters=llama3(32.0),
            tie_word_embeddings=True,
        ),
    ),
    "Llama-3.1-8B": (
        LlamaForCausalLM,
        8_030_261_248,
        llm(4096, 14_336, 32, 32, 8, rope_parameters=llama3(8.0), **{**LLAMA3, "head_dim": 128}),
    ),
    "TinyLlama-1.1B": (
        LlamaForCausalLM,
        1_100_048_384,
        llm(2048, 5632, 22, 32, 4, rms_norm_eps=1e-5, rope_parameters=rope(1e4)),
    ),
    "Qwen2.5-0.5B": (Qwen2ForCausalLM, 494_032_768, llm(896, 4864, 24, 14, 2, **QWEN)),
    "Qwen3-0.6B": (
        Qwen3ForCausalLM,
        596_049_920,
        llm(1024, 3072, 28, 16, 8, head_dim=128, **QWEN),
    ),
}


def published(name: str) -> Any:
    """Our config of a published model."""
    if name in WHISPERS:
        data = WhisperConfig(**WHISPERS[name][1]).to_dict()
        return WHISPER_ENCODER.parse_config(data, name)
    model_class, _, values = LLMS[name]
    return LLAMA.parse_config(model_class.config_class(**values).to_dict(), name)


def build(model_class: Any, num_parameters: int, values: dict[str, Any]) -> Any:
    """The model without memory for its weights."""
    with torch.device("meta"):
        model = model_class(model_class.config_class(**values))
    assert model.num_parameters() == num_parameters
    return model


def convert_there_and_back(kind: Any, model: Any) -> tuple[Any, dict[str, tuple[int, ...]], int]:
    """Our config, the torch tensors that come back, and our number of parameters."""
    config = kind.parse_text(model.config.to_json_string(), "config.json")
    source = {
        key: TensorInfo(tuple(tensor.shape), np.dtype(np.float32))
        for key, tensor in model.state_dict().items()
    }
    leaves = kind.leaves(config)
    forward = engine.plan_to_flax(kind.table, source, leaves)
    back = engine.plan_to_torch(kind.table, forward.params, leaves)
    shapes = {key: info.shape for key, info in back.tensors.items()}
    return config, shapes, sum(math.prod(leaf.shape) for leaf in leaves.values())


def shapes_of(module: torch.nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", WHISPERS)
def test_every_whisper_encoder_converts(name) -> None:
    model = build(WhisperForConditionalGeneration, *WHISPERS[name])
    config, shapes, num_parameters = convert_there_and_back(WHISPER_ENCODER, model)
    encoder = model.get_encoder()
    assert shapes == shapes_of(encoder, "model.encoder.")
    assert num_parameters == sum(p.numel() for p in encoder.parameters())
    for field in ("num_mel_bins", "encoder_attention_heads", "max_source_positions"):
        assert getattr(config, field) == getattr(model.config, field), field


@pytest.mark.parametrize("name", LLMS)
def test_every_llm_converts(name) -> None:
    model = build(*LLMS[name])
    config, shapes, num_parameters = convert_there_and_back(LLAMA, model)
    expected = shapes_of(model)
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]  # a copy of the embedding
    assert shapes == expected
    assert num_parameters == model.num_parameters()

    rope = model.config.rope_parameters
    assert config.rope_theta == rope["rope_theta"]
    assert config.rms_norm_eps == model.config.rms_norm_eps
    scaling = {} if config.rope_scaling is None else vars(config.rope_scaling)
    assert scaling == {k: v for k, v in rope.items() if k not in ("rope_type", "rope_theta")}
    is_rotated = getattr(model.config, "no_rope_layers", [1] * config.num_hidden_layers)
    assert config.no_rope_layers == tuple(i for i, mark in enumerate(is_rotated) if not mark)
    attention = model.model.layers[0].self_attn
    assert (config.head_dim, config.num_attention_heads // config.num_key_value_heads) == (
        attention.head_dim,
        attention.num_key_value_groups,
    )


@pytest.mark.parametrize("name", LLMS)
def test_config_as_it_was_published_means_the_same(name) -> None:
    """Files on the hub are of transformers 4: `rope_theta`, and `rope_scaling` or null."""
    model_class, _, values = LLMS[name]
    data = model_class.config_class(**values).to_dict()
    expected = LLAMA.parse_config(data, "config.json")
    rope = data.pop("rope_parameters")
    data["rope_theta"] = rope.pop("rope_theta")
    data["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    data.pop("layer_types", None)
    assert LLAMA.parse_config(data, "config.json") == expected
