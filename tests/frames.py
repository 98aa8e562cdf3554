"""A store of frames of tiny clips, and an encoder that needs no model."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import soundfile

from flax_projector.config import MeshConfig
from flax_projector.data.frames.keep import keep_frames
from flax_projector.data.frames.shards import Encoding
from flax_projector.data.frames.store import FrameStore
from flax_projector.data.rows import ManifestRow
from flax_projector.data.utterances import Utterance, Utterances
from flax_projector.sharding import make_mesh

BATCH, DIM = 4, 3
ENCODING = Encoding("weights", DIM, "float32", window_samples=6_400)  # 20 frames
MESH = make_mesh(MeshConfig(), jax.devices()[:2])


def make_utterances(folder: Path, count: int) -> list[Utterance]:
    """Clips of 4 to 19 frames of noise."""
    folder.mkdir(exist_ok=True)
    utterances = []
    for i in range(count):
        num_frames = 4 + i % 16
        samples = np.random.default_rng(i).uniform(-0.5, 0.5, 320 * num_frames)
        soundfile.write(folder / f"{i}.wav", samples, 16_000)
        row = ManifestRow(f"clip{i}", str(folder / f"{i}.wav"), "go", num_frames / 50)
        utterances.append(Utterance(row, 20, (1,)))
    return utterances


def change_row(utterance: Utterance, **changes) -> Utterance:
    """The same with another row."""
    return dataclasses.replace(utterance, row=dataclasses.replace(utterance.row, **changes))


class Encoder:
    """Frames [B, S, E] that tell clip, time and row; it ends as a killed process at some call."""

    def __init__(self, killed_at: int | None = None, dtype: str = "float32"):
        self.calls, self._killed_at, self._dtype = 0, killed_at, dtype

    def __call__(self, samples: jax.Array) -> jax.Array:
        if self.calls == self._killed_at:
            raise KeyboardInterrupt
        self.calls += 1
        frames = np.asarray(samples).reshape(BATCH, -1, 320)[..., :DIM].copy()  # [B, S, E]
        frames[..., 0] += np.arange(BATCH)[:, None]
        return jax.device_put(frames.astype(jnp.dtype(self._dtype)), samples.sharding)


def keep(
    root, utterances: list[Utterance], encode=None, encoding: Encoding = ENCODING
) -> FrameStore:
    """Keeps frames below a folder."""
    return keep_frames(
        root,
        "train",
        Utterances.of(utterances),
        encode or Encoder(),
        encoding,
        mesh=MESH,
        batch_size=BATCH,
        num_threads=2,
    )


def calls(root, utterances: list[Utterance], encoding: Encoding = ENCODING) -> int:
    """How often the encoder is called."""
    encoder = Encoder(dtype=encoding.dtype)
    keep(root, utterances, encoder, encoding)
    return encoder.calls


def write_other(path: str) -> None:
    """Other samples, as many of them."""
    size = os.path.getsize(path)
    soundfile.write(path, np.full(soundfile.info(path).frames, 0.25), 16_000)
    assert os.path.getsize(path) == size
    os.utime(path, (0, 0))
