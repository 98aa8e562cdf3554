"""Destinations that appear complete or not at all."""

import contextlib
import glob
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(dst: Path, *, names: Collection[str] = (), overwrite: bool) -> Iterator[Path]:
    """Gives a path to write to, and moves it to `dst` when the block succeeds.

    If the block fails, what was written is removed and `dst` is as it was. What a process leaves
    behind that is killed, the next one removes that writes to the same `dst`.

    Args:
      dst: what appears. If it is a link, what it points to is replaced.
      names: what a finished folder holds; empty for a file.
      overwrite: replaces what an earlier call wrote: a file, or a folder that holds `names` alone.

    Raises:
      ValueError: if `dst` exists and `overwrite` is false, or is anything else: that is never
        deleted.
    """
    dst = dst.resolve()
    for left in dst.parent.glob(f".{glob.escape(dst.name)}.*.part"):
        pid = re.fullmatch(r"\.(\d+)\.part", left.name.removeprefix(f".{dst.name}"))
        if pid and not _is_of_another(int(pid[1])):
            _discard(left, dst)
    _check_destination(dst, names, overwrite)
    staging = dst.with_name(f".{dst.name}.{os.getpid()}.part")
    staging.mkdir(parents=True)
    try:
        yield staging / dst.name
        if dst.is_dir():  # a folder cannot be replaced in one step
            dst.rename(_moved_aside(staging, dst))
        (staging / dst.name).replace(dst)
    finally:
        _discard(staging, dst)


def _check_destination(dst: Path, names: Collection[str], overwrite: bool) -> None:
    if not dst.exists():
        return
    if not overwrite:
        raise ValueError(f"{dst} exists: choose another destination or pass --overwrite")
    is_folder = dst.is_dir()
    held = {path.name for path in dst.iterdir()} if is_folder else set()
    if is_folder == bool(names) and held in (set(), set(names)):
        return
    found = f"a folder with {', '.join(sorted(held)) or 'nothing'} in it" if is_folder else "a file"
    expected = f"a folder with {', '.join(sorted(names))} in it" if names else "a file"
    raise ValueError(
        f"{dst} will not be overwritten: it is {found}, and an earlier conversion would have left "
        f"{expected}. Choose another destination"
    )


def _moved_aside(staging: Path, dst: Path) -> Path:
    """Where a folder lies while another takes its place."""
    return staging / f"{dst.name}.old"


def _discard(staging: Path, dst: Path) -> None:
    """Removes a staging folder; a folder that was moved aside and not replaced comes back."""
    old = _moved_aside(staging, dst)
    if old.exists() and not dst.exists():
        old.rename(dst)
    shutil.rmtree(staging)


def _is_of_another(pid: int) -> bool:
    """Whether another process with this number is running."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's
    return True
