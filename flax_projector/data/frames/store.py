"""The frames of one set of a run, as the inputs of its batches."""

import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from flax_projector.batch import Bucket
from flax_projector.data.audio import BadAudio
from flax_projector.data.frames.keys import find, sort_order
from flax_projector.data.frames.shards import Encoding, read_frames, read_notes
from flax_projector.data.inputs import Clip
from flax_projector.data.rows import row_key
from flax_projector.data.utterances import Utterance
from flax_projector.storage import AnyPath, temporary_folder

_KEYS, _ENTRIES, _SHARDS = "keys.npy", "entries.npy", "shards.json"


class FrameStore:
    """Kept frames, unpadded or of the whole window.

    Serves as the `Inputs` of `Batches`, which carry the frames as they are kept: those of bfloat16
    take half the bytes of float32, on the disk and on the way to the devices. Pickled as the paths
    of its files, so that worker processes share the table of the clips in memory.
    """

    name = "frames"

    def __init__(self, folder: AnyPath, encoding: Encoding, table: Path):
        """Opens what `make` has written.

        Args:
          folder: the store.
          encoding: of its frames.
          table: folder with the table of the set's clips.
        """
        self._folder, self._encoding, self._table = folder, encoding, table
        self.dtype = jnp.dtype(encoding.dtype)
        self._keys = np.load(table / _KEYS, mmap_mode="r")
        self._entries = np.load(table / _ENTRIES, mmap_mode="r")
        self._names = json.loads((table / _SHARDS).read_text())

    @classmethod
    def make(
        cls,
        folder: AnyPath,
        encoding: Encoding,
        rows: np.ndarray,
        entries: np.ndarray,
        names: list[str],
    ) -> "FrameStore":
        """Writes the table of a set's clips, for this process and its workers.

        Args:
          folder: the store.
          encoding: of its frames.
          rows: keys of the set's rows, u64[2, N].
          entries: what is known of their clips, `ENTRY`[N].
          names: names of the shards.
        """
        table, order = temporary_folder(), sort_order(rows)
        np.save(table / _KEYS, rows[:, order])
        np.save(table / _ENTRIES, entries[order])
        (table / _SHARDS).write_text(json.dumps(names))
        return cls(folder, encoding, table)

    def __reduce__(self) -> tuple[type, tuple[AnyPath, Encoding, Path]]:
        return FrameStore, (self._folder, self._encoding, self._table)

    def shape(self, bucket: Bucket) -> tuple[int, ...]:
        """(S, E) for the bucket."""
        return (bucket.num_frames, self._encoding.encoder_dim)

    def read(self, utterance: Utterance) -> Clip:
        """The kept frames [S, E], in the dtype in which they were computed.

        Raises:
          BadAudio: if the clip could not be used when its frames were computed.
          OSError: if they cannot be read.
        """
        row = utterance.row
        key = np.frombuffer(row_key(row.source, row.id), "<u8").reshape(2, 1)
        (at,) = find(self._keys, key)
        entry = self._entries[at]
        name, note = self._names[entry["shard"]], None
        if entry["has_note"]:
            note = self._notes(name)[int(entry["number"])]
        num_frames = int(entry["num_frames"])
        if not num_frames:
            assert note is not None  # `keep_frames` writes none without one
            raise note
        count = int(self._encoding.num_kept(np.asarray(num_frames)))
        frames = read_frames(self._folder, name, self._encoding, int(entry["start"]), count)
        return Clip(frames, num_frames, note)

    @functools.lru_cache(maxsize=64)  # noqa: B019 - it lives as long as the run
    def _notes(self, name: str) -> dict[int, BadAudio]:
        return read_notes(self._folder, name)
