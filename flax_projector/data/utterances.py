"""The utterances of a set: rows with their labels, and what a batch must know of them."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import pyarrow as pa
from pyarrow.compute import SetLookupOptions, call_function

from flax_projector.chat.prompt import Prompt
from flax_projector.config import DataConfig
from flax_projector.data.audio import BadAudio, Problem, file_of, read_duration
from flax_projector.data.bad_rows import BadRow, BadRows
from flax_projector.data.labels import Labels, make_labels
from flax_projector.data.row_file import NUM_THREADS
from flax_projector.data.rows import ManifestRow, Rows
from flax_projector.data.shared_arrays import SharedArrays
from flax_projector.data.sound import DURATION_TOLERANCE_SECS
from flax_projector.files import is_url
from flax_projector.lengths import SAMPLE_RATE, num_encoder_frames


@dataclass(frozen=True, slots=True)
class Utterance:
    """A row, with what a batch must know about it before any audio is read.

    Attributes:
      row: the row itself.
      max_frames: the most encoder frames that it may fill; stated durations are rounded. With
        `--data.audio-tokens window`, those of the window.
      target: label ids, including the end of turn.
    """

    row: ManifestRow
    max_frames: int
    target: tuple[int, ...]


class Utterances(Sequence[Utterance]):
    """The utterances of a set, in columns; an `Utterance` is made when somebody asks for it.

    Worker processes share the columns, which they do not copy.

    Attributes:
      sources: names of the sources that have utterances, in order.
      source_numbers: u16[N], each utterance's number in them.
      durations: f64[N], in seconds.
      max_frames: i32[N], see `Utterance`.
      num_labels: i32[N].
    """

    def __init__(self, parts: Sequence[tuple[Rows, Labels]], columns: SharedArrays):
        """Takes rows with their labels.

        Args:
          parts: of each source.
          columns: "part" and "number", where a row is; "durations", "max_frames", "num_labels".
        """
        self._parts, self._columns = parts, columns
        self._part, self._number = columns["part"], columns["number"]
        self.durations, self.max_frames = columns["durations"], columns["max_frames"]
        self.num_labels = columns["num_labels"]
        used = np.unique(self._part)
        names = [parts[i][0].source for i in used]
        self.sources = list(dict.fromkeys(names))
        number_of = np.zeros(len(parts), np.uint16)
        number_of[used] = [self.sources.index(name) for name in names]
        self._source_of_part = number_of

    @classmethod
    def of(cls, utterances: Sequence[Utterance]) -> "Utterances":
        """Columns of utterances of one source that are there already."""
        rows = Rows.of([u.row for u in utterances])
        columns = SharedArrays(
            part=np.zeros(len(utterances), np.uint16),
            number=np.arange(len(utterances), dtype=np.int32),
            durations=np.array([u.row.duration for u in utterances]),
            max_frames=np.array([u.max_frames for u in utterances], np.int32),
            num_labels=np.array([len(u.target) for u in utterances], np.int32),
        )
        return cls([(rows, Labels.of([u.target for u in utterances]))], columns)

    def __reduce__(self) -> tuple[Any, ...]:
        return Utterances, (self._parts, self._columns)

    def __len__(self) -> int:
        return len(self._number)

    @overload
    def __getitem__(self, index: int) -> Utterance: ...
    @overload
    def __getitem__(self, index: slice) -> list[Utterance]: ...
    def __getitem__(self, index: int | slice) -> Utterance | list[Utterance]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        rows, labels = self._parts[self._part[index]]
        number = int(self._number[index])
        row = replace(rows.row(number), duration=float(self.durations[index]))
        return Utterance(row, int(self.max_frames[index]), labels[number])

    @property
    def source_numbers(self) -> np.ndarray:
        """u16[N], the number of each utterance's source in `sources`."""
        return self._source_of_part[self._part]

    def find(self, keys: Iterable[str]) -> list[Utterance]:
        """Those of some rows, by `ManifestRow.key`."""
        ids: dict[str, list[str]] = {}
        for source, _, row_id in (key.partition("\t") for key in keys):
            ids.setdefault(source, []).append(row_id)
        found = []
        for part, (rows, _) in enumerate(self._parts):
            if rows.source not in ids:
                continue
            is_one = call_function(
                "is_in",
                [rows.table["id"]],
                SetLookupOptions(pa.array(ids[rows.source], pa.string())),
            )
            numbers = np.flatnonzero(is_one.to_numpy())
            is_found = (self._part == part) & np.isin(self._number, numbers)
            found += [self[int(i)] for i in np.flatnonzero(is_found)]
        return found

    def spoken(self) -> np.ndarray:
        """The ids of labels that occur in transcripts, ascending: not the ends of turns."""
        ids = [np.zeros(0, np.int32)]
        for part, (_, labels) in enumerate(self._parts):
            ids.append(labels.spoken(self._number[self._part == part]))
        return np.unique(np.concatenate(ids))

    def keys(self, name: str) -> np.ndarray:
        """u64[2, N], a column of 16 bytes; see `Rows.keys`."""
        found = np.zeros((2, len(self)), np.uint64)
        for part, (rows, _) in enumerate(self._parts):
            is_here = self._part == part
            found[:, is_here] = rows.keys(name, self._number[is_here])
        return found

    def update(self, digest: Any) -> None:
        """Adds everything to a hash that batches depend on, wherever the clips are."""
        digest.update(self.source_numbers.tobytes())
        digest.update(np.ascontiguousarray(self.durations).tobytes())
        for part, (rows, labels) in enumerate(self._parts):
            numbers = self._number[self._part == part]
            for column in (rows.table["name"].to_numpy(), labels.digests()):
                digest.update(column[numbers].tobytes())


def prepare(
    sources: Sequence[Rows], prompt: Prompt, config: DataConfig
) -> tuple[Utterances, BadRows]:
    """Makes labels; rows that no bucket can hold are returned as bad rows instead.

    Raises:
      ValueError: if nothing is left.
    """
    limit, window_frames = config.bucket_secs[-1], num_encoder_frames(config.window_samples)
    parts, columns, unfit = [], [], []
    for part, rows in enumerate(sources):
        labels = make_labels(rows, prompt.encode_target, config.text_case)
        durations = settle_lengths(rows, limit_secs=limit, window_secs=config.window_secs)
        num_labels = labels.lengths()[rows.numbers]
        too_long, too_many = durations > limit, num_labels > config.max_text_tokens
        if config.whole_window:
            max_frames = np.full(len(rows), window_frames, np.int32)
        else:
            # With a margin, since manifests round durations and resampling rounds samples.
            samples = np.rint((durations + DURATION_TOLERANCE_SECS) * SAMPLE_RATE).astype(int)
            max_frames = np.minimum(num_encoder_frames(samples) + 1, window_frames)
        fits = ~(too_long | too_many)
        parts.append((rows, labels))
        columns.append(
            {
                "part": np.full(fits.sum(), part, np.uint16),
                "number": rows.numbers[fits],
                "durations": durations[fits],
                "max_frames": max_frames[fits].astype(np.int32),
                "num_labels": num_labels[fits],
            }
        )
        unfit.append(_unfit(rows, durations, num_labels, too_long, too_many, config))
    joined = {name: np.concatenate([each[name] for each in columns]) for name in columns[0]}
    if not len(joined["number"]):
        bounds = " ".join(f"{secs:g}" for secs in config.bucket_secs)
        raise ValueError(
            f"none of {sum(map(len, sources))} utterances fits the run: all are longer than its "
            f"--data.bucket-secs {bounds}, or have more labels than its --data.max-text-tokens "
            f"{config.max_text_tokens}"
        )
    return Utterances(parts, SharedArrays(**joined)), BadRows.joined(unfit)


def _unfit(
    rows: Rows,
    durations: np.ndarray,
    num_labels: np.ndarray,
    too_long: np.ndarray,
    too_many: np.ndarray,
    config: DataConfig,
) -> BadRows:
    """The rows of a source that are beyond the run's limits."""
    indices, limit = np.flatnonzero(too_long | too_many), config.bucket_secs[-1]
    problems = np.where(too_long[indices], Problem.TOO_LONG.value, Problem.TOO_MANY_LABELS.value)
    durations, num_labels = durations[indices], num_labels[indices]

    def make(index: int) -> BadRow:
        row = rows[int(indices[index])]
        problem = Problem(int(problems[index]))
        detail = f"{durations[index]:.3f} s; --data.bucket-secs ends at {limit:g}"
        if problem is Problem.TOO_MANY_LABELS:
            detail = (
                f"{num_labels[index]} labels; --data.max-text-tokens is {config.max_text_tokens}"
            )
        return BadRow(row.id, row.source, problem, detail, row.text)

    return BadRows(problems.astype(np.int8), make)


def settle_lengths(rows: Rows, *, limit_secs: float, window_secs: float) -> np.ndarray:
    """f64[N], the lengths of rows: of those that are about as long as they may be, their files'.

    Stated durations are rounded, so such a clip may lie on either side of the limit. Headers of
    files at URLs are not fetched for this.

    Args:
      rows: rows that can be used.
      limit_secs: longer clips are left out.
      window_secs: no clip can be longer.
    """
    durations = rows.column("duration")
    is_near = np.where(
        durations > limit_secs,
        durations <= limit_secs + DURATION_TOLERANCE_SECS,
        durations + DURATION_TOLERANCE_SECS > window_secs,
    )

    def settle(index: int) -> float:
        row = rows[index]
        if is_url(file_of(row.audio)):
            return row.duration
        try:
            left = round(read_duration(row.audio) - (row.offset or 0.0), 6)
        except BadAudio:  # reported when it is read for a batch
            return row.duration
        if abs(left - row.duration) > DURATION_TOLERANCE_SECS:  # a segment, or reported then, too
            return row.duration
        return left

    near = np.flatnonzero(is_near)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        durations[near] = list(pool.map(settle, near.tolist()))
    return durations
