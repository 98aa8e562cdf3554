"""Frames of the frozen encoder, computed once and kept on disk."""

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from flax_projector.audio import BadAudio, Problem, file_stamp
from flax_projector.batch_plan import Bucket, Utterance
from flax_projector.data import Waveforms
from flax_projector.files import sync, write_atomically

log = logging.getLogger(__name__)

_FRAMES, _INDEX = "frames.f32", "index.jsonl"
_SAVE_EVERY_CLIPS = 256


class _Clip(NamedTuple):
    """What is kept of an utterance; a line of the index, after the utterance's key."""

    version: str
    num_frames: int
    problem: int = Problem.NONE
    detail: str = ""


@dataclass
class _Index:
    """What is kept: a line about the encoder, then one for every clip in the order of the frames.

    Attributes:
      encoder: that made the frames.
      encoder_dim: E.
      clips: by the utterance's key; of a clip that was kept again, what was kept last.
      starts: their first frames.
      num_frames: in all.
      num_bytes: of the lines.
    """

    encoder: str
    encoder_dim: int
    clips: dict[str, _Clip] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)
    num_frames: int = 0
    num_bytes: int = 0

    @property
    def num_frame_bytes(self) -> int:
        """Of all frames."""
        return self.num_frames * self.encoder_dim * np.dtype(np.float32).itemsize

    def has(self, utterance: Utterance) -> bool:
        """Whether the frames of the clip as it is now are kept."""
        clip = self.clips.get(utterance.row.key)
        return clip is not None and not clip.problem and clip.version == _version(utterance)


def _read_index(folder: Path) -> _Index | None:
    """What was written whole; None if that is nothing."""
    index_path, frames_path, index, num_bytes = folder / _INDEX, folder / _FRAMES, None, 0
    if not (index_path.is_file() and frames_path.is_file()):
        return None
    with index_path.open("rb") as file:
        for line in file:
            try:
                values = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            num_bytes += len(line)
            if index is None:
                index = _Index(**values)
                continue
            key, *clip = values
            index.clips[key] = _Clip(*clip)
            index.starts[key] = index.num_frames
            index.num_frames += index.clips[key].num_frames
    if index is None or frames_path.stat().st_size < index.num_frame_bytes:
        return None
    index.num_bytes = num_bytes
    return index


def _version(utterance: Utterance) -> str:
    """Changes with whatever decides which frames are an utterance's, beside the encoder."""
    row = utterance.row
    clip = [str(row.audio), file_stamp(row.audio), row.offset, row.duration]
    return hashlib.sha256(json.dumps(clip).encode()).hexdigest()[:16]


class FeatureStore:
    """Frames of every utterance, without padding, in one memory-mapped file.

    Serves as the `Inputs` of a `data.BatchSource`; it pickles as the names of its files.
    """

    name = "frames"

    def __init__(self, folder: Path):
        """Opens what `keep_features` wrote to `folder`."""
        index = _read_index(folder)
        if index is None:
            raise ValueError(f"{folder} holds no frames: keep_features writes {_INDEX}, {_FRAMES}")
        self._folder, self._index = folder, index

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return FeatureStore, (self._folder,)

    @functools.cached_property
    def _frames(self) -> np.ndarray:
        # Opened when needed: without any frame, the file is empty and cannot be mapped.
        shape = (self._index.num_frames, self._index.encoder_dim)
        return np.memmap(self._folder / _FRAMES, np.float32, "r", shape=shape)

    def shape(self, bucket: Bucket) -> tuple[int, ...]:
        """[S, E] of the bucket."""
        return (bucket.num_frames, self._index.encoder_dim)

    def read(self, utterance: Utterance) -> tuple[np.ndarray, int]:
        """f32[<= S, E] kept frames.

        Raises:
          BadAudio: what was wrong with the clip when they were computed.
        """
        clip, start = self._index.clips[utterance.row.key], self._index.starts[utterance.row.key]
        if clip.problem:
            raise BadAudio(Problem(clip.problem), clip.detail)
        return self._frames[start : start + clip.num_frames], clip.num_frames


def keep_features(
    folder: Path,
    utterances: Sequence[Utterance],
    encode: Callable[[np.ndarray], jax.Array],
    *,
    window_samples: int,
    batch_size: int,
    encoder_dim: int,
    encoder_name: str,
) -> FeatureStore:
    """Opens the kept frames in `folder`, computing first those that are not there.

    They are written as they come, and a start that is killed loses the last few. Clips that were
    changed are computed again. One that cannot be used is kept as such: reading its frames raises
    again; the next start tries it once more.

    Args:
      folder: holds `frames.f32`, f32[sum of S, E], and `index.jsonl`.
      utterances: whose frames are needed.
      encode: f32[B, N] waveforms, zero-padded to the window, to frames [B, S, E].
      window_samples: N.
      batch_size: utterances per call of `encode`.
      encoder_dim: E.
      encoder_name: whatever identifies the encoder's weights and dtype.

    Raises:
      ValueError: on several hosts, where each would need the whole file.
    """
    if jax.process_count() > 1:
        raise ValueError("data.cache_features works on one host only: turn it off")
    encoder = f"{encoder_name}, {window_samples} samples"
    index = _read_index(folder)
    if index is None or index.encoder != encoder:
        header = json.dumps({"encoder": encoder, "encoder_dim": encoder_dim}) + "\n"
        write_atomically(folder / _INDEX, header)
        index = _Index(encoder, encoder_dim, num_bytes=len(header))
    num_new, lines = 0, []
    with (
        (folder / _FRAMES).open("ab") as frames_file,
        (folder / _INDEX).open("a", encoding="utf-8") as index_file,
        tqdm(total=len(utterances), desc="encoder", unit="clip") as progress,
    ):
        frames_file.truncate(index.num_frame_bytes)
        index_file.truncate(index.num_bytes)

        def save() -> None:
            sync(frames_file)  # first: the index lists only what is there
            index_file.writelines(lines)
            sync(index_file)
            lines.clear()

        for start in range(0, len(utterances), batch_size):
            members = utterances[start : start + batch_size]
            # Each in the row that it has in every start: its frames are the same, bit for bit.
            missing = {row: u for row, u in enumerate(members) if not index.has(u)}
            for utterance, clip, frames in _encode(missing, encode, batch_size, window_samples):
                frames_file.write(frames.tobytes())
                lines.append(json.dumps([utterance.row.key, *clip]) + "\n")
            if len(lines) >= _SAVE_EVERY_CLIPS:
                save()
            num_new += len(missing)
            progress.update(len(members))
        save()
    log.info(
        "encoder frames of %d utterances in %s, %d of them computed now",
        *(len(utterances), folder, num_new),
    )
    return FeatureStore(folder)


def _encode(
    utterances: Mapping[int, Utterance],
    encode: Callable[[np.ndarray], jax.Array],
    batch_size: int,
    window_samples: int,
) -> list[tuple[Utterance, _Clip, np.ndarray]]:
    """What to keep of the utterances in some rows of a batch, with frames f32[S, E]."""
    waveforms, batch = Waveforms(window_samples), np.zeros((batch_size, window_samples), np.float32)
    clips = {}
    for row, utterance in utterances.items():
        try:
            samples, num_frames = waveforms.read(utterance)
        except BadAudio as error:
            clips[row] = _Clip(_version(utterance), 0, error.problem, str(error))
        else:
            clips[row] = _Clip(_version(utterance), num_frames)
            batch[row, : len(samples)] = samples
    is_any = any(clip.num_frames for clip in clips.values())
    frames = np.asarray(encode(batch), np.float32) if is_any else batch
    return [(utterances[row], clip, frames[row, : clip.num_frames]) for row, clip in clips.items()]
