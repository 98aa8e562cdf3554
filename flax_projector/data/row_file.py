"""Checks the rows of a source, and writes them into columns."""

import functools
import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b, sha256
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
from flax_projector.data.kept import Kept, keep, open_table, table_writer
from flax_projector.data.rows import (
    SCHEMA,
    Rows,
    StoredClips,
    clip_key,
    name_digest,
    row_key,
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


@dataclass(frozen=True, slots=True)
class Draft:
    """A row as written. If it has no duration, that will be read from the file.

    Attributes:
      id: as written, or made from the audio's name and the offset.
      audio: see `ManifestRow`, as for the attributes that follow.
      text: transcript.
      duration: in seconds.
      offset: in seconds.
      has_own_id: whether the id is written in the row.
    """

    id: str
    audio: Audio
    text: str
    duration: float | None
    offset: float | None
    has_own_id: bool = True


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
    total: int | None = None,
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
      total: number of rows, if known.
    """
    names = _Names(source)
    with (
        ThreadPoolExecutor(NUM_THREADS) as pool,
        progress_bar(
            _log, f"rows of {source}", total=total, unit="row", delay=1, leave=False
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
    files = table.select(["is_other_file", "audio", "stamp"])
    doubted = np.flatnonzero(table["depends_on_file"].to_numpy())
    # Millions of tasks would take gigabytes.
    num_rows = min(max(len(table) // (8 * NUM_THREADS), 1), _CHUNK)

    def have_stamps(batch: pa.RecordBatch) -> bool:
        others = batch.filter(batch["is_other_file"])
        pairs = zip(others["audio"].to_pylist(), others["stamp"].to_pylist(), strict=True)
        return all(_stamp_of(path) == stamp for path, stamp in pairs if not is_url(path))

    def has_problem(number: int) -> bool:
        audio, names = rows.audio(number), ("id", "text", "duration", "offset", "detail")
        row_id, text, duration, offset, detail = (rows.value(name, number) for name in names)
        # A duration that was read, since it is too short, is as good as one that is stated.
        draft = Draft(row_id, audio, text, duration, offset)
        record = _check(draft, rows.source, False, _stamp_of(audio), Lengths())
        return record["detail"] == detail

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        same = pool.map(have_stamps, files.to_batches(max_chunksize=num_rows))
        return all(same) and all(pool.map(has_problem, doubted.tolist()))


def _file(draft: Draft | BadRow) -> str:
    """The file that a row's clip is or is in, if there is one."""
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


class _Names:
    """Finds ids and rows that occur twice, by hashes: all rows of a source are not in memory."""

    def __init__(self, source: str) -> None:
        self._source, self._num_rows = source, 0
        self._numbers: list[np.ndarray] = []  # of the drafts among the rows
        self._hashes: list[np.ndarray] = []  # u64[N, 2]: of the id, and of the whole row
        self._are_own: list[np.ndarray] = []

    def add(self, rows: list[Draft | BadRow]) -> None:
        """Takes the next rows."""
        drafts = [(i, row) for i, row in enumerate(rows) if isinstance(row, Draft)]
        self._numbers.append(np.array([self._num_rows + i for i, _ in drafts], np.int64))
        hashes = [(_hash(d.id), _hash(repr(_content(d)))) for _, d in drafts]
        self._hashes.append(np.array(hashes, np.uint64).reshape(-1, 2))
        self._are_own.append(np.array([d.has_own_id for _, d in drafts], bool))
        self._num_rows += len(rows)

    def changes(self, path: Path) -> dict[int, dict[str, Any]]:
        """What to change in a table, by the number of the row.

        Ids that are made from the same name are numbered; rows that occur twice become bad rows.
        """
        numbers, hashes = np.concatenate(self._numbers), np.concatenate(self._hashes)
        are_own = np.concatenate(self._are_own)
        repeated = _repeated(hashes[:, 0]) | _repeated(hashes[:, 1])
        if not repeated.any():
            return {}
        table, ids = open_table(path), np.sort(hashes[:, 0])
        own_ids = np.sort(hashes[are_own, 0])
        made, seen, counts, changes = set(), set(), Counter(), {}

        def is_taken(name: str) -> bool:
            return name in made or _contains(own_ids, _hash(name))

        for number, is_own in zip(numbers[repeated].tolist(), are_own[repeated], strict=True):
            record = table.slice(number, 1).to_pylist()[0]
            row_id = base = record["id"]
            content = row_id if is_own else _values(record)
            if content in seen:
                what = f"id {row_id!r}" if is_own else f"the same row of {_audio_name(record)}"
                changes[number] = {
                    "id": f"row {number + 1}",
                    "text": "",
                    "problem": Problem.DUPLICATE_ID.value,
                    "detail": f"{what} occurs twice",
                    "depends_on_file": False,
                }
            elif not is_own:
                # A number that some other made id happens to end in is passed over.
                while is_taken(row_id) or (row_id != base and _contains(ids, _hash(row_id))):
                    counts[base] += 1
                    row_id = f"{base}#{counts[base] + 1}"
                made.add(row_id)
                if row_id != base:
                    name = name_digest(row_id, record["offset"])
                    key = row_key(self._source, row_id)
                    changes[number] = {"id": row_id, "name": name, "key": key}
            seen.add(content)
        return changes


def _content(draft: Draft) -> Any:
    if draft.has_own_id:
        return draft.id
    return (str(draft.audio), draft.text, draft.duration, draft.offset)


def _values(record: Mapping[str, Any]) -> tuple[Any, ...]:
    values = (record[name] for name in ("text", "duration", "offset"))
    return (_audio_name(record), record["read_secs"] is None, *values)


def _audio_name(record: Mapping[str, Any]) -> str:
    if record["start"] is None:
        return str(record["audio"])
    return str(Slice(record["audio"], record["start"], record["length"]))


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _repeated(hashes: np.ndarray) -> np.ndarray:
    """Whether each of u64[N] occurs more than once."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    same = ordered[1:] == ordered[:-1]
    repeated = np.zeros(len(hashes), bool)
    repeated[order[1:][same]] = True
    repeated[order[:-1][same]] = True
    return repeated


def _contains(ordered: np.ndarray, value: int) -> bool:
    place = np.searchsorted(ordered, np.uint64(value))
    return bool(place < len(ordered) and ordered[place] == value)
