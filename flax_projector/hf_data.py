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
from flax_projector.files import sync, write_atomically
from flax_projector.manifest import Draft, Durations, ManifestRow, check_rows, read_manifest

log = logging.getLogger(__name__)

PREFIX = "hf:"
_SAVE_EVERY_ROWS = 100


@dataclass(frozen=True)
class HFSource:
    """Which columns of which split of which data set.

    Attributes:
      name: hub id, or a local folder: of `save_to_disk`, of parquet files, or of sound files.
      config: of the data set; None is its default.
      split: as `datasets` writes it, "train[:1000]" included.
      audio: column of the clips.
      text: column of the transcripts.
      id: column of the ids; None takes the row's number.
    """

    name: str
    config: str | None
    split: str
    audio: str = "audio"
    text: str = "text"
    id: str | None = None


def parse_hf_source(source: str) -> HFSource:
    """Reads `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`, and columns: `...:text=sentence:id=path`.

    Raises:
      ValueError: if it is neither.
    """
    split = r"[^:=\[]+(?:\[[^\]]*\])?"
    columns = r"(?::(?:audio|text|id)=[^:]+)*"
    match = re.fullmatch(rf"hf:([^:\[]+)(?::([^:=\[]+))?:({split})({columns})", source)
    if not match:
        raise ValueError(
            f"{source!r}: write hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT; behind it :audio=COLUMN and "
            ":text=COLUMN, if clips and transcripts are in other columns than 'audio' and 'text', "
            "and :id=COLUMN, if ids are not the numbers of the rows"
        )
    *names, columns = match.groups()
    return HFSource(*names, **dict(part.split("=", 1) for part in columns.split(":")[1:]))


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
      config: streaming, row limit.
      cache: folder of streamed sets, and of durations.

    Returns:
      As `manifest.read_manifest`.

    Raises:
      ValueError: if there is no such data set, split or column, `datasets` is not installed, or
        the hub cannot be reached.
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


def _open(source: str, hf: HFSource, *, streaming: bool) -> Any:
    """The split, its audio column encoded."""
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
    wanted = [column for column in (hf.audio, hf.text, hf.id) if column]
    if columns is not None and (missing := [c for c in wanted if c not in columns]):
        raise ValueError(
            f"{source} has no column {missing}, but {sorted(columns)}: name its columns behind it, "
            "as in hf:NAME:SPLIT:audio=COLUMN:text=COLUMN:id=COLUMN"
        )
    return dataset.cast_column(hf.audio, datasets.Audio(decode=False))


def _keep_stream(source: str, hf: HFSource, max_rows: int, cache: Path) -> tuple[Path, int]:
    """Downloads what is missing of a streamed set; its manifest and number of rows."""
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
            f"{source} is not yet kept in {folder}: start once with one process, or point "
            "data.cache_dir of every host to a folder that has it"
        )
    stream = _open(source, hf, streaming=True)
    if done["stream"]:
        stream.load_state_dict(done["stream"])
    folder.mkdir(parents=True, exist_ok=True)
    with manifest.open("a", encoding="utf-8") as file:
        file.truncate(num_bytes)  # rows behind it came after the last save, and will come again

        def save() -> None:
            sync(file)  # first: the progress counts only what is there
            done["stream"] = stream.state_dict()
            write_atomically(progress_path, json.dumps(done))

        rows = itertools.islice(stream, max_rows - done["num_rows"]) if max_rows else iter(stream)
        bar = tqdm(rows, source, initial=done["num_rows"], total=max_rows or None, unit="row")
        for row in bar:
            record = _keep_row(row, hf, folder, done["num_rows"])
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            done["num_rows"] += 1
            if done["num_rows"] % _SAVE_EVERY_ROWS == 0:
                save()
        done["is_whole"] = not max_rows or done["num_rows"] < max_rows
        save()
    return manifest, done["num_rows"]


def _length_of_rows(manifest: Path, num_rows: int) -> int:
    """Bytes of a manifest's first rows.

    Raises:
      ValueError: if it has fewer.
    """
    if not num_rows:
        return 0
    lengths = []
    if manifest.is_file():
        with manifest.open("rb") as file:
            lengths = [len(line) for line in itertools.islice(file, num_rows)]
    if len(lengths) < num_rows:
        raise ValueError(
            f"{manifest} has {len(lengths)} rows, not the {num_rows} that were kept according to "
            f"progress.json: delete {manifest.parent}, and the data set is downloaded again"
        )
    return sum(lengths)


def _keep_row(row: dict[str, Any], hf: HFSource, folder: Path, number: int) -> dict[str, Any]:
    """Writes the encoded clip; what the manifest says of it."""
    audio = row[hf.audio]
    suffix = os.path.splitext((audio or {}).get("path") or "")[1]
    name = f"audio/{number // 1000:05d}/{number:08d}{suffix}"
    path = folder / name
    record = {
        "id": str(row[hf.id] if hf.id else number),
        "audio": name,
        "text": row[hf.text],
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
