"""Decodes with FFmpeg what libsndfile does not read: m4a, aac, wma, and the sound of videos."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

_FORMATS = (
    *("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv", "avi", "asf", "mpeg", "mpegts", "mxf"),
    *("aac", "ac3", "eac3", "amr", "amrnb", "amrwb", "ape", "dts", "tta", "wv"),
)
"""FFmpeg looks for no others: it knows some that name other files and URLs, and would open these,
and takes some texts for sound. libsndfile finds more of what is wrong with those that it reads."""
_STATE_LENGTHS = _FORMATS[:3]  # of the sound, which others guess, or leave out
# Encoders add samples, which headers count or not: two frames of AAC at the lowest rates.
_LENGTH_TOLERANCE_SECS = 0.25


class BadSound(ValueError):
    """A file whose samples are of no use."""


class EndMissing(BadSound):
    """A file that ends before its samples do."""


class UnknownFormat(BadSound):
    """A file in none of the formats."""


@dataclass(frozen=True)
class Container:
    """An opened file.

    Attributes:
      samplerate: in Hz.
      secs: its length, as far as its header states or suggests one.
      blocks: f32[N, channels], its samples, to be read once.
    """

    samplerate: int
    secs: float | None
    blocks: Iterator[np.ndarray]


@contextlib.contextmanager
def open_container(file: Any) -> Iterator[Container]:
    """Opens a file.

    Args:
      file: a binary file, at its start.

    Raises:
      UnknownFormat: if it is in none of the formats.
      BadSound: if it has no sound; and, when the blocks are read, if a part cannot be decoded or
        the end is missing.
    """
    import av  # it takes its time, and most files need none of it

    av.logging.set_level(None)  # FFmpeg would write to standard error
    options = {"format_whitelist": ",".join(_FORMATS)}
    try:
        container: Any = av.open(file, "r", metadata_errors="ignore", options=options)
    except (av.FFmpegError, ValueError) as error:
        raise UnknownFormat(_reason(error)) from error
    with container:
        if not container.streams.audio:
            raise BadSound("it has no sound")
        stream = container.streams.audio[0]
        frames = _frames(container, stream)
        if (first := next(frames, None)) is None:
            raise BadSound("it has no sound")
        secs = None
        if stream.duration and stream.time_base:
            secs = float(stream.duration * stream.time_base)
        elif container.duration and len(container.streams) == 1:  # others may be longer
            secs = container.duration / av.time_base
        stated = secs if container.format.name in _STATE_LENGTHS else None
        rate = first.sample_rate
        yield Container(rate, secs, _decode(itertools.chain([first], frames), rate, stated))


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    import av

    try:
        yield from container.decode(stream)
    except av.FFmpegError as error:
        raise BadSound(f"a part of it cannot be decoded: {_reason(error)}") from error


def _decode(frames: Iterator[Any], rate: int, stated_secs: float | None) -> Iterator[np.ndarray]:
    """The samples of frames, about a second at a time."""
    import av

    to_float, parts, num_samples, total = av.AudioResampler(format="fltp"), [], 0, 0
    try:
        for frame in itertools.chain(frames, [None]):
            for part in to_float.resample(frame):
                parts.append(part.to_ndarray().T)  # [N, channels]
                num_samples += len(parts[-1])
            if num_samples >= rate:
                yield np.concatenate(parts)
                total, parts, num_samples = total + num_samples, [], 0
    except ValueError as error:
        if "does not match" in str(error):  # another rate, or other channels
            raise BadSound("it joins streams of different rates and channels") from error
        raise
    if parts:
        yield np.concatenate(parts)
    secs = (total + num_samples) / rate
    if stated_secs is not None and secs < stated_secs - _LENGTH_TOLERANCE_SECS:
        raise EndMissing(f"its end is missing: it ends after {secs:.2f} s of {stated_secs:.2f} s")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
