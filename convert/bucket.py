"""Models in a bucket: small files are copied, weights are read in ranges."""

import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

from convert.checkpoint import TensorInfo, View
from flax_projector.storage import temporary_folder
from flax_projector.storage.urls import filesystem_of

LINK = b"flax-projector reads this file from "
"""How the file begins that stands for one in a bucket, whose URL follows."""

_COPIED = (".json", ".jinja", ".txt", ".model")
_CHUNK_BYTES = 8 << 20
_AT_ONCE = 8
"""How many chunks are fetched at the same time. `fetch` holds as many, or one tensor."""


@functools.cache
def copy_small_files(url: str) -> Path:
    """Makes a local folder of a model in a bucket, which the program can use in place of it.

    Files of weights are only links.

    Raises:
      ValueError: naming the URL, if there is no such folder, or no weights in it that can be read.
    """
    url = url.rstrip("/")
    folder = Path(temporary_folder(), *re.split(r":?/+", url))
    fs, root = filesystem_of(url)
    try:
        found = {PurePosixPath(item["name"]).name: item for item in fs.ls(root, detail=True)}
        files = {name: item["name"] for name, item in found.items() if item["type"] == "file"}
        copied = [name for name in files if name.endswith(_COPIED)]
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            texts = list(threads.map(lambda name: fs.cat_file(files[name]), copied))
    except Exception as error:  # of whatever client
        raise _unreadable(url, error) from error
    weights = [name for name in files if name.endswith(".safetensors")]
    if not weights:
        raise ValueError(
            f"{url} has no .safetensors, only {', '.join(sorted(found)) or 'nothing'}: weights in "
            "other forms are not read from a bucket. Copy the folder to this machine"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(copied, texts, strict=True):
        (folder / name).write_bytes(text)
    for name in weights:
        (folder / name).write_bytes(LINK + f"{url}/{name}".encode())
    return folder


class RemoteFile:
    """A file of safetensors in a bucket.

    Attributes:
      url: of the file.
      header: what it says of its tensors, by name.
    """

    def __init__(self, link: Path):
        """Reads the header.

        Args:
          link: a file that `copy_small_files` has made.

        Raises:
          ValueError: naming the URL, if it cannot be read or is not complete.
        """
        self.url = link.read_bytes().removeprefix(LINK).decode()
        self._fs, self._path = filesystem_of(self.url)
        try:
            size = self._fs.size(self._path)
            length = self._fs.cat_file(self._path, start=0, end=8)
            self._data = 8 + int.from_bytes(length, "little")  # where the tensors begin
            text = self._fs.cat_file(self._path, start=8, end=min(self._data, size))
        except Exception as error:  # of whatever client
            raise _unreadable(self.url, error) from error
        try:
            self.header: dict[str, Any] = json.loads(text)
            self.header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in self.header.values()), default=0)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            end = -1
            del error
        if end != size - self._data:
            raise ValueError(f"{self.url} is not a complete safetensors file: upload it again")

    def fetch(
        self, infos: dict[str, TensorInfo], names: Sequence[str], view: View
    ) -> Iterator[np.ndarray]:
        """Yields a view of each tensor, and reads no more than the range that it lies in.

        Args:
          infos: shape and dtype of every tensor.
          names: of the tensors.
          view: takes a part of a tensor, without looking at its elements.
        """
        spans = {name: self._span(name, infos[name], view) for name in names}
        for group in _groups(names, {name: end - start for name, (start, end, _) in spans.items()}):
            buffers = self._read([spans[name][:2] for name in group])
            for name, buffer in zip(group, buffers, strict=True):
                part = spans[name][2]
                yield np.ndarray(part.shape, part.dtype, buffer, strides=part.strides)

    def _span(self, name: str, info: TensorInfo, view: View) -> tuple[int, int, np.ndarray]:
        """Where a view of a tensor begins and ends in the file, and its shape and strides."""
        strides = np.cumprod([info.dtype.itemsize, *reversed(info.shape[1:])])[::-1]
        nothing = np.zeros(1, info.dtype)  # only addresses are computed, nothing is read
        whole = np.lib.stride_tricks.as_strided(nothing, info.shape, strides[: len(info.shape)])
        part = view(whole)
        start, end = (at - whole.ctypes.data for at in byte_bounds(part)) if part.size else (0, 0)
        first = self._data + self.header[name]["data_offsets"][0]
        return first + start, first + end, part

    def _read(self, spans: Sequence[tuple[int, int]]) -> list[bytearray]:
        """The bytes of ranges of the file, fetched in chunks, several at a time."""
        buffers = [bytearray(end - start) for start, end in spans]
        chunks = [
            (buffer, start, at, min(at + _CHUNK_BYTES, end))
            for buffer, (start, end) in zip(buffers, spans, strict=True)
            for at in range(start, end, _CHUNK_BYTES)
        ]

        def fill(chunk: tuple[bytearray, int, int, int]) -> None:
            buffer, start, at, end = chunk
            found = self._fs.cat_file(self._path, start=at, end=end)
            if len(found) != end - at:
                raise OSError(f"{len(found)} bytes of {end - at} were read")
            buffer[at - start : end - start] = found

        try:
            with ThreadPoolExecutor(_AT_ONCE) as threads:
                list(threads.map(fill, chunks))
        except Exception as error:  # of whatever client
            raise _unreadable(self.url, error) from error
        return buffers


def _groups(names: Iterable[str], sizes: dict[str, int]) -> Iterator[list[str]]:
    """The names in order, in groups of as many bytes as are fetched at once."""
    total = itertools.accumulate(sizes[name] for name in names)
    number = (end // (_AT_ONCE * _CHUNK_BYTES) for end in total)
    for _, group in itertools.groupby(zip(number, names, strict=True), lambda pair: pair[0]):
        yield [name for _, name in group]


def _unreadable(url: str, error: Exception) -> ValueError:
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return ValueError(f"{url} cannot be read: {reason}")
