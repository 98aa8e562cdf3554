"""Destinations that appear complete or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_OURS = {"config.json", "model.safetensors", "params"}


@contextlib.contextmanager
def replacing(dst: Path, *, overwrite: bool) -> Iterator[Path]:
    """Gives a path beside `dst` to write to, and moves it to `dst` when the block succeeds.

    If the block fails, what was written is removed and `dst` is as it was.

    Raises:
      ValueError: if `dst` exists and `overwrite` is false, or if it holds files that no conversion
        writes: those are never deleted.
    """
    _check_destination(dst, overwrite)
    dst.parent.mkdir(parents=True, exist_ok=True)
    part = dst.with_name(f".{dst.stem}.{os.getpid()}.part{dst.suffix}")
    _remove(part)
    try:
        yield part
        old = dst.with_name(f".{dst.stem}.{os.getpid()}.old{dst.suffix}")
        if dst.is_dir():  # a folder cannot be replaced in one step
            dst.rename(old)
        part.replace(dst)
        _remove(old)
    finally:
        _remove(part)


def _check_destination(dst: Path, overwrite: bool) -> None:
    if not dst.exists():
        return
    if not overwrite:
        raise ValueError(f"{dst} exists: choose another destination or pass --overwrite")
    foreign = sorted(p.name for p in dst.iterdir() if p.name not in _OURS) if dst.is_dir() else []
    if foreign:
        raise ValueError(
            f"{dst} will not be overwritten, it also holds {', '.join(foreign)}: "
            "choose another destination"
        )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
