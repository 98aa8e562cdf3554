"""Tables that are made once and kept: the rows of a source, and the labels of their transcripts."""

import contextlib
import functools
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pyarrow as pa

from flax_projector import hosts
from flax_projector.files import NotWritten, sync, writing
from flax_projector.storage import AnyPath, in_bucket, temporary_folder
from flax_projector.storage.bucket import filesystem

log = logging.getLogger(__name__)

_MADE_FROM, _NONCE = b"made_from", b"nonce"
_MANY_ROWS = 100_000
"""So many rows take seconds to read: they are kept beside their source, for all runs and hosts."""

_ABANDONED_SECS = 24 * 3600.0  # after which nobody writes to a file any more

_scratch = functools.cache(temporary_folder)


@dataclass(frozen=True)
class Kept:
    """A table that is kept.

    Attributes:
      path: its file on a local disk.
      folder: where it is kept, and what is made of it may be, too.
      table: what is in the file; pickled as the path.
    """

    path: Path
    folder: AnyPath
    table: pa.Table

    @property
    def nonce(self) -> str:
        """Differs between any two tables that were written."""
        return _nonce(self.table)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.folder, self.nonce)


def _reopen(path: Path, folder: AnyPath, nonce: str) -> Kept:
    """Opens a table in another process.

    Raises:
      ValueError: if another run has replaced it meanwhile.
    """
    kept = Kept(path, folder, open_table(path))
    if kept.nonce != nonce:
        raise ValueError(
            f"{path} is no longer what it was when this run started, since its source has changed: "
            "start the same command again"
        )
    return kept


def _nonce(table: pa.Table) -> str:
    return table.schema.metadata[_NONCE].decode()


def open_table(path: Path) -> pa.Table:
    """Maps a table into memory."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


@contextlib.contextmanager
def table_writer(
    path: Path, schema: pa.Schema, made_from: str
) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """Writes a table that says what it is made from: yields what writes a batch of rows.

    Raises:
      NotWritten: naming the path, if the disk is full.
    """
    metadata = {_MADE_FROM: made_from.encode(), _NONCE: uuid.uuid4().hex.encode()}
    with writing(path):
        table = pa.ipc.new_file(str(path), schema.with_metadata(metadata))

    def write(batch: pa.RecordBatch) -> None:
        with writing(path):
            table.write_batch(batch)

    try:
        yield write
    except BaseException:
        with contextlib.suppress(OSError):  # of what is not there, the end cannot be written either
            table.close()
        raise
    with writing(path):
        table.close()


def keep(
    file: str,
    folders: Sequence[AnyPath],
    write: Callable[[Path, Path | None], None],
    *,
    made_from: str,
    is_current: Callable[[Kept], bool] = lambda _: True,
) -> Kept:
    """Finds a table in one of some folders, or writes it.

    If there are several processes, process 0 writes it for all that see the same folder.

    Args:
      file: name of the table's file.
      folders: where it may be. If it has many rows, it is kept in the first that can be written
        to, or else in the last.
      write: writes it to a path; it is also given the path of an earlier one, if there is any.
      made_from: what changes when the table must be made anew.
      is_current: whether a table that is made from the same may be used.

    Raises:
      ValueError: if it cannot be made.
    """
    find = functools.partial(_find, file, folders, made_from, is_current)
    found, old = find()
    # Hosts may know a source, and so its file, by different names: they meet under one.
    texts = hosts.exchange("kept table", "found" if found else "missing")
    is_missing, *others = [text == "missing" for text in texts]
    if is_missing and any(others):
        if jax.process_index() == 0:
            found = _write(file, folders, write, old, find)
        hosts.exchange("kept table written", "")
        found = found or find()[0]
    return found or _write(file, folders, write, old, find)


def _find(
    file: str,
    folders: Sequence[AnyPath],
    made_from: str,
    is_current: Callable[[Kept], bool],
) -> tuple[Kept | None, Path | None]:
    """The table, and the newest one that cannot be used."""
    old = None
    for folder in folders:
        try:
            path = _fetch(folder, file)
            table = open_table(path)
        except (FileNotFoundError, PermissionError):
            continue
        except (OSError, pa.ArrowInvalid) as error:
            log.warning("%s/%s is made anew: %s", folder, file, error)
            continue
        if (table.schema.metadata or {}).get(_MADE_FROM) == made_from.encode():
            kept = Kept(path, folder, table)
            if is_current(kept):
                return kept, None
        old = old or path
    return None, old


def _fetch(folder: AnyPath, file: str) -> Path:
    """The local path of a file."""
    if isinstance(folder, Path):
        return folder / file
    path = _scratch() / f"{uuid.uuid4().hex}-{file}"
    filesystem().get_file(f"{folder}/{file}", str(path))
    return path


def _write(
    file: str,
    folders: Sequence[AnyPath],
    write: Callable[[Path, Path | None], None],
    old: Path | None,
    find: Callable[[], tuple[Kept | None, Path | None]],
) -> Kept:
    """Writes a table, and moves it to where it belongs."""

    def write_in(scratch: Path) -> Kept:
        partial = scratch / f".{file}.{uuid.uuid4().hex}.partial"
        try:
            write(partial, old)
            # Another run may have made the same table meanwhile, and its labels.
            if (found := find()[0]) is not None:
                return found
            is_large = open_table(partial).num_rows >= _MANY_ROWS
            for folder in folders if is_large else folders[-1:]:
                if (kept := _move(partial, folder, file)) is not None:
                    return kept
            return _kept(_to_scratch(partial, file), _scratch())
        finally:
            partial.unlink(missing_ok=True)

    last = folders[-1]
    if isinstance(last, Path) and _may_write(last):
        _remove_abandoned(last, file)
        with contextlib.suppress(NotWritten):  # there may be room elsewhere
            return write_in(last)
    return write_in(_scratch())


def _remove_abandoned(folder: Path, file: str) -> None:
    """Removes what killed processes have left of a file."""
    for path in folder.glob(f".{file}.*"):
        with contextlib.suppress(FileNotFoundError):  # another program removes it
            if time.time() - path.stat().st_mtime > _ABANDONED_SECS:
                path.unlink()


def _may_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _move(partial: Path, folder: AnyPath, file: str) -> Kept | None:
    """Puts a table into a folder; None, with a warning, if it cannot be written to."""
    try:
        if in_bucket(folder):
            filesystem().put_file(str(partial), f"{folder}/{file}")
            return _kept(_to_scratch(partial, file), folder)
        assert isinstance(folder, Path)
        folder.mkdir(parents=True, exist_ok=True)
        if partial.parent != folder:
            _remove_abandoned(folder, file)
            other = folder / partial.name
            try:
                shutil.copyfile(partial, other)
                _replace(other, folder / file)
            finally:
                other.unlink(missing_ok=True)
        else:
            _replace(partial, folder / file)
    except OSError as error:
        log.warning("%s is not kept: %s", f"{folder}/{file}", error.strerror or error)
        return None
    return _kept(folder / file, folder)


def _replace(partial: Path, path: Path) -> None:
    with partial.open("rb+") as written:
        sync(written)  # a file whose pages are lost with the machine looks whole
    partial.replace(path)


def _to_scratch(partial: Path, file: str) -> Path:
    return Path(shutil.move(partial, _scratch() / f"{uuid.uuid4().hex}-{file}"))


def _kept(path: Path, folder: AnyPath) -> Kept:
    return Kept(path, folder, open_table(path))
