"""Batches of tiny clips without a model, and clips that cannot be used."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import soundfile

from flax_projector.batch import Batch
from flax_projector.chat.prompt import Prompt, make_prompt
from flax_projector.config import DataConfig, MeshConfig, PromptConfig
from flax_projector.data.batches import Batches
from flax_projector.data.inputs import Inputs, Waveforms
from flax_projector.data.manifest import read_manifest
from flax_projector.data.rows import ManifestRow, Rows
from flax_projector.data.utterances import prepare
from flax_projector.sharding import make_mesh
from tests.tiny import make_speech, make_tokenizer

CONFIG = DataConfig(window_secs=2.0, bucket_secs=(0.7, 1.1, 2.0), max_text_tokens=20)


def tiny_prompt() -> Prompt:
    """The default prompt, around the tokenizer of the tiny LLM."""
    return make_prompt(make_tokenizer(), PromptConfig())


def read_speech(folder: Path, count: int, *, source: str | None = None) -> Rows:
    """Rows clip0, clip1, ... of noise, which are made in the folder."""
    rows, bad = read_manifest(make_speech(folder, count), source=source)
    assert not bad
    return rows


def make_batches(
    rows: Sequence[ManifestRow],
    *,
    inputs: Inputs | None = None,
    config: DataConfig = CONFIG,
    **options,
) -> Batches:
    """Batches of 8 over 8 devices, in buckets of up to 0.7, 1.1 and 2 seconds.

    Args:
      rows: of the set.
      inputs: sound files by default.
      config: of the data.
      options: for `Batches`.
    """
    prompt = tiny_prompt()
    return Batches(
        prepare(_by_source(rows), prompt, config)[0],
        inputs=inputs or Waveforms(config.window_samples),
        prompt=prompt,
        config=config,
        pool_stride=4,
        mesh=make_mesh(MeshConfig()),
        **{"batch_size": 8, **options},
    )


def _by_source(rows: Sequence[ManifestRow]) -> list[Rows]:
    if isinstance(rows, Rows):
        return [rows]
    sources = dict.fromkeys(row.source for row in rows)
    return [Rows.of([row for row in rows if row.source == source]) for source in sources]


def assert_same_batch(actual: Batch, expected: Batch) -> None:
    """Both have the same fields, static lengths and values, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def break_clip(path: str | Path, how: str) -> None:
    """Damages a sound file in a way that does not show in its manifest.

    Args:
      path: of the file.
      how: "missing", "undecodable", "nan", "longer" (1.9 s) or "shorter" (0.1 s).
    """
    rng = np.random.default_rng(0)
    if how == "missing":
        Path(path).unlink()
    elif how == "undecodable":
        Path(path).write_bytes(b"not audio")
    elif how == "nan":
        samples = np.full(soundfile.info(path).frames, np.nan)
        soundfile.write(path, samples, 16_000, subtype="FLOAT")
    else:
        secs = {"longer": 1.9, "shorter": 0.1}[how]
        soundfile.write(path, rng.uniform(-0.1, 0.1, round(secs * 16_000)), 16_000)


def spoil(manifest: str, *numbers: int) -> None:
    """Fills clips of `make_speech` with NaN: it shows only when they are read."""
    for number in numbers:
        break_clip(Path(manifest).with_name(f"{number}.wav"), "nan")
