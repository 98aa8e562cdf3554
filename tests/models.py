"""The same models in PyTorch and in Flax, for the tests that compare the two."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from convert import engine
from convert.checkpoint import in_memory
from convert.load import load_tower
from convert.models import LLAMA, PROJECTOR, ModelKind
from convert.trees import unflatten
from flax_projector.config import MeshConfig, ProjectorConfig, WhisperConfig
from flax_projector.models.llama import LlamaDecoder
from flax_projector.models.speech_llm import SpeechLLM, make_speech_llm
from flax_projector.sharding import make_mesh
from tests.tiny import randomize, read_all

# --- parameters ------------------------------------------------------------------------------


def load_on_one_device(kind: ModelKind, folder: Path) -> tuple[Any, dict]:
    """Config and parameters of a checkpoint, by way of the conversion tables."""
    config = kind.read_config(folder)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return config, load_tower(kind, folder, kind.abstract_params(config, mesh=mesh))


def projector_to_flax(config: ProjectorConfig, tensors: Mapping[str, torch.Tensor]) -> dict:
    """Copies parameters or gradients of a projector by torch name into the Flax module's tree.

    Copies, because JAX reads a NumPy array where it lies and after the call has returned: an
    optimizer of PyTorch that updates in place would change what ours is still to read.
    """
    copies = {name: tensor.detach().clone().numpy() for name, tensor in tensors.items()}
    arrays = in_memory(copies)
    plan = engine.plan_to_flax(PROJECTOR.table, arrays.infos, PROJECTOR.leaves(config))
    return unflatten(read_all(engine.as_flax(plan, arrays)))


def make_projector_pair(torch_class: Any, config: ProjectorConfig) -> tuple[Any, dict]:
    """A PyTorch projector with every parameter random, and its parameters for Flax."""
    module = randomize(torch_class(config), seed=config.projector_pool_stride).eval()
    return module, projector_to_flax(config, module.state_dict())


def random_floats(*shape: int) -> np.ndarray:
    """Standard normal f32; the same for the same shape."""
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


# --- decoders of the Llama family ------------------------------------------------------------

VOCAB, NUM_LAYERS = 53, 2

_TIED = {
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
_UNTIED = {
    "hidden_size": 28,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "rope_theta": 317.0,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DECODERS: dict[str, dict[str, Any]] = {
    "tied, 3 heads per kv head": _TIED,
    "untied, 4 heads per kv head": _UNTIED,
    "untied, 1 head per kv head": {
        "hidden_size": 21,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "rope_theta": 5_000_000.0,
        "tie_word_embeddings": False,
    },
    "llama with biases": {**_TIED, "attention_bias": True},
    "llama 3": {**_UNTIED, "rope": _LLAMA3},
    "qwen2": {**_TIED, "family": "qwen2", "head_dim": None},
    "qwen3": {**_UNTIED, "family": "qwen3"},
    "smollm3": {**_TIED, "family": "smollm3", "head_dim": 4, "no_rope_layers": [1, 0]},
}
"""Options of `make_decoder_pair`, by what is special about them."""

_FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
}


def make_decoder_pair(
    folder: Path,
    *,
    rope_theta: float,
    rope: Mapping[str, Any] | None = None,
    family: str = "llama",
    gain: float = 1.0,
    seed: int = 1,
    **sizes: Any,
) -> Any:
    """A tiny decoder with every parameter random, and the same in Flax, read from its folder.

    Args:
      folder: gets the decoder, as Hugging Face saves it.
      rope_theta: base of the rotary embeddings.
      rope: their scaling.
      family: of the model.
      gain: factor of the matrices. A higher one lets the context decide more: generated texts vary.
      seed: of the parameters.
      sizes: further fields of the model's config.

    Returns:
      `torch`, the one; `module`, `config` and `params`, the other.
    """
    make_config, make_model = _FAMILIES[family]
    if sizes.get("head_dim", 0) is None:
        del sizes["head_dim"]  # Qwen2 derives it
    config = make_config(
        vocab_size=VOCAB,
        intermediate_size=37,
        num_hidden_layers=NUM_LAYERS,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta, **(rope or {})},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **sizes,
    )
    config._attn_implementation = "eager"
    model = randomize(make_model(config), seed=seed).eval()
    for parameter in model.parameters():
        parameter.data *= gain if parameter.ndim == 2 else 1
    model.save_pretrained(folder)
    flax_config, params = load_on_one_device(LLAMA, folder)
    module = LlamaDecoder(flax_config)
    return SimpleNamespace(torch=model, config=flax_config, module=module, params=params)


def around(llama: Any) -> SpeechLLM:
    """A whole model, of which only the LLM matters, given that one's config."""
    whisper, projector = WhisperConfig(5, 7, 1, 1, 3), ProjectorConfig(7, llama.hidden_size)
    return make_speech_llm(whisper, projector, llama, dtype=jnp.float32, remat="none")
