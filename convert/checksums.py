"""Checksums of the leaves in a Flax folder, which Orbax does not keep for large leaves."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from convert.checkpoint import Checkpoint, contiguous
from flax_projector.file_types import recognise
from flax_projector.files import parse_json

_FILE = "checksums.json"


def crc32(array: np.ndarray) -> int:
    """CRC-32 of the bytes in C order."""
    return zlib.crc32(contiguous(array).reshape(-1).view(np.uint8).data)


def checksum(array: np.ndarray) -> str:
    """`crc32`, as it is written: in hexadecimal."""
    return f"{crc32(array):08x}"


def write_checksums(params: Path, sums: Mapping[str, str]) -> None:
    """Writes the checksum of every leaf beside the leaves.

    Args:
      params: the folder of the leaves.
      sums: by flax path.
    """
    text = json.dumps(dict(sorted(sums.items())), indent=2) + "\n"
    (params / _FILE).write_text(text, "utf-8")


def read_checksums(params: Path) -> dict[str, str]:
    """The checksum of every leaf, by flax path; empty if an earlier version wrote the folder.

    Raises:
      ValueError: if the file is damaged.
    """
    file = params / _FILE
    if not file.is_file():
        return {}
    try:
        sums = parse_json(file.read_text("utf-8"))
        if not isinstance(sums, dict) or not sums:
            raise ValueError("expected an object with a checksum for each leaf")
    except ValueError as error:
        raise ValueError(f"{file} {recognise(file) or f'is damaged: {error}'}") from error
    return sums


def check_sum(params: Path, sums: Mapping[str, str], leaf: str, array: np.ndarray) -> None:
    """Checks one leaf.

    Args:
      params: the folder of the leaves.
      sums: what `read_checksums` returned.
      leaf: flax path.
      array: what was read.

    Raises:
      ValueError: if it is not what was written.
    """
    if sums and sums.get(leaf) != (found := checksum(array)):
        raise ValueError(
            f"{params} is damaged: the checksum of {leaf} is {found}, but {_FILE} says "
            f"{sums.get(leaf)}. Copy the folder again, or convert again"
        )


def with_checks(checkpoint: Checkpoint, params: Path) -> Checkpoint:
    """The same leaves, which are checked when they are read.

    Args:
      checkpoint: every leaf by flax path.
      params: the folder of the leaves.

    Raises:
      ValueError: if the checksums are damaged.
    """
    sums = read_checksums(params)

    def read(leaf: str) -> np.ndarray:
        array = checkpoint.read(leaf)
        check_sum(params, sums, leaf, array)
        return array

    return replace(checkpoint, read=read)
