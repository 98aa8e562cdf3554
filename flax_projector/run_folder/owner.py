"""Which program trains in a run folder: one at a time."""

import contextlib
import json
import os
import socket
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from flax_projector.files import lock_file, reading, write_atomically
from flax_projector.run_folder.folder import RunFolder


@dataclass(frozen=True)
class Owner:
    """The start of the program that trains in a folder.

    Attributes:
      nonce: a random name of it.
      host: the name of its machine.
      pid: the number of its process.
      time: when it took over the folder, in local time.
    """

    nonce: str
    host: str
    pid: int
    time: str


_ME = uuid.uuid4().hex


@contextlib.contextmanager
def lock(folder: RunFolder, process_index: int = 0) -> Iterator[None]:
    """Keeps other programs from training in a folder until the block ends.

    A bucket has no locks: see `take_over`. An owner that has begun no run is forgotten.

    Args:
      folder: the folder.
      process_index: of this process; only the first one of a program holds the lock.

    Raises:
      ValueError: if another program does.
      OSError: if the folder cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        try:
            if process_index == 0 and isinstance(folder.path, Path):
                stack.enter_context(lock_file(folder.path / "lock"))
        except BlockingIOError as error:
            raise ValueError(
                f"--out: {folder.path} is in use by {error}: wait until it has ended, or choose "
                "another folder"
            ) from error
        except OSError as error:
            raise OSError(f"--out: {error}") from error
        if process_index == 0:
            stack.callback(_forget, folder)
        yield


def _forget(folder: RunFolder) -> None:
    with contextlib.suppress(OSError, ValueError):  # what ends the program matters more
        owner = read_owner(folder)
        if owner is not None and owner.nonce == _ME and not folder.config.is_file():
            folder.owner.unlink()


def take_over(folder: RunFolder, process_index: int = 0) -> str:
    """Makes this program the owner of a folder; the one before ends at its next save.

    Returns:
      The nonce of the new `Owner`; empty in all processes but the first, which write nothing.

    Raises:
      OSError: if it cannot be written to.
    """
    if process_index > 0:
        return ""
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    owner = Owner(_ME, socket.gethostname(), os.getpid(), now)
    try:
        write_atomically(folder.owner, json.dumps(asdict(owner)) + "\n")
    except OSError as error:
        raise OSError(f"--out: {error}") from error
    return owner.nonce


def read_owner(folder: RunFolder) -> Owner | None:
    """The program that has last begun to train in a folder, if any has.

    Raises:
      ValueError: if the file cannot be read.
    """
    with reading(folder.owner, way_out="remove it, and start the same command again"):
        try:
            return Owner(**json.loads(folder.owner.read_text("utf-8")))
        except FileNotFoundError:
            return None


def check_owner(folder: RunFolder) -> None:
    """Checks that no other program has begun to train in a folder.

    Raises:
      OSError: naming it, if one has.
    """
    owner = read_owner(folder)
    if owner is not None and owner.nonce != _ME:
        raise OSError(
            f"{folder.path} was taken over by process {owner.pid} on {owner.host}, started "
            f"{owner.time}: this run ends here, and writes nothing more. If both are meant to "
            "run, give one of them another --out"
        )
