"""Frames of the frozen encoder, computed once and kept on disk."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from flax_projector.data import Bucket, Utterance, Waveforms

log = logging.getLogger(__name__)


class FeatureStore:
    """Frames of every utterance, without padding, in one memory-mapped file.

    Serves as the `Inputs` of a `data.BatchSource`.
    """

    name = "frames"

    def __init__(self, frames: np.ndarray, offsets: dict[str, tuple[int, int]]):
        """Args: frames f32[sum of S, E]; offsets, start and stop of each utterance id."""
        self._frames = frames
        self._offsets = offsets

    def shape(self, bucket: Bucket) -> tuple[int, ...]:
        """[S, E] of the bucket."""
        return (bucket.num_frames, self._frames.shape[1])

    def read(self, utterance: Utterance) -> tuple[np.ndarray, int]:
        """f32[<= S, E] kept frames."""
        start, stop = self._offsets[utterance.row.id]
        return self._frames[start:stop], stop - start


def keep_features(
    folder: Path,
    utterances: Sequence[Utterance],
    encode: Callable[[np.ndarray], jax.Array],
    *,
    window_samples: int,
    batch_size: int,
    encoder_name: str,
) -> FeatureStore:
    """Opens the kept frames in `folder`, computing them first unless they are there.

    Args:
      folder: holds `frames.npy` and `index.json`.
      utterances: whose frames are needed.
      encode: f32[B, N] waveforms, zero-padded to the window, to frames [B, S, E].
      window_samples: N.
      batch_size: utterances per call of `encode`.
      encoder_name: whatever identifies the encoder's weights and dtype.

    Raises:
      ValueError: on several hosts, where each would need the whole file.
    """
    if jax.process_count() > 1:
        raise ValueError("data.cache_features works on one host only: turn it off")
    clips = [(u.row.id, str(u.row.audio), u.row.audio.stat().st_size) for u in utterances]
    key = hashlib.sha256(json.dumps([encoder_name, window_samples, clips]).encode()).hexdigest()
    index_path, frames_path = folder / "index.json", folder / "frames.npy"
    if index_path.is_file() and frames_path.is_file():
        index = json.loads(index_path.read_text())
        if index["key"] == key:
            log.info("encoder frames of %d utterances found in %s", len(utterances), folder)
            return FeatureStore(np.load(frames_path, mmap_mode="r"), index["offsets"])
    folder.mkdir(parents=True, exist_ok=True)
    index_path.unlink(missing_ok=True)  # until the frames are whole, there is nothing to find
    waveforms, parts, offsets, total = Waveforms(window_samples), [], {}, 0
    progress = tqdm(total=len(utterances), desc="encoder", unit="clip")
    for start in range(0, len(utterances), batch_size):
        members = utterances[start : start + batch_size]
        batch = np.zeros((batch_size, window_samples), np.float32)  # the last one is padded
        lengths = []
        for row, utterance in enumerate(members):
            samples, num_frames = waveforms.read(utterance)
            batch[row, : len(samples)] = samples
            lengths.append(num_frames)
        frames = np.asarray(encode(batch), np.float32)
        for row, (utterance, length) in enumerate(zip(members, lengths, strict=True)):
            parts.append(frames[row, :length])
            offsets[utterance.row.id] = (total, total + length)
            total += length
        progress.update(len(members))
    progress.close()
    partial = folder / "frames.partial.npy"
    np.save(partial, np.concatenate(parts))
    os.replace(partial, frames_path)
    index_path.write_text(json.dumps({"key": key, "offsets": offsets}))
    return FeatureStore(np.load(frames_path, mmap_mode="r"), offsets)
