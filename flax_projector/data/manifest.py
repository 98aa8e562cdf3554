"""Manifests: lists of clips and their transcripts."""

import contextlib
import itertools
import json
import math
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax_projector.data.audio import Problem, Slice, file_of, file_stamp
from flax_projector.data.bad_rows import BadRow, BadRows
from flax_projector.data.drafts import Draft
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
from flax_projector.data.row_file import keep_rows
from flax_projector.data.rows import Rows
from flax_projector.files import is_url
from flax_projector.storage.urls import filesystem_of, url_stamp, writable


def read_manifest(
    path: str | Path,
    *,
    source: str | None = None,
    max_rows: int | None = None,
    cache: Path | None = None,
) -> tuple[Rows, BadRows]:
    """Reads a manifest.

    A `.jsonl` manifest has one object per line: "audio" (an absolute path, a URL, or a path
    relative to the manifest's folder), "text", and optionally "id", "duration" and "offset" in
    seconds, and "bytes": [start, length]. A `.tsv` manifest has a header with "path" (or "audio"),
    "text" and optionally "id", "seconds" (or "duration"), "offset" and "bytes". A row with bytes is
    a part of a larger file; one with an offset is a segment of a longer clip.
    Missing durations are read from the files, which is slow for audio at URLs.

    The rows are kept in columns, and read from there as long as the manifest and its local files
    stay the same: those of a large manifest in `PATH.columns`, the others in `cache`.

    Args:
      path: a local path, or a URL.
      source: name of the rows' source; the path by default.
      max_rows: how many rows to read from the start; None reads all.
      cache: folder for the columns of small manifests.

    Returns:
      The rows that can be used, in the manifest's order, and the bad rows.

    Raises:
      ValueError: if the manifest cannot be read, has another suffix, has no rows, or has no column
        for the audio or the text.
    """
    path = str(path)
    check_utf8("manifest", path)
    is_remote = is_url(path)
    stamp = url_stamp(path) if is_remote else file_stamp(path)
    folder = path.rpartition("/")[0] if is_remote else os.path.dirname(path)
    source = path if source is None else source
    rows = keep_rows(
        source,
        lambda: _make_drafts(path, folder, source, max_rows),
        origin=path,
        made_from=json.dumps([stamp, folder, max_rows]) if stamp else None,
        beside=writable(f"{path}.columns"),
        cache=cache,
    )
    return rows, rows.bad


def _make_drafts(
    path: str, folder: str, source: str, max_rows: int | None
) -> Iterator[Draft | BadRow]:
    is_known = False
    raw_rows = itertools.islice(read_raw_rows(path), max_rows)
    for number, raw in enumerate(raw_rows, 1):
        draft = _make_draft(raw, folder, f"row {number}", source)
        if not is_known and isinstance(draft, Draft) and is_url(url := file_of(draft.audio)):
            filesystem_of(url)
            is_known = True
        yield draft


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
