"""Reads audio files, local or remote, of any format, rate and channel count, as 16 kHz mono."""

import contextlib
import enum
import functools
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar, runtime_checkable

import numpy as np
import soundfile
import soxr

from flax_projector.data.containers import BadSound, EndMissing
from flax_projector.data.sound import DURATION_TOLERANCE_SECS, open_sound
from flax_projector.file_types import recognise
from flax_projector.files import is_url, read_bytes
from flax_projector.lengths import FRAME_SECS, SAMPLE_RATE, SAMPLES_PER_FRAME
from flax_projector.storage.urls import filesystem_of

# Full scale is 1. Lossy codecs overshoot it a little, and clips that were normalised badly more.
_IMPOSSIBLE_PEAK, _LOUD_PEAK = 100.0, 2.0
_SILENT_LEVEL = 1e-4  # the standard deviation: 80 dB below full scale
_CLIPPED_LEVEL, _CLIPPED_SHARE = 0.99, 0.01
_CANCELLED = 0.1  # level of the mean of channels, relative to that of one of them alone


class Problem(enum.Enum):
    """Why a row cannot be used; the list of bad rows gives the name."""

    MALFORMED = 1  # a field is missing or is not a number
    DUPLICATE_ID = 2
    EMPTY_TEXT = 3
    MISSING_FILE = 4
    UNREADABLE = 5  # permissions, network
    UNDECODABLE = 6
    NOT_FINITE = 7  # NaN or infinite samples
    IMPOSSIBLE = 8  # samples far beyond full scale
    TOO_SHORT = 9  # shorter than an encoder frame
    WRONG_DURATION = 10  # longer or shorter than the manifest says
    INCOMPLETE = 11  # the end of the file is missing
    TOO_LONG = 12  # for --data.bucket-secs
    TOO_MANY_LABELS = 13  # for --data.max-text-tokens
    SILENT = 14  # this and what follows can be used, but may be no speech
    TOO_LOUD = 15
    CLIPPED = 16

    @property
    def is_defect(self) -> bool:
        """Whether the row itself is at fault; if not, it is beyond the run's limits or doubtful."""
        by_design = (Problem.TOO_LONG, Problem.TOO_MANY_LABELS)
        doubtful = (Problem.SILENT, Problem.TOO_LOUD, Problem.CLIPPED)
        return self not in (*by_design, *doubtful)

    @property
    def label(self) -> str:
        """The name in plain words, such as "missing file"."""
        return self.name.lower().replace("_", " ")


class BadAudio(ValueError):
    """A clip that cannot be used, and why.

    Attributes:
      problem: the reason.
    """

    def __init__(self, problem: Problem, detail: str):
        super().__init__(detail)
        self.problem = problem


@runtime_checkable
class StoredClip(Protocol):
    """A clip that is not a separate file: one in the table of a data set, or a part of a file."""

    def file(self) -> str:
        """Path or URL of the file that it is in; empty if it is in a table."""
        ...

    def fetch(self) -> bytes | str:
        """The encoded file, or its path."""
        ...

    def stamp(self) -> list[int | str]:
        """What changes when the clip does."""
        ...


Audio = str | Path | StoredClip


@dataclass(frozen=True, slots=True)
class Slice:
    """A clip that is a range of bytes in a larger file, such as a tar.

    Attributes:
      path: path or URL of the file.
      start: where the clip begins in it.
      length: how many bytes it has.
    """

    path: str
    start: int
    length: int

    @property
    def end(self) -> int:
        """Where the clip ends in the file."""
        return self.start + self.length

    def fetch(self) -> bytes:
        """The encoded clip: these bytes and no others are read.

        Raises:
          BadAudio: if the file is missing, cannot be read, or ends before the clip does.
        """
        with _reading(self.path):
            content = self._fetch_remote() if is_url(self.path) else self._fetch_local()
        self.require_end(self.start + len(content))
        return content

    def _fetch_local(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.length)

    def _fetch_remote(self) -> bytes:
        fs, path = filesystem_of(self.path)
        try:
            return fs.cat_file(path, start=self.start, end=self.end)
        except FileNotFoundError:
            raise
        except Exception:  # servers refuse a range that begins after the end
            self.require_end(fs.size(path))
            raise

    def require_end(self, size: int) -> None:
        """Raises BadAudio if a file of this size, in bytes, ends before the clip does."""
        if size < self.end:
            text = f"{self}: the file ends before byte {self.end}"
            raise BadAudio(Problem.INCOMPLETE, text)

    def file(self) -> str:
        """The file's path or URL."""
        return self.path

    def stamp(self) -> list[int | str]:
        """What changes when the file does."""
        return file_stamp(self.path)

    def __str__(self) -> str:
        return f"{self.path}[{self.start}:{self.end}]"


def file_of(audio: Audio) -> str:
    """Path or URL of the file that a clip is, or is a part of; empty if it is in a table."""
    return str(audio) if isinstance(audio, str | Path) else audio.file()


def file_stamp(audio: Audio) -> list[int | str]:
    """What changes when a clip does: size and time of a local file, the version of a data set.

    Empty for URLs, which are assumed not to change.
    """
    if isinstance(audio, StoredClip):
        return audio.stamp()
    if isinstance(audio, str | Path) and not is_url(audio) and os.path.isfile(audio):
        stat = os.stat(audio)
        return [stat.st_size, stat.st_mtime_ns]
    return []


@contextlib.contextmanager
def _reading(audio: Audio) -> Iterator[None]:
    """Turns errors in the block, which reads a clip, into BadAudio that names it."""
    try:
        yield
    except BadAudio:
        raise
    except FileNotFoundError as error:
        raise BadAudio(Problem.MISSING_FILE, f"{audio} does not exist") from error
    except IsADirectoryError as error:
        raise BadAudio(Problem.UNREADABLE, f"{audio} is a folder: name the files in it") from error
    except Exception as error:  # file systems raise the errors of their clients
        text = f"{audio} cannot be read: {type(error).__name__}: {error}"
        raise BadAudio(Problem.UNREADABLE, text) from error


Opened = TypeVar("Opened")
Opening = Callable[[Any], contextlib.AbstractContextManager[Opened]]
"""Opens a sound file, given by its path or as a binary file; see `sound`."""


@contextlib.contextmanager
def open_clip(audio: Audio, opening: Opening[Opened], *, whole: bool) -> Iterator[Opened]:
    """Opens a clip.

    Args:
      audio: the clip.
      opening: opens the file.
      whole: all of it will be read, so a remote file is fetched in one request.

    Raises:
      BadAudio: for anything that goes wrong, here or in the body.
    """
    with _reading(audio), contextlib.ExitStack() as stack:
        file: str | BinaryIO = ""
        try:
            found = audio.fetch() if isinstance(audio, StoredClip) else str(audio)
            if isinstance(found, bytes):
                file = io.BytesIO(found)
            elif not is_url(found):
                file = found  # libsndfile reads it without going through Python
            elif whole:
                file = io.BytesIO(read_bytes(found))
            else:
                fs, path = filesystem_of(found)
                file = stack.enter_context(fs.open(path))
            yield stack.enter_context(opening(file))
        except BadSound as error:
            is_cut = isinstance(error, EndMissing)
            problem = Problem.INCOMPLETE if is_cut else Problem.UNDECODABLE
            raise BadAudio(problem, f"{audio}: {error}") from error
        except soundfile.SoundFileError as error:
            if isinstance(file, str) and not os.path.exists(file):
                raise BadAudio(Problem.MISSING_FILE, f"{audio} does not exist") from error
            kind = recognise(Path(file)) if isinstance(file, str) else None
            reason = f"is not a readable audio file: {getattr(error, 'error_string', error)}"
            raise BadAudio(Problem.UNDECODABLE, f"{audio} {kind or reason}") from error


def read_encoded(audio: Audio) -> bytes:
    """The bytes of a clip, as they are stored.

    Raises:
      BadAudio: if it is missing or cannot be read.
    """
    with _reading(audio):
        found = audio.fetch() if isinstance(audio, StoredClip) else str(audio)
        return found if isinstance(found, bytes) else read_bytes(found)


def read_duration(audio: Audio) -> float:
    """Length of a clip in seconds, from its header, unless that is missing or wrong.

    Raises:
      BadAudio: if the clip is missing or cannot be read or decoded.
    """
    with open_clip(audio, open_sound, whole=False) as sound:
        return sound.frames / sound.samplerate


def mix(samples: np.ndarray) -> np.ndarray:
    """The mean of f32[N, channels], or the loudest of channels that cancel each other."""
    num_channels = samples.shape[1]
    if num_channels == 1 or not len(samples):
        return samples[:, 0]
    channels = np.ascontiguousarray(samples.T)  # NumPy is ten times faster along the long axis
    with np.errstate(over="ignore", invalid="ignore"):  # `check_samples` refuses such samples
        mono = channels.mean(axis=0)
        energies = np.einsum("cn,cn->c", channels, channels)
        if np.einsum("n,n", mono, mono) < (_CANCELLED / num_channels) ** 2 * energies.max():
            return channels[energies.argmax()]
    return mono


def check_samples(audio: Audio, samples: np.ndarray) -> BadAudio | None:
    """Checks that a clip can be speech; takes one pass over the samples of most clips.

    Args:
      audio: the clip, for the message.
      samples: f32[N] as `load_audio` gives them.

    Returns:
      Why it may be no speech, though it can be used: it is silent, too loud or clipped.

    Raises:
      BadAudio: if samples are not finite or far beyond full scale.
    """
    peak = float(np.maximum(samples.max(), -samples.min()))  # not finite if a sample is not
    if not np.isfinite(peak):
        raise BadAudio(Problem.NOT_FINITE, f"{audio} has samples that are not finite")
    if peak > _IMPOSSIBLE_PEAK:
        raise BadAudio(
            Problem.IMPOSSIBLE,
            f"{audio} has a sample of {peak:g}; full scale is 1: were integers written as floats?",
        )
    if peak > _LOUD_PEAK:
        return BadAudio(Problem.TOO_LOUD, f"{audio} has a sample of {peak:g}; full scale is 1")
    # The level of a sixteenth of the samples is at most four times that of all.
    if samples[::16].std() < 4 * _SILENT_LEVEL and (level := samples.std()) < _SILENT_LEVEL:
        return BadAudio(Problem.SILENT, f"{audio} is silent: its level is {level:.1g}")
    if peak >= _CLIPPED_LEVEL:
        clipped = np.count_nonzero(samples >= _CLIPPED_LEVEL)
        clipped += np.count_nonzero(samples <= -_CLIPPED_LEVEL)
        if clipped > _CLIPPED_SHARE * len(samples):
            percent = 100 * clipped / len(samples)
            detail = f"{audio} is clipped: {percent:.0f}% of its samples are at full scale"
            return BadAudio(Problem.CLIPPED, detail)
    return None


def check_num_samples(audio: Audio, count: int) -> None:
    """Raises BadAudio if a clip of so many samples at 16 kHz is shorter than an encoder frame."""
    if count < SAMPLES_PER_FRAME:
        text = f"{audio} has {count} samples at 16 kHz; an encoder frame takes {SAMPLES_PER_FRAME}"
        raise BadAudio(Problem.TOO_SHORT, text)


def check_duration(audio: Audio, secs: float, *, offset: float | None, duration: float) -> None:
    """Checks what a row states against the length of its file.

    Args:
      audio: the clip, for the message.
      secs: length of the whole file.
      offset: start of the segment, in seconds; None means the whole file.
      duration: rounded length of the segment or of the whole file, in seconds.

    Raises:
      BadAudio: if the segment ends after the file, or the file does not last as long as stated.
    """
    start = offset or 0.0
    left = max(secs - start, 0.0)
    is_cut = offset is not None and left > duration
    if is_cut or abs(left - duration) <= DURATION_TOLERANCE_SECS:
        return
    where = "" if offset is None else f" from {offset:g} s on"
    way_out = "correct the duration, omit it, or give the offset of a segment"
    excess = (start + duration) / 1000 - secs
    fits_in_ms = excess <= DURATION_TOLERANCE_SECS and (
        offset is not None or -excess <= DURATION_TOLERANCE_SECS
    )
    if fits_in_ms and duration >= 1000 * FRAME_SECS and max(start, duration) > secs:
        way_out = "times are in seconds, and these seem to be in milliseconds"
    raise BadAudio(
        Problem.WRONG_DURATION,
        f"{audio} lasts {left:.2f} s{where}, not {duration:.2f} s as stated: {way_out}",
    )


def load_audio(
    audio: Audio, *, offset: float | None = None, duration: float | None = None
) -> np.ndarray:
    """Reads a clip as 16 kHz mono: averages the channels, then resamples.

    Of channels that cancel each other, it takes the loudest.

    Args:
      audio: path, URL or stored clip.
      offset: where the segment to read starts, in seconds; None means the whole file.
      duration: rounded length of the segment or of the whole file, in seconds. A segment that ends
        within the tolerance of the file's end is read to the end.

    Returns:
      f32[N].

    Raises:
      BadAudio: if the clip is missing, cannot be read or decoded, lacks its end, is shorter than an
        encoder frame, or does not have the stated duration.
    """
    end = None if offset is None or duration is None else offset + duration
    opening = functools.partial(open_sound, end_secs=end)
    with open_clip(audio, opening, whole=offset is None) as sound:
        rate, num_samples = sound.samplerate, sound.frames
        start = min(round((offset or 0.0) * rate), num_samples)
        left = num_samples - start
        if duration is not None:
            # Before decoding: without an offset the file may be hours long.
            check_duration(audio, num_samples / rate, offset=offset, duration=duration)
            if offset is not None and left > (duration + DURATION_TOLERANCE_SECS) * rate:
                left = round(duration * rate)
        sound.seek(start)
        samples = sound.read(left, dtype="float32", always_2d=True)
    if len(samples) < left - DURATION_TOLERANCE_SECS * rate:
        raise BadAudio(
            Problem.INCOMPLETE,
            f"{audio}: its end is missing: it ends after {(start + len(samples)) / rate:.2f} s of "
            f"{num_samples / rate:.2f} s",
        )
    mono = mix(samples)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE)
    check_num_samples(audio, len(mono))
    return mono
