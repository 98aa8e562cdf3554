"""Names and opens Hugging Face data sets; their clips stay as they are stored."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFIX = "hf:"


@dataclass(frozen=True)
class HFSource:
    """Which columns of which split of which data set.

    Attributes:
      name: hub id, or a local folder: from `save_to_disk`, or with parquet or audio files.
      config: the data set's configuration; None means the default one.
      split: in the syntax of `datasets`, including "train[:1000]" and "train+test".
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

    @property
    def folder(self) -> Path:
        """The local folder that the name stands for, if it does."""
        return Path(os.path.expanduser(self.name))


def parse_hf_source(source: str) -> HFSource:
    """Parses `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`, and columns: `...:text=sentence:id=path`.

    Raises:
      ValueError: if it is neither.
    """
    part = r"[^:=\[+]+(?:\[[^\]]*\])?(?:\(\w+\))?"
    columns = r"(?::(?:audio|text|id)=[^:]+)*"
    match = re.fullmatch(rf"hf:([^:\[]+)(?::([^:=\[]+))?:({part}(?:\+{part})*)({columns})", source)
    if not match:
        raise ValueError(
            f"{source!r}: write hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT. Append :audio=COLUMN and "
            ":text=COLUMN if clips and transcripts are in columns with other names, and :id=COLUMN "
            "if rows have ids other than their numbers"
        )
    *names, columns = match.groups()
    return HFSource(*names, **dict(part.split("=", 1) for part in columns.split(":")[1:]))


def open_hf(source: str, hf: HFSource, *, streaming: bool) -> Any:
    """Opens a split.

    Returns:
      A `datasets.Dataset` or, if streaming, a `datasets.IterableDataset`.

    Raises:
      ValueError: if there is no such data set, split or column, a column holds something else than
        clips, strings or ids, `datasets` is not installed, or the hub cannot be reached.
    """
    datasets = _import_datasets(source)
    with without_torch(source):
        try:
            dataset = _load(datasets, hf, streaming=streaming)
            is_empty = isinstance(dataset, datasets.Dataset) and not len(dataset)
            if streaming and isinstance(dataset, datasets.Dataset) and not is_empty:
                dataset = dataset.to_iterable_dataset()
            if streaming and dataset.features is None:
                dataset = dataset._resolve_features()
        except Exception as error:  # the hub's client and the readers of files raise their own
            raise ValueError(f"{source} cannot be opened: {_explain(error, hf)}") from error
        if is_empty:
            raise ValueError(f"{source} has no rows")
        _check_columns(datasets, source, hf, dataset)
        if isinstance((dataset.features or {}).get(hf.audio), datasets.Audio):
            dataset = dataset.cast_column(hf.audio, datasets.Audio(decode=False))
        return dataset


@contextlib.contextmanager
def without_torch(source: str) -> Iterator[None]:
    """Inside the block, `datasets` neither imports torch nor needs it to read audio files."""
    datasets = _import_datasets(source)
    config, audio = datasets.config, datasets.Audio
    before = config.TORCH_AVAILABLE, audio.encode_example
    config.TORCH_AVAILABLE = False  # streaming would import it for its loaders
    # Called for folders of audio files; it would import torchcodec before looking at them.
    audio.encode_example = _keep_encoded
    try:
        yield
    finally:
        config.TORCH_AVAILABLE, audio.encode_example = before


def _import_datasets(source: str) -> Any:
    try:
        import datasets
        import datasets.config
    except ImportError as error:
        raise ValueError(f"{source} needs datasets: pip install 'flax-projector[hf]'") from error
    return datasets


def _keep_encoded(_audio: Any, value: Any) -> dict[str, Any]:
    """What `datasets.Audio` makes of an audio file before decoding it."""
    if isinstance(value, dict) and ("bytes" in value or "path" in value):
        return {"bytes": value.get("bytes"), "path": value.get("path")}
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, str):
        return {"bytes": None, "path": value}
    raise ValueError(f"audio as {type(value).__name__}: only encoded files can be read")


def _load(datasets: Any, hf: HFSource, *, streaming: bool) -> Any:
    whole, parts = hf.folder / "state.json", hf.folder / "dataset_dict.json"
    if not (whole.is_file() or parts.is_file()):
        name = str(hf.folder) if hf.folder.exists() else hf.name
        return datasets.load_dataset(name, hf.config, split=hf.split, streaming=streaming)
    if hf.config:
        raise ValueError(f"a folder of save_to_disk has no configurations such as {hf.config!r}")
    if parts.is_file():
        names = json.loads(parts.read_text("utf-8"))["splits"]
        saved = {name: _load_saved(datasets, hf.folder / name) for name in names}
    else:
        dataset = _load_saved(datasets, hf.folder)
        if str(dataset.split) == hf.split:
            saved, names = {hf.split: dataset}, None
        else:
            # A slice bears the name of what it was taken from; `datasets` calls it train if
            # there is none.
            saved = {re.sub(r"[\[(].*?[\])]", "", str(dataset.split or "train")): dataset}
    if set(saved) != {hf.split}:
        lengths = {name: len(dataset) for name, dataset in saved.items()}
        instruction = datasets.ReadInstruction.from_spec(hf.split).to_absolute(lengths)
        slices = [
            saved[part.splitname].select(range(part.from_, part.to) or []) for part in instruction
        ]
    else:
        slices = [saved[hf.split]]
    return datasets.concatenate_datasets(slices) if len(slices) > 1 else slices[0]


def _load_saved(datasets: Any, folder: Path) -> Any:
    if not json.loads((folder / "state.json").read_text("utf-8"))["_data_files"]:
        return datasets.Dataset.from_dict({})  # `load_from_disk` needs a file
    return datasets.load_from_disk(str(folder))


def _explain(error: Exception, hf: HFSource) -> str:
    """What went wrong, and the way out."""
    causes = [error] if error.__cause__ is None else [error, error.__cause__]
    shown = [f"{type(e).__name__}: {' '.join(str(e).split())[:300]}" for e in causes]
    way_out = "Name a data set on the hub, if this machine can reach it, or a folder that holds one"
    if "Dataset scripts" in str(error):
        way_out = (
            "Such data sets are Python programs. Run this one with datasets<4, call save_to_disk, "
            "and name that folder"
        )
    elif hf.folder.is_file():
        way_out = f"This is a file: name the folder that it is in, {hf.folder.parent}"
    elif "Bad split" in str(error) and "[" in hf.split:
        way_out = "A stream (--data.hf-streaming) has no slices: name the whole split"
    return f"{'; '.join(shown)}\n{way_out}"


def _check_columns(datasets: Any, source: str, hf: HFSource, dataset: Any) -> None:
    columns, features = dataset.column_names, dataset.features or {}
    if not columns:  # a stream that ends before its first row
        raise ValueError(f"{source} has no rows")
    wanted = [column for column in (hf.audio, hf.text, hf.id) if column]
    if missing := [column for column in wanted if column not in columns]:
        raise ValueError(
            f"{source} has no column {missing}, but {sorted(columns)}: append the names of its "
            "columns, as in hf:NAME:SPLIT:audio=COLUMN:text=COLUMN:id=COLUMN"
        )
    needed = {
        hf.audio: _not_clips(datasets, features.get(hf.audio)),
        hf.text: "" if _is_value(features.get(hf.text), "string") else "not strings",
    }
    if hf.id and not _is_value(features.get(hf.id), "string", "int", "uint"):
        needed[hf.id] = "neither strings nor integers"
    for column, wrong in needed.items():
        if wrong:
            known = str(features.get(column))[:200]  # a ClassLabel lists its names
            role = next(role for role in ("audio", "text", "id") if getattr(hf, role) == column)
            raise ValueError(
                f"{source}: column {column!r} holds {known}, {wrong}: name the column of the "
                f"{_ROLES[role]}, as in hf:NAME:SPLIT:{role}=COLUMN"
            )


_ROLES = {"audio": "clips", "text": "transcripts", "id": "ids"}


def _is_value(feature: Any, *dtypes: str) -> bool:
    """Whether a column holds plain values of some dtype, of any width."""
    dtype = getattr(feature, "dtype", "") if type(feature).__name__ == "Value" else ""
    return re.sub(r"^large_|\d+$", "", dtype) in dtypes


def _not_clips(datasets: Any, feature: Any) -> str:
    """Why a column holds no clips; empty if it does."""
    if isinstance(feature, datasets.Audio) or _is_value(feature, "string", "binary", "null"):
        return ""
    if not isinstance(feature, dict) or not {"array", "bytes", "path"} & set(feature):
        return "neither files nor paths nor samples with their sampling_rate"
    samples = feature.get("array")
    if samples is None:
        return ""
    if "sampling_rate" not in feature:
        return "samples without their sampling_rate"
    while hasattr(samples, "feature"):
        samples = samples.feature
    dtype = getattr(samples, "dtype", "")
    # The full scale of other integers is not known: those of 16 bits are often stored as int64.
    is_known = dtype == "int16" or dtype.startswith("float")
    return "" if is_known else "samples of which only int16 and floats have a known full scale"
