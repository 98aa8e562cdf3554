"""Hugging Face data sets as rows: from the hub or a folder, with random access or streamed.

`datasets` would decode audio with torch; we take the encoded bytes from its tables instead.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import jax

from flax_projector.config import DataConfig
from flax_projector.data.audio import BadAudio, read_duration
from flax_projector.data.bad_rows import BadRow
from flax_projector.data.manifest import Draft, Durations, ManifestRow, check_rows, read_manifest
from flax_projector.data.manifest_text import read_text
from flax_projector.files import sync, write_atomically
from flax_projector.logs import progress_bar

log = logging.getLogger(__name__)

PREFIX = "hf:"
_SAVE_EVERY_ROWS = 100


@dataclass(frozen=True)
class HFSource:
    """Which columns of which split of which data set.

    Attributes:
      name: hub id, or a local folder: from `save_to_disk`, or with parquet or audio files.
      config: the data set's configuration; None means the default one.
      split: in the syntax of `datasets`, including "train[:1000]".
      audio: column with the clips.
      text: column with the transcripts.
      id: column with the ids; None uses the row numbers.
    """

    name: str
    config: str | None
    split: str
    audio: str = "audio"
    text: str = "text"
    id: str | None = None


def parse_hf_source(source: str) -> HFSource:
    """Parses `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`, and columns: `...:text=sentence:id=path`.

    Raises:
      ValueError: if it is neither.
    """
    split = r"[^:=\[]+(?:\[[^\]]*\])?"
    columns = r"(?::(?:audio|text|id)=[^:]+)*"
    match = re.fullmatch(rf"hf:([^:\[]+)(?::([^:=\[]+))?:({split})({columns})", source)
    if not match:
        raise ValueError(
            f"{source!r}: write hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT. Append :audio=COLUMN and "
            ":text=COLUMN if clips and transcripts are in columns with other names, and :id=COLUMN "
            "if rows have ids other than their numbers"
        )
    *names, columns = match.groups()
    return HFSource(*names, **dict(part.split("=", 1) for part in columns.split(":")[1:]))


@dataclass(frozen=True)
class _Table:
    """The audio column of a data set; pickled as the paths of its files."""

    dataset: Any
    source: str


@dataclass(frozen=True, slots=True)
class TableClip:
    """One clip of a data set, found by row number."""

    table: _Table
    index: int

    def fetch(self) -> bytes | str:
        """The encoded file, or its path."""
        return _encoded(next(iter(self.table.dataset[self.index].values())))

    def __str__(self) -> str:
        return f"{self.table.source}[{self.index}]"


def _encoded(audio: dict[str, Any] | None) -> bytes | str:
    if not audio or not (audio["bytes"] or audio["path"]):
        raise FileNotFoundError("the row has no audio")
    return audio["bytes"] or audio["path"]


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
    hf = parse_hf_source(source)
    if config.hf_streaming:
        manifest, num_rows = _keep_stream(source, hf, config.hf_max_rows, cache)
        limit = config.hf_max_rows or num_rows
        return read_manifest(manifest, source=source, max_rows=limit, cache=cache)
    dataset = _open(source, hf, streaming=False)
    if config.hf_max_rows:
        dataset = dataset.select(range(min(config.hf_max_rows, len(dataset))))
    table = _Table(dataset.select_columns([hf.audio]), source)
    texts = dataset[hf.text]
    ids = dataset[hf.id] if hf.id else range(len(dataset))
    drafts = [
        Draft(str(row_id), TableClip(table, n), read_text(text), None, None)
        for n, (row_id, text) in enumerate(zip(ids, texts, strict=True))
    ]
    durations = Durations(cache, f"{source} {dataset._fingerprint}")
    return check_rows(drafts, source, durations)


def _import_datasets(source: str) -> Any:
    try:
        import datasets
        import datasets.config
    except ImportError as error:
        raise ValueError(f"{source} needs datasets: pip install 'flax-projector[hf]'") from error
    return datasets


@contextlib.contextmanager
def _without_torch(datasets: Any) -> Iterator[None]:
    """Inside the block, `datasets` neither imports torch nor needs it to read audio files."""
    config, audio = datasets.config, datasets.Audio
    before = config.TORCH_AVAILABLE, audio.encode_example
    config.TORCH_AVAILABLE = False  # streaming would import it for its loaders
    # Called for folders of audio files; it would import torchcodec before looking at them.
    audio.encode_example = _keep_encoded
    try:
        yield
    finally:
        config.TORCH_AVAILABLE, audio.encode_example = before


def _keep_encoded(_audio: Any, value: Any) -> dict[str, Any]:
    """What `datasets.Audio` makes of an audio file before decoding it."""
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        return {"bytes": value.get("bytes"), "path": value.get("path")}
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, str):
        return {"bytes": None, "path": value}
    raise ValueError(f"audio as {type(value).__name__}: only encoded files can be read")


def _open(source: str, hf: HFSource, *, streaming: bool) -> Any:
    """The split, with the audio column left encoded."""
    datasets = _import_datasets(source)
    with _without_torch(datasets):
        dataset = _load(datasets, source, hf, streaming=streaming)
        columns = dataset.column_names
        wanted = [column for column in (hf.audio, hf.text, hf.id) if column]
        if columns is not None and (missing := [c for c in wanted if c not in columns]):
            raise ValueError(
                f"{source} has no column {missing}, but {sorted(columns)}: append the names of its "
                "columns, as in hf:NAME:SPLIT:audio=COLUMN:text=COLUMN:id=COLUMN"
            )
        for column, known in (dataset.features or {}).items():
            if column == hf.text and getattr(known, "dtype", "") not in ("string", "large_string"):
                raise ValueError(
                    f"{source}: column {column!r} holds {known}, not strings: name the column of "
                    "the transcripts, as in hf:NAME:SPLIT:text=COLUMN"
                )
        return dataset.cast_column(hf.audio, datasets.Audio(decode=False))


def _load(datasets: Any, source: str, hf: HFSource, *, streaming: bool) -> Any:
    folder = Path(hf.name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            dataset = datasets.load_from_disk(str(folder))
            if isinstance(dataset, datasets.DatasetDict):
                if hf.split not in dataset:
                    raise ValueError(f"no split {hf.split!r} in {sorted(dataset)}")
                dataset = dataset[hf.split]
            elif str(dataset.split or hf.split) != hf.split:
                raise ValueError(f"no split {hf.split!r}, only {str(dataset.split)!r}")
            if streaming:
                dataset = dataset.to_iterable_dataset()
        else:
            dataset = datasets.load_dataset(hf.name, hf.config, split=hf.split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{source} cannot be opened: {type(error).__name__}: {error}\nName a data set on the "
            "hub, if this machine can reach it, or a folder that holds one"
        ) from error
    return dataset


def _keep_stream(source: str, hf: HFSource, max_rows: int, cache: Path) -> tuple[Path, int]:
    """Downloads a streamed data set's missing rows; returns its manifest and number of rows."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    folder = cache / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', source)}-{digest}"
    manifest, progress_path = folder / "rows.jsonl", folder / "progress.json"
    done: dict[str, Any] = {"num_rows": 0, "is_whole": False, "stream": None}
    if progress_path.is_file():
        done = json.loads(progress_path.read_text())
    num_bytes = _length_of_rows(manifest, done["num_rows"])
    if done["is_whole"] or (max_rows and done["num_rows"] >= max_rows):
        log.info("%s: %d rows found in %s", source, done["num_rows"], folder)
        return manifest, done["num_rows"]
    if jax.process_count() > 1:
        raise ValueError(
            f"{source} is not kept in {folder} yet: start once with one process, or point "
            "--data.cache-dir of every host to a folder that has it"
        )
    stream = _open(source, hf, streaming=True)
    if done["stream"]:
        stream.load_state_dict(done["stream"])
    folder.mkdir(parents=True, exist_ok=True)
    with manifest.open("a", encoding="utf-8") as file:
        file.truncate(num_bytes)  # rows after the last save will be downloaded again

        def save() -> None:
            sync(file)  # first, so that the progress counts only rows that are there
            done["stream"] = stream.state_dict()
            write_atomically(progress_path, json.dumps(done))

        rows = itertools.islice(stream, max_rows - done["num_rows"]) if max_rows else iter(stream)
        with (
            _without_torch(_import_datasets(source)),
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


def _keep_row(row: dict[str, Any], hf: HFSource, folder: Path, number: int) -> dict[str, Any]:
    """Writes the encoded clip, and returns its row for the manifest."""
    audio = row[hf.audio]
    suffix = os.path.splitext((audio or {}).get("path") or "")[1]
    name = f"audio/{number // 1000:05d}/{number:08d}{suffix}"
    path = folder / name
    record: dict[str, Any] = {
        "id": str(row[hf.id] if hf.id else number),
        "audio": name,
        "text": read_text(row[hf.text]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        found = _encoded(audio)
        if isinstance(found, str):
            with fsspec.open(found, "rb") as file:
                found = file.read()  # pyright: ignore[reportAttributeAccessIssue]
        path.write_bytes(found)
        record["duration"] = read_duration(path)
    except (FileNotFoundError, BadAudio) as error:
        log.warning("%s, row %d: %s", hf.name, number, error)
    return record
