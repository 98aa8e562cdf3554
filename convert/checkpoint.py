"""A checkpoint as conversions see it: headers first, then one tensor at a time."""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import ml_dtypes
import numpy as np
from tqdm import tqdm

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


_Result = TypeVar("_Result")


class TensorInfo(NamedTuple):
    """What a file's header tells about a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors that are read one by one, from a file or made of another checkpoint.

    Attributes:
      infos: shape and dtype of every tensor, in the order in which reading them costs least.
      read: gives one tensor, possibly a view of the file or of another tensor.
      files: that are read, or folders of Orbax; none if the tensors are in memory.
    """

    infos: Mapping[str, TensorInfo]
    read: Callable[[str], np.ndarray]
    files: frozenset[Path] = frozenset()

    @property
    def nbytes(self) -> int:
        """Size of all tensors, in bytes."""
        return sum(info.nbytes for info in self.infos.values())

    def cast(self, dtype: np.dtype) -> "Checkpoint":
        """The same tensors, converted to `dtype` when they are read.

        Reading raises a ValueError if a finite value becomes infinite.
        """
        infos = {name: TensorInfo(info.shape, dtype) for name, info in self.infos.items()}
        return replace(self, infos=infos, read=lambda name: _cast(name, self.read(name), dtype))

    def only(self, names: Collection[str]) -> "Checkpoint":
        """Without the tensors that are not among `names`."""
        return replace(self, infos={n: info for n, info in self.infos.items() if n in names})

    def renamed(self, old_names: Mapping[str, str]) -> "Checkpoint":
        """The tensors under new names: {new: old}."""
        infos = {new: self.infos[old] for new, old in old_names.items()}
        return replace(self, infos=infos, read=lambda name: self.read(old_names[name]))

    def stream(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, tensor in C order) in order; two threads read the next two meanwhile."""
        return map_ahead(lambda name: contiguous(self.read(name)), self.infos)

    @contextlib.contextmanager
    def with_progress(self, label: str) -> Iterator["Checkpoint"]:
        """The same tensors; a bar shows what has been read."""
        with progress_bar(label, self.nbytes) as progress:

            def read(name: str) -> np.ndarray:
                array = self.read(name)
                progress.update(array.nbytes)
                return array

            yield replace(self, read=read)


def map_ahead(
    function: Callable[[str], _Result], names: Iterable[str]
) -> Iterator[tuple[str, _Result]]:
    """Yields (name, function(name)) in order; meanwhile two threads work on the next two.

    Args:
      function: of one name.
      names: of tensors.
    """
    with ThreadPoolExecutor(2) as workers:
        upcoming = deque()
        for name in names:
            upcoming.append((name, workers.submit(function, name)))
            if len(upcoming) > 2:
                first, result = upcoming.popleft()
                yield first, result.result()
        for first, result in upcoming:
            yield first, result.result()


def progress_bar(label: str, num_bytes: int, *, is_quiet: bool = False) -> tqdm:
    """A bar on stderr, if that is a terminal; its `update` takes the bytes that are done.

    Args:
      label: in front of the bar.
      num_bytes: of everything.
      is_quiet: shows nothing, as on every process but the first.
    """
    disable = True if is_quiet else None  # None: tqdm asks whether stderr is a terminal
    return tqdm(total=num_bytes, desc=label, unit="B", unit_scale=True, disable=disable)


def _cast(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # said below; and NaNs stay NaNs
        cast = array.astype(dtype)
    overflows = np.isinf(cast) & np.isfinite(array)
    if overflows.any():
        raise ValueError(
            f"tensor {name} holds {array[overflows][0]:g}, but {dtype} ends at "
            f"{ml_dtypes.finfo(dtype).max:g}: choose another dtype"
        )
    return cast


def in_memory(arrays: Mapping[str, np.ndarray]) -> Checkpoint:
    """Arrays that are there already."""
    infos = {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}
    return Checkpoint(infos, arrays.__getitem__)


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in C order: itself, or a copy."""
    if array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, array.dtype)
    copy_into(out, array)
    return out


def copy_into(out: np.ndarray, array: np.ndarray) -> None:
    """Copies an array into a contiguous one of the same shape and dtype.

    A transposed matrix is copied in strips of a cache line, five times as fast as numpy does it.
    """
    if array.ndim < 2 or array.strides[-1] == array.itemsize:
        np.copyto(out, array, casting="no")
        return
    for start in range(0, array.shape[-1], 16):
        strip = np.s_[..., start : start + 16]
        np.copyto(out[strip], array[strip], casting="no")
