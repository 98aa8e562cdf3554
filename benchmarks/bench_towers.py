"""Measures both frozen towers in Flax against Hugging Face's in PyTorch: same sizes, f32.

Runs the encoder of whisper-base on two windows of 30 s, and SmolLM2-135M forward on 2 x 415
embeddings, with logits for the last 40, and backward to the embeddings. Weights are random. Both
frameworks run in this process and take turns. Prints JSON: medians in seconds, and ours divided by
PyTorch's.

Example:

  python benchmarks/bench_towers.py --rounds 9
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from side_by_side import Pair, compare, flax_params

from convert.models import LLAMA, WHISPER_ENCODER
from convert.published import hf_config
from flax_projector.models.llama import LlamaDecoder
from flax_projector.models.whisper import WhisperEncoder

WHISPER_BASE = hf_config("openai/whisper-base")
SMOLLM2_135M = hf_config("HuggingFaceTB/SmolLM2-135M")
BATCH, LENGTH, LABELS = 2, 415, 40


def encoder_pair() -> Pair:
    torch.manual_seed(0)
    model = transformers.WhisperModel(WHISPER_BASE).eval()
    config = WHISPER_ENCODER.parse_config(WHISPER_BASE.to_dict(), "the benchmark")
    params = flax_params(WHISPER_ENCODER, config, model)
    mel = np.random.default_rng(0).normal(size=(BATCH, 80, 3000)).astype(np.float32)
    jax_mel, torch_mel = jnp.asarray(mel), torch.from_numpy(mel)
    encode = jax.jit(lambda params, mel: WhisperEncoder(config).apply({"params": params}, mel))

    def torch_encode():
        with torch.no_grad():
            return model.get_encoder()(torch_mel).last_hidden_state

    return lambda: jax.block_until_ready(encode(params, jax_mel)), torch_encode


def decoder_pair() -> Pair:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(SMOLLM2_135M).eval().requires_grad_(False)
    config = LLAMA.parse_config(SMOLLM2_135M.to_dict(), "the benchmark")
    params = flax_params(LLAMA, config, model)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, LENGTH, config.hidden_size)).astype(np.float32)
    w = rng.normal(size=(BATCH, LABELS, config.vocab_size)).astype(np.float32)
    jax_x, jax_w, torch_x, torch_w = jnp.asarray(x), jnp.asarray(w), *map(torch.from_numpy, (x, w))
    torch_x.requires_grad_()

    def total(x, params, w):
        llm = LlamaDecoder(config)
        positions = jnp.arange(LENGTH)[None]
        hidden: Any = llm.apply({"params": params}, x, positions=positions, method="blocks")
        logits = llm.apply({"params": params}, hidden[0][:, -LABELS:], method="logits")
        return jnp.sum(jnp.asarray(logits) * w)

    gradient = jax.jit(jax.value_and_grad(total))

    def torch_gradient():
        torch_x.grad = None
        logits = model(inputs_embeds=torch_x, logits_to_keep=LABELS, use_cache=False).logits
        (logits * torch_w).sum().backward()

    return lambda: jax.block_until_ready(gradient(jax_x, params, jax_w)), torch_gradient


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="rounds; each runs both once")
    pairs = {"encoder": encoder_pair(), "decoder forward and backward": decoder_pair()}
    compare("towers", pairs, rounds=parser.parse_args().rounds)


if __name__ == "__main__":
    main()
