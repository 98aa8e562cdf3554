"""Hugging Face data sets as rows: from the hub or a folder, with random access or streamed."""

import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from flax_projector.config import DataConfig
from flax_projector.data.audio import read_duration
from flax_projector.data.bad_rows import BadRow
from flax_projector.data.hf_clips import Table, TableClip, encoded, parts_of
from flax_projector.data.hf_source import HFSource, open_hf, parse_hf_source, without_torch
from flax_projector.data.manifest import Draft, Durations, ManifestRow, check_rows, read_manifest
from flax_projector.data.manifest_text import check_utf8, read_text
from flax_projector.files import read_bytes, reading, sync, write_atomically
from flax_projector.logs import progress_bar

log = logging.getLogger(__name__)

_SAVE_EVERY_ROWS = 100


def read_hf(source: str, config: DataConfig, cache: Path) -> tuple[list[ManifestRow], list[BadRow]]:
    """Reads the rows of a data set, without decoding any audio.

    With random access, clips stay in the data set's files. A streamed data set has no files, but a
    resumable run must be able to ask for any batch. So it is read once, row by row, and its encoded
    clips are kept under `cache`, with a manifest. An interrupted download continues where it
    stopped, a complete one is not repeated, and a larger `hf_max_rows` adds the missing rows.

    Args:
      source: see `parse_hf_source`.
      config: whether to stream, and the row limit.
      cache: folder for streamed data sets and for durations.

    Returns:
      As `manifest.read_manifest`.

    Raises:
      ValueError: if there is no such data set, split or column, `datasets` is not installed, the
        hub cannot be reached, or several processes would have to download a stream.
    """
    check_utf8("data set", source)
    hf = parse_hf_source(source)
    if config.hf_streaming:
        manifest, num_rows = _keep_stream(source, hf, config.hf_max_rows, cache)
        if not num_rows:
            raise ValueError(f"{source} has no rows")
        limit = config.hf_max_rows or num_rows
        return read_manifest(manifest, source=source, max_rows=limit, cache=cache)
    dataset = open_hf(source, hf, streaming=False)
    version = dataset._fingerprint  # before rows are left out: those that stay are the same
    if config.hf_max_rows:
        dataset = dataset.select(range(min(config.hf_max_rows, len(dataset))))
    clips = dataset.select_columns([hf.audio]).with_format("arrow")
    table = Table(clips, source, hf.folder, version)
    texts = dataset[hf.text]
    ids = dataset[hf.id] if hf.id else range(len(dataset))
    drafts = [
        Draft(_id(row_id, n), TableClip(table, n), read_text(text), None, None)
        for n, (row_id, text) in enumerate(zip(ids, texts, strict=True))
    ]
    return check_rows(drafts, source, Durations(cache, source))


def _keep_stream(source: str, hf: HFSource, max_rows: int, cache: Path) -> tuple[Path, int]:
    """Downloads a streamed data set's missing rows; returns its manifest and number of rows."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", source)[:100]  # the hash tells the rest
    folder = cache / f"{name}-{digest}"
    manifest, progress_path = folder / "rows.jsonl", folder / "progress.json"
    done: dict[str, Any] = {"num_rows": 0, "is_whole": False, "stream": None}
    if progress_path.is_file():
        with reading(progress_path, way_out="remove its folder, to read the data set anew"):
            done |= json.loads(progress_path.read_text("utf-8"))
    num_bytes = _length_of_rows(manifest, done["num_rows"])
    if done["is_whole"] or (max_rows and done["num_rows"] >= max_rows):
        log.info("%s: %d rows found in %s", source, done["num_rows"], folder)
        return manifest, done["num_rows"]
    if jax.process_count() > 1:
        raise ValueError(
            f"{source} is not kept in {folder} yet: start once with one process, or point "
            "--data.cache-dir of every host to a folder that has it"
        )
    stream = open_hf(source, hf, streaming=True)
    if done["stream"]:
        stream.load_state_dict(done["stream"])
    folder.mkdir(parents=True, exist_ok=True)
    with manifest.open("a", encoding="utf-8") as file:
        file.truncate(num_bytes)  # rows after the last save will be downloaded again

        def save() -> None:
            sync(file)  # first, so that the progress counts only rows that are there
            done["stream"] = stream.state_dict()
            write_atomically(progress_path, json.dumps(done))

        rows = _read_stream(source, stream)
        if max_rows:
            rows = itertools.islice(rows, max_rows - done["num_rows"])
        with (
            without_torch(source),
            progress_bar(
                log, source, initial=done["num_rows"], total=max_rows or None, unit="row"
            ) as progress,
        ):
            for row in rows:
                record = _keep_row(row, hf, folder, done["num_rows"])
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                done["num_rows"] += 1
                progress.update()
                if done["num_rows"] % _SAVE_EVERY_ROWS == 0:
                    save()
        done["is_whole"] = not max_rows or done["num_rows"] < max_rows
        save()
    return manifest, done["num_rows"]


def _length_of_rows(manifest: Path, num_rows: int) -> int:
    """Length in bytes of a manifest's first rows.

    Raises:
      ValueError: if it has fewer rows.
    """
    if not num_rows:
        return 0
    lengths = []
    if manifest.is_file():
        with manifest.open("rb") as file:
            lengths = [len(line) for line in itertools.islice(file, num_rows)]
    if len(lengths) < num_rows:
        raise ValueError(
            f"{manifest} has {len(lengths)} rows, but progress.json says that {num_rows} were "
            f"kept: delete {manifest.parent} to download the data set again"
        )
    return sum(lengths)


def _id(row_id: Any, number: int) -> str:
    return str(number if row_id is None else row_id)


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
    record: dict[str, Any] = {
        "id": _id(row[hf.id] if hf.id else None, number),
        "audio": name,
        "text": read_text(row[hf.text]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        found = encoded(parts, hf.folder, f"row {number}")
        if isinstance(found, str):
            found = read_bytes(found)
        path.write_bytes(found)
        record["duration"] = read_duration(path)
    except (FileNotFoundError, IsADirectoryError, PermissionError, ValueError) as error:
        log.warning("%s, row %d: %s", hf.name, number, error)
    return record
