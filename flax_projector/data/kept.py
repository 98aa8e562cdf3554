"""Tables that are made once and kept: the rows of a source, and the labels of their transcripts."""

import functools
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import pyarrow as pa

from flax_projector import hosts
from flax_projector.storage import AnyPath, in_bucket, temporary_folder
from flax_projector.storage.bucket import filesystem

log = logging.getLogger(__name__)

_MADE_FROM, _NONCE = b"made_from", b"nonce"
_MANY_ROWS = 100_000
"""So many rows take seconds to read: they are kept beside their source, for all runs and hosts."""

_scratch = functools.cache(temporary_folder)


@dataclass(frozen=True)
class Kept:
    """A table that is kept.

    Attributes:
      path: its file on a local disk.
      folder: where it is kept, and what is made of it may be, too.
    """

    path: Path
    folder: AnyPath

    @property
    def nonce(self) -> str:
        """Differs between any two tables that were written."""
        with pa.memory_map(str(self.path)) as file:
            return pa.ipc.open_file(file).schema.metadata[_NONCE].decode()


def open_table(path: Path) -> pa.Table:
    """Maps a table into memory."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def table_writer(path: Path, schema: pa.Schema, made_from: str) -> pa.ipc.RecordBatchFileWriter:
    """Writes a table that says what it is made from."""
    metadata = {_MADE_FROM: made_from.encode(), _NONCE: uuid.uuid4().hex.encode()}
    return pa.ipc.new_file(str(path), schema.with_metadata(metadata))


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
    found, old = _find(file, folders, made_from, is_current)
    is_missing, *others = [
        text == "missing" for text in hosts.exchange(file, "found" if found else "missing")
    ]
    if is_missing and any(others):
        if jax.process_index() == 0:
            found = _write(file, folders, write, old)
        hosts.exchange(file, "written")
        found = found or _find(file, folders, made_from, is_current)[0]
    return found or _write(file, folders, write, old)


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
            kept = Kept(path, folder)
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
) -> Kept:
    *_, last = folders
    scratch = last if isinstance(last, Path) and _may_write(last) else _scratch()
    partial = scratch / f".{file}.{uuid.uuid4().hex}.partial"
    try:
        write(partial, old)
        is_large = open_table(partial).num_rows >= _MANY_ROWS
        for folder in folders if is_large else folders[-1:]:
            if (kept := _move(partial, folder, file)) is not None:
                return kept
        path = _scratch() / f"{uuid.uuid4().hex}-{file}"
        return Kept(Path(shutil.move(partial, path)), _scratch())
    finally:
        partial.unlink(missing_ok=True)


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
            path = _scratch() / f"{uuid.uuid4().hex}-{file}"
            return Kept(Path(shutil.move(partial, path)), folder)
        assert isinstance(folder, Path)
        folder.mkdir(parents=True, exist_ok=True)
        if partial.parent != folder:
            other = folder / partial.name
            try:
                shutil.copyfile(partial, other)
                other.replace(folder / file)
            finally:
                other.unlink(missing_ok=True)
        else:
            partial.replace(folder / file)
    except OSError as error:
        log.warning("%s is not kept: %s", f"{folder}/{file}", error.strerror or error)
        return None
    return Kept(folder / file, folder)
