"""Which paths can be used, reading JSON, and writing small files completely or not at all."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from flax_projector.storage import AnyPath, in_bucket, temporary_folder
from flax_projector.storage.bucket import bucket_path, filesystem
from flax_projector.storage.urls import filesystem_of, open_url

_log = logging.getLogger(__name__)


def is_url(path: str | AnyPath) -> bool:
    """Whether the path is a URL (`gs://...`), and not a local path."""
    return "://" in str(path)


def any_path(path: str | AnyPath) -> AnyPath:
    """The path of something that may be on a disk or in a bucket (`gs://...`).

    Raises:
      ValueError: as `local_path` and `bucket_path`.
      OSError: if the bucket cannot be used.
    """
    return bucket_path(str(path)) if is_url(path) else local_path(str(path))


def whole_path(path: AnyPath) -> AnyPath:
    """An absolute path without links; one in a bucket is that already."""
    return path if in_bucket(path) else path.resolve()


def local_path(path: str | Path) -> Path:
    """The path that a user names, with "~" as the home folder.

    Raises:
      ValueError: if it is empty, a URL, not UTF-8, or a loop of links.
    """
    text = os.path.expanduser(path)
    if not text:
        raise ValueError("the path is empty: name a file or a folder")
    if re.match(r"[A-Za-z][\w+.-]+:/", text):  # `Path` makes one slash of two
        raise ValueError(f"{text} is a URL: expected a local or mounted path")
    try:
        text.encode()
        Path(text).resolve().exists()
    except UnicodeEncodeError as error:
        raise ValueError(f"the path {text!a} is not UTF-8: rename it") from error
    except (RuntimeError, OSError, ValueError) as error:  # RuntimeError: a loop, before Python 3.13
        raise ValueError(f"{text!r} cannot be used as a path: {error}") from error
    return Path(text)


def check_orbax_path(path: AnyPath, *, is_new: bool) -> None:
    """Checks that Orbax, which stores parameters and runs, can handle a path.

    Args:
      path: of a folder.
      is_new: whether Orbax is to write there. It then searches the folder, and takes the path for
        a pattern.

    Raises:
      ValueError: naming what is in the way, also in the name of a folder above.
    """
    whole = whole_path(path)
    wrong = {c for c in str(whole) if c in ("\\*?[" if is_new else "\\")}
    if not in_bucket(path):  # Orbax would look there
        wrong |= {name for name in whole.parts if name in ("gs:", "s3:", "az:", "hf:")}
    if wrong:
        raise ValueError(
            f"{whole}: parameters cannot be {'written to' if is_new else 'read from'} a path with "
            f"{' or '.join(sorted(wrong))} in it. "
            + ("Choose another path" if is_new else "Rename the folder")
        )


def read_bytes(path: str) -> bytes:
    """The contents of a file on a disk or at a URL, whose errors are those of its file system."""
    if not is_url(path):
        return Path(path).read_bytes()
    fs, place = filesystem_of(path)
    return fs.cat_file(place)


def open_to_read(path: str) -> Any:
    """Opens a file on a disk or at a URL, to be read from its beginning to its end."""
    return open_url(path) if is_url(path) else open(path, "rb")


def parse_json(text: str) -> Any:
    """`json.loads`, for a text that a user may have written or damaged.

    Raises:
      ValueError: whatever is wrong with it, even if it is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@contextlib.contextmanager
def reading(path: AnyPath, *, way_out: str) -> Iterator[None]:
    """Gives errors in the block, which reads a file that we wrote, a message with its path.

    Args:
      path: the file.
      way_out: what a user may do if the file is damaged.

    Raises:
      ValueError: if its contents are not what we write.
    """
    try:
        yield
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"{path} is damaged ({reason}): {way_out}") from error


def sync(file: IO) -> None:
    """Flushes to disk, so that the data survives a machine crash, not just a process crash."""
    file.flush()
    os.fsync(file.fileno())


def system_error(error: Exception) -> OSError | None:
    """The error of the system inside one of TensorStore, through which Orbax writes, if any."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else None


@contextlib.contextmanager
def writing(path: AnyPath) -> Iterator[None]:
    """Gives errors in the block, which writes to `path`, a message with the path and a way out.

    Raises:
      NotWritten: if it cannot be written.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, NotWritten):  # says it already
            raise
        raise NotWritten(path, error) from error


class NotWritten(OSError):
    """A file that could not be written, with a message that names it and says the way out."""

    def __init__(self, path: AnyPath, error: OSError):
        """Takes the path of the file, and what happened."""
        if in_bucket(path):  # the error says the way out
            super().__init__(f"{path} could not be written: {error}")
            return
        way_out = "check who may write there"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            way_out = "make room"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            way_out = "a file or folder is in the way"
        super().__init__(
            f"{path} could not be written: {error.strerror or error}: {way_out}, then start the "
            "same command again"
        )


@contextlib.contextmanager
def new_file(path: AnyPath, *, scratch: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write, which is at its path when the block has ended, and not before.

    Args:
      path: where it is to be, on a disk or in a bucket.
      scratch: folder on the same disk for the file while it is written; by default its own.

    Raises:
      OSError: naming the path, if it cannot be written.
    """
    is_local = isinstance(path, Path)
    with writing(path):
        folder = (scratch or path.parent) if is_local else temporary_folder()
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{path.name}.{uuid.uuid4().hex}.partial"
        try:
            with partial.open("wb+") as file:
                yield file
                sync(file)
            if is_local:
                partial.replace(path)
            else:
                filesystem().put_file(str(partial), str(path))
        finally:
            partial.unlink(missing_ok=True)


def write_atomically(path: AnyPath, content: str | bytes) -> None:
    """Writes a file, replacing any earlier one, and creates its folder if needed.

    A reader sees either the old content or the new one, even if the process is killed or the
    machine goes down. Several processes may write the same file: the last one wins.

    Raises:
      OSError: naming the path, if it cannot be written.
    """
    content = content.encode() if isinstance(content, str) else content
    if in_bucket(path):
        with writing(path):
            filesystem().pipe_file(str(path), content)
        return
    with new_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Holds a file for this process alone until the block ends, then removes it.

    The system itself releases it when the process ends in whatever way. On file systems that do not
    support this, the block runs with a warning.

    Args:
      path: of the file; folders above it are made, and removed again if they are empty at the end.

    Raises:
      BlockingIOError: if another process holds it; the text is what that one says of itself.
      OSError: naming the path, if it cannot be written.
    """
    new_folders = [folder for folder in path.parents if not folder.exists()]
    with contextlib.ExitStack() as stack:
        while not stack.enter_context(_opened_and_held(path)):
            pass
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is still held
            with contextlib.suppress(OSError):  # not empty
                for folder in new_folders:
                    folder.rmdir()


@contextlib.contextmanager
def _opened_and_held(path: Path) -> Iterator[bool]:
    """Whether the file, which this block holds, is still there: its last holder removes it."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab+", buffering=0)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise BlockingIOError(file.read().decode() or "another process") from error
        except OSError as error:
            _log.warning("%s: other programs are not kept out: %s", path, error.strerror)
        with writing(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        try:
            is_there = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except FileNotFoundError:
            is_there = False
        yield is_there
