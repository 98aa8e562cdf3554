"""Output files and folders that appear complete or not at all."""

import contextlib
import glob
import hashlib
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from etils import epath

from flax_projector.files import writing
from flax_projector.storage import AnyPath
from flax_projector.storage.bucket import filesystem

_log = logging.getLogger(__name__)

_A_DAY = 24 * 3600.0


@contextlib.contextmanager
def replacing(dst: AnyPath, *, names: Collection[str] = (), overwrite: bool) -> Iterator[Path]:
    """Gives a local path to write to, and moves it to `dst` when the block succeeds.

    If the block fails, everything that it wrote is removed and `dst` stays as it was. If the
    process is killed, the next one that writes to the same `dst` removes what was left behind: at
    once on the same host, after a day on others, which cannot know whether it is running.

    A bucket has no folders that could be moved: there, a folder is complete when the files directly
    in it are there, and `dst` is incomplete while it is being replaced.

    Args:
      dst: the destination. If it is a link, the target of the link is replaced.
      names: the files and folders in a finished folder; empty if `dst` is to be a file.
      overwrite: replace what an earlier call wrote: a file, or a folder with exactly these names.

    Raises:
      ValueError: if `dst` exists and `overwrite` is false, or if something else is there, which is
        never deleted.
      OSError: naming `dst`, if it cannot be written.
    """
    if not isinstance(dst, Path):
        with _uploading(dst, names, overwrite) as part:
            yield part
        return
    dst = dst.resolve()
    stem = _stem(dst.name)
    for left in dst.parent.glob(f".{glob.escape(stem)}.*.part"):
        owner = re.fullmatch(r"\.(\d+)@(.*)\.part", left.name.removeprefix(f".{stem}"))
        if owner and _is_left_behind(left, int(owner[1]), owner[2]):
            _discard(left, dst)
    _check_destination(dst, names, overwrite)
    staging = dst.with_name(f".{stem}.{os.getpid()}@{socket.gethostname()}.part")
    part = staging / "new" / dst.name
    new_parents = [parent for parent in dst.parents if not parent.exists()]
    try:
        part.parent.mkdir(parents=True)
        yield part
        if dst.is_dir():  # a folder cannot be replaced in one step
            dst.rename(_moved_aside(staging))
        part.replace(dst)
    except BaseException as error:
        try:
            _discard(staging, dst)
        except OSError as left:  # must not hide what failed first
            _log.warning("WARNING: %s could not be removed: %s", staging, left)
        with contextlib.suppress(OSError):  # not made yet, or in use by somebody else
            for parent in new_parents:
                parent.rmdir()
        if isinstance(error, OSError) and _is_of_writing(error, staging):
            reason = error.strerror or error
            raise OSError(f"{dst} could not be written: {reason}. Nothing was changed") from error
        raise
    _discard(staging, dst)


@contextlib.contextmanager
def _uploading(dst: epath.Path, names: Collection[str], overwrite: bool) -> Iterator[Path]:
    _check_destination(dst, names, overwrite)
    with tempfile.TemporaryDirectory(prefix="flax-projector-") as temporary:
        part = Path(temporary, dst.name)
        yield part
        files = [file for file in part.rglob("*") if file.is_file()] if names else [part]
        with writing(dst):
            if dst.exists():
                for file in (dst / name for name in names):
                    if file.is_file():  # first, so that nobody takes the rest for a whole folder
                        file.unlink()
                dst.rmtree(missing_ok=True)
            for file in sorted(files, key=lambda file: -len(file.parts)):
                to = f"{dst.parent}/{file.relative_to(temporary).as_posix()}"
                filesystem().pipe_file(to, file.read_bytes())


def _check_destination(dst: AnyPath, names: Collection[str], overwrite: bool) -> None:
    if not dst.exists():
        return
    if not overwrite:
        raise ValueError(f"{dst} exists: choose another destination or pass --overwrite")
    is_folder = dst.is_dir()
    found = {path.name for path in dst.iterdir()} if is_folder else set()
    if is_folder == bool(names) and found in (set(), set(names)):
        return
    actual = (
        f"a folder with {', '.join(sorted(found)) or 'nothing'} in it" if is_folder else "a file"
    )
    expected = f"a folder with {', '.join(sorted(names))} in it" if names else "a file"
    raise ValueError(
        f"{dst} will not be overwritten: it is {actual}, but an earlier conversion would have left "
        f"{expected}. Choose another destination"
    )


def _is_of_writing(error: OSError, staging: Path) -> bool:
    """Whether an error concerns the result, and not a file that is read."""
    return error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(staging)


def _stem(name: str) -> str:
    """What the name of a staging folder begins with: the name, or a hash of one that is long."""
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()
    return name if len(os.fsencode(name)) <= len(digest) else digest


def _moved_aside(staging: Path) -> Path:
    """Where a folder is kept while another takes its place."""
    return staging / "old"


def _discard(staging: Path, dst: Path) -> None:
    """Removes a staging folder; first moves back a folder in it that has not been replaced."""
    old = _moved_aside(staging)
    if old.exists() and not dst.exists():
        old.rename(dst)
    if staging.exists():
        shutil.rmtree(staging)


def _is_left_behind(staging: Path, pid: int, host: str) -> bool:
    """Whether the process that wrote there is gone; those of other hosts are, after a day."""
    if host == socket.gethostname():
        return not _is_of_another(pid)
    try:
        return time.time() - staging.stat().st_mtime > _A_DAY
    except FileNotFoundError:  # it has just been finished
        return False


def _is_of_another(pid: int) -> bool:
    """Whether another process with this number is running on this host."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)  # only checks that it exists
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it belongs to another user
    return True
