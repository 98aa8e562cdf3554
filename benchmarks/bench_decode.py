"""Measures decoding against transformers' `generate` with its cache, in f32.

SmolLM2-135M continues the prompts of 1, 8 and 32 clips of 10 s by 32 tokens, as many as are spoken
in that time; none ends earlier. A prompt has 24 tokens before the audio, 125 audio tokens and 8
after them, in every second row 16 audio tokens less. Ours knows the keys of the 24, which are the
same in every prompt. Both run in this process and take turns, greedily and with 4 beams, and must
find the same tokens. Prints JSON: medians in seconds, ours divided by theirs, and ours divided by
the length of the clips (the real-time factor of the LLM alone).

Without --models, weights are random, and tokens are not compared: many are equally likely.

Example:

  python benchmarks/bench_decode.py --models models
"""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from side_by_side import Pair, compare, flax_params

from convert.models import LLAMA, WHISPER_ENCODER
from convert.published import hf_config
from flax_projector.config import DecodeConfig, MeshConfig, ProjectorConfig
from flax_projector.models.decode import generate
from flax_projector.models.speech_llm import encode_prefix, make_speech_llm
from flax_projector.sharding import make_mesh, use_mesh

PREFIX, AUDIO, AFTER, NEW = 24, 125, 8, 32
LENGTH, SHORTER, CLIP_SECS = PREFIX + AUDIO + AFTER, 16, 10.0
SIZES, BEAMS = (1, 8, 32), (1, 4)
NO_TOKEN = -1  # as end of turn: no row ends early


class Decoders:
    """The LLM on both sides."""

    def __init__(self, models: Path | None):
        """Loads the weights, or makes random ones."""
        torch.manual_seed(0)
        if models:
            folder = models / "smollm2-135m-instruct"
            llm: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32
            )
        else:
            llm = transformers.LlamaForCausalLM(hf_config("HuggingFaceTB/SmolLM2-135M"))
        self.theirs = llm.eval().requires_grad_(False)
        llm.generation_config.eos_token_id = None
        llm.generation_config.pad_token_id = 0
        llama = LLAMA.parse_config(llm.config.to_dict(), "the benchmark")
        whisper = WHISPER_ENCODER.parse_config(
            hf_config("openai/whisper-base").to_dict(), "the benchmark"
        )
        projector = ProjectorConfig(whisper.d_model, llama.hidden_size)
        self.params = flax_params(LLAMA, llama, llm)
        self.mesh = make_mesh(MeshConfig())
        self.rng = np.random.default_rng(0)
        self.prefix = self.rng.integers(0, llama.vocab_size, PREFIX).tolist()
        model = make_speech_llm(whisper, projector, llama, dtype=jnp.float32, remat="none")
        prefix = encode_prefix(model, self.params, self.prefix, self.mesh)
        self.model = dataclasses.replace(model, prefix=prefix)

    def pair(self, size: int, beams: int, *, is_checked: bool) -> Pair:
        """Both sides, on the same prompts."""
        table = self.theirs.get_input_embeddings().weight.numpy()
        ids = self.rng.integers(0, len(table), (size, LENGTH))
        ids[:, :PREFIX] = self.prefix
        lengths = LENGTH - SHORTER * (np.arange(size) % 2)
        inputs, on_left = table[ids], np.zeros((size, LENGTH, table.shape[1]), np.float32)
        mask = np.arange(LENGTH) >= LENGTH - lengths[:, None]
        for row, length in enumerate(lengths):
            on_left[row, LENGTH - length :] = inputs[row, :length]
        config = DecodeConfig(beams=beams, max_new_tokens=NEW, max_repeats=0)
        decode = jax.jit(
            functools.partial(generate, model=self.model, config=config, end_of_turn=NO_TOKEN)
        )
        args = jnp.asarray(inputs), jnp.asarray(lengths)

        def ours() -> np.ndarray:
            with use_mesh(self.mesh):
                return np.asarray(decode(self.params, *args).tokens)

        def theirs() -> np.ndarray:
            return self.theirs.generate(
                inputs_embeds=torch.from_numpy(on_left),
                attention_mask=torch.from_numpy(mask).long(),
                max_new_tokens=NEW,
                num_beams=beams,
                do_sample=False,
            ).numpy()

        if is_checked and (differ := np.mean(ours() != theirs())):
            raise RuntimeError(f"not the same work: {differ:.1%} of the tokens differ")
        return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2, help="rounds; each runs both once")
    parser.add_argument("--models", type=Path, help="folder of smollm2-135m-instruct")
    args = parser.parse_args()
    decoders, pairs, audio_secs = Decoders(args.models), {}, {}
    for beams in BEAMS:
        for size in SIZES:
            name = f"{size} clips, {f'{beams} beams' if beams > 1 else 'greedy'}"
            pairs[name] = decoders.pair(size, beams, is_checked=args.models is not None)
            audio_secs[name] = size * CLIP_SECS
    compare("decode", pairs, rounds=args.rounds, audio_secs=audio_secs)


if __name__ == "__main__":
    main()
