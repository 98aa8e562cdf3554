"""Small files that appear whole or not at all."""

import os
import uuid
from pathlib import Path
from typing import IO


def sync(file: IO) -> None:
    """Makes what was written survive the machine, not only the process."""
    file.flush()
    os.fsync(file.fileno())


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file in place of an earlier one, and the folders it lies in.

    Whoever reads it, also after the process was killed or the machine went away, finds the old
    text or the new one. Several processes may write the same file: the last one wins.
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
