"""A manifest of shards that exist; their clips stay where they are."""

import functools
import glob
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from flax_projector.data.audio import BadAudio, Problem, read_duration
from flax_projector.data.bad_rows import BadRow
from flax_projector.data.manifest_text import read_text
from flax_projector.data.shards.output import write_rows
from flax_projector.data.shards.tar import AUDIO_SUFFIXES, read_members
from flax_projector.data.shards.texts import Texts
from flax_projector.files import any_path, is_url, local_path, open_to_read, parse_json
from flax_projector.logs import progress_bar
from flax_projector.storage.urls import filesystem_of

_log = logging.getLogger(__name__)

_NUM_THREADS = 8  # they wait for disks and networks: the headers of 2 GB are read in a second
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # as WebDataset has it: key, suffix


@dataclass(frozen=True, slots=True)
class _InHand:
    """The bytes of a clip, which have been read already."""

    content: bytes
    name: str

    def file(self) -> str:
        return ""

    def fetch(self) -> bytes:
        return self.content

    def stamp(self) -> list[int | str]:
        return []

    def __str__(self) -> str:
        return self.name


def duration_of(content: bytes, name: str) -> float:
    """Length in seconds of a clip of which all bytes are there.

    Raises:
      BadAudio: naming it, if it cannot be decoded or lacks its end.
    """
    return round(read_duration(_InHand(content, name)), 6)


@dataclass
class _Sample:
    """What a shard has under one key."""

    names: set[str] = field(default_factory=set)  # suffixes
    clip: dict[str, Any] | None = None  # columns of the manifest
    texts: dict[str, Any] = field(default_factory=dict)  # by suffix
    wrong: BadAudio | None = None


def write_index(
    shards: Sequence[str],
    out: str,
    *,
    text_key: str = "text",
    texts: Sequence[str] = (),
    overwrite: bool = False,
) -> None:
    """Writes a manifest of the clips in shards, and next to it a list of what is wrong in them.

    Args:
      shards: tars as paths, URLs, or patterns of either.
      out: the manifest, `NAME.jsonl`.
      text_key: where a `key.json`, or a line of NeMo's manifests, has the transcript.
      texts: files of transcripts that are not in the shards; see `Texts`.
      overwrite: whether `out` may exist.

    Raises:
      ValueError: if there is no such shard, no clip in them, or `out` may not be replaced.
    """
    path = any_path(out)
    if path.suffix != ".jsonl":
        raise ValueError(f"--out {out}: the name must end in .jsonl")
    if path.exists() and not overwrite:
        raise ValueError(f"--out {out} exists: choose another name, or pass --overwrite")
    sizes = {shard: size for pattern in shards for shard, size in _find(pattern)}
    names = _names(list(sizes))
    known = Texts(texts, text_key) if texts else None
    rows, bad = [], []
    work = functools.partial(_read_shard, text_key=text_key, texts=known)
    tasks = [(shard, names[shard], _seen_from(shard, out)) for shard in sizes]
    with (
        ThreadPoolExecutor(_NUM_THREADS) as pool,
        progress_bar(
            _log, "indexed", total=sum(sizes.values()), unit="B", unit_scale=True
        ) as progress,
    ):
        for size, (found, wrong) in zip(sizes.values(), pool.map(work, tasks), strict=True):
            rows += found
            bad += wrong
            progress.update(size)
    if not rows:
        examples = "; ".join(f"{row.id}: {row.detail}" for row in bad[:3]) or "they are empty"
        raise ValueError(f"no clip with a transcript in {len(sizes)} shards: {examples}")
    write_rows(path, rows, bad, num_rows=len(rows) + len(bad))
    hours = sum(row["duration"] for row in rows) / 3600
    _log.info("%s: %d clips of %d shards, %.1f hours", out, len(rows), len(sizes), hours)


def _find(pattern: str) -> list[tuple[str, int]]:
    """Shards and their sizes in bytes, in the order of their names."""
    is_pattern = any(c in pattern for c in "*?[")
    if not is_url(pattern):
        path = str(local_path(pattern))
        found = [path] if os.path.isfile(path) else sorted(glob.glob(path)) if is_pattern else []
        shards = [(shard, os.path.getsize(shard)) for shard in found if os.path.isfile(shard)]
    else:
        fs, path = filesystem_of(pattern)
        try:
            found = fs.glob(path, detail=True).values() if is_pattern else [fs.info(path)]
        except FileNotFoundError:
            found = []
        shards = sorted(
            (fs.unstrip_protocol(item["name"]) if is_pattern else pattern, item["size"])
            for item in found
            if item["type"] == "file"
        )
    if not shards:
        raise ValueError(f"there is no shard {pattern}: name tar files, or a pattern of them")
    return shards


def _names(shards: list[str]) -> dict[str, str]:
    """What ids begin with: the stems of the shards, with as many folders as tell them apart."""
    depth = 1
    while True:
        names = {
            shard: "/".join(PurePosixPath(shard).with_suffix("").parts[-depth:]) for shard in shards
        }
        if len(set(names.values())) == len(shards) or depth > 100:
            return names
        depth += 1


def _seen_from(shard: str, manifest: str) -> str:
    """The path of a shard that a manifest states: relative to its folder if it lies below."""
    if is_url(shard) != is_url(manifest):
        return shard if is_url(shard) else os.path.abspath(shard)
    if not is_url(shard):
        shard, manifest = os.path.abspath(shard), os.path.abspath(local_path(manifest))
    return shard.removeprefix(f"{manifest.rpartition('/')[0]}/")


def _read_shard(
    task: tuple[str, str, str], *, text_key: str, texts: Texts | None
) -> tuple[list[dict[str, Any]], list[BadRow]]:
    """The rows of a shard, and what is wrong in it.

    Args:
      task: the shard, what its ids begin with, and its path in the manifest.
      text_key: see `write_index`.
      texts: transcripts that are not in the shard.
    """
    shard, name, seen = task
    samples: dict[str, _Sample] = {}
    bad: list[BadRow] = []
    try:
        with open_to_read(shard) as file:
            _read_samples(file, shard, samples, bad, has_texts=texts is not None)
    except BadAudio as error:
        bad.append(BadRow(name, shard, error.problem, f"{shard}: {error}"))
    except Exception as error:  # file systems raise the errors of their clients
        text = f"{shard} cannot be read: {type(error).__name__}: {error}"
        bad.append(BadRow(name, shard, Problem.UNREADABLE, text))
    rows = []
    for key, sample in samples.items():
        row_id = f"{name}/{key}"
        try:
            text = _text_of(sample, shard, text_key, texts)
            if sample.clip is None:
                raise sample.wrong or BadAudio(
                    Problem.MALFORMED,
                    f"no clip, only {', '.join(sorted(sample.names))}: the suffixes of clips are "
                    f"{', '.join(AUDIO_SUFFIXES)}",
                )
            if not text:
                raise BadAudio(
                    Problem.EMPTY_TEXT, f"no transcript, only {', '.join(sorted(sample.names))}"
                )
        except BadAudio as error:
            bad.append(BadRow(row_id, shard, error.problem, f"{shard}, {key}: {error}"))
            continue
        clip = {column: value for column, value in sample.clip.items() if column != "name"}
        rows.append({"id": row_id, "audio": seen, "text": text, **clip})
    return rows, bad


def _read_samples(
    file: Any, shard: str, samples: dict[str, _Sample], bad: list[BadRow], *, has_texts: bool
) -> None:
    """Fills the samples of a shard; their clips are opened while their bytes are at hand."""
    for member in read_members(file, {*AUDIO_SUFFIXES, "txt", "json"}):
        # With the texts elsewhere, nothing has to be beside a clip, and its name may have dots.
        whole = member.name.removeprefix("./")
        match = re.fullmatch(r"(.+)\.([^./]+)", whole) if has_texts else _NAME.fullmatch(whole)
        if match is None or PurePosixPath(match[1]).name.startswith((".", "__")):
            continue  # no member of a sample
        key, suffix = match[1], match[2].lower()
        sample, kind = samples.setdefault(key, _Sample()), suffix.rpartition(".")[2]
        is_clip = kind in AUDIO_SUFFIXES
        if suffix in sample.names or (is_clip and (sample.clip or sample.wrong)):
            detail = f"{shard}: {member.name}: its key {key!r} occurs twice; the first one is used"
            bad.append(BadRow(key, shard, Problem.DUPLICATE_ID, detail))
            continue
        sample.names.add(suffix)
        if is_clip:
            try:
                secs = duration_of(member.content, member.name)
                size = len(member.content)
                sample.clip = {
                    "name": member.name,
                    "bytes": [member.start, size],
                    "duration": secs,
                }
            except BadAudio as error:
                sample.wrong = error
        elif kind in ("txt", "json"):
            sample.texts[kind] = member.content


def _text_of(sample: _Sample, shard: str, text_key: str, texts: Texts | None) -> str:
    """The transcript of a sample; empty if there is none.

    Raises:
      BadAudio: if it is no text.
    """
    try:
        if texts is not None:
            return read_text(texts.find(shard, sample.clip["name"]) if sample.clip else None)
        if "txt" in sample.texts:
            return read_text(sample.texts["txt"].decode("utf-8-sig"))
        if "json" in sample.texts:
            found = parse_json(sample.texts["json"].decode("utf-8-sig"))
            return read_text(found.get(text_key) if isinstance(found, dict) else None)
    except ValueError as error:
        raise BadAudio(Problem.MALFORMED, f"its transcript cannot be read: {error}") from error
    return ""
