"""Telling URLs from local paths, and writing small files completely or not at all."""

import os
import uuid
from pathlib import Path
from typing import IO


def is_url(path: str | Path) -> bool:
    """Whether the path is a URL (`gs://...`), which fsspec opens, and not a local path."""
    return "://" in str(path)


def sync(file: IO) -> None:
    """Flushes to disk, so that the data survives a machine crash, not just a process crash."""
    file.flush()
    os.fsync(file.fileno())


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file, replacing any earlier one, and creates its folder if needed.

    A reader sees either the old text or the new one, even if the process is killed or the machine
    goes down. Several processes may write the same file: the last one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            sync(file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
