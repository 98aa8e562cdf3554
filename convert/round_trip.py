"""Compares tensors byte for byte, and with them what was converted with what came back."""

import numpy as np

from convert.checkpoint import Checkpoint, contiguous, map_ahead
from convert.errors import Problem, raise_any

_BLOCK_BYTES = 16 << 20
"""Tensors are compared in blocks that fit into the cache and reuse the same memory."""


def check_round_trip(before: Checkpoint, after: Checkpoint) -> None:
    """Checks that converting a checkpoint and converting it back gave the same bytes.

    This proves that nothing was lost, not that every tensor went to the right place: comparing
    forward passes proves that.

    Raises:
      ConversionError: naming every tensor that is missing, new or different.
    """
    problems = [
        Problem("missing", name, "did not come back")
        for name in before.infos.keys() - after.infos.keys()
    ]
    comparable = []
    for name, info in after.infos.items():
        original = before.infos.get(name)
        if original is None:
            problems.append(Problem("new", name, "was not there before"))
        elif info != original:
            change = f"{original.dtype}{list(original.shape)} -> {info.dtype}{list(info.shape)}"
            problems.append(Problem("header", name, change))
        else:
            comparable.append(name)

    def came_back(name: str) -> bool:
        return is_same(after.read(name), before.read(name))

    problems += [
        Problem("bytes", name, "came back with other values")
        for name, is_equal in map_ahead(came_back, comparable)
        if not is_equal
    ]
    raise_any("the round trip changed the checkpoint: the result is discarded", problems)


def is_same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether dtype, shape and every byte are equal, even of NaNs and signed zeros."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if a.ndim == 0 or a.size == 0:
        return _bytes(a).tobytes() == _bytes(b).tobytes()
    num_rows = max(1, _BLOCK_BYTES * len(a) // a.nbytes)
    blocks = (slice(start, start + num_rows) for start in range(0, len(a), num_rows))
    return all(np.array_equal(_bytes(a[block]), _bytes(b[block])) for block in blocks)


def _bytes(array: np.ndarray) -> np.ndarray:
    widest = np.uint64 if array.nbytes % 8 == 0 else np.uint8  # eight at a time is faster
    return contiguous(array).reshape(-1).view(np.uint8).view(widest)
