"""When a cloud, a scheduler or Ctrl-C tells the process to stop: save, and exit with code 0."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from flax_projector import hosts
from flax_projector.data.reader import STOP_SIGNALS

log = logging.getLogger(__name__)

GRACE_SECS = 20.0  # clouds give at least 30 seconds


class Preempted(Exception):
    """The process was asked to stop."""


class PreemptionGuard:
    """Notices a signal to stop at any moment, even while the main thread compiles or loads.

    These are SIGTERM, which clouds send before they take a machine away; SIGINT (Ctrl-C); SIGUSR1,
    SLURM's warning; and SIGHUP, when a terminal is closed. A second Ctrl-C ends the process at
    once. Signals that were ignored from the start stay ignored, as `nohup` wants it.

    Python runs signal handlers only between two bytecodes of the main thread, and a compilation is
    one bytecode that takes minutes. So a separate thread waits for the signal. The main thread
    polls (`check`) wherever it can save, and ends the run. If it does not do so within the grace
    period, it is busy with something that cannot be interrupted. Everything is saved before such
    work begins, so the process only waits for a save in flight, then ends. Before `protect` is
    called there is nothing to save, and the process ends at once.

    On several hosts, JAX's own preemption service handles SIGTERM, and all hosts agree on the poll
    at which they stop: the other signals are passed on to it as SIGTERM. The grace period begins on
    all of them when one has been told to stop.
    """

    def __init__(self) -> None:
        self._requested, self._ended = threading.Event(), threading.Event()
        self._finish: Callable[[], object] | None = None
        self._num_polls, self._checked_at = 0, time.monotonic()

    def protect(self, finish: Callable[[], object], *, stall_mins: float = 0.0) -> None:
        """Declares that there is now a state to save, and that steps begin.

        Args:
          finish: waits for a save in flight.
          stall_mins: ends the run when `check` has not been called for so long; 0 never does.
        """
        self._finish, self._checked_at = finish, time.monotonic()
        if stall_mins:
            threading.Thread(target=self._watch_steps, args=(stall_mins,), daemon=True).start()

    def check(self) -> None:
        """Raises `Preempted` if the run was asked to stop; all hosts must call it equally often."""
        self._checked_at = time.monotonic()
        if jax.process_count() > 1:
            self._num_polls += 1
            is_due = multihost_utils.reached_preemption_sync_point(self._num_polls)
        else:
            is_due = self._requested.is_set()
        if is_due:
            raise Preempted

    @contextlib.contextmanager
    def watching(self) -> Iterator["PreemptionGuard"]:
        """Watches for signals until the block ends; call it in the main thread."""
        is_alone = jax.process_count() == 1
        read_fd, write_fd = os.pipe()
        os.set_blocking(write_fd, False)  # set_wakeup_fd requires it
        old_handlers = {
            number: signal.signal(number, lambda *_: None)
            for number in STOP_SIGNALS
            if signal.getsignal(number) != signal.SIG_IGN and (is_alone or number != signal.SIGTERM)
        }
        old_fd = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        stop = self._stop if is_alone else lambda: os.kill(os.getpid(), signal.SIGTERM)
        hosts.when_told_to_stop(self._stop)
        thread = threading.Thread(target=self._watch, args=(read_fd, stop), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            signal.set_wakeup_fd(old_fd)
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
            os.close(write_fd)  # ends the thread
            thread.join()
            os.close(read_fd)

    def _watch(self, read_fd: int, stop: Callable[[], None]) -> None:
        while byte := os.read(read_fd, 1):
            if byte[0] not in STOP_SIGNALS:
                continue
            if not self._requested.is_set():
                self._requested.set()
                log.info("%s: stopping; Ctrl-C ends at once", signal.Signals(byte[0]).name)
                threading.Thread(target=stop, daemon=True).start()
            elif byte[0] == signal.SIGINT:
                hosts.end_now(128 + signal.SIGINT)  # as shells have it

    def _watch_steps(self, mins: float) -> None:
        while not self._ended.wait(min(1.0, 60 * mins)):
            if time.monotonic() - self._checked_at > 60 * mins:
                hosts.end_all(
                    TimeoutError(
                        f"no step for {mins:g} minutes (--stall-mins); this process is in "
                        f"{_where()}: the same command continues"
                    )
                )
                return

    def _stop(self) -> None:
        if self._finish is not None:
            if self._ended.wait(GRACE_SECS):
                return
            saving = threading.Thread(target=self._finish, daemon=True)
            saving.start()
            # On several hosts, one that saves with this one may be stuck.
            saving.join(None if jax.process_count() == 1 else hosts.SAVE_SECS)
        log.info("start the same command again to continue")
        hosts.leave(0)


def _where() -> str:
    """The function of this project that the main thread is in."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] in ("flax_projector", "convert", "train_tpu"):
            return f"{module}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "another program"
