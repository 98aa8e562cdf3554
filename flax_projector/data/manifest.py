"""Manifests: lists of clips and their transcripts."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import reprlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from flax_projector.data.audio import (
    Audio,
    BadAudio,
    Problem,
    Slice,
    check_duration,
    file_of,
    file_stamp,
    read_duration,
    require_file,
)
from flax_projector.data.bad_rows import BadRow
from flax_projector.data.manifest_text import (
    AUDIO,
    BYTES,
    DURATION,
    OFFSET,
    check_utf8,
    read_range,
    read_raw_rows,
    read_text,
)
from flax_projector.data.sound import DURATION_TOLERANCE_SECS
from flax_projector.files import is_url, reading, write_atomically
from flax_projector.lengths import FRAME_SECS
from flax_projector.logs import progress_bar
from flax_projector.storage.urls import filesystem_of

_log = logging.getLogger(__name__)

_NUM_THREADS = 32  # they mostly wait for disks and networks
_DOUBTFUL_SECS = 60  # longer than any window: stated durations above it are compared with the file
_CHUNK = 4096  # rows handed to the threads at a time


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One utterance.

    Attributes:
      id: unique within its source.
      audio: path, URL or stored clip.
      text: transcript.
      duration: length of the clip in seconds, or of the segment if there is an offset.
      offset: start of the segment in the file, in seconds. None means that the row is a whole
        file: if that is longer than `duration`, the row is bad; it is never cut.
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


@dataclass(frozen=True, slots=True)
class Draft:
    """A row as written. If it has no duration, that will be read from the file.

    Attributes:
      id: as written, or made from the audio's name, its range of bytes and the offset.
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


class Durations:
    """Lengths of clips whose rows do not state them, kept from one start of a run to the next.

    A clip whose file or data set has changed is read again; URLs are assumed not to change.
    """

    def __init__(self, folder: Path | None, source: str):
        """Loads the known lengths of a source's clips.

        Args:
          folder: where they are kept; None keeps nothing.
          source: name of the source.
        """
        digest = hashlib.sha256(source.encode()).hexdigest()[:16]
        self._path = folder / f"lengths-{digest}.json" if folder else None
        self._known: dict[str, tuple[float, list[int | str]]] = {}
        self._is_changed = False
        if self._path is not None and self._path.is_file():
            with reading(self._path, way_out="remove it, and the lengths are read again"):
                known = json.loads(self._path.read_text("utf-8")).items()
                self._known = {name: (secs, stamp) for name, (secs, stamp) in known}

    def read(self, audio: Audio) -> float:
        """Length of a clip in seconds; several threads may call this.

        Raises:
          BadAudio: if the clip is missing or cannot be read or decoded.
        """
        stamp = file_stamp(audio)
        secs, known_stamp = self._known.get(str(audio), (0.0, None))
        if known_stamp != stamp:
            secs = read_duration(audio)
            self._known[str(audio)] = (secs, stamp)
            self._is_changed = True
        return secs

    def save(self) -> None:
        """Saves the lengths that were read; where that is impossible, they will be read again."""
        if self._path is not None and self._is_changed and jax.process_index() == 0:
            try:
                write_atomically(self._path, json.dumps(self._known))
            except OSError as error:
                _log.warning("lengths of clips are not kept: %s", error)


def read_manifest(
    path: str | Path,
    *,
    source: str | None = None,
    max_rows: int | None = None,
    cache: Path | None = None,
) -> tuple[list[ManifestRow], list[BadRow]]:
    """Reads a manifest.

    A `.jsonl` manifest has one object per line: "audio" (an absolute path, a URL, or a path
    relative to the manifest's folder), "text", and optionally "id", "duration" and "offset" in
    seconds, and "bytes": [start, length]. A `.tsv` manifest has a header with "path" (or "audio"),
    "text" and optionally "id", "seconds" (or "duration"), "offset" and "bytes". A row with bytes is
    a part of a larger file; one with an offset is a segment of a longer clip.
    Missing durations are read from the files, which is slow for audio at URLs.

    Args:
      path: a local path, or a URL.
      source: name of the rows' source; the path by default.
      max_rows: how many rows to read from the start; None reads all.
      cache: folder for durations that had to be read.

    Returns:
      The rows that can be used, in the manifest's order, and the bad rows.

    Raises:
      ValueError: if the manifest cannot be read, has another suffix, has no rows, or has no column
        for the audio or the text.
    """
    path = str(path)
    source = path if source is None else source
    check_utf8("manifest", path)
    raw_rows = read_raw_rows(path)
    folder = path.rpartition("/")[0] if is_url(path) else os.path.dirname(path)
    drafts = [
        _make_draft(raw, folder, f"row {n}", source) for n, raw in enumerate(raw_rows[:max_rows], 1)
    ]
    files = (file_of(draft.audio) for draft in drafts if isinstance(draft, Draft))
    for url in filter(is_url, files):
        filesystem_of(url)
        break
    return check_rows(drafts, source, Durations(cache, source))


def _make_draft(raw: dict[str, Any] | str, folder: str, place: str, source: str) -> Draft | BadRow:
    if isinstance(raw, str):
        return BadRow(place, source, Problem.MALFORMED, raw)
    row_id, text = _first(raw, ("id",)), ""
    try:
        text = read_text(raw.get("text"))
        if row_id is not None and not _is(row_id, str, int, float):
            raise ValueError(f"the id {reprlib.repr(row_id)} is neither a string nor a number")
        name = _first(raw, AUDIO)
        if name is None:
            raise ValueError(f"no 'audio' in {sorted(raw)[:20]}")
        if not _is(name, str) or "\0" in name:
            raise ValueError(f"the audio {reprlib.repr(name)} is neither a path nor a URL")
        check_utf8("id", str(row_id))
        check_utf8("audio", name)
        duration, offset = _read_number(raw, DURATION), _read_number(raw, OFFSET)
        span = read_range(_first(raw, BYTES))
    except ValueError as error:
        return BadRow(place, source, Problem.MALFORMED, str(error), text)
    where = "" if span is None else f"[{span[0]}:{sum(span)}]"
    where += "" if offset is None else f"@{offset:.15g}"
    default_id = f"{os.path.splitext(name)[0]}{where}"
    if not is_url(name) and not os.path.isabs(name):
        name = f"{folder}/{name}" if is_url(folder) else os.path.join(folder, name)
    return Draft(
        default_id if row_id is None else str(row_id),
        name if span is None else Slice(name, *span),
        text,
        duration or None,
        offset,
        has_own_id=row_id is not None,
    )


def _first(raw: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The first value among columns that is not empty, or None."""
    return next((raw[name] for name in names if raw.get(name) not in (None, "")), None)


def _is(value: Any, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)  # a bool is an int in Python


def _read_number(raw: dict[str, Any], names: tuple[str, ...]) -> float | None:
    value, number = _first(raw, names), math.nan
    if value is None:
        return None
    if _is(value, str, int, float):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{names[0]}: {reprlib.repr(value)} is not a number of seconds")
    return number


def check_rows(
    drafts: Sequence[Draft | BadRow], source: str, durations: Durations
) -> tuple[list[ManifestRow], list[BadRow]]:
    """Sorts rows into usable and bad ones.

    Checks that local files exist and reads missing durations, in threads. Clips are not decoded
    until they are used. Ids must be unique; those that are made from the audio's name are made so.

    Args:
      drafts: rows as written, or already known to be bad.
      source: name of the rows' source.
      durations: the known durations, to which those that are read are added.

    Returns:
      Both lists, in the original order.
    """
    drafts = _tell_apart(drafts, source)
    rows: list[ManifestRow | BadRow] = []
    with (
        ThreadPoolExecutor(_NUM_THREADS) as pool,
        progress_bar(
            _log, f"rows of {source}", total=len(drafts), unit="row", delay=1, leave=False
        ) as progress,
    ):
        for start in range(0, len(drafts), _CHUNK):
            chunk = drafts[start : start + _CHUNK]
            rows += pool.map(lambda draft: _check_row(draft, source, durations), chunk)
            progress.update(len(chunk))
    durations.save()
    good = [row for row in rows if isinstance(row, ManifestRow)]
    return good, [row for row in rows if isinstance(row, BadRow)]


def settle_lengths(
    rows: Sequence[ManifestRow], *, limit_secs: float, window_secs: float
) -> list[ManifestRow]:
    """Gives rows that are about as long as they may be the lengths of their files.

    Stated durations are rounded, so such a clip may lie on either side of the limit. Headers of
    files at URLs are not fetched for this.

    Args:
      rows: rows that can be used.
      limit_secs: longer clips are left out.
      window_secs: no clip can be longer.
    """

    def is_near(row: ManifestRow) -> bool:
        if row.duration > limit_secs:
            return row.duration <= limit_secs + DURATION_TOLERANCE_SECS
        return row.duration + DURATION_TOLERANCE_SECS > window_secs

    def settle(row: ManifestRow) -> ManifestRow:
        try:
            left = round(read_duration(row.audio) - (row.offset or 0.0), 6)
        except BadAudio:  # reported when it is read for a batch
            return row
        if abs(left - row.duration) > DURATION_TOLERANCE_SECS:  # a segment, or reported then, too
            return row
        return dataclasses.replace(row, duration=left)

    near = [i for i, row in enumerate(rows) if is_near(row) and not is_url(str(row.audio))]
    settled = list(rows)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for i, row in zip(near, pool.map(settle, [rows[i] for i in near]), strict=True):
            settled[i] = row
    return settled


def _tell_apart(drafts: Sequence[Draft | BadRow], source: str) -> list[Draft | BadRow]:
    """Numbers ids that are made from the same name; rows that occur twice become bad rows."""
    own_ids = [d.id for d in drafts if isinstance(d, Draft) and d.has_own_id]
    taken, counts = set(own_ids), collections.Counter()
    seen: set[Any] = set()
    apart: list[Draft | BadRow] = []
    for n, draft in enumerate(drafts, 1):
        if isinstance(draft, Draft):
            values = (str(draft.audio), draft.text, draft.duration, draft.offset)
            content = draft.id if draft.has_own_id else values
            if content in seen:
                what = f"id {draft.id!r}" if draft.has_own_id else f"the same row of {draft.audio}"
                detail = f"{what} occurs twice"
                draft = BadRow(f"row {n}", source, Problem.DUPLICATE_ID, detail)
            elif not draft.has_own_id:
                base = draft.id
                while draft.id in taken:
                    counts[base] += 1
                    draft = dataclasses.replace(draft, id=f"{base}#{counts[base] + 1}")
                taken.add(draft.id)
            seen.add(content)
        apart.append(draft)
    return apart


def _check_row(draft: Draft | BadRow, source: str, durations: Durations) -> ManifestRow | BadRow:
    if isinstance(draft, BadRow):
        return draft
    audio, text, duration, offset = draft.audio, draft.text, draft.duration, draft.offset
    if not text:
        return BadRow(draft.id, source, Problem.EMPTY_TEXT, f"{audio} has no transcript")
    try:
        if duration is None:
            duration = max(durations.read(audio) - (offset or 0), 0.0)
        else:
            require_file(audio)
            if duration > _DOUBTFUL_SECS:
                # Most often milliseconds; without a look at the file, the row would be left out as
                # too long by design.
                check_duration(audio, durations.read(audio), offset=offset, duration=duration)
        if duration < FRAME_SECS:
            where = "" if offset is None else f" from {offset:g} s on"
            raise BadAudio(
                Problem.TOO_SHORT,
                f"{audio} lasts {duration:.4f} s{where}, less than an encoder frame of "
                f"{FRAME_SECS} s",
            )
    except BadAudio as error:
        return BadRow(draft.id, source, error.problem, str(error), text)
    return ManifestRow(draft.id, audio, text, duration, offset, source)
