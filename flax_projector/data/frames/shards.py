"""The files of a store: `NAME.frames` with the frames of some clips, `NAME.npz` with their index.

The index is written when the frames are on the disk, or in the bucket: frames without an index are
those of a shard that is being written, or whose writer was killed. They are ignored, and removed
when that was more than a day ago.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import time
import uuid
import zipfile
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NamedTuple

import jax.numpy as jnp
import numpy as np

from flax_projector.data.audio import BadAudio, Problem
from flax_projector.data.frames.keys import sort_order
from flax_projector.data.inputs import Clip
from flax_projector.data.shared_folder import SUFFIX as SHARED
from flax_projector.files import sync, write_atomically, writing
from flax_projector.lengths import num_encoder_frames
from flax_projector.storage import AnyPath, in_bucket, temporary_folder
from flax_projector.storage.bucket import filesystem

log = logging.getLogger(__name__)

FRAMES, INDEX = ".frames", ".npz"
_MAX_BYTES = 256 * 2**20
_MAX_SECS = 300.0  # a kill loses what was computed since the last shard
_ABANDONED_SECS = 24 * 3600.0  # after which nobody writes to a file any more
_NUM_THREADS = 32  # they wait for disks and networks

ENTRY = np.dtype(
    [
        ("shard", "<i4"),  # number of the shard
        ("number", "<i4"),  # of the clip in its shard
        ("start", "<i8"),  # first frame in the shard
        ("num_frames", "<i4"),  # of the clip; 0 if it cannot be used
        ("has_note", "?"),  # why it cannot be used, or may be no speech
    ]
)
"""What is known of a clip."""


@dataclass(frozen=True)
class Encoding:
    """All that the frames of a store have in common.

    Attributes:
      encoder: digest of the encoder's weights.
      encoder_dim: E, the width of the frames.
      dtype: in which the encoder computes, and in which the frames are kept: nothing is lost.
      window_samples: N, the number of samples in the window.
      whole_window: whether the frames of the whole window are kept, those after the clip included.
    """

    encoder: str
    encoder_dim: int
    dtype: str
    window_samples: int
    whole_window: bool = False

    @property
    def address(self) -> str:
        """The name of the store's folder."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]

    @property
    def frame_bytes(self) -> int:
        """Size of a frame."""
        return self.encoder_dim * jnp.dtype(self.dtype).itemsize

    def num_kept(self, num_frames: np.ndarray) -> np.ndarray:
        """Number of frames that are kept of clips."""
        if not self.whole_window:
            return num_frames
        return np.where(num_frames, num_encoder_frames(self.window_samples), 0)


class Shards(NamedTuple):
    """The clips in the shards of a store.

    Attributes:
      names: of the shards, by number.
      keys: u64[2, N], sorted; usable clips come before others with the same key.
      entries: `ENTRY`[N].
    """

    names: list[str]
    keys: np.ndarray
    entries: np.ndarray


NO_SHARDS = Shards([], np.zeros((2, 0), np.uint64), np.zeros(0, ENTRY))


class ShardWriter:
    """Writes clips to one shard after the other.

    Attributes:
      encoding: of the frames.
      names: of the shards that are complete.
    """

    def __init__(self, folder: AnyPath, encoding: Encoding):
        """Writes nothing yet.

        Args:
          folder: the store.
          encoding: of its frames.
        """
        self.encoding = encoding
        self.names: list[str] = []
        self._folder = folder
        self._local = folder if isinstance(folder, Path) else temporary_folder()
        self._file: IO[bytes] | None = None

    def add(self, key: np.ndarray, clip: Clip | BadAudio, frames: np.ndarray) -> None:
        """Adds a clip.

        Args:
          key: u64[2].
          clip: what was read, or why it cannot be used.
          frames: [S, E] of the window; anything if the clip cannot be used.

        Raises:
          OSError: if it cannot be written.
        """
        num_frames, note = (0, clip) if isinstance(clip, BadAudio) else clip[1:]
        with writing(self._folder):
            file = self._file or self._open()
            if note is not None:
                self._notes[len(self._keys)] = (note.problem.name, str(note))
            self._keys.append(key)
            self._lengths.append(num_frames)
            num_kept = int(self.encoding.num_kept(np.asarray(num_frames)))
            file.write(frames[:num_kept].tobytes())

    def close_if_due(self) -> None:
        """Finishes the shard if it is large or old enough; the next clip begins another one."""
        if self._file is not None:
            age = time.monotonic() - self._began
            if self._file.tell() >= _MAX_BYTES or age >= _MAX_SECS:
                self.finish()

    def finish(self) -> None:
        """Finishes the shard that is being written, if there is one: now others can read it."""
        if self._file is None:
            return
        index = io.BytesIO()
        np.savez(
            index,
            keys=np.stack(self._keys, axis=1),
            num_frames=np.array(self._lengths, np.int32),
            notes=np.frombuffer(json.dumps(self._notes).encode(), np.uint8),
        )
        name = self._path.stem
        with writing(self._folder):
            sync(self._file)
            if in_bucket(self._folder):
                filesystem().put_file(str(self._path), f"{self._folder}/{self._path.name}")
                self._path.unlink()
            write_atomically(self._folder / f"{name}{INDEX}", index.getvalue())
        self._file.close()
        self._file = None
        self.names.append(name)

    def close(self) -> None:
        """Removes a shard that is not finished, after an error."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it writes what it still can
                self._file.close()
            self._file = None

    def _open(self) -> IO[bytes]:
        self._path = self._local / f"{uuid.uuid4().hex}{FRAMES}"
        self._file, self._began = self._path.open("wb"), time.monotonic()
        self._keys, self._lengths = [], []
        self._notes: dict[int, tuple[str, str]] = {}
        return self._file


def read_shards(
    folder: AnyPath,
    encoding: Encoding,
    *,
    known: Shards = NO_SHARDS,
    names: Collection[str] | None = None,
) -> Shards:
    """Reads the indexes of a store.

    Damaged shards are left out, with a warning.

    Args:
      folder: the store.
      encoding: of its frames.
      known: what is known already.
      names: of the shards to add to that; by default, all that there are.
    """
    sizes = None
    if names is None:
        sizes = _sizes(folder)
        names = sorted(name for name, suffix in sizes if suffix == INDEX)

    def read(name: str) -> tuple[np.ndarray, np.ndarray] | None:
        # A shared file system may be slow to list what another host has just written.
        size = sizes.get((name, FRAMES), 0) if sizes else _size(folder / f"{name}{FRAMES}")
        return _read_index(folder, name, encoding, size)

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        found = dict(zip(names, pool.map(read, names), strict=True))
    good = {name: index for name, index in found.items() if index is not None}
    for number, (_, entries) in enumerate(good.values(), len(known.names)):
        entries["shard"] = number
    all_names = [*known.names, *good]
    keys = np.concatenate([known.keys, *(keys for keys, _ in good.values())], axis=1)
    entries = np.concatenate([known.entries, *(entries for _, entries in good.values())])
    del found, good  # they are large
    order = sort_order(keys, entries["num_frames"] == 0)
    keys = keys[:, order]
    return Shards(all_names, keys, entries[order])


def _sizes(folder: AnyPath) -> dict[tuple[str, str], int]:
    """Sizes of the files of a store, by name and suffix."""
    if isinstance(folder, Path):
        with os.scandir(folder) as files:
            found = {file.name: file.stat().st_size for file in files}
    else:
        listed = filesystem().ls(str(folder), detail=True)
        found = {one["name"].rpartition("/")[2]: one["size"] for one in listed}
    return {os.path.splitext(name): size for name, size in found.items()}


def _size(path: AnyPath) -> int:
    if isinstance(path, Path):
        return path.stat().st_size
    return filesystem().info(str(path))["size"]


def _read_index(
    folder: AnyPath, name: str, encoding: Encoding, size: int
) -> tuple[np.ndarray, np.ndarray] | None:
    path = folder / f"{name}{INDEX}"
    try:
        with np.load(io.BytesIO(path.read_bytes())) as index:
            keys, num_frames = index["keys"], index["num_frames"]
            with_note = [int(number) for number in _parse_notes(index["notes"])]
        count = len(num_frames)
        if keys.shape != (2, count) or not np.all(num_frames >= 0):
            raise ValueError("its parts do not fit together")
        starts = np.zeros(count + 1, np.int64)
        np.cumsum(encoding.num_kept(num_frames), out=starts[1:])
        needed = starts[-1] * encoding.frame_bytes
        if size != needed:
            path = folder / f"{name}{FRAMES}"
            raise ValueError(f"it has {size} of {needed} bytes")
    except (EOFError, FileNotFoundError, LookupError, TypeError, ValueError, *_OF_ZIP) as error:
        reason = " ".join(str(error).split())[:200]
        log.warning(
            "%s is damaged (%s): its clips are computed again, and it can be removed", path, reason
        )
        return None
    entries = np.zeros(count, ENTRY)
    entries["number"], entries["start"] = np.arange(count), starts[:-1]
    entries["num_frames"] = num_frames
    entries["has_note"][with_note] = True
    return keys.astype(np.uint64), entries


_OF_ZIP = (zipfile.BadZipFile, NotImplementedError, OverflowError)


def _parse_notes(stored: np.ndarray) -> dict[str, Sequence[str]]:
    return json.loads(stored.tobytes())


def read_notes(folder: AnyPath, name: str) -> dict[int, BadAudio]:
    """Why clips of a shard cannot be used or may be no speech, by their numbers in it."""
    with np.load(io.BytesIO((folder / f"{name}{INDEX}").read_bytes())) as index:
        notes = _parse_notes(index["notes"])
    return {int(n): BadAudio(Problem[kind], text) for n, (kind, text) in notes.items()}


def read_frames(
    folder: AnyPath, name: str, encoding: Encoding, start: int, count: int
) -> np.ndarray:
    """Reads frames [S, E] of a shard: of a bucket, by one request.

    Not by a memory map: each map holds a file open, and a store may have more than a process may
    open.

    Args:
      folder: the store.
      name: of the shard.
      encoding: of its frames.
      start: the first frame.
      count: S.

    Raises:
      OSError: if they are not there any more.
    """
    path, first = folder / f"{name}{FRAMES}", start * encoding.frame_bytes
    num_bytes = count * encoding.frame_bytes
    if isinstance(path, Path):
        with path.open("rb", buffering=0) as file:
            file.seek(first)
            found = file.read(num_bytes)
    else:
        found = filesystem().cat_file(str(path), start=first, end=first + num_bytes)
    if len(found) != num_bytes:
        raise OSError(
            f"{path} has become shorter: start the same command again, and what is missing is "
            "computed anew"
        )
    return np.frombuffer(found, jnp.dtype(encoding.dtype)).reshape(count, encoding.encoder_dim)


def remove_abandoned(folder: AnyPath) -> None:
    """Removes what programs that were killed have left in a store, a day later."""
    files = _sizes(folder)
    for name, suffix in files:
        path = folder / f"{name}{suffix}"
        is_unfinished = suffix == FRAMES and (name, INDEX) not in files
        if (is_unfinished or suffix == SHARED) and _age(path) > _ABANDONED_SECS:
            path.unlink(missing_ok=True)


def _age(path: AnyPath) -> float:
    """Seconds since a file was written to."""
    try:
        if isinstance(path, Path):
            return time.time() - path.stat().st_mtime
        return time.time() - filesystem().modified(str(path)).timestamp()
    except FileNotFoundError:  # another program has removed it
        return 0.0
