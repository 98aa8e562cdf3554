"""Reads batches ahead, in threads or in processes with threads; resumable by batch number."""

import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from multiprocessing import resource_tracker
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from flax_projector.batch import Batch
from flax_projector.data.bad_rows import BadRowLog
from flax_projector.data.batches import Batches, LocalBatch

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""What tells a run to stop. Terminals and schedulers send them to its worker processes as well,
which must go on until the run has saved: they ignore them, and end with the run."""


def state_at(number: int) -> dict[str, Any]:
    """The state of a `BatchIterator` whose first batch is this one: it has read none before."""
    return {"next_batch": number, "data": None}


class BatchIterator:
    """Batches in order, read ahead by Grain.

    Its state is the number of the next batch. That does not depend on who reads: a run may continue
    with a different number of threads, workers or hosts.
    """

    def __init__(self, batches: Batches, *, num_threads: int, num_workers: int = 0):
        """Reads nothing yet.

        Args:
          batches: the batches to read.
          num_threads: number of threads in each process that reads.
          num_workers: number of worker processes that read; with 0, this process reads.
        """
        self._batches, self._next, self._grain = batches, 0, None
        self._num_threads, self._num_workers = num_threads, num_workers

    def _start(self) -> grain.DatasetIterator:
        ahead = max(2, 2 * self._num_threads)
        options = grain.ReadOptions(num_threads=self._num_threads, prefetch_buffer_size=ahead)
        batches = grain.MapDataset.source(self._batches)[self._next :].to_iter_dataset(options)
        if self._num_workers:
            if not flags.FLAGS.is_parsed():  # Grain reads them to set up its workers
                flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(
                num_workers=self._num_workers, per_worker_buffer_size=2
            )
            batches = batches.mp_prefetch(workers, worker_init_fn=_end_with_parent)
        return iter(batches)

    def __iter__(self) -> Iterator[LocalBatch]:
        return self

    def __next__(self) -> LocalBatch:
        if self._next >= len(self._batches):
            raise StopIteration
        batch = self._read()
        self._next += 1
        if self._num_workers:  # out of shared memory, which is freed only with the last array in it
            batch = batch._replace(batch=jax.tree.map(np.array, batch.batch))
        return batch

    def _read(self) -> LocalBatch:
        try:
            if self._grain is not None:
                return next(self._grain)
            with _for_workers() if self._num_workers else contextlib.nullcontext():
                self._grain = self._start()
                return next(self._grain)
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            raise ChildProcessError(
                f"a process of --data.num-workers {self._num_workers} has ended ({error}). If the "
                "system has killed it for memory, lower their number: the same command continues"
            ) from error

    def get_state(self) -> dict[str, Any]:
        """JSON from which `set_state` continues."""
        return {"next_batch": self._next, "data": self._batches.fingerprint}

    def set_state(self, state: Mapping[str, Any], *, has_moved: bool = False) -> None:
        """Continues where another iterator stopped; warns if that one read different batches.

        Args:
          state: of the other one.
          has_moved: whether the data is named by another path: then it must be the same, since
            nobody can tell repaired rows from another set.

        Raises:
          ValueError: if it has moved and is not the same.
        """
        if state["data"] not in (None, self._batches.fingerprint):
            if has_moved:
                raise ValueError(
                    f"--data.{self._batches.name} names other rows than those that the run is "
                    "trained on: name the same data, under any path, or choose another --out"
                )
            log.warning(
                "%s: the rows are not those that the run began with: batches from %d on are not "
                "what they would have been",
                self._batches.name,
                state["next_batch"],
            )
        self.close()
        self._next = state["next_batch"]

    def close(self) -> None:
        """Stops the threads and processes; reading the next batch would start them again."""
        if self._grain is not None:
            self._grain.close()
            self._grain = None
            if self._num_workers:
                gc.collect()  # arrays in shared memory, in circles


@contextlib.contextmanager
def _for_workers() -> Iterator[None]:
    """In the block, processes may be started that are not to end by `STOP_SIGNALS`.

    They do not see them until they are ready to ignore them. Meanwhile other threads of this
    process handle them.
    """
    # When this process ends at once, the tracker removes what the workers shared, and would say so.
    if (ignored := "ignore:resource_tracker") not in sys.warnoptions:
        sys.warnoptions.append(ignored)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # Python's own process; this unblocks some of them
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(_index: int, _count: int) -> None:
    """Ends this worker when the main process is gone, and only then.

    Even after SIGKILL, where Grain would leave it. Until then it ignores `STOP_SIGNALS`.

    Linux's PR_SET_PDEATHSIG cannot be used: it sends its signal when the thread that started the
    worker ends, and that is one of Grain's.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None  # every process that multiprocessing starts has one
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def read_batch(iterator: BatchIterator, batches: Batches, bad_rows: BadRowLog) -> Batch:
    """Reads the next global batch onto the devices; lists those of its clips that cannot be used.

    Raises:
      StopIteration: after the last batch.
      ValueError: if too many clips have turned out to be unusable; see `BadRowLog.add`.
    """
    local = next(iterator)
    bad_rows.add(batches.name, local.bad)
    return batches.to_global(local.batch)
