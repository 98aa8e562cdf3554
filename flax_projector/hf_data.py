"""Hugging Face data sets as rows: from the hub or a folder, at random access or streamed.

`datasets` decodes audio with torch; its tables are asked for the encoded bytes instead.
"""

import hashlib
import itertools
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import jax
from tqdm import tqdm

from flax_projector.audio import BadAudio, read_duration
from flax_projector.bad_rows import BadRow
from flax_projector.config import DataConfig
from flax_projector.manifest import Draft, Durations, ManifestRow, check_rows, read_manifest

log = logging.getLogger(__name__)

PREFIX = "hf:"
_SAVE_EVERY_ROWS = 100


@dataclass(frozen=True)
class HFSource:
    """Which split of which data set.

    Attributes:
      name: hub id, or a local folder: of `save_to_disk`, of parquet files, or of sound files.
      config: of the data set; None is its default.
      split: as `datasets` writes it, "train[:1000]" included.
    """

    name: str
    config: str | None
    split: str


def parse_hf_source(source: str) -> HFSource:
    """Reads `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`.

    Raises:
      ValueError: if it is neither.
    """
    match = re.fullmatch(r"hf:([^:\[]+)(?::([^:\[]+))?:([^:\[]+(?:\[[^\]]*\])?)", source)
    if not match:
        raise ValueError(f"{source!r}: write hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    return HFSource(*match.groups())


@dataclass(frozen=True)
class _Table:
    """The audio column of a data set; it pickles as the paths of its files."""

    dataset: Any
    source: str


@dataclass(frozen=True, slots=True)
class TableClip:
    """One clip of a data set, found by row number."""

    table: _Table
    index: int

    def fetch(self) -> bytes | str:
        """The encoded file, or where it lies."""
        return _encoded(next(iter(self.table.dataset[self.index].values())))

    def __str__(self) -> str:
        return f"{self.table.source}[{self.index}]"


def _encoded(audio: dict[str, Any] | None) -> bytes | str:
    if not audio or not (audio["bytes"] or audio["path"]):
        raise FileNotFoundError("the row has no audio")
    return audio["bytes"] or audio["path"]


def read_hf(source: str, config: DataConfig, cache: Path) -> tuple[list[ManifestRow], list[BadRow]]:
    """Reads the rows of a data set, without decoding any audio.

    At random access, clips stay in the files of the data set. A streamed data set has no random
    access, but a resumable run must be able to ask for any batch: it is therefore read once, row
    by row, and its encoded clips are kept under `cache` with a manifest. An interrupted download
    continues where it stood, a whole one is not repeated, and a higher `hf_max_rows` adds the rows
    that are missing.

    Args:
      source: see `parse_hf_source`.
      config: columns, streaming, row limit.
      cache: folder of streamed sets, and of durations.

    Returns:
      As `manifest.read_manifest`.

    Raises:
      ValueError: if there is no such data set, split or column, `datasets` is not installed, or
        the hub cannot be reached.
    """
    if config.hf_streaming:
        manifest, num_rows = _keep_stream(source, config, cache)
        limit = config.hf_max_rows or num_rows
        return read_manifest(manifest, source=source, max_rows=limit, cache=cache)
    dataset = _open(source, config, streaming=False)
    if config.hf_max_rows:
        dataset = dataset.select(range(min(config.hf_max_rows, len(dataset))))
    table = _Table(dataset.select_columns([config.hf_audio_column]), source)
    texts = dataset[config.hf_text_column]
    ids = dataset[config.hf_id_column] if config.hf_id_column else range(len(dataset))
    drafts = [
        Draft(str(row_id), TableClip(table, n), str(text or "").strip(), None, None)
        for n, (row_id, text) in enumerate(zip(ids, texts, strict=True))
    ]
    durations = Durations(cache, f"{source} {dataset._fingerprint}")
    return check_rows(drafts, source, durations)


def _import_datasets(source: str) -> Any:
    """`datasets`, kept from importing torch."""
    try:
        import datasets
        import datasets.config
    except ImportError as error:
        raise ValueError(f"{source} needs datasets: pip install 'flax-projector[hf]'") from error
    datasets.config.TORCH_AVAILABLE = False  # streaming would import it for its loaders
    # Folders of sound files go through it, and it imports torchcodec before it looks at them.
    datasets.Audio.encode_example = _keep_encoded  # pyright: ignore[reportAttributeAccessIssue]
    return datasets


def _keep_encoded(_audio: Any, value: Any) -> dict[str, Any]:
    """What `datasets.Audio` makes of a sound file before anybody decodes it."""
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        return {"bytes": value.get("bytes"), "path": value.get("path")}
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, str):
        return {"bytes": None, "path": value}
    raise ValueError(f"audio as {type(value).__name__}: only encoded files can be read")


def _open(source: str, config: DataConfig, *, streaming: bool) -> Any:
    """The split, its audio column encoded."""
    hf = parse_hf_source(source)
    datasets = _import_datasets(source)
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
            f"{source} cannot be opened: {type(error).__name__}: {error}\nName a data set of the "
            "hub that this machine can reach, or a folder that it was saved in"
        ) from error
    columns = dataset.column_names
    wanted = [config.hf_audio_column, config.hf_text_column, config.hf_id_column]
    if columns is not None and (missing := [c for c in wanted if c and c not in columns]):
        raise ValueError(
            f"{source} has no column {missing}, but {sorted(columns)}: set data.hf_audio_column, "
            "data.hf_text_column and data.hf_id_column"
        )
    return dataset.cast_column(config.hf_audio_column, datasets.Audio(decode=False))


def _keep_stream(source: str, config: DataConfig, cache: Path) -> tuple[Path, int]:
    """Downloads what is missing of a streamed set; its manifest and number of rows."""
    columns = [config.hf_audio_column, config.hf_text_column, config.hf_id_column]
    digest = hashlib.sha256(json.dumps([source, columns]).encode()).hexdigest()[:8]
    folder = cache / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', source)}-{digest}"
    manifest, progress_path = folder / "rows.jsonl", folder / "progress.json"
    done: dict[str, Any] = {"num_rows": 0, "is_whole": False, "stream": None}
    if progress_path.is_file():
        done = json.loads(progress_path.read_text())
    limit = config.hf_max_rows
    if done["is_whole"] or (limit and done["num_rows"] >= limit):
        log.info("%s: %d rows found in %s", source, done["num_rows"], folder)
        return manifest, done["num_rows"]
    if jax.process_count() > 1:
        raise ValueError(
            f"{source} is not yet kept in {folder}: start once with one process, or point "
            "data.cache_dir of every host to a folder that has it"
        )
    stream = _open(source, config, streaming=True)
    if done["stream"]:
        stream.load_state_dict(done["stream"])
    folder.mkdir(parents=True, exist_ok=True)
    kept = manifest.read_text(encoding="utf-8").splitlines() if manifest.is_file() else []
    with manifest.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in kept[: done["num_rows"]])

        def save() -> None:
            file.flush()
            done["stream"] = stream.state_dict()
            partial = progress_path.with_suffix(".partial")
            partial.write_text(json.dumps(done))
            os.replace(partial, progress_path)

        rows = itertools.islice(stream, limit - done["num_rows"]) if limit else iter(stream)
        bar = tqdm(rows, source, initial=done["num_rows"], total=limit or None, unit="row")
        for row in bar:
            number = done["num_rows"]
            record = _keep_row(row, config, folder, number)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            done["num_rows"] += 1
            if done["num_rows"] % _SAVE_EVERY_ROWS == 0:
                save()
        done["is_whole"] = not limit or done["num_rows"] < limit
        save()
    return manifest, done["num_rows"]


def _keep_row(row: dict[str, Any], config: DataConfig, folder: Path, number: int) -> dict[str, Any]:
    """Writes the encoded clip; what the manifest says of it."""
    audio = row[config.hf_audio_column]
    suffix = os.path.splitext((audio or {}).get("path") or "")[1]
    name = f"audio/{number // 1000:05d}/{number:08d}{suffix}"
    path = folder / name
    record = {
        "id": str(row[config.hf_id_column] if config.hf_id_column else number),
        "audio": name,
        "text": row[config.hf_text_column],
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
        log.warning("%s, row %d: %s", config.hf_audio_column, number, error)
    return record
