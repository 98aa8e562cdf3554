"""Orbax's readers, changed so that a leaf that cannot be read leaves no other read running.

Orbax raises the first error at once. The reads that are still running then find their event loop
closed, and each of them prints a traceback.
"""

import asyncio
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers


def make_reader() -> Any:
    """A handler that reads the metadata or the leaves of a tree."""
    registry = type_handlers.create_type_handler_registry(
        (int, type_handlers.ScalarHandler()),
        (float, type_handlers.ScalarHandler()),
        (np.ndarray, _NumpyReader()),
        (jax.Array, _ArrayReader()),
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def reason(error: Exception) -> str:
    """The first line of an error, without the description of the array that tensorstore adds."""
    text = str(error).partition(" [tensorstore_spec=")[0].partition("\n")[0]
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"


class _Settling(type_handlers.TypeHandler):
    """Reads leaf by leaf, and waits for all of them."""

    def metadata(self, infos: Sequence[Any]) -> Any:
        read = super().metadata
        return _Later(lambda: _settle(read([info]) for info in infos))

    async def deserialize(
        self, infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        read = super().deserialize
        args = args or [None] * len(infos)
        pairs = zip(infos, args, strict=True)
        return await _settle(read([info], [arg] if arg else None) for info, arg in pairs)


class _Later:
    """Can be awaited; unlike a coroutine, it does not complain if it never is."""

    def __init__(self, start: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self._start = start

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._start().__await__()


class _NumpyReader(_Settling, type_handlers.NumpyHandler):
    pass


class _ArrayReader(_Settling, type_handlers.ArrayHandler):
    pass


async def _settle(reads: Iterable[Coroutine[Any, Any, Sequence[Any]]]) -> list[Any]:
    """The single result of each read; or, when all have ended, the first error."""
    done: list[Any] = await asyncio.gather(*reads, return_exceptions=True)
    for result in done:
        if isinstance(result, BaseException):
            raise result
    return [one for results in done for one in results]
