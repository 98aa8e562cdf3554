"""Opens sound files with their real lengths, whatever their headers say.

libsndfile believes headers: it never decodes past the length that they state or that it guesses
from them. So a file whose header has no length, or one that the file's size contradicts, is decoded
here to its end. A file whose end is missing is an error. FFmpeg reads what libsndfile does not: see
`containers`.
"""

import contextlib
import functools
import io
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile

from flax_projector.data.containers import (
    BadSound,
    EndMissing,
    UnknownFormat,
    open_container,
)

BinaryFile = Any
"""What has `read`, `seek` and `tell`; those of fsspec are no `typing.BinaryIO`."""

# Manifests round durations: a clip may be this much longer or shorter than its manifest says.
DURATION_TOLERANCE_SECS = 0.05

_UNKNOWN_SIZE = 0x7FFFF000  # programs that write to pipes state this size in bytes, or more
_MAX_PER_BYTE = 5_000  # samples: digital silence in flac; beyond it, a length is none
_RATES = range(1_000, 1_000_001)  # Hz
_BLOCK = 1 << 16
_BLOCK_SECS = 10  # of a stream: its channels are mixed by the block
# What libsndfile logs about au, aiff, w64 and rf64 files that are shorter than they state.
_SIZES = re.compile(r"^\s*(?:Data Size|SSND|riff|Riff size)\s*: (\d+) \(should be (\d+)\)", re.M)
_MP3_TAGS = 4096  # bytes of tags behind the samples that do not make the file's size wrong
_FIRST_PAGE = re.compile(rb"OggS\0[\2\6]")


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
    with _opened_anyhow(file, end_secs) as found:
        if isinstance(found, SoundStream):
            found = DecodedSound(np.concatenate(list(found.blocks)), found.samplerate)
        yield found


@dataclass(frozen=True)
class SoundStream:
    """A sound file that is read once, from its start to its end, however long it is.

    Attributes:
      samplerate: in Hz.
      secs: its length, as far as its header states one.
      blocks: f32[N, channels], its samples.
    """

    samplerate: int
    secs: float | None
    blocks: Iterator[np.ndarray]


@contextlib.contextmanager
def open_stream(file: str | BinaryFile) -> Iterator[SoundStream]:
    """Opens a sound file to read it block by block: none of it is decoded in advance.

    Args:
      file: as `open_sound` takes it.

    Raises:
      EndMissing: if the end of the file is missing; often only when it is reached.
      BadSound: as `open_sound`, or if a part cannot be decoded.
      soundfile.SoundFileError: if it cannot be read.
    """
    with _opened_anyhow(file, None) as found:
        if isinstance(found, soundfile.SoundFile):
            secs = found.frames / found.samplerate
            found = SoundStream(found.samplerate, secs, _blocks(found))
        yield found


@contextlib.contextmanager
def _opened_anyhow(
    file: str | BinaryFile, end_secs: float | None
) -> Iterator[soundfile.SoundFile | SoundStream]:
    """The file as libsndfile opens it, or else what decodes it to its end."""
    with contextlib.ExitStack() as stack:
        yield _open(file, end_secs, stack)


def _open(
    file: str | BinaryFile, end_secs: float | None, stack: contextlib.ExitStack
) -> soundfile.SoundFile | SoundStream:
    """See `_opened_anyhow`; the stack closes what is opened.

    Raises:
      soundfile.SoundFileError: if neither libsndfile nor FFmpeg knows the format.
    """
    name: Any = os.fsencode(file) if isinstance(file, str) else file  # it need not be UTF-8
    try:
        sound = stack.enter_context(soundfile.SoundFile(name))
    except soundfile.SoundFileError as error:
        if isinstance(file, str) and not os.path.exists(file):
            raise
        content = stack.enter_context(_opened(file))
        try:
            found = stack.enter_context(open_container(content))
        except UnknownFormat:
            raise error from None
        return SoundStream(_checked(found.samplerate), found.secs, found.blocks)
    _checked(sound.samplerate)
    with contextlib.ExitStack() as opened:
        content = opened.enter_context(_opened(file))
        is_within = end_secs is not None and end_secs * sound.samplerate <= sound.frames
        if parts := _distrusted(sound, content, is_within=is_within):
            stack.enter_context(opened.pop_all())
            return SoundStream(sound.samplerate, None, _decode(sound, parts))
    return sound


def _checked(samplerate: int) -> int:
    if samplerate not in _RATES:
        raise BadSound(f"{samplerate} Hz is no sample rate of speech")
    return samplerate


def _blocks(sound: soundfile.SoundFile) -> Iterator[np.ndarray]:
    size, num_read = _BLOCK_SECS * sound.samplerate, 0
    while len(block := sound.read(size, dtype="float32", always_2d=True)):
        num_read += len(block)
        yield block
    if num_read < sound.frames - DURATION_TOLERANCE_SECS * sound.samplerate:
        secs, stated = (number / sound.samplerate for number in (num_read, sound.frames))
        raise EndMissing(f"its end is missing: it ends after {secs:.2f} s of {stated:.2f} s")


def _distrusted(
    sound: soundfile.SoundFile, file: BinaryFile, *, is_within: bool
) -> list[BinaryFile]:
    """What to decode in place of a file whose header is wrong; empty if it can be trusted.

    Args:
      sound: the file, as libsndfile opens it.
      file: the same file.
      is_within: whether no more is wanted of it than its header states.

    Raises:
      EndMissing: if the end of the file is missing.
    """
    has_length = sound.frames <= _MAX_PER_BYTE * file.seek(0, os.SEEK_END)
    file.seek(0)
    if is_within and has_length:
        return []
    if sound.format == "OGG":
        return _whole_ogg(file, has_length=has_length)
    if sound.format == "MP3":
        return _whole_mp3(file, is_tag_trusted=has_length)
    if sound.format in ("WAV", "WAVEX"):
        return _whole_wav(sound, file)
    if sound.format != "FLAC":  # its decoder finds a missing end itself
        for stated, found in _SIZES.findall(sound.extra_info):
            _check_end(sound, stated=int(stated), found=int(found))
    return [] if has_length else [file]


def _check_end(sound: soundfile.SoundFile, *, stated: int, found: int) -> None:
    """Checks the number of bytes that a header states against those that there are."""
    missing_secs = (stated - found) / max(found, 1) * sound.frames / sound.samplerate
    if stated < _UNKNOWN_SIZE and missing_secs > DURATION_TOLERANCE_SECS:
        raise EndMissing(f"its end is missing: it has {found} of {stated} bytes")


def _whole_ogg(file: BinaryFile, *, has_length: bool) -> list[BinaryFile]:
    """The streams of an ogg file that has several, one after the other."""
    data = file.read()
    last = data.rfind(b"OggS\0")
    header = data[last : last + 27]
    lengths = data[last + 27 : last + 27 + header[-1]]
    is_whole = len(header) == 27 and last + 27 + header[-1] + sum(lengths) <= len(data)
    if not (is_whole and header[5] & 4):
        raise EndMissing("its end is missing: it has no last page, or only a part of it")
    starts = [match.start() for match in _FIRST_PAGE.finditer(data)]
    if len(starts) <= 1:
        return [] if has_length else [file]
    ends = [*starts[1:], len(data)]
    return [io.BytesIO(data[a:b]) for a, b in zip(starts, ends, strict=True)]


def _whole_wav(sound: soundfile.SoundFile, file: BinaryFile) -> list[BinaryFile]:
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
    file.seek(position)
    if not any(any(part) for part in iter(functools.partial(file.read, _BLOCK), b"")):  # padding
        return []
    return [_Patched(file, samples - 4, (size - samples).to_bytes(4, order))]


def _whole_mp3(file: BinaryFile, *, is_tag_trusted: bool) -> list[BinaryFile]:
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
    if not tag:
        return [file]
    flags = int.from_bytes(head[tag.end() : tag.end() + 4], "big")
    at = tag.end() + (8 if flags & 1 else 4)  # the number of frames comes first
    stated = int.from_bytes(head[at : at + 4], "big") if flags & 2 else 0
    # Other tags may follow the samples; a file that is too short is found when it is decoded.
    is_whole = stated and size - start <= 1.01 * stated + _MP3_TAGS
    # A frame of silence without it.
    return [] if is_tag_trusted and is_whole else [_Patched(file, start + tag.start(), bytes(4))]


class _Patched:
    """A binary file of which some bytes are others."""

    def __init__(self, file: BinaryFile, start: int, content: bytes):
        self._file, self._start, self._content = file, start, content
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        place = self._start - self._file.tell()
        data = bytearray(self._file.read(size))
        for i, byte in enumerate(self._content, place):
            if 0 <= i < len(data):
                data[i] = byte
        return bytes(data)


def _decode(sound: soundfile.SoundFile, parts: Sequence[BinaryFile]) -> Iterator[np.ndarray]:
    """All samples of the parts of a file.

    Of mp3, libsndfile reads more than it guessed from the header only if it cannot see the file's
    size.
    """
    kind = (sound.samplerate, sound.channels)
    yield np.zeros((0, sound.channels), np.float32)
    for part in parts:
        part.seek(0)
        source: int | BinaryFile = part
        if sound.format == "MP3":
            source, end = os.pipe()
            threading.Thread(target=_write, args=(end, part), daemon=True).start()
        with _Stream(source) as stream:
            if (other := (stream.samplerate, stream.channels)) != kind:
                kinds = sorted({kind, other})
                raise BadSound(f"it joins streams of different rates and channels: {kinds}")
            size = _BLOCK_SECS * stream.samplerate
            while len(block := stream.read(size, dtype="float32", always_2d=True)):
                yield block


def _write(end: int, file: BinaryFile) -> None:
    with contextlib.suppress(BrokenPipeError), open(end, "wb") as pipe:
        shutil.copyfileobj(file, pipe)


@contextlib.contextmanager
def _opened(file: str | BinaryFile) -> Iterator[BinaryFile]:
    """The file at its start; one that is already open is left where it was."""
    if isinstance(file, str):
        with open(os.fsencode(file), "rb") as opened:
            yield opened
    else:
        position = file.tell()
        file.seek(0)
        yield file
        file.seek(position)
