"""Published models, as configs alone: none of their weights is here."""

from typing import Any

from transformers import (
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SmolLM3ForCausalLM,
    WhisperConfig,
)

from convert.models import LLAMA, WHISPER_ENCODER


def _whisper(d_model: int, layers: int, **others: Any) -> dict[str, Any]:
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


def _llm(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, **others: Any) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **others,
    }


def _llama3(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


_SMOLLM2 = {"vocab_size": 49_152, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
_LLAMA3 = {"vocab_size": 128_256, "rms_norm_eps": 1e-5}
_LLAMA3_1 = {**_LLAMA3, "head_dim": 128, "rope_parameters": _llama3(8.0)}
_LLAMA3_2 = {
    **_LLAMA3,
    "head_dim": 64,
    "rope_parameters": _llama3(32.0),
    "tie_word_embeddings": True,
}
_QWEN = {"vocab_size": 151_936, "tie_word_embeddings": True, "rope_parameters": _rope(1e6)}

# The numbers of parameters are the published ones: they guard the values typed here.
WHISPERS = {
    "tiny": (37_760_640, _whisper(384, 4)),
    "tiny.en": (37_760_256, _whisper(384, 4, vocab_size=51_864)),
    "base": (72_593_920, _whisper(512, 6)),
    "small": (241_734_912, _whisper(768, 12)),
    "medium": (763_857_920, _whisper(1024, 24)),
    "large-v2": (1_543_304_960, _whisper(1280, 32)),
    "large-v3": (1_543_490_560, _whisper(1280, 32, num_mel_bins=128, vocab_size=51_866)),
    "large-v3-turbo": (
        808_878_080,
        _whisper(1280, 32, num_mel_bins=128, vocab_size=51_866, decoder_layers=4),
    ),
}
LLMS = {
    "SmolLM2-135M": (
        LlamaForCausalLM,
        134_515_008,
        _llm(576, 1536, 30, 9, 3, rope_parameters=_rope(1e5), **_SMOLLM2),
    ),
    "SmolLM2-360M": (
        LlamaForCausalLM,
        361_821_120,
        _llm(960, 2560, 32, 15, 5, rope_parameters=_rope(1e5), **_SMOLLM2),
    ),
    "SmolLM2-1.7B": (
        LlamaForCausalLM,
        1_711_376_384,
        _llm(2048, 8192, 24, 32, 32, rope_parameters=_rope(130_000.0), **_SMOLLM2),
    ),
    "SmolLM3-3B": (
        SmolLM3ForCausalLM,
        3_075_098_624,
        _llm(2048, 11_008, 36, 16, 4, vocab_size=128_256, rope_parameters=_rope(5e6)),
    ),
    "Llama-3.2-1B": (
        LlamaForCausalLM,
        1_235_814_400,
        _llm(2048, 8192, 16, 32, 8, **_LLAMA3_2),
    ),
    "Llama-3.1-8B": (
        LlamaForCausalLM,
        8_030_261_248,
        _llm(4096, 14_336, 32, 32, 8, **_LLAMA3_1),
    ),
    "TinyLlama-1.1B": (
        LlamaForCausalLM,
        1_100_048_384,
        _llm(2048, 5632, 22, 32, 4, rms_norm_eps=1e-5, rope_parameters=_rope(1e4)),
    ),
    "Qwen2.5-0.5B": (Qwen2ForCausalLM, 494_032_768, _llm(896, 4864, 24, 14, 2, **_QWEN)),
    "Qwen3-0.6B": (
        Qwen3ForCausalLM,
        596_049_920,
        _llm(1024, 3072, 28, 16, 8, head_dim=128, **_QWEN),
    ),
}


def published_config(name: str) -> Any:
    """Our config of a published model, by its name in one of the two lists."""
    if name in WHISPERS:
        data = WhisperConfig(**WHISPERS[name][1]).to_dict()
        return WHISPER_ENCODER.parse_config(data, name)
    model_class, _, values = LLMS[name]
    return LLAMA.parse_config(model_class.config_class(**values).to_dict(), name)
