"""Shards: tars in WebDataset's layout, `key.flac` beside `key.txt` or `key.json`."""

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from flax_projector.data.audio import BadAudio, Problem

AUDIO_SUFFIXES = ("flac", "wav", "mp3", "ogg", "oga", "opus", "aif", "aiff", "au", "w64")
"""Members with these suffixes are clips."""

# First bytes of a clip, and its suffix.
_FORMATS = (
    (rb"fLaC", "flac"),
    (rb"RIFF|RF64|RIFX", "wav"),
    (rb"OggS", "ogg"),
    (rb"FORM", "aiff"),
    (rb"\.snd", "au"),
    (rb"ID3|\xff[\xe0-\xff]", "mp3"),
)
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Member:
    """A file in a shard.

    Attributes:
      name: its path in the shard.
      start: where its content begins in the shard, in bytes.
      content: its bytes; empty if they were not asked for.
    """

    name: str
    start: int
    content: bytes


def read_members(shard: Any, suffixes: set[str]) -> Iterator[Member]:
    """Reads a shard once from its start to its end.

    Args:
      shard: an open file; those of fsspec are no `typing.BinaryIO`.
      suffixes: of the members to read; others are only named.

    Raises:
      BadAudio: after the last member that could be read, if there should be more: the shard is cut
        or damaged, or no tar.
    """
    try:
        tar = tarfile.open(fileobj=shard, mode="r:")  # noqa: SIM115  the shard is not ours
    except tarfile.TarError as error:
        text = f"it is no tar, or a compressed one, which must be unpacked ({error})"
        raise BadAudio(Problem.UNDECODABLE, text) from error
    try:
        while (info := tar.next()) is not None:
            tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  it keeps them all
            if info.isreg():
                wanted = info.name.rpartition(".")[2].lower() in suffixes
                content = tar.extractfile(info) if wanted else None
                yield Member(info.name, info.offset_data, content.read() if content else b"")
    except (tarfile.TarError, ValueError) as error:
        text = f"it breaks off at byte {tar.offset}: {error}"
        raise BadAudio(Problem.INCOMPLETE, text) from error
    # `tarfile` takes a damaged header, or none, for the end.
    shard.seek(tar.offset)
    if shard.read(_BLOCK) != bytes(_BLOCK):
        text = f"it breaks off at byte {tar.offset}: the end of a tar is not there"
        raise BadAudio(Problem.INCOMPLETE, text)


def suffix_of(content: bytes) -> str:
    """The suffix of a clip, by its first bytes; empty if they are of no format that we know."""
    return next((suffix for start, suffix in _FORMATS if re.match(start, content)), "")


class ShardWriter:
    """Writes a shard whose bytes depend on nothing but its members."""

    def __init__(self, file: BinaryIO):
        """Begins it in an open file, which has to be closed after it."""
        self._tar = tarfile.TarFile(fileobj=file, mode="w", format=tarfile.GNU_FORMAT)

    def add(self, name: str, content: bytes) -> int:
        """Appends a member, and returns where its content begins."""
        info = tarfile.TarInfo(name)  # without a time, an owner or other traces of this machine
        info.size, info.mode = len(content), 0o644
        start = self._tar.offset + len(info.tobuf(self._tar.format))
        self._tar.addfile(info, io.BytesIO(content))
        return start

    def close(self) -> None:
        """Writes the end of the shard."""
        self._tar.close()
