"""Opens sound files with their real lengths, whatever their headers say.

libsndfile believes headers: it never decodes past the length that they state or that it guesses
from them. So a file whose header has no length, or one that the file's size contradicts, is decoded
here to its end. A file whose end is missing is an error.
"""

import contextlib
import io
import os
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import soundfile

BinaryFile = Any
"""What has `read`, `seek` and `tell`; those of fsspec are no `typing.BinaryIO`."""

# Manifests round durations: a clip may be this much longer or shorter than its manifest says.
DURATION_TOLERANCE_SECS = 0.05

_UNKNOWN_SIZE = 0x7FFFF000  # programs that write to pipes state this size in bytes, or more
_MAX_PER_BYTE = 5_000  # samples: digital silence in flac; beyond it, a length is none
_RATES = range(1_000, 1_000_001)  # Hz
_BLOCK = 1 << 16
# What libsndfile logs about au, aiff, w64 and rf64 files that are shorter than they state.
_SIZES = re.compile(r"^\s*(?:Data Size|SSND|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", re.M)
_MP3_TAGS = 4096  # bytes of tags behind the samples that do not make the file's size wrong
_FIRST_PAGE = re.compile(rb"OggS\0[\2\6]")


class BadSound(ValueError):
    """A file whose samples are of no use."""


class EndMissing(BadSound):
    """A file that ends before its samples do."""


class _Stream(soundfile.SoundFile):
    """A sound file that is only read from its start to its end."""

    def seekable(self) -> bool:
        return False  # otherwise SoundFile stops where the header says


class DecodedSound:
    """A sound file that was decoded to its end; has what is used of `soundfile.SoundFile`."""

    def __init__(self, samples: np.ndarray, samplerate: int):
        self._samples, self.samplerate = samples, samplerate
        self.frames, self._next = len(samples), 0

    def seek(self, frames: int) -> int:
        """Continues with another sample; returns its number."""
        self._next = frames
        return frames

    def read(self, frames: int, *, dtype: str = "float32", always_2d: bool = True) -> np.ndarray:
        """The next samples, as f32[N, channels]."""
        samples = self._samples[self._next : self._next + frames]
        self._next += len(samples)
        return samples


@contextlib.contextmanager
def open_sound(
    file: str | BinaryFile, *, end_secs: float | None = None
) -> Iterator[soundfile.SoundFile | DecodedSound]:
    """Opens a sound file; `frames` is its real length.

    Args:
      file: path, or a binary file.
      end_secs: what will be read ends here. If the header says that the file is longer, the file
        is not decoded, however long it really is. None means to the file's end.

    Raises:
      EndMissing: if the end of the file is missing.
      BadSound: if it joins streams of different rates, or its rate is none of speech.
      soundfile.SoundFileError: if it cannot be read.
    """
    if isinstance(file, str):
        file = os.fsencode(file)  # its name need not be UTF-8
    with soundfile.SoundFile(file) as sound:
        if sound.samplerate not in _RATES:
            raise BadSound(f"{sound.samplerate} Hz is no sample rate of speech")
        is_within = end_secs is not None and end_secs * sound.samplerate <= sound.frames
        with _opened(file) as content:
            has_length = sound.frames <= _MAX_PER_BYTE * content.seek(0, os.SEEK_END)
            content.seek(0)
            trusted = is_within and has_length
            parts = [] if trusted else _distrusted(sound, content, has_length=has_length)
        if not parts:
            yield sound
            return
        is_mp3 = sound.format == "MP3"
    decoded = [_decode(part, through_pipe=is_mp3) for part in parts]
    kinds = {(rate, samples.shape[1]) for samples, rate in decoded}
    if len(kinds) > 1:
        raise BadSound(f"it joins streams of different rates and channels: {sorted(kinds)}")
    yield DecodedSound(np.concatenate([samples for samples, _ in decoded]), decoded[0][1])


def _distrusted(sound: soundfile.SoundFile, file: BinaryFile, *, has_length: bool) -> list[bytes]:
    """What to decode in place of a file whose header is wrong; empty if it can be trusted.

    Args:
      sound: the file, as libsndfile opens it.
      file: the same file at its start.
      has_length: whether the header states a length that can be true.

    Raises:
      EndMissing: if the end of the file is missing.
    """
    if sound.format == "OGG":
        data = file.read()
        return _whole_ogg(data) or ([] if has_length else [data])
    if sound.format == "MP3":
        return _whole_mp3(file, is_tag_trusted=has_length)
    if sound.format in ("WAV", "WAVEX"):
        return _whole_wav(sound, file)
    if sound.format != "FLAC":  # its decoder finds a missing end itself
        for stated, found in _SIZES.findall(sound.extra_info):
            _check_end(sound, stated=int(stated), found=int(found))
    return [] if has_length else [file.read()]


def _check_end(sound: soundfile.SoundFile, *, stated: int, found: int) -> None:
    """Checks the number of bytes that a header states against those that there are."""
    missing_secs = (stated - found) / max(found, 1) * sound.frames / sound.samplerate
    if stated < _UNKNOWN_SIZE and missing_secs > DURATION_TOLERANCE_SECS:
        raise EndMissing(f"its end is missing: it has {found} of {stated} bytes")


def _whole_ogg(data: bytes) -> list[bytes]:
    """The streams of an ogg file that has several, one after the other."""
    last = data.rfind(b"OggS\0")
    header = data[last : last + 27]
    lengths = data[last + 27 : last + 27 + header[-1]]
    is_whole = len(header) == 27 and last + 27 + header[-1] + sum(lengths) <= len(data)
    if not (is_whole and header[5] & 4):
        raise EndMissing("its end is missing: it has no last page, or only a part of it")
    starts = [match.start() for match in _FIRST_PAGE.finditer(data)]
    ends = [*starts[1:], len(data)]
    return [data[a:b] for a, b in zip(starts, ends, strict=True)] if len(starts) > 1 else []


def _whole_wav(sound: soundfile.SoundFile, file: BinaryFile) -> list[bytes]:
    """A wav file with the size of its samples corrected, if what is behind them are samples too."""
    size = file.seek(0, os.SEEK_END)
    order = "big" if sound.endian == "BIG" else "little"
    position, samples = 12, 0  # after RIFF, size, WAVE
    while position + 8 <= size:
        file.seek(position)
        name, length = file.read(4), int.from_bytes(file.read(4), order)
        if name == b"data" and not samples:
            samples = position + 8
            _check_end(sound, stated=length, found=size - samples)
        elif samples and not (name.isascii() and name.decode().isprintable()):
            break
        position += 8 + length + length % 2
    else:
        return []
    file.seek(samples)
    behind = file.read()
    if not any(behind[position - samples :]):  # padding
        return []
    file.seek(0)
    header = file.read(samples - 4)
    return [header + len(behind).to_bytes(4, order) + behind]


def _whole_mp3(file: BinaryFile, *, is_tag_trusted: bool) -> list[bytes]:
    """An mp3 file without the tag that states its length, if that is missing or wrong."""
    size = file.seek(0, os.SEEK_END)
    start = 0
    while True:  # ID3 tags
        file.seek(start)
        head = file.read(64)
        if not head.startswith(b"ID3"):
            break
        start += 10 + sum(byte << 7 * (3 - i) for i, byte in enumerate(head[6:10]))
    tag = re.search(rb"Xing|Info", head)
    if tag:
        flags = int.from_bytes(head[tag.end() : tag.end() + 4], "big")
        at = tag.end() + (8 if flags & 1 else 4)  # the number of frames comes first
        stated = int.from_bytes(head[at : at + 4], "big") if flags & 2 else 0
        # Other tags may follow the samples; a file that is too short is found when it is decoded.
        is_whole = stated and size - start <= 1.01 * stated + _MP3_TAGS
        if is_tag_trusted and is_whole:
            return []
    file.seek(0)
    data = file.read()
    if tag:  # a frame of silence without it
        data = data[: start + tag.start()] + bytes(4) + data[start + tag.end() :]
    return [data]


def _decode(data: bytes, *, through_pipe: bool) -> tuple[np.ndarray, int]:
    """All samples of a file, and their rate.

    Of mp3, libsndfile reads more than it guessed from the header only if it cannot see the file's
    size.
    """
    file: int | BinaryFile = io.BytesIO(data)
    if through_pipe:
        file, end = os.pipe()
        threading.Thread(target=_write, args=(end, data), daemon=True).start()
    with _Stream(file) as sound:
        blocks: list[np.ndarray] = [np.zeros((0, sound.channels), np.float32)]
        while True:
            blocks.append(sound.read(_BLOCK, dtype="float32", always_2d=True))
            if len(blocks[-1]) < _BLOCK:
                return np.concatenate(blocks), sound.samplerate


def _write(end: int, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), open(end, "wb") as pipe:
        pipe.write(data)


@contextlib.contextmanager
def _opened(file: bytes | BinaryFile) -> Iterator[BinaryFile]:
    """The file at its start; one that is already open is left where it was."""
    if isinstance(file, bytes):
        with open(file, "rb") as opened:
            yield opened
    else:
        position = file.tell()
        file.seek(0)
        yield file
        file.seek(position)
