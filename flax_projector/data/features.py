"""The frozen encoder's frames, computed once and kept on disk."""

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

from flax_projector.batch import Bucket
from flax_projector.data.audio import BadAudio, Problem, file_stamp
from flax_projector.data.batch_plan import Utterance
from flax_projector.data.inputs import Clip, Waveforms
from flax_projector.files import reading, sync, write_atomically, writing
from flax_projector.lengths import num_encoder_frames
from flax_projector.logs import progress_bar

log = logging.getLogger(__name__)

_FRAMES, _INDEX = "frames.f32", "index.jsonl"
_SAVE_EVERY_CLIPS = 256


class _Clip(NamedTuple):
    """What the index keeps about an utterance: a line, which starts with the utterance's key."""

    version: str
    num_frames: int
    problem: str = ""  # name of a `Problem`; with frames, a doubt
    detail: str = ""


@dataclass
class _Index:
    """The index file: a line about the encoder, then one per clip, in the order of the frames.

    Attributes:
      encoder: name of the encoder that made the frames.
      encoder_dim: E.
      clips: by the utterance's key; the latest, if a clip was kept more than once.
      starts: index of each clip's first frame.
      window_frames: number of frames that are kept of every clip; 0 if only those of the clip.
      num_frames: total number of frames.
      num_bytes: total length of the lines.
    """

    encoder: str
    encoder_dim: int
    window_frames: int = 0
    clips: dict[str, _Clip] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)
    num_frames: int = 0
    num_bytes: int = 0

    @property
    def num_frame_bytes(self) -> int:
        """Size of all frames in bytes."""
        return self.num_frames * self.encoder_dim * np.dtype(np.float32).itemsize

    def add(self, key: str, clip: _Clip) -> None:
        """Takes the next line."""
        self.clips[key] = clip
        self.starts[key] = self.num_frames
        self.num_frames += self.num_kept(clip)

    def num_kept(self, clip: _Clip) -> int:
        """Number of frames that are kept of a clip."""
        return self.window_frames if clip.num_frames and self.window_frames else clip.num_frames

    def has(self, utterance: Utterance) -> bool:
        """Whether frames of the clip, as it is now, are kept."""
        clip = self.clips.get(utterance.row.key)
        return clip is not None and clip.num_frames > 0 and clip.version == _version(utterance)


def _read_index(folder: Path) -> _Index | None:
    """The index up to its last complete line; None if there is none, or frames are missing."""
    index_path, frames_path, index, num_bytes = folder / _INDEX, folder / _FRAMES, None, 0
    if not (index_path.is_file() and frames_path.is_file()):
        return None
    way_out = "remove its folder, and the frames are computed anew"
    with reading(index_path, way_out=way_out), index_path.open("rb") as file:
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
            index.add(key, _Clip(*clip))
    if index is None or frames_path.stat().st_size < index.num_frame_bytes:
        return None
    index.num_bytes = num_bytes
    return index


def _version(utterance: Utterance) -> str:
    """A hash of everything that an utterance's frames depend on, except the encoder."""
    row = utterance.row
    clip = [str(row.audio), file_stamp(row.audio), row.offset, row.duration]
    return hashlib.sha256(json.dumps(clip).encode()).hexdigest()[:16]


class FeatureStore:
    """The frames of every utterance, unpadded or of the whole window, in one memory-mapped file.

    Serves as the `Inputs` of `Batches`; pickled as the path of its folder.
    """

    name = "frames"

    def __init__(self, folder: Path):
        """Opens what `keep_features` wrote to `folder`.

        Raises:
          ValueError: if the folder holds no frames.
        """
        index = _read_index(folder)
        if index is None:
            raise ValueError(f"{folder} holds no frames: keep_features writes {_INDEX}, {_FRAMES}")
        self._folder, self._index = folder, index

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return FeatureStore, (self._folder,)

    @functools.cached_property
    def _frames(self) -> np.ndarray:
        # Opened when needed: if there are no frames, the file is empty and cannot be mapped.
        shape = (self._index.num_frames, self._index.encoder_dim)
        return np.memmap(self._folder / _FRAMES, np.float32, "r", shape=shape)

    def shape(self, bucket: Bucket) -> tuple[int, ...]:
        """(S, E) for the bucket."""
        return (bucket.num_frames, self._index.encoder_dim)

    def read(self, utterance: Utterance) -> Clip:
        """The kept frames f32[S, E].

        Raises:
          BadAudio: if the clip could not be used when its frames were computed.
        """
        clip, start = self._index.clips[utterance.row.key], self._index.starts[utterance.row.key]
        problem = BadAudio(Problem[clip.problem], clip.detail) if clip.problem else None
        if problem is not None and not clip.num_frames:
            raise problem
        frames = self._frames[start : start + self._index.num_kept(clip)]
        return Clip(frames, clip.num_frames, problem)


def keep_features(
    folder: Path,
    utterances: Sequence[Utterance],
    encode: Callable[[np.ndarray], jax.Array],
    *,
    window_samples: int,
    batch_size: int,
    encoder_dim: int,
    encoder_name: str,
    whole_window: bool = False,
) -> FeatureStore:
    """Computes the frames that are missing in `folder`, then opens all that are kept there.

    Frames are written as they are computed; a start that is killed loses only the last few. Clips
    that have changed are computed again. A clip that cannot be used is recorded as such: reading
    its frames raises the error again, and the next start retries the clip.

    Args:
      folder: receives `frames.f32`, the frames of all clips one after the other, and `index.jsonl`.
      utterances: the utterances whose frames are needed.
      encode: maps f32[B, N] waveforms, zero-padded to the window, to frames [B, S, E].
      window_samples: N, the number of samples in the window.
      batch_size: utterances per call of `encode`.
      encoder_dim: E, the width of the frames.
      encoder_name: identifies the encoder's weights and dtype.
      whole_window: keep the frames of the whole window, those after the clip included.

    Raises:
      ValueError: on several hosts, where each would need the whole file.
    """
    if jax.process_count() > 1:
        raise ValueError("--data.cache-features works on one host only: turn it off")
    encoder = f"{encoder_name}, {window_samples} samples"
    window_frames = num_encoder_frames(window_samples) if whole_window else 0
    index = _read_index(folder)
    if index is None or (index.encoder, index.window_frames) != (encoder, window_frames):
        made_by = {"encoder": encoder, "encoder_dim": encoder_dim}
        header = json.dumps(made_by | ({"window_frames": window_frames} if window_frames else {}))
        write_atomically(folder / _INDEX, f"{header}\n")
        index = _Index(encoder, encoder_dim, window_frames, num_bytes=len(header) + 1)
    num_new, lines = 0, []
    with (
        writing(folder),
        (folder / _FRAMES).open("ab") as frames_file,
        (folder / _INDEX).open("a", encoding="utf-8") as index_file,
        progress_bar(log, "encoder", total=len(utterances), unit="clip") as progress,
    ):
        frames_file.truncate(index.num_frame_bytes)
        index_file.truncate(index.num_bytes)

        def save() -> None:
            sync(frames_file)  # first, so that the index lists only frames that are there
            index_file.writelines(lines)
            sync(index_file)
            lines.clear()

        for start in range(0, len(utterances), batch_size):
            members = utterances[start : start + batch_size]
            # A clip has the same row at every start, so that its frames are the same bit for bit.
            missing = {row: u for row, u in enumerate(members) if not index.has(u)}
            for utterance, clip, frames in _encode(missing, encode, batch_size, window_samples):
                frames_file.write(frames[: index.num_kept(clip)].tobytes())
                lines.append(json.dumps([utterance.row.key, *clip]) + "\n")
            if len(lines) >= _SAVE_EVERY_CLIPS:
                save()
            num_new += len(missing)
            progress.update(len(members))
        save()
    log.info(
        "encoder frames of %d utterances in %s, %d of them computed now",
        len(utterances),
        folder,
        num_new,
    )
    return FeatureStore(folder)


def _encode(
    utterances: Mapping[int, Utterance],
    encode: Callable[[np.ndarray], jax.Array],
    batch_size: int,
    window_samples: int,
) -> list[tuple[Utterance, _Clip, np.ndarray]]:
    """What to keep for the utterances in some rows of a batch, with the window's f32[S, E]."""
    waveforms, batch = Waveforms(window_samples), np.zeros((batch_size, window_samples), np.float32)
    clips = {}
    for row, utterance in utterances.items():
        try:
            samples, num_frames, doubt = waveforms.read(utterance)
        except BadAudio as error:
            clips[row] = _Clip(_version(utterance), 0, error.problem.name, str(error))
        else:
            noted = (doubt.problem.name, str(doubt)) if doubt else ()
            clips[row] = _Clip(_version(utterance), num_frames, *noted)
            batch[row, : len(samples)] = samples
    is_any = any(clip.num_frames for clip in clips.values())
    frames = np.asarray(encode(batch), np.float32) if is_any else batch
    return [(utterances[row], clip, frames[row]) for row, clip in clips.items()]
