"""Streamed data sets, whose rows are kept on disk: each process of a run keeps its part.

A stream is divided into parts, whole shards of it. Part i is kept by process i modulo their number,
in a folder of its own. So the order of the rows, that of the parts, does not depend on the number
of processes, and a start with another one goes on where the last one stopped.
"""

import hashlib
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from flax_projector import hosts
from flax_projector.data.audio import read_duration
from flax_projector.data.hf_clips import encoded, parts_of
from flax_projector.data.hf_source import HFSource, open_hf, without_torch
from flax_projector.data.manifest_text import read_text
from flax_projector.data.shared_folder import check_shared
from flax_projector.files import read_bytes, reading, sync, write_atomically
from flax_projector.logs import progress_bar

log = logging.getLogger(__name__)

_SAVE_EVERY_ROWS = 100
_MAX_PARTS = 1024  # of folders of sound files, every file is a shard
_ROWS, _PROGRESS = "rows.jsonl", "progress.json"


def keep_stream(source: str, hf: HFSource, max_rows: int, cache: Path) -> tuple[Path, int]:
    """Downloads a streamed data set's missing rows; all processes call it.

    Args:
      source: name of the data set.
      hf: its parts.
      max_rows: how many rows are needed from the start; 0 means all.
      cache: folder that all processes share.

    Returns:
      A manifest of the rows that are kept, on all processes, and their number, which may be larger.

    Raises:
      ValueError: if there is no such data set, the stream breaks off, or what is kept is damaged.
      HostsDiffer: on all processes, if they do not share the folder or see other shards.
    """
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", source)[:100]  # the hash tells the rest
    folder = cache / f"{name}-{digest}"
    check_shared(folder, "on a disk")
    done = {"num_rows": 0, "is_whole": False, "num_parts": 0}
    # As process 0 sees it: another run may be writing to it.
    done |= json.loads(hosts.broadcast("stream", json.dumps(_read_progress(folder))))
    _length_of_rows(folder / _ROWS, done["num_rows"])
    if done["is_whole"] or (max_rows and done["num_rows"] >= max_rows):
        log.info("%s: %d rows found in %s", source, done["num_rows"], folder)
        return folder / _ROWS, done["num_rows"]
    stream = open_hf(source, hf, streaming=True)
    num_parts = min(stream.num_shards, _MAX_PARTS)
    hosts.agree({f"shards of {source}": str(stream.num_shards)})
    if done["num_parts"] not in (0, num_parts):
        raise ValueError(
            f"{source} has {stream.num_shards} shards now: delete {folder}, where it is kept in "
            f"{done['num_parts']} parts, to download it again"
        )
    done["num_parts"] = num_parts
    if jax.process_index() == 0:
        write_atomically(folder / _PROGRESS, json.dumps(done))
    _keep_parts(source, hf, stream, num_parts, max_rows, folder)
    if jax.process_index() == 0:
        done["num_rows"], done["is_whole"] = _join(folder, num_parts)
        write_atomically(folder / _PROGRESS, json.dumps(done))
    return folder / _ROWS, int(hosts.broadcast("rows of the stream", str(done["num_rows"])))


def _read_progress(folder: Path) -> dict[str, Any]:
    path = folder / _PROGRESS
    if not path.is_file():
        return {}
    with reading(path, way_out="remove its folder, to read the data set anew"):
        return {} | json.loads(path.read_text("utf-8"))


def _keep_parts(
    source: str, hf: HFSource, stream: Any, num_parts: int, max_rows: int, folder: Path
) -> None:
    """Keeps the parts of this process, and waits for the others."""
    me, num_processes, num_rows = jax.process_index(), jax.process_count(), 0
    with (
        without_torch(source),
        progress_bar(log, source, total=max_rows or None, unit="row") as progress,
    ):
        for first in range(0, num_parts, num_processes):
            found, limit = 0, max_rows - num_rows if max_rows else 0
            if (number := first + me) < num_parts:
                part = stream.shard(num_parts, number, contiguous=True)
                found = _keep_part(source, hf, part, _part(folder, number), limit, progress)
            if max_rows:  # whether more parts are needed depends on all that come before
                counts = hosts.exchange("rows of parts", str(found), timeout_secs=math.inf)
                num_rows += sum(map(int, counts))
                if num_rows >= max_rows:
                    break
    hosts.exchange("parts of the stream", "", timeout_secs=math.inf)


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:04d}"


def _keep_part(
    source: str, hf: HFSource, stream: Any, folder: Path, max_rows: int, progress: Any
) -> int:
    """Downloads the missing rows of a part; returns how many are kept."""
    done = {"num_rows": 0, "is_whole": False, "stream": None} | _read_progress(folder)
    num_bytes = _length_of_rows(folder / _ROWS, done["num_rows"])
    progress.update(done["num_rows"])
    if done["is_whole"] or (max_rows and done["num_rows"] >= max_rows):
        return done["num_rows"]
    if done["stream"]:
        stream.load_state_dict(done["stream"])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _ROWS).open("a", encoding="utf-8") as file:
        file.truncate(num_bytes)  # rows after the last save will be downloaded again

        def save() -> None:
            sync(file)  # first, so that the progress counts only rows that are there
            done["stream"] = stream.state_dict()
            write_atomically(folder / _PROGRESS, json.dumps(done))

        rows = _read_stream(source, stream)
        if max_rows:
            rows = itertools.islice(rows, max_rows - done["num_rows"])
        for row in rows:
            record = _keep_row(row, hf, folder, done["num_rows"])
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            done["num_rows"] += 1
            progress.update()
            if done["num_rows"] % _SAVE_EVERY_ROWS == 0:
                save()
        done["is_whole"] = not max_rows or done["num_rows"] < max_rows
        save()
    return done["num_rows"]


def _join(folder: Path, num_parts: int) -> tuple[int, bool]:
    """Writes the manifest of all rows up to the first that is missing.

    Returns:
      Their number, and whether none is missing.
    """
    partial, number, is_whole = folder / f".{_ROWS}.partial", 0, True
    with partial.open("w", encoding="utf-8") as joined:
        for part in (_part(folder, number) for number in range(num_parts)):
            done = {"num_rows": 0, "is_whole": False} | _read_progress(part)
            if done["num_rows"]:
                with (part / _ROWS).open(encoding="utf-8") as rows:
                    for line in itertools.islice(rows, done["num_rows"]):
                        record = json.loads(line)
                        record["audio"] = f"{part.name}/{record['audio']}"
                        if record["id"] is None:
                            record["id"] = str(number)
                        joined.write(json.dumps(record, ensure_ascii=False) + "\n")
                        number += 1
            if not done["is_whole"]:
                is_whole = False
                break
        sync(joined)
    partial.replace(folder / _ROWS)
    return number, is_whole


def _length_of_rows(manifest: Path, num_rows: int) -> int:
    """Length in bytes of a manifest's first rows.

    Raises:
      ValueError: if it has fewer rows.
    """
    if not num_rows:
        return 0
    found = length = 0
    if manifest.is_file():
        with manifest.open("rb") as file:
            for line in itertools.islice(file, num_rows):
                found, length = found + 1, length + len(line)
    if found < num_rows:
        raise ValueError(
            f"{manifest} has {found} rows, but progress.json says that {num_rows} were "
            f"kept: delete {manifest.parent} to download the data set again"
        )
    return length


def _read_stream(source: str, stream: Any) -> Iterator[dict[str, Any]]:
    try:
        yield from stream
    except Exception as error:  # of the network, the hub's client, or the readers of files
        raise ValueError(
            f"{source} broke off: {type(error).__name__}: {error}\nThe same command continues it"
        ) from error


def _keep_row(row: dict[str, Any], hf: HFSource, folder: Path, number: int) -> dict[str, Any]:
    """Writes the encoded clip, and returns its row for the manifest."""
    import pyarrow  # comes with datasets

    parts = parts_of(pyarrow.scalar(row[hf.audio]))
    suffix = os.path.splitext(str(parts.get("path", "")))[1] if "array" not in parts else ".wav"
    name = f"audio/{number // 1000:05d}/{number:08d}{suffix}"
    path = folder / name
    row_id = row[hf.id] if hf.id else None
    record: dict[str, Any] = {
        "id": None if row_id is None else str(row_id),  # else its number among all rows
        "audio": name,
        "text": read_text(row[hf.text]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        found = encoded(parts, hf.folder, f"row {number} of {folder.name}")
        if isinstance(found, str):
            found = read_bytes(found)
        path.write_bytes(found)
        record["duration"] = read_duration(path)
    except (FileNotFoundError, IsADirectoryError, PermissionError, ValueError) as error:
        log.warning("%s, row %d of %s: %s", hf.name, number, folder.name, error)
    return record
