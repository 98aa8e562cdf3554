"""Measures seconds of speech trained per second, padding included, in JAX and in PyTorch.

Ours groups clips of similar length into a few buckets. Audio tokens of padding never enter the LLM,
the start of the prompt is computed once, and logits are computed at the labels only. The PyTorch
loop does what tiny-audio does: it pads every clip to 30 seconds, feeds all 375 audio tokens to the
LLM, and computes logits at every position.

Towers and projector are those of bench_train_step.py, with random weights; the clips are noise in
memory. There are two sets of lengths: those of the demo's clips, and those of clips from read books
up to 15 seconds (mean 12). Ours runs three times: with an encoder window of 30 s, with one of 15 s,
and with encoder frames that were computed before, which a frozen encoder allows. All take turns on
the same clips. Prints JSON: seconds of speech per second over all rounds, and ours divided by
PyTorch's.

Example:

  python benchmarks/bench_job.py --rounds 3
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bench_train_step import CONFIG, OPTIMIZER, JaxStep, TorchStep

from flax_projector.batch import Bucket
from flax_projector.config import DataConfig, MeshConfig
from flax_projector.data.batches import Batches
from flax_projector.data.inputs import Clip
from flax_projector.data.rows import ManifestRow
from flax_projector.data.utterances import Utterance, Utterances
from flax_projector.lengths import SAMPLE_RATE, SAMPLES_PER_FRAME
from flax_projector.planning.speech import prompt_of_ids
from flax_projector.sharding import make_mesh

MANIFEST = Path(__file__).parents[1] / "examples/demo/speech/train.jsonl"
BATCH = 8
LABELS_PER_SEC = 3.5  # tokens of read English
PROMPT = prompt_of_ids(before_audio=range(24), after_audio=range(5))


def demo_lengths() -> np.ndarray:
    """Returns the lengths of the demo's training clips in seconds."""
    rows = map(json.loads, MANIFEST.read_text().splitlines())
    return np.array([row["duration"] for row in rows])


def read_speech_lengths() -> np.ndarray:
    """Returns the lengths of 600 clips in seconds: most are near 15, the mean is 12."""
    return 15 * np.random.default_rng(0).beta(4, 1, 600)


SETS = {  # lengths, and the buckets that ours uses
    "demo, 2 to 4 s": (demo_lengths, (2.1, 2.5, 4.0)),
    "read speech, mean 12 s": (read_speech_lengths, (8.0, 10.0, 12.0, 13.0, 14.0, 15.0)),
}


class Noise:
    """Clips of noise, as `data.inputs.Inputs`."""

    def __init__(self, window_secs: float, *, is_kept: bool):
        """Draws the noise.

        Args:
          window_secs: window of the encoder.
          is_kept: gives encoder frames instead of waveforms.
        """
        self.name = "frames" if is_kept else "samples"
        self.dtype = np.dtype(np.float32)
        rng = np.random.default_rng(0)
        num_samples = round(window_secs * SAMPLE_RATE)
        num_frames = num_samples // SAMPLES_PER_FRAME
        shape = (num_frames, CONFIG.encoder_dim) if is_kept else (num_samples,)
        self._array = 0.1 * rng.standard_normal(shape, np.float32)

    def shape(self, bucket: Bucket) -> tuple[int, ...]:
        """Returns the static shape of one clip."""
        if self.name == "frames":
            return (bucket.num_frames, CONFIG.encoder_dim)
        return self._array.shape

    def read(self, utterance: Utterance) -> Clip:
        """Returns the clip."""
        num_frames = utterance.max_frames - 1
        length = num_frames if self.name == "frames" else num_frames * SAMPLES_PER_FRAME
        return Clip(self._array[:length], num_frames)


def make_utterances(lengths: np.ndarray) -> list[Utterance]:
    """Makes utterances of these lengths in seconds, with random labels."""
    rng = np.random.default_rng(1)
    utterances = []
    for i, secs in enumerate(lengths):
        target = rng.integers(3, 49_000, 1 + round(secs * LABELS_PER_SEC)).tolist()
        row = ManifestRow(str(i), f"{i}.wav", "", float(secs))
        num_frames = int(secs * SAMPLE_RATE) // SAMPLES_PER_FRAME
        utterances.append(Utterance(row, num_frames + 1, (*target, PROMPT.end_of_turn)))
    return utterances


class PaddingLoop(TorchStep):
    """Trains as tiny-audio does: every clip padded to 30 s, and logits at every position."""

    def train(self, samples: np.ndarray, targets: list[tuple[int, ...]]) -> float:
        """Does one update on waveforms [B, 30 s] and labels; returns the loss."""
        mel = self.features(
            list(samples), sampling_rate=SAMPLE_RATE, return_tensors="pt"
        ).input_features
        with torch.no_grad():
            frames = self.encoder(mel).last_hidden_state
        audio = self.projector(frames)
        longest = max(map(len, targets))
        labels = torch.full((len(targets), longest), -100)
        for row, target in zip(labels, targets, strict=True):
            row[: len(target)] = torch.tensor(target)
        embed = self.llm.get_input_embeddings()
        rows = (len(targets), -1)
        before = embed(torch.tensor([PROMPT.before_audio])).expand(*rows, -1)
        after = embed(torch.tensor([PROMPT.after_audio])).expand(*rows, -1)
        text = embed(labels.clamp(min=0))
        inputs = torch.cat([before, audio, after, text], dim=1)
        logits = self.llm(inputs_embeds=inputs, use_cache=False).logits
        predicted = logits[:, -longest - 1 : -1]
        loss = F.cross_entropy(predicted.flatten(0, 1), labels.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.projector.parameters(), OPTIMIZER.clip_norm)
        self.optimizer.step()
        return loss.item()


def make_batches(utterances: list[Utterance], bucket_secs: Any, inputs: Noise) -> Batches:
    """Makes an epoch of our batches."""
    return Batches(
        Utterances.of(utterances),
        inputs=inputs,
        prompt=PROMPT,
        config=DataConfig(bucket_secs=bucket_secs, max_text_tokens=128),
        pool_stride=CONFIG.projector_pool_stride,
        mesh=make_mesh(MeshConfig()),
        batch_size=BATCH,
        shuffle_seed=0,
    )


def seconds(function: Callable[[], object]) -> float:
    """Returns the wall-clock time of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(lengths: np.ndarray, bucket_secs: Any, theirs: PaddingLoop, rounds: int) -> Any:
    """Returns the speed of every way to train, on batches spread over an epoch."""
    utterances = make_utterances(lengths)
    ours = JaxStep(theirs, PROMPT.before_audio)
    ways = {
        "flax, window of 30 s": Noise(30, is_kept=False),
        "flax, window of 15 s": Noise(15, is_kept=False),
        "flax, kept frames": Noise(30, is_kept=True),
    }
    batches = {way: make_batches(utterances, bucket_secs, noise) for way, noise in ways.items()}
    any_batches = next(iter(batches.values()))
    noise = Noise(30, is_kept=False)
    spent = dict.fromkeys([*ways, "torch"], 0.0)
    speech = 0.0
    for index in np.linspace(0, len(any_batches) - 1, rounds).astype(int):
        members = [u for u in any_batches.members(index) if u is not None]
        speech += sum(u.row.duration for u in members)
        for way in ways:
            batch, _ = batches[way][index]
            ours(batch)  # compiled, if its lengths are new
            spent[way] += seconds(functools.partial(ours, batch))
        samples = np.zeros((len(members), 30 * SAMPLE_RATE), np.float32)
        for row, utterance in zip(samples, members, strict=True):
            clip = noise.read(utterance).audio
            row[: len(clip)] = clip
        targets = [u.target for u in members]
        spent["torch"] += seconds(functools.partial(theirs.train, samples, targets))
    rates = {way: speech / secs for way, secs in spent.items()}
    return {
        "mean_secs": round(float(lengths.mean()), 2),
        "speech_secs_per_sec": {way: round(rate, 2) for way, rate in rates.items()},
        "ratio": {way: round(rates[way] / rates["torch"], 2) for way in ways},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="batches per set")
    args = parser.parse_args()
    theirs = PaddingLoop()
    results = {
        name: measure(make_lengths(), bucket_secs, theirs, args.rounds)
        for name, (make_lengths, bucket_secs) in SETS.items()
    }
    setting = {"cpus": os.cpu_count(), "batch": BATCH, "rounds": args.rounds}
    json.dump({"benchmark": "job", **setting, "results": results}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
