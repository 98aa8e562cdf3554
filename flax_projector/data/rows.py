"""The rows of a source in columns, as Arrow lays them out in a file.

Millions of rows take no Python objects: the file is mapped into memory, processes share it, and a
`ManifestRow` is made of a row only when somebody asks for it.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from flax_projector.data.audio import Audio, Problem, Slice, file_stamp
from flax_projector.data.bad_rows import BadRow, BadRows
from flax_projector.data.kept import Kept
from flax_projector.files import is_url

StoredClips = Callable[[int], Audio]
"""Gives the clip of a row that names no file, by the number of the row."""

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("audio", pa.string()),  # null: the clip is in a table, at the number of the row
        ("start", pa.int64()),  # of a slice, as is the length; in bytes
        ("length", pa.int64()),
        ("text", pa.string()),
        ("duration", pa.float64()),
        ("offset", pa.float64()),
        ("problem", pa.int8()),  # 0 for rows that can be used
        ("detail", pa.string()),
        ("depends_on_file", pa.bool_()),  # whether the problem may go away with another file
        ("read_secs", pa.float64()),  # length of the whole clip, if it was read
        ("is_other_file", pa.bool_()),  # than that of the row before
        ("stamp", pa.string()),  # of the file, if it is another one
        ("name", pa.uint64()),  # see `name_digest`
        ("key", pa.binary(16)),  # see `row_key`
        ("clip", pa.binary(16)),  # see `clip_key`
    ]
)


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One utterance.

    Attributes:
      id: unique within its source.
      audio: path, URL, part of a file, or clip of a data set.
      text: transcript.
      duration: length of the clip in seconds, or of the segment if there is an offset.
      offset: start of the segment in the clip, in seconds. None means that the row is all of it: if
        that is longer than `duration`, the row is bad; it is never cut.
      source: the manifest or data set that it comes from.
    """

    id: str
    audio: Audio
    text: str
    duration: float
    offset: float | None = None
    source: str = ""

    @property
    def key(self) -> str:
        """Unique within a run."""
        return f"{self.source}\t{self.id}"


class Rows(Sequence[ManifestRow]):
    """The rows of a source that can be used; the others are in `bad`.

    Attributes:
      source: the source's name.
      table: a column for each attribute of all rows, those that cannot be used included.
      kept: where the table is kept, with what else is made of it; None if it is only in memory.
      numbers: i32, the number in the table of each row that can be used.
    """

    def __init__(
        self,
        source: str,
        table: pa.Table,
        *,
        kept: Kept | None = None,
        stored: StoredClips | None = None,
    ):
        """Takes a table.

        Args:
          source: the source's name.
          table: with `SCHEMA`.
          kept: where it is kept.
          stored: the clips of rows that name no file, by their numbers.
        """
        self.source, self.table, self.kept, self._stored = source, table, kept, stored
        self._problems = np.asarray(table["problem"])
        self.numbers = np.flatnonzero(self._problems == 0).astype(np.int32)

    @classmethod
    def of(cls, rows: Sequence[ManifestRow]) -> "Rows":
        """Columns of rows that can all be used and have one source, or such an object as it is."""
        if isinstance(rows, Rows):
            return rows
        (source,) = {row.source for row in rows} or {""}
        records, stored = [], None
        for row in rows:
            record = to_record(source, row.id, row.audio, row.text, row.duration, row.offset)
            stamp = json.dumps(file_stamp(row.audio))
            records.append(record | {"clip": clip_key(row.audio, stamp, row.offset, row.duration)})
        if any(record["audio"] is None for record in records):
            stored = [row.audio for row in rows].__getitem__
        return cls(source, pa.Table.from_pylist(records, SCHEMA), stored=stored)

    def __reduce__(self) -> tuple[Any, ...]:
        table = self.table if self.kept is None else None
        return _open, (self.source, table, self.kept, self._stored)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> ManifestRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ManifestRow]: ...
    def __getitem__(self, index: int | slice) -> ManifestRow | Sequence[ManifestRow]:
        if isinstance(index, slice):
            return [self.row(int(number)) for number in self.numbers[index]]
        return self.row(int(self.numbers[index]))

    def row(self, number: int) -> ManifestRow:
        """A row, by its number in the table."""
        return ManifestRow(
            self.value("id", number),
            self.audio(number),
            self.value("text", number),
            self.value("duration", number),
            self.value("offset", number),
            self.source,
        )

    def audio(self, number: int) -> Audio:
        """The clip of a row."""
        name = self.value("audio", number)
        if name is None:
            assert self._stored is not None  # the rows of a manifest name their files
            return self._stored(number)
        start = self.value("start", number)
        return name if start is None else Slice(name, start, self.value("length", number))

    def value(self, column: str, number: int) -> Any:
        """A value of a row, by its number in the table."""
        return self._columns[column][number].as_py()

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, of the rows that can be used."""
        return self.table[name].to_numpy()[self.numbers]

    def keys(self, name: str, numbers: np.ndarray) -> np.ndarray:
        """u64[2, N], a column of 16 bytes: the first halves, then the second ones.

        Args:
          name: of the column.
          numbers: which rows, by their numbers in the table.
        """
        chunks = [np.frombuffer(c.buffers()[1], "<u8").reshape(-1, 2) for c in _whole(self, name)]
        pairs = np.concatenate([np.zeros((0, 2), "<u8"), *chunks])[numbers]
        return np.ascontiguousarray(pairs.T)  # searches run along one half

    @functools.cached_property
    def bad(self) -> BadRows:
        """The rows that cannot be used."""
        numbers = np.flatnonzero(self._problems)

        def make(index: int) -> BadRow:
            number = int(numbers[index])
            problem = Problem(int(self._problems[number]))
            texts = (self.value(name, number) for name in ("id", "detail", "text"))
            row_id, detail, text = texts
            return BadRow(row_id, self.source, problem, detail, text)

        return BadRows(self._problems[numbers], make)

    @functools.cached_property
    def _columns(self) -> dict[str, pa.ChunkedArray]:
        return {name: self.table[name] for name in self.table.column_names}


def _open(
    source: str, table: pa.Table | None, kept: Kept | None, stored: StoredClips | None
) -> Rows:
    if table is None:
        assert kept is not None  # see Rows.__reduce__
        table = kept.table
    return Rows(source, table, kept=kept, stored=stored)


def _whole(rows: Rows, name: str) -> Iterator[pa.Array]:
    """The chunks of a column, none of which begins within its memory."""
    for chunk in rows.table[name].chunks:
        yield chunk if chunk.offset == 0 else pa.concat_arrays([chunk])


def to_record(
    source: str,
    row_id: str,
    audio: Audio | None,
    text: str,
    duration: float | None,
    offset: float | None,
) -> dict[str, Any]:
    """The columns of a row that can be used, but for those that its file gives.

    Args:
      source: of the row.
      row_id: its id.
      audio: its clip; None for one that cannot be used.
      text: its transcript.
      duration: in seconds.
      offset: in seconds.
    """
    is_slice = isinstance(audio, Slice)
    path = audio.path if is_slice else audio
    return {
        "id": row_id,
        "audio": str(path) if isinstance(path, str | Path) else None,
        "start": audio.start if is_slice else None,
        "length": audio.length if is_slice else None,
        "text": text,
        "duration": duration,
        "offset": offset,
        "problem": 0,
        "detail": None,
        "depends_on_file": False,
        "read_secs": None,
        "is_other_file": False,
        "stamp": None,
        "name": name_digest(row_id, offset),
        "key": row_key(source, row_id),
        "clip": bytes(16),
    }


def row_key(source: str, row_id: str) -> bytes:
    """16 bytes for `ManifestRow.key`."""
    return _digest(f"{source}\t{row_id}")


def clip_key(audio: Audio, stamp: str, offset: float | None, duration: float) -> bytes:
    """16 bytes that change when a row's samples may.

    Args:
      audio: the clip.
      stamp: what changes when its file or data set does.
      offset: in seconds.
      duration: in seconds.
    """
    name = str(audio)
    if isinstance(audio, str | Path) and not is_url(name):
        name = os.path.abspath(name)  # manifests in other folders name the same file
    offset = None if offset is None else float(offset)
    return _digest(repr((name, stamp, offset, float(duration))))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def name_digest(row_id: str, offset: float | None) -> int:
    """A hash of what a row is called, wherever its files are.

    An id that is not given is made from the path of the clip: only its last part counts.
    """
    name = f"{row_id.rpartition('/')[2]}\t{offset}"
    return hash64(name.encode())


def hash64(content: bytes) -> int:
    """A hash that fits in u64."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
