"""Hugging Face data sets as rows: from the hub or a folder, with random access or streamed."""

from pathlib import Path
from typing import Any

from flax_projector.config import DataConfig
from flax_projector.data.bad_rows import BadRow
from flax_projector.data.hf_clips import Table, TableClip
from flax_projector.data.hf_source import open_hf, parse_hf_source
from flax_projector.data.hf_stream import keep_stream
from flax_projector.data.manifest import Draft, Durations, ManifestRow, check_rows, read_manifest
from flax_projector.data.manifest_text import check_utf8, read_text


def read_hf(source: str, config: DataConfig, cache: Path) -> tuple[list[ManifestRow], list[BadRow]]:
    """Reads the rows of a data set, without decoding any audio.

    With random access, clips stay in the data set's files. A streamed data set has no files, but a
    resumable run must be able to ask for any batch. So it is read once, row by row, and its encoded
    clips are kept under `cache`, with a manifest; each process of a run reads its part. An
    interrupted download continues where it stopped, a complete one is not repeated, and a larger
    `hf_max_rows` adds the missing rows.

    Args:
      source: see `parse_hf_source`.
      config: whether to stream, and the row limit.
      cache: folder for streamed data sets and for durations.

    Returns:
      As `manifest.read_manifest`.

    Raises:
      ValueError: if there is no such data set, split or column, `datasets` is not installed, or the
        hub cannot be reached.
      HostsDiffer: on all processes, if they would have to share `cache` and do not.
    """
    check_utf8("data set", source)
    hf = parse_hf_source(source)
    if config.hf_streaming:
        manifest, num_rows = keep_stream(source, hf, config.hf_max_rows, cache)
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


def _id(row_id: Any, number: int) -> str:
    return str(number if row_id is None else row_id)
