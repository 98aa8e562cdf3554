"""Shards from any source: planned once, written in any order, the same bytes after any kill."""

import contextlib
import functools
import hashlib
import io
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import soundfile

from flax_projector.config import DataConfig
from flax_projector.data.audio import (
    BadAudio,
    Problem,
    check_duration,
    file_of,
    load_audio,
    read_encoded,
)
from flax_projector.data.bad_rows import BadRow
from flax_projector.data.rows import ManifestRow
from flax_projector.data.shards.index import duration_of
from flax_projector.data.shards.output import in_processes, write_rows
from flax_projector.data.shards.tar import ShardWriter, suffix_of
from flax_projector.data.sources import read_source
from flax_projector.files import any_path, lock_file, new_file, reading, write_atomically
from flax_projector.lengths import SAMPLE_RATE
from flax_projector.logs import progress_bar
from flax_projector.storage import AnyPath, users_cache
from flax_projector.storage.bucket import filesystem
from flax_projector.storage.urls import filesystem_of

_log = logging.getLogger(__name__)

_NUM_SAMPLES = 32  # clips that tell how large those of a source are
_CHUNK = 8 << 20


@dataclass(frozen=True)
class Plan:
    """Which rows each shard has; kept until all of them are written.

    Attributes:
      source: the source's name, for messages.
      digest: of its rows and of the options.
      starts: number of the first row of each shard, and of all rows.
      num_bytes: about how large the shards will be together.
    """

    source: str
    digest: str
    starts: list[int]
    num_bytes: int


def pack(source: str, dst: str, *, shard_mb: int, flac: bool, config: DataConfig) -> None:
    """Writes the clips of a source in shards, and their manifest, `manifest.jsonl`.

    The same call continues one that was killed, and ends with the same bytes.

    Args:
      source: manifest or data set.
      dst: a new folder, on a disk or in a bucket.
      shard_mb: about how large a shard is to be, in millions of bytes.
      flac: write what training would read: 16 kHz, mono, 16-bit FLAC, segments cut. Otherwise
        encoded files stay as they are.
      config: how data sets are read.

    Raises:
      ValueError: if the source cannot be read, or the folder holds something else.
    """
    if shard_mb < 1:
        raise ValueError(f"--shard-mb {shard_mb}: expected 1 or more")
    folder = any_path(dst)
    scratch = folder / ".pack"
    with _held(scratch):
        rows, bad = read_source(source, config, users_cache() / "data")
        if not rows:
            raise ValueError(f"{source}: none of {len(bad)} rows can be used")
        plan = _planned(folder, source, rows, shard_mb=shard_mb, flac=flac)
        spans = list(zip(plan.starts, plan.starts[1:], strict=False))
        work = functools.partial(_write_shard, folder=str(folder), flac=flac)
        done = {int(path.stem) for path in scratch.glob("[0-9]*.json")}
        tasks = (
            (number, start, [rows[i] for i in range(start, end)])
            for number, (start, end) in enumerate(spans)
            if number not in done
        )
        label = f"packed {dst}"
        with progress_bar(_log, label, total=len(spans), unit="shard", initial=len(done)) as bar:
            for _ in in_processes(work, tasks, num_bytes=plan.num_bytes):
                bar.update(1)
        records = [_read_record(scratch, number) for number in range(len(spans))]
        _verify(folder, records, num_bytes=plan.num_bytes)
        found = [row for record in records for row in record["rows"]]
        bad = [*bad, *(_bad_row(entry) for record in records for entry in record["bad"])]
        write_rows(folder / "manifest.jsonl", found, bad, num_rows=len(found) + len(bad))
        _remove(scratch)
    hours = sum(row["duration"] for row in found) / 3600
    _log.info("%s: %d clips in %d shards, %.1f hours", dst, len(found), len(spans), hours)


@contextlib.contextmanager
def _held(scratch: AnyPath) -> Iterator[None]:
    """Keeps other processes of this machine out; buckets have no locks."""
    if not isinstance(scratch, Path):
        yield
        return
    try:
        with lock_file(scratch.with_name(".pack.lock")):
            yield
    except BlockingIOError as error:
        raise ValueError(f"{scratch.parent} is being written by {error}") from error


def _planned(
    folder: AnyPath, source: str, rows: Sequence[ManifestRow], *, shard_mb: int, flac: bool
) -> Plan:
    """The plan that was begun with, or a new one.

    Raises:
      ValueError: if the folder holds something else.
    """
    path = folder / ".pack" / "plan.json"
    digest = hashlib.sha256(f"{shard_mb} {flac}".encode())
    for row in rows:
        place = (row.id, str(row.audio), row.text, row.duration, row.offset)
        digest.update(json.dumps(place).encode())
    if path.exists():
        with reading(path, way_out=f"remove {folder}"):
            plan = Plan(**json.loads(path.read_text()))
        if plan.digest != digest.hexdigest():
            raise ValueError(
                f"{folder} was begun with {plan.source} as it was then, and with other rows or "
                "options than now: choose another folder, or remove it"
            )
        return plan
    # The lock is ours. What a bucket calls a folder may be an empty object.
    found = [item.name for item in folder.iterdir()] if folder.exists() else []
    if others := sorted(set(found) - {".pack.lock", ".pack", ""}):
        raise ValueError(
            f"{folder} holds something else ({', '.join(others[:3])}): choose a new folder"
        )
    plan = Plan(source, digest.hexdigest(), *_divide(rows, shard_mb * 10**6, flac=flac))
    write_atomically(path, json.dumps(asdict(plan)))
    return plan


def _divide(rows: Sequence[ManifestRow], max_bytes: int, *, flac: bool) -> tuple[list[int], int]:
    """The first row of each shard, and the total size, by what a few clips take for a second."""
    size, secs = 0, 0.0
    for i in range(0, len(rows), max(1, len(rows) // _NUM_SAMPLES)):
        with contextlib.suppress(BadAudio):
            content = _content(rows[i], flac=flac)
            size += len(content)
            secs += rows[i].duration if flac else duration_of(content, rows[i].id)
    rate = size / secs if secs else 32_000.0  # bytes a second
    starts, in_shard, total, known = [0], 0.0, 0.0, {}
    for i, row in enumerate(rows):
        is_part = row.offset is not None and not flac
        end = row.duration + (row.offset or 0.0 if is_part else 0.0)
        # Of a file of many rows, what is beyond the rows seen so far.
        cost = 1024 + rate * max(end - known.get(str(row.audio), 0.0) * is_part, 0.0)
        if in_shard and in_shard + cost > max_bytes:
            starts.append(i)
            in_shard, known, cost = 0.0, {}, 1024 + rate * end
        if is_part:
            known[str(row.audio)] = max(end, known.get(str(row.audio), 0.0))
        in_shard, total = in_shard + cost, total + cost
    return [*starts, len(rows)], round(total)


def _content(row: ManifestRow, *, flac: bool) -> bytes:
    """What a shard is to hold of a row's clip.

    Raises:
      BadAudio: if the clip cannot be used.
    """
    if not flac:
        return read_encoded(row.audio)
    samples = load_audio(row.audio, offset=row.offset, duration=row.duration)
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _write_shard(task: tuple[int, int, list[ManifestRow]], *, folder: str, flac: bool) -> None:
    """Writes a shard and, when that is there, the record of it.

    Args:
      task: the shard's number, its first row's, and its rows.
      folder: where shards are.
      flac: see `pack`.
    """
    number, start, rows = task
    to = any_path(folder)
    path, entries, bad = to / f"{number:06d}.tar", [], []
    local = to / ".pack" if isinstance(to, Path) else None
    packed: dict[str, dict[str, Any]] = {}  # files of several rows
    with new_file(path, scratch=local) as file:
        shard = ShardWriter(file)
        for i, row in enumerate(rows, start):
            is_part = row.offset is not None and not flac
            try:
                clip = packed.get(str(row.audio))
                if clip is None:
                    clip = _add(shard, f"{i:09d}", row, flac=flac)
                if is_part:
                    packed[str(row.audio)] = clip
                if not flac:
                    check_duration(
                        row.audio, clip["secs"], offset=row.offset, duration=row.duration
                    )
            except BadAudio as error:
                bad.append(
                    {
                        **asdict(BadRow(row.id, row.source, error.problem, str(error), row.text)),
                        "reason": error.problem.name,
                    }
                )
                continue
            # The lengths stay as stated, though rounded: the order of batches depends on them.
            entry = {"id": row.id, "audio": path.name, "text": row.text, "bytes": clip["bytes"]}
            entry["duration"] = row.duration
            if is_part:
                entry["offset"] = row.offset
            else:
                shard.add(f"{i:09d}.txt", row.text.encode())
            entries.append(entry)
        shard.close()
        file.flush()
        file.seek(0)
        digest = _digest(file)
    record = {"name": path.name, "sha256": digest, "rows": entries, "bad": bad}
    write_atomically(to / ".pack" / f"{number:06d}.json", json.dumps(record))


def _add(shard: ShardWriter, key: str, row: ManifestRow, *, flac: bool) -> dict[str, Any]:
    content = _content(row, flac=flac)
    # As they are, clips are not decoded here: those that cannot be are found in training.
    secs = duration_of(content, str(row.audio))
    suffix = suffix_of(content) or file_of(row.audio).rpartition(".")[2] or "audio"
    return {"bytes": [shard.add(f"{key}.{suffix}", content), len(content)], "secs": secs}


def _bad_row(entry: dict[str, Any]) -> BadRow:
    return BadRow(reason=Problem[entry.pop("reason")], **entry)


def _read_record(scratch: AnyPath, number: int) -> dict[str, Any]:
    path = scratch / f"{number:06d}.json"
    with reading(path, way_out="remove it, and the shard is written again"):
        return json.loads(path.read_text())


def _verify(folder: AnyPath, records: list[dict[str, Any]], *, num_bytes: int) -> None:
    """Reads back what was written.

    Raises:
      ValueError: naming the shards that are not what they were; they will be written again.
    """
    tasks = [(str(folder / record["name"]), record["sha256"]) for record in records]
    with progress_bar(_log, "verified", total=len(tasks), unit="shard") as bar:
        wrong = []
        for record, is_same in zip(
            records, in_processes(_is_same, tasks, num_bytes=num_bytes), strict=True
        ):
            bar.update(1)
            if not is_same:
                wrong.append(record["name"])
                (folder / ".pack" / f"{record['name'].removesuffix('.tar')}.json").unlink()
    if wrong:
        raise ValueError(
            f"{folder}: {', '.join(wrong)} did not read back as written: check the disk, then "
            "start the same command again"
        )


def _is_same(task: tuple[str, str]) -> bool:
    path, digest = task
    try:
        if isinstance(any_path(path), Path):
            with open(path, "rb") as file:
                return _digest(file) == digest
        fs, place = filesystem_of(path)
        with fs.open(place, block_size=_CHUNK, cache_type="readahead") as file:
            return _digest(file) == digest
    except FileNotFoundError:
        return False


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _remove(scratch: AnyPath) -> None:
    if isinstance(scratch, Path):
        shutil.rmtree(scratch)
    else:
        filesystem().rm(str(scratch), recursive=True)
