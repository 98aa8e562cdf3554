"""A folder that all processes of a run see, and what process 0 hands to the others through it."""

import io
import time
import uuid
from collections.abc import Callable, Mapping

import jax
import numpy as np

from flax_projector import hosts
from flax_projector.files import write_atomically
from flax_projector.storage import AnyPath

SUFFIX = ".shared"
"""Of files that process 0 removes as soon as the others have read them."""

_SETTLE_SECS = 10.0  # until a shared file system shows what another host has written


def check_shared(folder: AnyPath, where: str) -> None:
    """Checks that all processes see the same folder below `--data.cache-dir`; all must call it.

    Args:
      folder: as this process knows it.
      where: it can be, in words.

    Raises:
      HostsDiffer: on all processes, if one does not see what process 0 has written there.
      OSError: if process 0 cannot write there.
    """
    if jax.process_count() == 1:
        return
    nonce = uuid.uuid4().hex
    name = hosts.broadcast("shared folder", nonce)
    path = folder / f"{name}{SUFFIX}"
    if name == nonce:  # of process 0
        write_atomically(path, "")
    hosts.broadcast("shared folder written", "")
    found = "is seen" if _appears(path) else f"not in {folder}"
    try:
        what = f"what process 0 has written to {folder}"
        what = hosts.broadcast("shared folder name", what)
        way_out = f"let --data.cache-dir name a folder {where} that all hosts share"
        hosts.agree({f"{what} ({way_out})": found})
    finally:
        if name == nonce:
            path.unlink(missing_ok=True)


def from_first(
    folder: AnyPath, make: Callable[[], Mapping[str, np.ndarray]]
) -> Mapping[str, np.ndarray]:
    """Arrays that process 0 makes, on all processes; all must call it.

    Args:
      folder: one that all processes share.
      make: makes them.
    """
    if jax.process_count() == 1:
        return make()
    nonce = uuid.uuid4().hex
    name = hosts.broadcast("shared arrays", nonce)
    path = folder / f"{name}{SUFFIX}"
    arrays = None
    if name == nonce:  # of process 0
        arrays, file = make(), io.BytesIO()
        np.savez(file, allow_pickle=False, **arrays)
        write_atomically(path, file.getvalue())
    hosts.broadcast("shared arrays written", "")
    if arrays is None:
        _appears(path)
        with np.load(io.BytesIO(path.read_bytes())) as stored:
            arrays = dict(stored)
    hosts.exchange("shared arrays read", "")
    if name == nonce:
        path.unlink(missing_ok=True)
    return arrays


def _appears(path: AnyPath) -> bool:
    end = time.monotonic() + _SETTLE_SECS
    while not (is_there := path.is_file()) and time.monotonic() < end:
        time.sleep(0.2)
    return is_there
