"""Published models, built on torch's meta device: their configs are read, their tensors placed."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSpeechSeq2Seq

from convert import engine
from convert.checkpoint import TensorInfo
from convert.models import LLAMA, WHISPER_ENCODER
from convert.published import LLMS, WHISPERS, hf_config, published_config

pytestmark = pytest.mark.torch


def build(auto_class: Any, name: str) -> Any:
    """The model without memory for its weights."""
    with torch.device("meta"):
        model = auto_class.from_config(hf_config(name))
    assert model.num_parameters() == (WHISPERS | LLMS)[name][0]
    return model


def convert_there_and_back(kind: Any, model: Any) -> tuple[Any, dict[str, tuple[int, ...]], int]:
    """Our config, the torch tensors that come back, and our number of parameters."""
    config = kind.parse_text(model.config.to_json_string(), "config.json")
    tensors = {
        key: TensorInfo(tuple(tensor.shape), np.dtype(np.float32))
        for key, tensor in model.state_dict().items()
    }
    leaves = kind.leaves(config)
    forward = engine.plan_to_flax(kind.table, tensors, leaves)
    back = engine.plan_to_torch(kind.table, forward.params, leaves)
    shapes = {key: info.shape for key, info in back.tensors.items()}
    return config, shapes, sum(math.prod(leaf.shape) for leaf in leaves.values())


def shapes_of(module: torch.nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", WHISPERS)
def test_every_whisper_encoder_converts(name) -> None:
    model = build(AutoModelForSpeechSeq2Seq, name)
    config, shapes, num_parameters = convert_there_and_back(WHISPER_ENCODER, model)
    encoder = model.get_encoder()
    assert shapes == shapes_of(encoder, "model.encoder.")
    assert num_parameters == sum(p.numel() for p in encoder.parameters())
    for field in ("num_mel_bins", "encoder_attention_heads", "max_source_positions"):
        assert getattr(config, field) == getattr(model.config, field), field


@pytest.mark.parametrize("name", LLMS)
def test_every_llm_converts(name) -> None:
    model = build(AutoModelForCausalLM, name)
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
    config: Any = hf_config(name)
    data = config.to_dict()
    expected = LLAMA.parse_config(data, "config.json")
    rope = data.pop("rope_parameters")
    data["rope_theta"] = rope.pop("rope_theta")
    data["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    data.pop("layer_types", None)
    assert LLAMA.parse_config(data, "config.json") == expected


@pytest.mark.parametrize("name", [*WHISPERS, *LLMS])
def test_our_config_is_that_of_transformers_with_its_defaults(name) -> None:
    kind = WHISPER_ENCODER if name in WHISPERS else LLAMA
    assert published_config(name) == kind.parse_config(hf_config(name).to_dict(), name)
