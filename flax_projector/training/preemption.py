"""On SIGTERM, which clouds send before they take a machine away: save, and exit with code 0."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)

GRACE_SECS = 20.0  # clouds give at least 30 seconds


class Preempted(Exception):
    """The process was asked to stop."""


class PreemptionGuard:
    """Notices SIGTERM at any moment, even while the main thread compiles or loads.

    Python runs signal handlers only between two bytecodes of the main thread, and a compilation is
    one bytecode that takes minutes. So a separate thread waits for the signal. The main thread
    polls (`check`) wherever it can save, and ends the run. If it does not do so within the grace
    period, it is busy with something that cannot be interrupted. Everything is saved before such
    work begins, so the thread only waits for a save in flight, then ends the process. Before
    `protect` is called there is nothing to save, and the thread ends the process at once.

    On several hosts, JAX's own preemption service handles SIGTERM, and all hosts agree on the poll
    at which they stop. No host ends by itself during work that cannot be interrupted.
    """

    def __init__(self) -> None:
        self._requested, self._ended = threading.Event(), threading.Event()
        self._finish: Callable[[], object] | None = None
        self._num_polls = 0

    def protect(self, finish: Callable[[], object]) -> None:
        """Declares that there is now a state to save; `finish` waits for a save in flight."""
        self._finish = finish

    def check(self) -> None:
        """Raises `Preempted` if the run was asked to stop; all hosts must call it equally often."""
        if jax.process_count() > 1:
            self._num_polls += 1
            is_due = multihost_utils.reached_preemption_sync_point(self._num_polls)
        else:
            is_due = self._requested.is_set()
        if is_due:
            raise Preempted

    @contextlib.contextmanager
    def watching(self) -> Iterator["PreemptionGuard"]:
        """Watches for the signal until the block ends; call it in the main thread."""
        if jax.process_count() > 1:
            yield self
            return
        read_fd, write_fd = os.pipe()
        os.set_blocking(write_fd, False)  # set_wakeup_fd requires it
        old_handler = signal.signal(signal.SIGTERM, lambda *_: None)
        old_fd = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._watch, args=(read_fd,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            signal.set_wakeup_fd(old_fd)
            signal.signal(signal.SIGTERM, old_handler)
            os.close(write_fd)  # ends the thread
            thread.join()
            os.close(read_fd)

    def _watch(self, read_fd: int) -> None:
        while (byte := os.read(read_fd, 1)) != bytes([signal.SIGTERM]):
            if not byte:
                return
        self._requested.set()
        log.info("SIGTERM: stopping")
        if self._finish is not None:
            if self._ended.wait(GRACE_SECS):
                return
            self._finish()
        log.info("start the same command again to continue")
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(0)
