"""Keys of 16 bytes: made of rows, and looked up among millions without a Python object for each.

An array of keys is u64[2, N]: the first halves of all keys, then the second halves.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from flax_projector.data.audio import file_stamp
from flax_projector.data.batch_plan import Utterance
from flax_projector.data.manifest import ManifestRow
from flax_projector.files import is_url

_CHUNK = 4096  # rows handed to a thread at a time
_NUM_THREADS = 32  # they mostly wait for disks


def clip_digest(row: ManifestRow) -> bytes:
    """16 bytes that change when a row's samples may: what and where the clip is, and its stamp."""
    audio = row.audio
    name = str(audio)
    if isinstance(audio, str | Path) and not is_url(name):
        name = os.path.abspath(name)  # manifests in other folders name the same file
    offset = None if row.offset is None else float(row.offset)
    return _digest(repr((name, file_stamp(audio), offset, float(row.duration))))


def _row_key(row: ManifestRow) -> bytes:
    """16 bytes for a row's `key`, by which a run looks up its clips."""
    return _digest(row.key)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _what_hosts_share(row: ManifestRow) -> bytes:
    """As `Batches.fingerprint`: paths may differ between hosts."""
    offset = None if row.offset is None else float(row.offset)
    return _digest(repr((row.id.rpartition("/")[2], offset, float(row.duration))))


def to_keys(digests: Iterable[bytes]) -> np.ndarray:
    """The array of keys, u64[2, N]."""
    pairs = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
    return np.ascontiguousarray(pairs.T)  # searches run along one half


def row_key(row: ManifestRow) -> np.ndarray:
    """The key of a row among those of its run, u64[2, 1]."""
    return to_keys([_row_key(row)])


def keys_of(utterances: Iterable[Utterance], *, clips: bool) -> tuple[np.ndarray, np.ndarray, str]:
    """The keys of a set, in one pass over it.

    Args:
      utterances: the set.
      clips: whether the clips' own keys are wanted; they take a look at every file.

    Returns:
      Keys of the rows and of their clips, u64[2, N] each, the latter empty if they are not wanted;
      and a hash of the rows that is the same on all hosts.
    """

    def make(rows: list[ManifestRow]) -> tuple[bytes, bytes, bytes]:
        return (
            b"".join(map(_row_key, rows)),
            b"".join(map(clip_digest, rows)) if clips else b"",
            b"".join(map(_what_hosts_share, rows)),
        )

    of_rows, of_clips, shared = [], [], hashlib.blake2b(digest_size=8)
    rows = (utterance.row for utterance in utterances)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        # A few chunks at a time: `map` would take all rows at once.
        while chunks := [
            chunk for _ in range(_NUM_THREADS) if (chunk := list(itertools.islice(rows, _CHUNK)))
        ]:
            for row_keys, clip_keys, described in pool.map(make, chunks):
                of_rows.append(row_keys)
                of_clips.append(clip_keys)
                shared.update(described)
    return to_keys(of_rows), to_keys(of_clips), shared.hexdigest()


def sort_order(keys: np.ndarray, rank: np.ndarray | None = None) -> np.ndarray:
    """The order in which keys are looked up: ascending; equal ones by their rank."""
    return np.lexsort((keys[1], keys[0]) if rank is None else (rank, keys[1], keys[0]))


def find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Positions of the wanted keys in a sorted array; of equal keys the first, -1 if there is none.

    Args:
      keys: u64[2, N], in the order of `sort_order`.
      wanted: u64[2, M], in any order.
    """
    found = np.full(wanted.shape[1], -1)
    order = np.argsort(wanted[0])  # neighbours are found near each other: ten times as fast
    at = np.empty(len(order), np.int64)
    at[order] = np.searchsorted(keys[0], wanted[0, order])
    left = np.arange(len(at))
    while len(left):  # once, unless different keys begin with the same half
        left = left[at[left] < keys.shape[1]]
        left = left[keys[0, at[left]] == wanted[0, left]]
        is_it = keys[1, at[left]] == wanted[1, left]
        found[left[is_it]] = at[left[is_it]]
        left = left[~is_it]
        at[left] += 1
    return found
