"""Computes the frames that a store lacks, on all processes and devices."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from flax_projector import hosts
from flax_projector.data.audio import BadAudio
from flax_projector.data.frames.keys import find, sort_order
from flax_projector.data.frames.shards import (
    NO_SHARDS,
    Encoding,
    ShardWriter,
    read_shards,
    remove_abandoned,
)
from flax_projector.data.frames.store import FrameStore
from flax_projector.data.inputs import Clip, Waveforms
from flax_projector.data.shared_folder import check_shared, from_first
from flax_projector.data.utterances import Utterance, Utterances
from flax_projector.files import write_atomically
from flax_projector.logs import progress_bar
from flax_projector.sharding import rows_of_process, spread_sharding
from flax_projector.storage import AnyPath

log = logging.getLogger(__name__)

Encode = Callable[[jax.Array], jax.Array]
"""Maps f32[B, N] waveforms, zero-padded to the window, to encoder frames [B, S, E].

Rows are spread over all devices, before and after. All processes call it with the same B."""


class _Missing(NamedTuple):
    """The clips whose frames are to be computed, the same on all processes.

    Attributes:
      numbers: i64[M], their places in the set.
      keys: u64[2, M].
      is_new: bool[M], whether they have not been tried before; these come first.
    """

    numbers: np.ndarray
    keys: np.ndarray
    is_new: np.ndarray


def keep_frames(
    root: AnyPath,
    name: str,
    utterances: Utterances,
    encode: Encode,
    encoding: Encoding,
    *,
    mesh: Mesh,
    batch_size: int,
    num_threads: int,
) -> FrameStore:
    """Computes the frames that no run has computed yet; then the frames of all can be read.

    All processes call it. Process 0 decides which frames are missing, and each process computes and
    writes those of its own rows. What a start has written when it is killed is not lost, except for
    the last few minutes. A clip that cannot be used is recorded as such: reading its frames raises
    the error again, and the next start retries the clip.

    Args:
      root: the folder with all stores, which all processes share.
      name: the name of the set.
      utterances: the utterances whose frames are needed.
      encode: the encoder.
      encoding: what identifies its frames.
      mesh: the devices.
      batch_size: utterances per call of `encode`, rounded up to a multiple of the devices.
      num_threads: number of threads that read audio.

    Raises:
      HostsDiffer: on all processes, if they do not share the folder or have other rows.
      OSError: if the frames cannot be written.
    """
    folder, is_first = root / encoding.address, jax.process_index() == 0
    if is_first:
        description = json.dumps(asdict(encoding), indent=2) + "\n"
        write_atomically(folder / "encoding.json", description)
    check_shared(folder, "on a disk or in a bucket")
    if is_first:
        remove_abandoned(folder)
    digest = hashlib.sha256()
    utterances.update(digest)
    described = f"{len(utterances)} with the hash {digest.hexdigest()[:16]}"
    hosts.agree({f"rows of {name}": described})
    row_keys = utterances.keys("key")
    clip_keys = utterances.keys("clip") if is_first else row_keys[:, :0]
    shards = read_shards(folder, encoding) if is_first else NO_SHARDS
    at = find(shards.keys, clip_keys)
    missing = _Missing(**from_first(folder, lambda: _find_missing(clip_keys, at, shards.entries)))
    written = _compute(
        utterances,
        missing,
        encode,
        ShardWriter(folder, encoding),
        mesh=mesh,
        batch_size=batch_size,
        num_threads=num_threads,
    )

    def make_table() -> dict[str, np.ndarray]:
        if not written:
            return {"entries": shards.entries[at], "names": np.array(shards.names, str)}
        all_shards = read_shards(folder, encoding, known=shards, names=written)
        now_at = find(all_shards.keys, clip_keys)
        if np.any(now_at < 0):
            raise OSError(
                f"{folder}: frames that were just written cannot be read: start the same command "
                "again"
            )
        return {"entries": all_shards.entries[now_at], "names": np.array(all_shards.names, str)}

    table = from_first(folder, make_table)
    log.info(
        "encoder frames of %d utterances in %s, those of %d clips computed now",
        len(utterances),
        folder,
        len(missing.numbers),
    )
    return FrameStore.make(folder, encoding, row_keys, table["entries"], table["names"].tolist())


def _find_missing(wanted: np.ndarray, at: np.ndarray, entries: np.ndarray) -> dict:
    """The fields of `_Missing`.

    Args:
      wanted: keys of the set's clips.
      at: where they are in the store, -1 if they are not.
      entries: what is known of the clips in the store.
    """
    is_bad = np.zeros(len(at), bool)
    is_bad[at >= 0] = entries["num_frames"][at[at >= 0]] == 0
    new, bad = np.flatnonzero(at < 0), np.flatnonzero(is_bad)
    # With new clips first, a start that was killed goes on with the same batches.
    numbers = np.concatenate([new, bad])
    # Rows may share a clip: the first of them stands for all.
    order = sort_order(wanted[:, numbers], np.arange(len(numbers)))
    in_order = wanted[:, numbers[order]]
    is_first = np.append([True] * bool(len(order)), np.diff(in_order).any(axis=0))
    numbers = numbers[np.sort(order[is_first.astype(bool)])]
    is_new = at[numbers] < 0
    return {"numbers": numbers, "keys": wanted[:, numbers], "is_new": is_new}


def _compute(
    utterances: Sequence[Utterance],
    missing: _Missing,
    encode: Encode,
    writer: ShardWriter,
    *,
    mesh: Mesh,
    batch_size: int,
    num_threads: int,
) -> list[str]:
    """Computes and writes what is missing; returns the names of the shards, of all processes."""
    waveforms, window = Waveforms(writer.encoding.window_samples), writer.encoding.window_samples
    sharding, total = spread_sharding(mesh), len(missing.numbers)
    num_rows = -(-batch_size // mesh.size) * mesh.size
    rows = rows_of_process(sharding, num_rows)

    def read(number: int) -> Clip | BadAudio:
        try:
            return waveforms.read(utterances[number])
        except BadAudio as error:
            return error

    def start(clips: list[Clip | BadAudio]) -> jax.Array:
        batch = np.zeros((len(rows), window), np.float32)
        for row, clip in zip(batch, clips, strict=False):  # the last batch may not be full
            if isinstance(clip, Clip):
                row[: len(clip.audio)] = clip.audio
        shape = (num_rows, window)
        return encode(jax.make_array_from_process_local_data(sharding, batch, shape))

    def write(places: np.ndarray, clips: list[Clip | BadAudio], frames: jax.Array | None) -> None:
        windows = [np.zeros(0)] * len(clips) if frames is None else _own_rows(frames)
        for place, clip, frames_of_clip in zip(places, clips, windows, strict=False):
            writer.add(missing.keys[:, place], clip, frames_of_clip)
        writer.close_if_due()

    with (
        ThreadPoolExecutor(num_threads) as pool,
        progress_bar(log, "encoder", total=total, unit="clip") as progress,
        contextlib.closing(writer),
    ):
        in_flight = None
        for first in range(0, total, num_rows):
            places = first + rows[rows < total - first]
            clips = list(pool.map(read, missing.numbers[places].tolist()))
            # Where all have failed before, the encoder need not be compiled just to try again.
            is_needed = missing.is_new[first] or _any(isinstance(clip, Clip) for clip in clips)
            frames = start(clips) if is_needed else None
            if in_flight is not None:
                write(*in_flight)  # while the devices are busy
            in_flight = places, clips, frames
            progress.update(min(num_rows, total - first))
        if in_flight is not None:
            write(*in_flight)
        writer.finish()
    names = hosts.exchange("kept frames", " ".join(writer.names))
    return [name for mine in names for name in mine.split()]


def _own_rows(frames: jax.Array) -> np.ndarray:
    """The rows that are on devices of this process, ascending."""
    shards = {shard.index[0].start or 0: shard.data for shard in frames.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def _any(mine: Iterable[bool]) -> bool:
    """Whether something is true in one of the processes."""
    return "1" in hosts.exchange("any", "1" if any(mine) else "")
