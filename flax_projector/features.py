"""Frames of the frozen encoder, computed once and kept on disk."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from flax_projector.audio import BadAudio, Problem, is_url
from flax_projector.batch_plan import Bucket, Utterance
from flax_projector.data import Waveforms

log = logging.getLogger(__name__)


class FeatureStore:
    """Frames of every utterance, without padding, in one memory-mapped file.

    Serves as the `Inputs` of a `data.BatchSource`; it pickles as the names of its files.
    """

    name = "frames"

    def __init__(self, folder: Path):
        """Opens what `keep_features` wrote to `folder`."""
        index = json.loads((folder / "index.json").read_text())
        self._folder = folder
        self._frames = np.load(folder / "frames.npy", mmap_mode="r")
        self._offsets: dict[str, tuple[int, int]] = index["offsets"]
        self._problems: dict[str, tuple[int, str]] = index["problems"]

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return FeatureStore, (self._folder,)

    def shape(self, bucket: Bucket) -> tuple[int, ...]:
        """[S, E] of the bucket."""
        return (bucket.num_frames, self._frames.shape[1])

    def read(self, utterance: Utterance) -> tuple[np.ndarray, int]:
        """f32[<= S, E] kept frames.

        Raises:
          BadAudio: what was wrong with the clip when they were computed.
        """
        key = utterance.row.key
        if key in self._problems:
            code, detail = self._problems[key]
            raise BadAudio(Problem(code), detail)
        start, stop = self._offsets[key]
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

    A clip that cannot be used is kept as such: reading its frames raises again.

    Args:
      folder: holds `frames.npy` f32[sum of S, E] and `index.json`.
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
    clips = [_describe(utterance) for utterance in utterances]
    key = hashlib.sha256(json.dumps([encoder_name, window_samples, clips]).encode()).hexdigest()
    index_path, frames_path = folder / "index.json", folder / "frames.npy"
    if index_path.is_file() and frames_path.is_file():
        index = json.loads(index_path.read_text())
        if index["key"] == key:
            log.info("encoder frames of %d utterances found in %s", len(utterances), folder)
            return FeatureStore(folder)
    folder.mkdir(parents=True, exist_ok=True)
    index_path.unlink(missing_ok=True)  # until the frames are whole, there is nothing to find
    waveforms, parts, offsets, problems, total = Waveforms(window_samples), [], {}, {}, 0
    progress = tqdm(total=len(utterances), desc="encoder", unit="clip")
    for start in range(0, len(utterances), batch_size):
        members = utterances[start : start + batch_size]
        batch = np.zeros((batch_size, window_samples), np.float32)  # the last one is padded
        lengths = []
        for row, utterance in enumerate(members):
            try:
                samples, num_frames = waveforms.read(utterance)
                if num_frames > utterance.max_frames:
                    text = f"{utterance.row.audio}: {num_frames} frames, more than its bucket holds"
                    raise BadAudio(Problem.WRONG_DURATION, text)
            except BadAudio as error:
                problems[utterance.row.key] = (int(error.problem), str(error))
                samples, num_frames = batch[row, :0], 0
            batch[row, : len(samples)] = samples
            lengths.append(num_frames)
        frames = np.asarray(encode(batch), np.float32)
        for row, (utterance, length) in enumerate(zip(members, lengths, strict=True)):
            parts.append(frames[row, :length])
            offsets[utterance.row.key] = (total, total + length)
            total += length
        progress.update(len(members))
    progress.close()
    partial = folder / "frames.partial.npy"
    np.save(partial, np.concatenate(parts))
    os.replace(partial, frames_path)
    index_path.write_text(json.dumps({"key": key, "offsets": offsets, "problems": problems}))
    return FeatureStore(folder)


def _describe(utterance: Utterance) -> list[Any]:
    """What decides which frames are an utterance's."""
    row = utterance.row
    is_file = not is_url(str(row.audio)) and os.path.isfile(str(row.audio))
    size = os.path.getsize(str(row.audio)) if is_file else None
    return [row.key, str(row.audio), size, row.offset, row.duration]
