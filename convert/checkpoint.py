"""A checkpoint as conversions see it: all headers first, then one tensor at a time."""

import contextlib
import logging
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import ml_dtypes
import numpy as np

from flax_projector.logs import progress_bar

_log = logging.getLogger(__name__)

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

CASTABLE = (*DTYPES.values(), np.dtype(np.float64))
"""What `cast` casts. Integers and float8 are useless without their scales, which are elsewhere, and
complex numbers without their imaginary part."""

View = Callable[[np.ndarray], np.ndarray]
"""Takes a part of a tensor, or moves its axes, without looking at its elements."""

_Result = TypeVar("_Result")


class TensorInfo(NamedTuple):
    """Shape and dtype of a tensor, as the header of its file states them."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors that are read one at a time, from files or from another checkpoint.

    Attributes:
      infos: shape and dtype of every tensor, in the order that is cheapest to read.
      read: returns one tensor, possibly a view of the file or of another tensor.
      files: the files or Orbax folders that are read; empty if the tensors are in memory.
      fetch: yields views of several tensors, if they are in a bucket; see `views`.
    """

    infos: Mapping[str, TensorInfo]
    read: Callable[[str], np.ndarray]
    files: frozenset[Path] = frozenset()
    fetch: Callable[[Sequence[str], View], Iterator[np.ndarray]] | None = None

    @property
    def nbytes(self) -> int:
        """Size of all tensors together, in bytes."""
        return sum(info.nbytes for info in self.infos.values())

    def views(self, names: Sequence[str], view: View) -> Iterator[np.ndarray]:
        """Yields the same view of several tensors; of files, only what lies in it is read."""
        if self.fetch is not None:
            return self.fetch(names, view)
        return (view(self.read(name)) for name in names)

    def cast(self, dtype: np.dtype) -> "Checkpoint":
        """The same tensors, converted to `dtype` when they are read, if they are `CASTABLE`.

        Reading raises a ValueError if a finite value becomes infinite.
        """
        infos = {
            name: TensorInfo(info.shape, dtype) if info.dtype in CASTABLE else info
            for name, info in self.infos.items()
        }
        return replace(
            self,
            infos=infos,
            read=lambda name: _cast(name, self.read(name), infos[name].dtype),
            fetch=None,
        )

    def only(self, names: Collection[str]) -> "Checkpoint":
        """Only the tensors with these names."""
        return replace(self, infos={n: info for n, info in self.infos.items() if n in names})

    def renamed(self, old_names: Mapping[str, str]) -> "Checkpoint":
        """The same tensors under new names: {new: old}."""
        infos = {new: self.infos[old] for new, old in old_names.items()}

        def fetch(names: Sequence[str], view: View) -> Iterator[np.ndarray]:
            return self.views([old_names[name] for name in names], view)

        return replace(
            self,
            infos=infos,
            read=lambda name: self.read(old_names[name]),
            fetch=fetch if self.fetch else None,
        )

    def stream(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, tensor in C order) in order, while two threads read the next two."""
        return map_ahead(lambda name: contiguous(self.read(name)), self.infos)

    @contextlib.contextmanager
    def with_progress(self, label: str) -> Iterator["Checkpoint"]:
        """The same tensors; a progress bar shows how much of them has been read."""
        size = self.nbytes
        with progress_bar(_log, label, total=size, unit="B", unit_scale=True) as progress:

            def read(name: str) -> np.ndarray:
                array = self.read(name)
                progress.update(array.nbytes)
                return array

            yield replace(self, read=read, fetch=None)


def map_ahead(
    function: Callable[[str], _Result], names: Iterable[str]
) -> Iterator[tuple[str, _Result]]:
    """Yields (name, function(name)) in order, while two threads work on the next two."""
    with ThreadPoolExecutor(2) as workers:
        upcoming = deque()
        for name in names:
            upcoming.append((name, workers.submit(function, name)))
            if len(upcoming) > 2:
                first, result = upcoming.popleft()
                yield first, result.result()
        for first, result in upcoming:
            yield first, result.result()


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # reported below; NaNs stay NaNs
        cast = array.astype(dtype)
    overflows = np.isinf(cast) & np.isfinite(array)
    if overflows.any():
        raise ValueError(
            f"tensor {name} holds {array[overflows][0]:g}, but the largest {dtype} is "
            f"{ml_dtypes.finfo(dtype).max:g}: choose another dtype"
        )
    return cast


def in_memory(arrays: Mapping[str, np.ndarray]) -> Checkpoint:
    """A checkpoint of arrays that are in memory already."""
    infos = {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}
    return Checkpoint(infos, arrays.__getitem__)


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array itself if it is in C order, otherwise a copy that is."""
    if array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, array.dtype)
    copy_into(out, array)
    return out


def copy_into(out: np.ndarray, array: np.ndarray) -> None:
    """Copies an array into a contiguous one of the same shape and dtype.

    A transposed matrix is copied in strips as wide as a cache line, which is five times as fast as
    numpy's own copy.
    """
    if array.ndim < 2 or array.strides[-1] == array.itemsize:
        np.copyto(out, array, casting="no")
        return
    for start in range(0, array.shape[-1], 16):
        strip = np.s_[..., start : start + 16]
        np.copyto(out[strip], array[strip], casting="no")
