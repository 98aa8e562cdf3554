"""Groups pieces of similar lengths into batches, in bounded memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def in_batches(
    items: Iterable[Item],
    *,
    secs: Callable[[Item], float],
    bounds: Sequence[float],
    sizes: Sequence[int],
    max_waiting: int,
) -> Iterator[tuple[int, list[Item]]]:
    """Groups items by length; a batch is given as soon as it is full.

    Args:
      items: what is to be grouped.
      secs: the length of an item.
      bounds: the longest length of each bucket, ascending; no item is longer than the last.
      sizes: how many items a batch of each bucket holds.
      max_waiting: after so many items, and at the end, those that still wait are given in batches
        of the longest of their buckets: so none waits for long, and few batches are not full.

    Yields:
      The number of a bucket, and at most so many items as its batch holds.
    """
    queues: list[list[Item]] = [[] for _ in bounds]

    def rest() -> Iterator[tuple[int, list[Item]]]:
        used = [number for number, queue in enumerate(queues) if queue]
        waiting = [item for queue in queues for item in queue]
        for queue in queues:
            queue.clear()
        for start in range(0, len(waiting), sizes[used[-1]] if used else 1):
            yield used[-1], waiting[start : start + sizes[used[-1]]]

    for count, item in enumerate(items, 1):
        number = next(i for i, bound in enumerate(bounds) if secs(item) <= bound)
        queues[number].append(item)
        if len(queues[number]) == sizes[number]:
            yield number, queues[number].copy()
            queues[number].clear()
        if count % max_waiting == 0:
            yield from rest()
    yield from rest()
