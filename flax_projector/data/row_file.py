"""Checks the rows of a source, and writes them into columns."""

import functools
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flax_projector.data.audio import (
    Audio,
    BadAudio,
    Problem,
    Slice,
    check_duration,
    file_of,
    file_stamp,
    read_duration,
)
from flax_projector.data.bad_rows import BadRow
from flax_projector.data.drafts import Draft, Names
from flax_projector.data.kept import Kept, keep, open_table, table_writer
from flax_projector.data.rows import (
    SCHEMA,
    Rows,
    StoredClips,
    clip_key,
    to_record,
)
from flax_projector.files import is_url
from flax_projector.lengths import FRAME_SECS
from flax_projector.logs import progress_bar
from flax_projector.storage import AnyPath, temporary_folder

_log = logging.getLogger(__name__)

NUM_THREADS = 32  # they mostly wait for disks and networks
_DOUBTFUL_SECS = 60  # longer than any window: stated durations above it are compared with the file
_CHUNK = 16_384  # rows in memory at a time
_NO_FILE = "[]"  # the stamp of what is not there, or at a URL
_VERSION = 1  # of this code: what it makes of the same rows


class Lengths:
    """Lengths of whole clips that an earlier start has read.

    A clip whose file has changed is read again; URLs are assumed not to change.
    """

    def __init__(self, earlier: Rows | None = None):
        """Takes what the rows of an earlier start say."""
        self._known: dict[str, tuple[float, str]] = {}
        if earlier is None:
            return
        stamp = ""
        columns = (earlier.table[name] for name in ("read_secs", "is_other_file", "stamp"))
        for number, (secs, is_other, new_stamp) in enumerate(zip(*columns, strict=True)):
            stamp = new_stamp.as_py() if is_other.as_py() else stamp
            if secs.is_valid:
                self._known[str(earlier.audio(number))] = (secs.as_py(), stamp)

    def read(self, audio: Audio, stamp: str) -> float:
        """Length of a clip in seconds; several threads may call this.

        Raises:
          BadAudio: if the clip is missing or cannot be read or decoded.
        """
        secs, known_stamp = self._known.get(str(audio), (0.0, None))
        return secs if known_stamp == stamp else read_duration(audio)


def write_rows(
    path: Path,
    drafts: Iterable[Draft | BadRow],
    source: str,
    *,
    made_from: str,
    lengths: Lengths,
) -> None:
    """Sorts rows into usable and bad ones, and writes both.

    Checks that local files exist and reads missing durations, in threads. Clips are not decoded
    until they are used. Ids must be unique; those that are made from the audio's name are made so.

    Args:
      path: of the table to write.
      drafts: rows as written, or already known to be bad.
      source: name of the rows' source.
      made_from: see `kept.keep`.
      lengths: what is known of the clips.
    """
    names = Names(source)
    with (
        ThreadPoolExecutor(NUM_THREADS) as pool,
        progress_bar(
            _log, f"rows of {source}", total=None, unit="row", delay=1, leave=False
        ) as progress,
        table_writer(path, SCHEMA, made_from) as write_batch,
    ):
        drafts, file, stamp = iter(drafts), "", _stamp_of("")
        while chunk := list(itertools.islice(drafts, _CHUNK)):
            files = [_file(draft) for draft in chunk]
            others = [new != old for old, new in itertools.pairwise([file, *files])]
            stamps = pool.map(_stamp, list(itertools.compress(chunk, others)))
            pending = []
            for draft, is_other in zip(chunk, others, strict=True):
                stamp = next(stamps) if is_other else stamp
                check = functools.partial(_check, draft, source, is_other, stamp, lengths)
                # A thread is worth its while only where a file is read.
                pending.append(pool.submit(check).result if _reads_clip(draft) else check)
            records = [finish() for finish in pending]
            write_batch(pa.RecordBatch.from_pylist(records, SCHEMA))
            names.add(chunk)
            file = files[-1]
            progress.update(len(chunk))
    if changes := names.changes(path):
        _rewrite(path, made_from, changes)


def keep_rows(
    source: str,
    make_drafts: Callable[[], Iterable[Draft | BadRow]],
    *,
    origin: str,
    made_from: str | None,
    beside: AnyPath | None,
    cache: Path | None,
    stored: StoredClips | None = None,
) -> Rows:
    """The rows of a source in columns, which are kept from one start to the next.

    Args:
      source: name of the rows' source.
      make_drafts: reads the rows.
      origin: the manifest's path, or the data set's name.
      made_from: what changes when the source does; None if that cannot be known: then nothing is
        kept.
      beside: folder for the columns of a large source.
      cache: folder for those of a small one, which are not kept without.
      stored: the clips of rows that name no file, by their numbers.
    """
    digest = sha256(origin.encode()).hexdigest()[:16]
    folders = [beside] if beside is not None and made_from is not None else []
    folders.append(temporary_folder() if cache is None or made_from is None else cache)
    made_from = f"{_VERSION} {source} {made_from}"

    def rows_of(kept: Kept) -> Rows:
        return Rows(source, kept.table, kept=kept, stored=stored)

    def write(path: Path, old: Path | None) -> None:
        earlier = None
        if old is not None and open_table(old).schema.equals(SCHEMA):
            earlier = Rows(source, open_table(old), stored=stored)
        write_rows(path, make_drafts(), source, made_from=made_from, lengths=Lengths(earlier))

    kept = keep(
        f"rows-{digest}.arrow",
        folders,
        write,
        made_from=made_from,
        is_current=lambda kept: _is_current(rows_of(kept)),
    )
    return rows_of(kept)


def _is_current(rows: Rows) -> bool:
    """Whether the files of rows are those that were checked, and their problems still the same."""
    table = rows.table
    doubted = np.flatnonzero(table["depends_on_file"].to_numpy())
    # A task for many rows, and within one piece of the table: a whole column is never copied.
    num_rows = min(max(len(table) // (8 * NUM_THREADS), 1), _CHUNK)
    batches = table.select(["is_other_file", "audio", "stamp"]).to_batches(max_chunksize=num_rows)
    starts = np.cumsum([0, *map(len, batches)])[:-1]

    def have_stamps(start: int, batch: pa.RecordBatch) -> bool:
        numbers = start + np.flatnonzero(batch["is_other_file"].to_numpy(zero_copy_only=False))
        others = batch.filter(batch["is_other_file"]).to_pydict()
        for number, name, stamp in zip(numbers, others["audio"], others["stamp"], strict=True):
            audio = rows.audio(int(number)) if name is None else name
            if not is_url(file_of(audio)) and _stamp_of(audio) != stamp:
                return False
        return True

    def has_problem(number: int) -> bool:
        audio, names = rows.audio(number), ("id", "text", "duration", "offset", "detail")
        row_id, text, duration, offset, detail = (rows.value(name, number) for name in names)
        # A duration that was read, since it is too short, is as good as one that is stated.
        draft = Draft(row_id, audio, text, duration, offset)
        record = _check(draft, rows.source, False, _stamp_of(audio), Lengths())
        return record["detail"] == detail

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        same = pool.map(have_stamps, starts.tolist(), batches)
        return all(same) and all(pool.map(has_problem, doubted.tolist()))


def _file(draft: Draft | BadRow) -> str:
    return "" if isinstance(draft, BadRow) else file_of(draft.audio)


def _reads_clip(draft: Draft | BadRow) -> bool:
    if isinstance(draft, BadRow) or not draft.text:
        return False
    return draft.duration is None or draft.duration > _DOUBTFUL_SECS


def _stamp(draft: Draft | BadRow) -> str:
    return "" if isinstance(draft, BadRow) else _stamp_of(draft.audio)


def _stamp_of(audio: Audio) -> str:
    return json.dumps(file_stamp(audio))


def _check(
    draft: Draft | BadRow, source: str, is_other_file: bool, stamp: str, lengths: Lengths
) -> dict[str, Any]:
    """The columns of a row."""
    if isinstance(draft, BadRow):
        record = to_record(draft.source, draft.id, None, draft.text, None, None)
        return record | {"problem": draft.reason.value, "detail": draft.detail}
    audio, text, duration, offset = draft.audio, draft.text, draft.duration, draft.offset
    record = to_record(source, draft.id, audio, text, duration, offset)
    if is_other_file:
        record |= {"is_other_file": True, "stamp": stamp}
    if not text:
        detail = f"{audio} has no transcript"
        return record | {"problem": Problem.EMPTY_TEXT.value, "detail": detail}
    if not (path := file_of(audio)):  # in a table, which has a stamp of its own
        stamp = _stamp_of(audio)
    try:
        if duration is None or duration > _DOUBTFUL_SECS:
            record["read_secs"] = secs = lengths.read(audio, stamp)
            if duration is None:
                record["duration"] = duration = max(secs - (offset or 0), 0.0)
            else:
                # Most often milliseconds; without a look at the file, the row would be left out as
                # too long by design.
                check_duration(audio, secs, offset=offset, duration=duration)
        elif path and not is_url(path) and stamp == _NO_FILE:
            raise BadAudio(Problem.MISSING_FILE, f"{path} does not exist")
        elif isinstance(audio, Slice) and stamp != _NO_FILE:
            audio.require_end(json.loads(stamp)[0])
        if duration < FRAME_SECS:
            where = "" if offset is None else f" from {offset:g} s on"
            raise BadAudio(
                Problem.TOO_SHORT,
                f"{audio} lasts {duration:.4f} s{where}, less than an encoder frame of "
                f"{FRAME_SECS} s",
            )
    except BadAudio as error:
        bad = {"problem": error.problem.value, "detail": str(error), "depends_on_file": True}
        return record | bad
    return record | {"clip": clip_key(audio, stamp, offset, duration)}


def _rewrite(path: Path, made_from: str, changes: Mapping[int, Mapping[str, Any]]) -> None:
    """Changes some rows of a table."""
    other = path.with_name(f"{path.name}.other")
    try:
        with table_writer(other, SCHEMA, made_from) as write_batch:
            start = 0
            for batch in open_table(path).to_batches():
                numbers = [n for n in range(start, start + len(batch)) if n in changes]
                if numbers:
                    records = batch.to_pylist()
                    for number in numbers:
                        records[number - start] |= changes[number]
                    batch = pa.RecordBatch.from_pylist(records, SCHEMA)
                write_batch(batch)
                start += len(batch)
        other.replace(path)
    finally:
        other.unlink(missing_ok=True)
