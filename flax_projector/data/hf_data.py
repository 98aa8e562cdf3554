"""Hugging Face data sets as rows: from the hub or a folder, with random access or streamed."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax_projector.config import DataConfig
from flax_projector.data.bad_rows import BadRows
from flax_projector.data.drafts import Draft
from flax_projector.data.hf_clips import Table, TableClip
from flax_projector.data.hf_source import open_hf, parse_hf_source
from flax_projector.data.hf_stream import keep_stream
from flax_projector.data.manifest import read_manifest
from flax_projector.data.manifest_text import check_utf8, read_text
from flax_projector.data.row_file import keep_rows
from flax_projector.data.rows import Rows

_BATCH = 1000  # rows whose texts are in memory at a time


def read_hf(source: str, config: DataConfig, cache: Path) -> tuple[Rows, BadRows]:
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
    column = dataset.select_columns([hf.audio]).with_format("arrow")
    clips = Table(column, source, hf.folder, version)

    def make_drafts() -> Iterator[Draft]:
        names = {hf.text: "text"} | ({hf.id: "id"} if hf.id else {})
        texts = dataset.select_columns(list(names)).with_format("arrow")
        number = 0
        for table in texts.iter(batch_size=_BATCH):
            for row in table.to_pylist():
                row_id = row[hf.id] if hf.id else None
                clip = TableClip(clips, number)
                yield Draft(_id(row_id, number), clip, read_text(row[hf.text]), None, None)
                number += 1

    rows = keep_rows(
        source,
        make_drafts,
        origin=source,
        made_from=f"{version} {len(dataset)}",
        beside=None,
        cache=cache,
        stored=functools.partial(TableClip, clips),
    )
    return rows, rows.bad


def _id(row_id: Any, number: int) -> str:
    return str(number if row_id is None else row_id)
