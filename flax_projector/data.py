"""Manifests of speech -> deterministic, bucketed batches -> global arrays."""

import csv
import functools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np
import soundfile
import soxr
from jax.sharding import Mesh

from flax_projector.config import SAMPLE_RATE, DataConfig
from flax_projector.projector import output_length
from flax_projector.prompt import Prompt
from flax_projector.sharding import batch_sharding, local_rows, padded_batch_size
from flax_projector.whisper import num_encoder_frames

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ManifestRow:
    """One line of a manifest.

    Attributes:
      id: unique in its manifest.
      audio: file path.
      text: transcript.
      duration: seconds.
    """

    id: str
    audio: Path
    text: str
    duration: float


def read_manifest(path: str | Path) -> list[ManifestRow]:
    """Reads a manifest.

    `.jsonl` has one object a line: "audio" (relative to the manifest's folder), "text", and
    optionally "id" and "duration" in seconds. `.tsv` has a header with "path" (or "audio"), "text"
    and optionally "id" and "seconds" (or "duration"). Missing durations are read from the files.

    Raises:
      ValueError: naming file and line, if a row is malformed, an audio file is missing or
        unreadable, an id occurs twice, or nothing is left.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"manifest {path} does not exist")
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            raw_rows = [_parse_json(line, f"{path}:{n}") for n, line in enumerate(file, 1)]
        elif path.suffix == ".tsv":
            raw_rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        else:
            raise ValueError(f"manifest {path}: the name must end in .jsonl or .tsv")
    rows = [_make_row(raw, path, n) for n, raw in enumerate(raw_rows)]
    if not rows:
        raise ValueError(f"manifest {path} has no rows")
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise ValueError(f"manifest {path}: id {row.id!r} occurs twice")
        seen.add(row.id)
    return rows


def _parse_json(line: str, where: str) -> dict[str, Any]:
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: need an object, got {line.strip()!r}")
    return raw


def _make_row(raw: dict[str, Any], manifest: Path, index: int) -> ManifestRow:
    where = f"{manifest}: row {index + 1}"
    audio_name, text = raw.get("audio") or raw.get("path"), raw.get("text")
    if not audio_name or not text or not str(text).strip():
        raise ValueError(f"{where}: needs a non-empty 'audio' and 'text', has {sorted(raw)}")
    audio = manifest.parent / audio_name
    if not audio.is_file():
        raise ValueError(f"{where}: audio file {audio} does not exist")
    seconds = raw.get("duration") or raw.get("seconds")
    return ManifestRow(
        id=str(raw.get("id") or audio.stem),
        audio=audio,
        text=str(text).strip(),
        duration=float(seconds) if seconds else _read_duration(audio),
    )


def _read_duration(path: Path) -> float:
    try:
        return soundfile.info(path).duration
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is not a readable audio file: {error}") from error


def load_audio(path: Path) -> np.ndarray:
    """Reads a sound file as f32[N], 16 kHz mono: channels are averaged, then resampled.

    Raises:
      ValueError: if it cannot be decoded, is empty or has values that are not finite.
    """
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is not a readable audio file: {error}") from error
    mono = samples.mean(axis=1)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE)
    if not len(mono) or not np.isfinite(mono).all():
        raise ValueError(f"{path} is empty or has samples that are not finite")
    return mono


@dataclass(frozen=True)
class Utterance:
    """A row with what its batch needs to know before any audio is read.

    Attributes:
      row: of the manifest.
      max_frames: encoder frames that it fills at most (a written duration is rounded).
      target: label ids, end of turn included.
    """

    row: ManifestRow
    max_frames: int
    target: tuple[int, ...]


@dataclass(frozen=True)
class Bucket:
    """Static lengths of the batches of similar utterances; every bucket is compiled once.

    Attributes:
      num_frames: S.
      merged_len: L.
      text_len: T.
    """

    num_frames: int
    merged_len: int
    text_len: int


@runtime_checkable
class Inputs(Protocol):
    """Where the encoder's side of a batch comes from: waveforms, or frames kept from before."""

    name: str

    def shape(self, bucket: Bucket) -> tuple[int, ...]:
        """Static shape of one utterance."""
        ...

    def read(self, utterance: Utterance) -> tuple[np.ndarray, int]:
        """The utterance's array, unpadded, and its number of encoder frames."""
        ...


class Waveforms:
    """Reads sound files, for an encoder that runs in the step."""

    name = "samples"

    def __init__(self, window_samples: int):
        self._window_samples = window_samples

    def shape(self, bucket: Bucket) -> tuple[int, ...]:
        """[N] samples, of the whole window."""
        return (self._window_samples,)

    def read(self, utterance: Utterance) -> tuple[np.ndarray, int]:
        """f32[<= N] samples at 16 kHz."""
        samples = load_audio(utterance.row.audio)
        return samples, num_encoder_frames(len(samples))


def prepare(rows: Sequence[ManifestRow], prompt: Prompt, config: DataConfig) -> list[Utterance]:
    """Tokenizes transcripts and leaves out, with a count in the log, what no bucket can hold."""
    utterances, too_long, too_wordy = [], 0, 0
    for row in rows:
        target = prompt.encode_target(row.text)
        too_long += row.duration > config.bucket_secs[-1]
        too_wordy += len(target) > config.max_text_tokens
        if row.duration <= config.bucket_secs[-1] and len(target) <= config.max_text_tokens:
            # Manifests round durations: one frame more is allowed for.
            max_frames = num_encoder_frames(round(row.duration * SAMPLE_RATE)) + 1
            utterances.append(Utterance(row, max_frames, target))
    if too_long or too_wordy:
        log.warning(
            "%d of %d utterances are left out: %d longer than %g s, %d with more than %d labels",
            *(len(rows) - len(utterances), len(rows), too_long, config.bucket_secs[-1]),
            *(too_wordy, config.max_text_tokens),
        )
    if not utterances:
        raise ValueError(
            f"none of {len(rows)} utterances fits: raise data.bucket_secs {config.bucket_secs} or "
            f"data.max_text_tokens {config.max_text_tokens}"
        )
    return utterances


def _assign(utterances: Sequence[Utterance], config: DataConfig) -> np.ndarray:
    """Index of the smallest bucket that holds each utterance's audio."""
    durations = [u.row.duration for u in utterances]
    return np.searchsorted(np.asarray(config.bucket_secs), durations)


def make_buckets(
    utterances: Sequence[Utterance], prompt: Prompt, config: DataConfig, pool_stride: int
) -> list[Bucket]:
    """The tightest static lengths that hold each bucket's utterances and all smaller ones."""
    assigned = _assign(utterances, config)
    lengths = np.zeros((len(config.bucket_secs), 3), int)
    for bucket, u in zip(assigned, utterances, strict=True):
        audio_tokens = output_length(u.max_frames, pool_stride)
        needed = (audio_tokens, prompt.merged_length(audio_tokens, len(u.target)), len(u.target))
        lengths[bucket] = np.maximum(lengths[bucket], needed)
    lengths = np.maximum.accumulate(lengths)
    window_frames = num_encoder_frames(config.window_samples)
    return [
        Bucket(min(int(a) * pool_stride, window_frames), int(merged), int(text))
        for a, merged, text in lengths
    ]


def epoch_plan(
    assigned: np.ndarray, num_buckets: int, batch_size: int, rng: np.random.Generator | None
) -> list[tuple[int, np.ndarray]]:
    """Batches of one epoch as (bucket, utterance indices); every utterance occurs exactly once.

    What does not fill a batch moves up into the next bucket, so that only the last batch of the
    last bucket is padded, with index -1.

    Args:
      assigned: bucket of each utterance.
      num_buckets: how many there are.
      batch_size: utterances per batch.
      rng: shuffles utterances within buckets, then batches; None keeps the manifest's order.
    """
    plan = []
    carried = np.zeros(0, int)
    for bucket in range(num_buckets):
        members = np.concatenate([carried, np.flatnonzero(assigned == bucket)])
        if rng is not None:
            members = rng.permutation(members)
        is_last = bucket == num_buckets - 1
        padding = -len(members) % batch_size if is_last else 0
        members = np.pad(members, (0, padding), constant_values=-1)
        num_full = len(members) // batch_size
        batches = members[: num_full * batch_size].reshape(num_full, batch_size)
        plan += [(bucket, batch) for batch in batches]
        carried = members[num_full * batch_size :]
    if rng is not None:
        plan = [plan[i] for i in rng.permutation(len(plan))]
    return plan


class BatchSource:
    """Batches by number, endless when shuffled: batch i is the same for everyone who asks.

    Each process builds only its own rows. `__getitem__` gives a dict of numpy arrays with these
    rows on axis 0: `samples` f32[B, N] or `frames` f32[B, S, E], `frame_valid` bool[B, S], and what
    `Prompt.layout` describes.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        *,
        inputs: Inputs,
        prompt: Prompt,
        config: DataConfig,
        pool_stride: int,
        mesh: Mesh,
        batch_size: int,
        shuffle_seed: int | None = None,
        num_batches: int | None = None,
    ):
        """Plans the batches.

        Args:
          utterances: from `prepare`.
          inputs: waveforms or kept frames.
          prompt: of the run.
          config: lengths.
          pool_stride: k of the projector.
          mesh: decides which rows this process provides.
          batch_size: utterances per batch, over all devices; the arrays have more rows where it
            does not divide over them.
          shuffle_seed: None keeps the order.
          num_batches: length; None is one epoch.
        """
        self.utterances = list(utterances)
        self.buckets = make_buckets(utterances, prompt, config, pool_stride)
        self.mesh = mesh
        self.num_rows = padded_batch_size(mesh, batch_size)
        self._inputs, self._prompt, self._pool_stride = inputs, prompt, pool_stride
        self._assigned = _assign(utterances, config)
        self._seed = shuffle_seed
        self._batch_size = batch_size
        self._rows = local_rows(mesh, self.num_rows)
        self._epoch_len = len(self._epoch(0))
        self._len = self._epoch_len if num_batches is None else num_batches

    @functools.lru_cache(maxsize=2)  # noqa: B019 - one source per run
    def _epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        rng = None if self._seed is None else np.random.default_rng((self._seed, epoch))
        return epoch_plan(self._assigned, len(self.buckets), self._batch_size, rng)

    def __len__(self) -> int:
        return self._len

    def members(self, index: int) -> list[Utterance | None]:
        """Utterances of all rows of a batch, over all processes; None for padding."""
        _, batch = self._epoch(index // self._epoch_len)[index % self._epoch_len]
        padding = [None] * (self.num_rows - len(batch))
        return [self.utterances[i] if i >= 0 else None for i in batch] + padding

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        bucket_index, _ = self._epoch(index // self._epoch_len)[index % self._epoch_len]
        bucket = self.buckets[bucket_index]
        members = self.members(index)
        rows = [self._make_row(members[row], bucket) for row in self._rows]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _make_row(self, utterance: Utterance | None, bucket: Bucket) -> dict[str, np.ndarray]:
        padded = np.zeros(self._inputs.shape(bucket), np.float32)
        num_frames, target, num_audio_tokens = 0, (), 0
        if utterance is not None:
            array, num_frames = self._inputs.read(utterance)
            if num_frames > utterance.max_frames:
                raise ValueError(
                    f"{utterance.row.audio} lasts {num_frames / 50:.2f} s, its manifest says "
                    f"{utterance.row.duration} s: correct the duration or leave it out"
                )
            padded[: len(array)] = array
            target = utterance.target
            num_audio_tokens = output_length(num_frames, self._pool_stride)
        text = _padding_layout(bucket, self._prompt.end_of_turn)
        if target:
            text = self._prompt.layout(
                num_audio_tokens, target, merged_len=bucket.merged_len, text_len=bucket.text_len
            )
        frame_valid = np.arange(bucket.num_frames) < num_frames
        return {self._inputs.name: padded, "frame_valid": frame_valid, **text}


def _padding_layout(bucket: Bucket, fill: int) -> dict[str, np.ndarray]:
    """A row without an utterance: no label counts."""
    zeros = np.zeros(bucket.text_len, np.int32)
    return {
        "tokens": np.full(bucket.merged_len, fill, np.int32),
        "prompt_len": np.array(0, np.int32),
        "label_positions": zeros,
        "labels": zeros,
        "label_valid": zeros.astype(bool),
    }


def make_iterator(source: BatchSource, num_threads: int) -> grain.DatasetIterator:
    """A Grain iterator that reads ahead in threads; `get_state` and `set_state` resume it."""
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def to_global(batch: dict[str, np.ndarray], source: BatchSource) -> dict[str, jax.Array]:
    """Assembles the global batch on the devices from each process's rows."""
    sharding = batch_sharding(source.mesh)
    return {
        name: jax.make_array_from_process_local_data(
            sharding, rows, (source.num_rows, *rows.shape[1:])
        )
        for name, rows in batch.items()
    }
