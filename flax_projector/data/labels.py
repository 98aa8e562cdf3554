"""The labels of transcripts, made once and kept with the rows that they belong to."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow.compute import call_function

from flax_projector.chat.prompt import TranscriptEncoder
from flax_projector.data.kept import Kept, keep, table_writer
from flax_projector.data.rows import Rows, hash64
from flax_projector.logs import progress_bar

_log = logging.getLogger(__name__)

_SCHEMA = pa.schema([("ids", pa.list_(pa.int32())), ("digest", pa.uint64())])
_CHUNK = 16_384  # rows in memory at a time


class Labels:
    """The labels of the rows of a source, by their numbers in its table.

    Attributes:
      table: the ids of the labels, and a hash of them; none for rows that cannot be used.
    """

    def __init__(self, table: pa.Table, kept: Kept | None = None):
        """Takes a table, and where it is kept."""
        self.table, self._kept = table, kept
        self._ids = table["ids"]

    @classmethod
    def of(cls, labels: Sequence[tuple[int, ...]]) -> "Labels":
        """Labels that are there already."""
        return cls(pa.Table.from_batches([_to_batch(labels)]))

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, (self.table if self._kept is None else None, self._kept)

    def __getitem__(self, number: int) -> tuple[int, ...]:
        return tuple(self._ids[number].as_py())

    def lengths(self) -> np.ndarray:
        """i32[N], the number of labels of each row."""
        return _lengths(self._ids)

    def digests(self) -> np.ndarray:
        """u64[N], a hash of each row's labels."""
        return self.table["digest"].to_numpy()

    def spoken(self, numbers: np.ndarray) -> np.ndarray:
        """The ids that occur in the transcripts of some rows, ascending: not the ends of turns."""
        is_one = np.zeros(len(self.table), bool)
        is_one[numbers] = True
        found, start = np.zeros(0, np.int32), 0
        for chunk in self._ids.chunks:  # one by one: a whole column is never copied
            ids = chunk.filter(pa.array(is_one[start : start + len(chunk)]))
            ends = np.cumsum(_lengths(ids))
            found = np.union1d(found, np.delete(ids.flatten().to_numpy(), ends - 1))
            start += len(chunk)
        return found


def _lengths(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    return call_function("list_value_length", [ids]).to_numpy()


def _open(table: pa.Table | None, kept: Kept | None) -> Labels:
    if table is None:
        assert kept is not None  # see Labels.__reduce__
        table = kept.table
    return Labels(table, kept)


def make_labels(rows: Rows, encode: TranscriptEncoder, text_case: str) -> Labels:
    """The labels of the rows of a source.

    Args:
      rows: the rows.
      encode: makes the labels of transcripts.
      text_case: "keep", or "lower" to turn transcripts into lower case first.

    Raises:
      ValueError: if a transcript cannot be encoded.
    """
    if rows.kept is None:
        batches = [_encode(batch, encode, text_case) for batch in rows.table.to_batches()]
        return Labels(pa.Table.from_batches(batches, _SCHEMA))

    def write(path: Path, _: Path | None) -> None:
        with (
            progress_bar(
                _log,
                f"labels of {rows.source}",
                total=rows.table.num_rows,
                unit="row",
                delay=1,
                leave=False,
            ) as progress,
            table_writer(path, _SCHEMA, made_from) as write_batch,
        ):
            for batch in rows.table.to_batches(max_chunksize=_CHUNK):
                write_batch(_encode(batch, encode, text_case))
                progress.update(len(batch))

    how = f"{rows.source} {encode.digest()} {text_case}"
    made_from = f"{how} {rows.kept.nonce}"
    file = f"labels-{hashlib.sha256(how.encode()).hexdigest()[:16]}.arrow"
    kept = keep(file, [rows.kept.folder], write, made_from=made_from)
    return Labels(kept.table, kept)


def _encode(batch: pa.RecordBatch, encode: TranscriptEncoder, text_case: str) -> pa.RecordBatch:
    problems = np.asarray(batch["problem"])
    texts = batch["text"].filter(pa.array(problems == 0)).to_pylist()
    made = iter(encode.batch([t.lower() if text_case == "lower" else t for t in texts]))
    ids = [next(made) if problem == 0 else () for problem in problems]
    return _to_batch(ids)


def _to_batch(labels: Sequence[Sequence[int]]) -> pa.RecordBatch:
    digests = np.array([_digest(ids) for ids in labels], np.uint64)
    return pa.RecordBatch.from_arrays(
        [pa.array(labels, pa.list_(pa.int32())), pa.array(digests)], schema=_SCHEMA
    )


def _digest(ids: Sequence[int]) -> int:
    return hash64(np.asarray(ids, np.int32).tobytes())
