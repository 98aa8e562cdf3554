"""Manifests: lists of clips and their transcripts."""

import csv
import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import jax

from flax_projector.config.presets import DEMO_SPEECH
from flax_projector.data.audio import (
    Audio,
    BadAudio,
    Problem,
    file_stamp,
    read_duration,
    require_filesystem,
)
from flax_projector.data.bad_rows import BadRow
from flax_projector.files import is_url, write_atomically
from flax_projector.lengths import FRAME_SECS
from flax_projector.logs import progress_bar

_log = logging.getLogger(__name__)

_NUM_THREADS = 32  # they mostly wait for disks and networks
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
    """A row as written. If it has no duration, that will be read from the file."""

    id: str
    audio: Audio
    text: str
    duration: float | None
    offset: float | None


class Durations:
    """Lengths of clips whose rows do not state them, kept from one start of a run to the next.

    A local file that has changed is read again; anything else is assumed not to change.
    """

    def __init__(self, folder: Path | None, source: str):
        """Loads the known lengths of a source's clips.

        Args:
          folder: where they are kept; None keeps nothing.
          source: name of the source, with whatever distinguishes its versions.
        """
        digest = hashlib.sha256(source.encode()).hexdigest()[:16]
        self._path = folder / f"durations-{digest}.json" if folder else None
        self._known: dict[str, tuple[float, list[int]]] = {}
        self._is_changed = False
        if self._path is not None and self._path.is_file():
            self._known = json.loads(self._path.read_text())

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
        """Saves the lengths that were read."""
        if self._path is not None and self._is_changed and jax.process_index() == 0:
            write_atomically(self._path, json.dumps(self._known))


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
    seconds. A `.tsv` manifest has a header with "path" (or "audio"), "text" and optionally "id",
    "seconds" (or "duration") and "offset". A row with an offset is a segment of a longer file.
    Missing durations are read from the files, which is slow for audio at URLs.

    Args:
      path: a local path, or a URL that fsspec opens.
      source: name of the rows' source; the path by default.
      max_rows: how many rows to read from the start; None reads all.
      cache: folder for durations that had to be read.

    Returns:
      The rows that can be used, in the manifest's order, and the bad rows.

    Raises:
      ValueError: if the manifest cannot be read, has another suffix, or has no rows.
    """
    path = str(path)
    source = path if source is None else source
    text = _read_text(path)
    if path.endswith(".jsonl"):
        # Not splitlines, which would also split a row at U+2028 in its transcript.
        raw_rows = [_parse_json(line) for line in text.split("\n") if line.strip()]
    elif path.endswith(".tsv"):
        raw_rows = list(csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))
    else:
        raise ValueError(f"manifest {path}: the name must end in .jsonl or .tsv")
    if not raw_rows:
        raise ValueError(f"manifest {path} has no rows")
    folder = path.rpartition("/")[0] if is_url(path) else os.path.dirname(path)
    drafts = [
        _make_draft(raw, folder, f"row {n}", source) for n, raw in enumerate(raw_rows[:max_rows], 1)
    ]
    for url in (str(d.audio) for d in drafts if isinstance(d, Draft) and is_url(str(d.audio))):
        require_filesystem(url)
        break
    return check_rows(drafts, source, Durations(cache, source))


def missing_manifest(path: str) -> ValueError:
    """The error for a manifest that does not exist; says where a relative path was looked for."""
    where = "" if is_url(path) or os.path.isabs(path) else f" in {os.getcwd()}"
    hint = ""
    if path.startswith(DEMO_SPEECH):
        hint = (
            f". The demo's speech is in {DEMO_SPEECH} of the repository and not part of the "
            "installed package: run the demo in a clone"
        )
    return ValueError(f"manifest {path} does not exist{where}{hint}")


def _read_text(path: str) -> str:
    if is_url(path):
        require_filesystem(path)
    try:
        with fsspec.open(path, "rt", encoding="utf-8", newline="") as file:
            return file.read()  # pyright: ignore[reportAttributeAccessIssue]
    except FileNotFoundError as error:
        raise missing_manifest(path) from error
    except Exception as error:  # file systems raise the errors of their clients
        raise ValueError(
            f"manifest {path} cannot be read: {type(error).__name__}: {error}\n"
            "Name a .jsonl or .tsv file in UTF-8, or a data set as hf:NAME:SPLIT"
        ) from error


def _parse_json(line: str) -> dict[str, Any] | str:
    """The row, or what is wrong with it."""
    try:
        raw = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not JSON ({error})"
    return raw if isinstance(raw, dict) else f"need an object, got {line.strip()!r}"


def _make_draft(raw: dict[str, Any] | str, folder: str, place: str, source: str) -> Draft | BadRow:
    if isinstance(raw, str):
        return BadRow(place, source, Problem.MALFORMED, raw)
    name, text = raw.get("audio") or raw.get("path"), str(raw.get("text") or "").strip()
    if not name:
        return BadRow(place, source, Problem.MALFORMED, f"no 'audio' in {sorted(map(str, raw))}")
    name = str(name)
    try:
        duration = _read_number(raw.get("duration") or raw.get("seconds"))
        offset = _read_number(raw.get("offset"))
    except ValueError as error:
        return BadRow(str(raw.get("id") or place), source, Problem.MALFORMED, str(error), text)
    where = "" if offset is None else f"@{offset:g}"
    default_id = f"{os.path.splitext(name)[0]}{where}"
    if not is_url(name) and not os.path.isabs(name):
        name = f"{folder}/{name}" if is_url(folder) else os.path.join(folder, name)
    return Draft(str(raw.get("id") or default_id), name, text, duration or None, offset)


def _read_number(value: Any) -> float | None:
    if value is None or value == "":
        return None
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{value!r} is not a number of seconds")
    return number


def check_rows(
    drafts: Sequence[Draft | BadRow], source: str, durations: Durations
) -> tuple[list[ManifestRow], list[BadRow]]:
    """Sorts rows into usable and bad ones.

    Checks that local files exist and reads missing durations, in threads. Clips are not decoded
    until they are used.

    Args:
      drafts: rows as written, or already known to be bad.
      source: name of the rows' source.
      durations: the known durations, to which those that are read are added.

    Returns:
      Both lists, in the original order.
    """
    rows: list[ManifestRow | BadRow] = []
    seen: set[str] = set()
    with (
        ThreadPoolExecutor(_NUM_THREADS) as pool,
        progress_bar(
            _log, f"rows of {source}", total=len(drafts), unit="row", delay=1, leave=False
        ) as progress,
    ):
        for start in range(0, len(drafts), _CHUNK):
            chunk = drafts[start : start + _CHUNK]
            for row in pool.map(lambda draft: _check_row(draft, source, durations), chunk):
                if isinstance(row, ManifestRow):
                    if row.id in seen:
                        text = f"id {row.id!r} occurs twice"
                        place = f"row {len(rows) + 1}"
                        row = BadRow(place, source, Problem.DUPLICATE_ID, text)
                    else:
                        seen.add(row.id)
                rows.append(row)
            progress.update(len(chunk))
    durations.save()
    good = [row for row in rows if isinstance(row, ManifestRow)]
    return good, [row for row in rows if isinstance(row, BadRow)]


def _check_row(draft: Draft | BadRow, source: str, durations: Durations) -> ManifestRow | BadRow:
    if isinstance(draft, BadRow):
        return draft
    audio, text, duration, offset = draft.audio, draft.text, draft.duration, draft.offset
    if not text:
        return BadRow(draft.id, source, Problem.EMPTY_TEXT, f"{audio} has no transcript")
    try:
        if duration is None:
            duration = durations.read(audio) - (offset or 0)
        elif isinstance(audio, str) and not is_url(audio) and not os.path.isfile(audio):
            raise BadAudio(Problem.MISSING_FILE, f"{audio} does not exist")
        if duration < FRAME_SECS:
            detail = f"{audio} lasts {duration:.4f} s, less than an encoder frame of {FRAME_SECS} s"
            raise BadAudio(Problem.TOO_SHORT, detail)
    except BadAudio as error:
        return BadRow(draft.id, source, error.problem, str(error), text)
    return ManifestRow(draft.id, audio, text, duration, offset, source)
