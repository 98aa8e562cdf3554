"""The configs of published models, by hub id, so that their sizes are known without a network.

None of their weights is here. The models of a family whose names end with "-Instruct" have the same
config as those without.
"""

from typing import Any

from convert.models import KINDS


def _whisper(d_model: int, layers: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": "whisper",
        "max_source_positions": 1500,
        "num_mel_bins": 80,
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
        "model_type": "llama",
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
_QWEN = {
    "vocab_size": 151_936,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": _rope(1e6),
}

# The numbers of parameters are the published ones: they guard the values typed here.
WHISPERS = {
    "openai/whisper-tiny": (37_760_640, _whisper(384, 4)),
    "openai/whisper-tiny.en": (37_760_256, _whisper(384, 4, vocab_size=51_864)),
    "openai/whisper-base": (72_593_920, _whisper(512, 6)),
    "openai/whisper-small": (241_734_912, _whisper(768, 12)),
    "openai/whisper-medium": (763_857_920, _whisper(1024, 24)),
    "openai/whisper-large-v2": (1_543_304_960, _whisper(1280, 32)),
    "openai/whisper-large-v3": (
        1_543_490_560,
        _whisper(1280, 32, num_mel_bins=128, vocab_size=51_866),
    ),
    "openai/whisper-large-v3-turbo": (
        808_878_080,
        _whisper(1280, 32, num_mel_bins=128, vocab_size=51_866, decoder_layers=4),
    ),
}
"""Number of parameters and config by hub id."""
LLMS = {
    "HuggingFaceTB/SmolLM2-135M": (
        134_515_008,
        _llm(576, 1536, 30, 9, 3, rope_parameters=_rope(1e5), **_SMOLLM2),
    ),
    "HuggingFaceTB/SmolLM2-360M": (
        361_821_120,
        _llm(960, 2560, 32, 15, 5, rope_parameters=_rope(1e5), **_SMOLLM2),
    ),
    "HuggingFaceTB/SmolLM2-1.7B": (
        1_711_376_384,
        _llm(2048, 8192, 24, 32, 32, rope_parameters=_rope(130_000.0), **_SMOLLM2),
    ),
    "HuggingFaceTB/SmolLM3-3B": (
        3_075_098_624,
        {
            **_llm(2048, 11_008, 36, 16, 4, vocab_size=128_256, rope_parameters=_rope(5e6)),
            "model_type": "smollm3",
            "rms_norm_eps": 1e-6,
        },
    ),
    "meta-llama/Llama-3.2-1B": (1_235_814_400, _llm(2048, 8192, 16, 32, 8, **_LLAMA3_2)),
    "meta-llama/Llama-3.1-8B": (8_030_261_248, _llm(4096, 14_336, 32, 32, 8, **_LLAMA3_1)),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (
        1_100_048_384,
        _llm(
            2048, 5632, 22, 32, 4, vocab_size=32_000, rms_norm_eps=1e-5, rope_parameters=_rope(1e4)
        ),
    ),
    "Qwen/Qwen2.5-0.5B": (
        494_032_768,
        {**_llm(896, 4864, 24, 14, 2, **_QWEN), "model_type": "qwen2"},
    ),
    "Qwen/Qwen3-0.6B": (
        596_049_920,
        {**_llm(1024, 3072, 28, 16, 8, head_dim=128, **_QWEN), "model_type": "qwen3"},
    ),
}
"""Likewise."""


def hf_config(hub_id: str) -> Any:
    """transformers' config of a published model, with its defaults; None if it is not known here.

    Imports PyTorch, if that is installed.
    """
    from transformers import CONFIG_MAPPING

    if (found := _find(hub_id)) is None:
        return None
    values = dict(found)
    return CONFIG_MAPPING[values.pop("model_type")](**values)


def published_config(hub_id: str) -> Any:
    """Our config of a published model; None if it is not known here."""
    if (data := _find(hub_id)) is None:
        return None
    (kind,) = (kind for kind in KINDS if data["model_type"] in kind.model_types)
    return kind.parse_config(data, hub_id)


def _find(hub_id: str) -> dict[str, Any] | None:
    found = (WHISPERS | LLMS).get(hub_id.removesuffix("-Instruct"))
    return None if found is None else found[1]
