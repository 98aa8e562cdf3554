"""Measures a training step in JAX against the same step in PyTorch, at real sizes in f32.

The step goes from waveforms to the update: the encoder of whisper-base on two windows of 30 s, the
projector (k = 4: 375 audio tokens per window), SmolLM2-135M on these and 40 text tokens,
cross-entropy, the gradients of the projector, clipping, and AdamW. The PyTorch side uses the models
of transformers with their fused attention (`sdpa`) and computes logits at the labels only, as ours
does. Weights are random. Both run in this process and take turns. Prints JSON: medians in seconds,
and ours divided by PyTorch's.

Example:

  python benchmarks/bench_train_step.py --rounds 9
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from side_by_side import compare, flax_params

from convert.models import LLAMA, PROJECTOR, WHISPER_ENCODER
from convert.published import hf_config
from convert.torch_projector import ResidualAudioProjector as TorchProjector
from flax_projector.batch import AUDIO_TOKEN, Batch
from flax_projector.config import MeshConfig, OptimizerConfig, ProjectorConfig
from flax_projector.lengths import SAMPLE_RATE
from flax_projector.models.speech_llm import encode_prefix, make_speech_llm
from flax_projector.sharding import make_mesh
from flax_projector.training.state import init_state, make_optimizer
from flax_projector.training.train_step import train_step

WHISPER_BASE = hf_config("openai/whisper-base")
SMOLLM2_135M = hf_config("HuggingFaceTB/SmolLM2-135M")
CONFIG = ProjectorConfig(encoder_dim=512, llm_dim=576)
OPTIMIZER = OptimizerConfig()
BATCH, WINDOW_SECS, FRAMES, AUDIO, TEXT, LABELS = 2, 30, 1500, 375, 40, 24
LENGTH = AUDIO + TEXT


def make_batch() -> Batch:
    """Makes noise that fills the window. The audio tokens come first, the labels last."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SMOLLM2_135M.vocab_size, (BATCH, LENGTH), dtype=np.int32)
    labels = tokens[:, -LABELS:]
    samples = 0.1 * rng.standard_normal((BATCH, WINDOW_SECS * SAMPLE_RATE)).astype(np.float32)
    positions = np.broadcast_to(
        np.arange(LENGTH - LABELS - 1, LENGTH - 1, dtype=np.int32), labels.shape
    )
    return Batch(
        num_frames=np.full(BATCH, FRAMES, np.int32),
        tokens=np.where(np.arange(LENGTH) < AUDIO, AUDIO_TOKEN, tokens),
        prompt_len=np.full(BATCH, LENGTH - LABELS, np.int32),
        label_positions=positions,
        labels=labels,
        label_valid=np.ones(labels.shape, bool),
        samples=samples,
        max_frames=FRAMES,
    )


class TorchStep:
    """The same models and the same update in PyTorch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.encoder = transformers.WhisperModel(WHISPER_BASE).get_encoder().eval()
        self.llm: Any = transformers.LlamaForCausalLM(SMOLLM2_135M).eval()
        for tower in (self.encoder, self.llm):
            tower.requires_grad_(False)
        self.projector = TorchProjector(CONFIG)
        self.features = transformers.WhisperFeatureExtractor(feature_size=80)
        named = list(self.projector.named_parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for _, p in named if p.ndim > 1]},
                {"params": [p for _, p in named if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=OPTIMIZER.learning_rate,
            weight_decay=OPTIMIZER.weight_decay,
        )

    def __call__(self, batch: Batch) -> float:
        """Does one update; returns the loss."""
        mel = self.features(
            list(batch.samples), sampling_rate=SAMPLE_RATE, return_tensors="pt"
        ).input_features
        with torch.no_grad():
            frames = self.encoder(mel).last_hidden_state
        audio = self.projector(frames)
        text = self.llm.get_input_embeddings()(torch.from_numpy(batch.tokens[:, AUDIO:]))
        inputs = torch.cat([audio, text], dim=1)
        logits = self.llm(inputs_embeds=inputs, logits_to_keep=LABELS + 1, use_cache=False).logits
        labels = torch.from_numpy(batch.labels).long()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.projector.parameters(), OPTIMIZER.clip_norm)
        self.optimizer.step()
        return loss.item()


class JaxStep:
    """Our step, with the weights of a `TorchStep`."""

    def __init__(self, twin: TorchStep, prefix: Sequence[int] = ()):
        """Converts the weights.

        Args:
          twin: the step in PyTorch that has the weights.
          prefix: token ids that every sequence starts with.
        """
        whisper = WHISPER_ENCODER.parse_config(WHISPER_BASE.to_dict(), "the benchmark")
        llama = LLAMA.parse_config(SMOLLM2_135M.to_dict(), "the benchmark")
        model = make_speech_llm(whisper, CONFIG, llama, dtype=jnp.float32, remat="products")
        encoder = flax_params(WHISPER_ENCODER, whisper, twin.encoder)
        llm = flax_params(LLAMA, llama, twin.llm)
        self.frozen = (encoder, llm)
        mesh = make_mesh(MeshConfig())
        model = dataclasses.replace(model, prefix=encode_prefix(model, llm, prefix, mesh))
        optimizer = make_optimizer(OPTIMIZER, lambda _: OPTIMIZER.learning_rate)
        params = flax_params(PROJECTOR, CONFIG, twin.projector)
        self.state = jax.jit(functools.partial(init_state, optimizer=optimizer))(params)
        step = functools.partial(train_step, model=model, optimizer=optimizer, seed=0)
        self.step = jax.jit(step, donate_argnums=0)

    def __call__(self, batch: Batch) -> float:
        """Does one update; returns the loss."""
        self.state, metrics = self.step(self.state, *self.frozen, batch)
        return float(metrics["loss"])


def make_pair() -> tuple[Callable[[], float], Callable[[], float]]:
    """Makes both steps, on the same batch and with the same initial parameters."""
    batch = make_batch()
    theirs = TorchStep()
    ours = JaxStep(theirs)
    return functools.partial(ours, batch), functools.partial(theirs, batch)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="rounds; each runs both once")
    args = parser.parse_args()
    pair = make_pair()
    ours, theirs = (function() for function in pair)
    if not np.isclose(ours, theirs, rtol=1e-4):
        raise RuntimeError(f"not the same work: the losses are {ours} and {theirs}")
    compare("train_step", {"same work": pair}, rounds=args.rounds)


if __name__ == "__main__":
    main()
