"""Arrays that worker processes share."""

import functools
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flax_projector.files import writing
from flax_projector.storage import temporary_folder

_folder = functools.cache(temporary_folder)


class SharedArrays(Mapping[str, np.ndarray]):
    """Arrays by name; pickled as the path of files that other processes map into their memory."""

    def __init__(self, **arrays: np.ndarray):
        """Takes arrays, which nobody may change any more."""
        self._arrays = arrays
        self._path: Path | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        if self._path is None:
            path = _folder() / uuid.uuid4().hex
            with writing(path):
                path.mkdir()
                for name, array in self._arrays.items():
                    np.save(path / f"{name}.npy", array)
            self._path = path
        return _load, (self._path, list(self._arrays))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _load(path: Path, names: list[str]) -> SharedArrays:
    return SharedArrays(**{name: np.load(path / f"{name}.npy", mmap_mode="r") for name in names})
