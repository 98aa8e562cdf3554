"""Manifests with the list of what they leave out, and the processes that write shards."""

import collections
import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from flax_projector.data.bad_rows import BadRow, by_reason, to_line
from flax_projector.files import new_file
from flax_projector.storage import AnyPath

_log = logging.getLogger(__name__)

_WORTH_A_PROCESS = 64 << 20  # bytes


def write_rows(
    path: AnyPath, rows: Iterable[dict[str, Any]], bad: list[BadRow], *, num_rows: int
) -> None:
    """Writes a manifest and, next to it, the list of what was left out, with a line to the log.

    Args:
      path: of the manifest, `NAME.jsonl`; the list is `NAME.bad.jsonl`.
      rows: of the manifest.
      bad: what was left out.
      num_rows: number of rows of both kinds.
    """
    listed = path.with_name(f"{path.stem}.bad.jsonl")
    if bad:
        with new_file(listed) as file:
            file.writelines(to_line("manifest", row).encode() for row in bad)
        _log.warning(
            "%d of %d rows are left out: %s; all of them are in %s",
            len(bad),
            num_rows,
            by_reason(collections.Counter(row.reason for row in bad)),
            listed,
        )
    elif listed.exists():
        listed.unlink()
    with new_file(path) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def in_processes(
    work: Callable[[Any], Any], tasks: Iterable[Any], *, num_bytes: int
) -> Iterator[Any]:
    """The results of tasks in their order, from as many processes as there are CPU cores.

    They end with this one, however it ends.

    Args:
      work: what to do for each task.
      tasks: its arguments, of which only a few are taken ahead.
      num_bytes: how much there is to read. Little is read here, before a process would start.

    Raises:
      OSError: as `work` does, or if a process has ended.
      ValueError: as `work` does.
    """
    num_processes = len(os.sched_getaffinity(0))
    if num_processes <= 1 or num_bytes < _WORTH_A_PROCESS:
        yield from map(work, tasks)
        return
    context = multiprocessing.get_context("spawn")  # JAX and gRPC have threads
    pool = ProcessPoolExecutor(num_processes, context, initializer=_end_with_parent)
    try:
        pending: collections.deque[Future] = collections.deque()
        for task in tasks:
            pending.append(pool.submit(sendable, work, task))
            if len(pending) > 2 * num_processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a process that wrote shards has ended. If the system has killed it for memory, free "
            "some: the same command continues"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def sendable(work: Callable[[Any], Any], task: Any) -> Any:
    """Does the work in a process; errors that users see get through to the one that waits."""
    try:
        return work(task)
    except (OSError, ValueError) as error:  # those of our own take other arguments than a text
        raise (OSError if isinstance(error, OSError) else ValueError)(str(error)) from None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # every process that multiprocessing starts has one

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
