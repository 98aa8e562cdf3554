"""Keys of 16 bytes, looked up among millions without a Python object for each.

An array of keys is u64[2, N]: the first halves of all keys, then the second halves.
"""

import numpy as np


def sort_order(keys: np.ndarray, rank: np.ndarray | None = None) -> np.ndarray:
    """The order in which keys are looked up: ascending; equal ones by their rank."""
    return np.lexsort((keys[1], keys[0]) if rank is None else (rank, keys[1], keys[0]))


def find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Positions of the wanted keys in a sorted array; of equal keys the first, -1 if there is none.

    Args:
      keys: u64[2, N], in the order of `sort_order`.
      wanted: u64[2, M], in any order.
    """
    found = np.full(wanted.shape[1], -1)
    order = np.argsort(wanted[0])  # neighbours are found near each other: ten times as fast
    at = np.empty(len(order), np.int64)
    at[order] = np.searchsorted(keys[0], wanted[0, order])
    left = np.arange(len(at))
    while len(left):  # once, unless different keys begin with the same half
        left = left[at[left] < keys.shape[1]]
        left = left[keys[0, at[left]] == wanted[0, left]]
        is_it = keys[1, at[left]] == wanted[1, left]
        found[left[is_it]] = at[left[is_it]]
        left = left[~is_it]
        at[left] += 1
    return found
