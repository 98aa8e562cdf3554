"""What the processes of a run on several hosts tell each other, without their devices.

They use the store of texts that process 0 holds in JAX's coordination service. It works while a
device, a file system or a save hangs. So an error in one process ends all of them, with the cause
as the last line of each, and a process that is waited for is named. A process that runs alone tells
itself.
"""

import collections
import contextlib
import json
import logging
import os
import socket
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jax
from jax._src import distributed  # there is no public form

from flax_projector.logs import printable

log = logging.getLogger(__name__)

USER_ERRORS = (ValueError, FloatingPointError, OSError)
"""Errors whose message says all; others are shown with their traceback."""

SAVE_SECS = 60.0
"""How long a process that was told to stop waits for a save before it ends."""

_WATCH_SECS = 1.0  # between two looks at the news
_ANSWER_SECS = 10.0  # for what every process does within two looks
_UNWIND_SECS = 5.0  # for closing files after an error
_REMIND_SECS = 60.0
_WAIT_SECS = 3600.0  # hosts may read terabytes at different speeds
_LINGER_SECS = 0.5
_MAX_VALUE_LEN = 100

_ERROR, _ROLL = "news/error", "news/roll"
_STOP = "RECEIVED_PREEMPTION_NOTICE"  # JAX's own


class HostsDiffer(ValueError):
    """An error that all processes raise with the same message."""


@dataclass
class _Store:
    """The store, and what this process has to do with it."""

    client: Any
    me: int
    num_processes: int
    hosts: list[str] = field(default_factory=list)
    rounds: collections.Counter = field(default_factory=collections.Counter)
    is_failing: bool = False
    on_stop: Callable[[], None] | None = None
    done: threading.Event = field(default_factory=threading.Event)
    ending: threading.Lock = field(default_factory=threading.Lock)

    def put(self, key: str, text: str = "") -> None:
        """Stores a text, unless the key has one already."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.client.key_value_set(key, text)

    def get(self, key: str) -> str | None:
        try:
            return self.client.key_value_try_get(key)
        except jax.errors.JaxRuntimeError:
            return None

    def numbers(self, folder: str) -> dict[int, str]:
        """The texts of a folder whose keys are the numbers of processes."""
        found = self.client.key_value_dir_get(f"{folder}/")
        return {int(key.rpartition("/")[2]): text for key, text in found}

    def gather(self, folder: str, secs: float) -> dict[int, str]:
        """The texts of all processes, or of those that have come in time."""
        end, pause = time.monotonic() + secs, 0.005
        while True:
            found = self.numbers(folder)
            if len(found) == self.num_processes or time.monotonic() > end:
                return found
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def name(self, process: int) -> str:
        return f"process {process}" + (f" on {self.hosts[process]}" if self.hosts else "")

    def missing(self, found: Mapping[int, str]) -> str:
        return some([self.name(i) for i in range(self.num_processes) if i not in found])


_store: _Store | None = None


def connect() -> None:
    """Makes this process one of several; call it once JAX has connected them."""
    global _store
    state = distributed.global_state
    _store = _Store(state.client, state.process_id, state.num_processes)
    _store.hosts = exchange("host", socket.gethostname())
    threading.Thread(target=_watch, args=(_store,), name="hosts", daemon=True).start()


def exchange(name: str, text: str, *, timeout_secs: float = _WAIT_SECS) -> list[str]:
    """Waits for the texts of all processes; all must call it, in the same order.

    Args:
      name: of what is exchanged, for messages.
      text: of this process.
      timeout_secs: how long to wait for the others.

    Returns:
      The texts, by the numbers of the processes.

    Raises:
      ValueError: naming the processes that are missing.
    """
    if (store := _store) is None:
        return [text]
    store.rounds[name] += 1
    number = store.rounds[name]
    store.client.key_value_set(f"{name}/{number}/{store.me}", text)
    began = time.monotonic()
    while (waited := time.monotonic() - began) < timeout_secs:
        limit = min(_REMIND_SECS, timeout_secs - waited)
        found = store.gather(f"{name}/{number}", limit)
        if len(found) == store.num_processes:
            if number > 1:  # which everyone has read by now
                store.client.key_value_delete(f"{name}/{number - 1}/{store.me}")
            return [found[i] for i in range(store.num_processes)]
        if limit == _REMIND_SECS:
            log.warning("waiting for %s: %s", store.missing(found), name)
    raise ValueError(
        f"{store.missing(found)} did not come to the exchange of {name!r} in {timeout_secs:g} s"
    )


def broadcast(name: str, text: str) -> str:
    """The text of process 0, on all processes; see `exchange`."""
    return exchange(name, text)[0]


def agree(values: Mapping[str, str]) -> None:
    """Compares values by name between the processes; all must call it.

    Raises:
      HostsDiffer: on all of them, with the names, the values and the processes that have them.
    """
    everywhere = [json.loads(text) for text in exchange("agreement", json.dumps(values))]
    problems = []
    for name in dict.fromkeys(name for each in everywhere for name in each):
        processes = collections.defaultdict(list)
        for process, each in enumerate(everywhere):
            processes[each.get(name, "nothing")].append(process)
        if len(processes) > 1 and _store is not None:
            parts = [
                f"{textwrap.shorten(value, _MAX_VALUE_LEN)} ({some([_store.name(i) for i in who])})"
                for value, who in processes.items()
            ]
            problems.append(f"{name}: {' but '.join(parts)}")
    if problems:
        raise HostsDiffer(
            "the hosts of this run differ: start the same command, with the same versions and the "
            "same files, on all of them\n  " + "\n  ".join(problems)
        )


def some(names: list[str]) -> str:
    """The first of many names."""
    shown = names[:8]
    rest = len(names) - len(shown)
    return ", ".join(shown) + f" and {rest} more" * (rest > 0) if names else "none"


# --- how processes end ------------------------------------------------------------------------


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Tells the other processes at once of an error in the block, before anything is closed."""
    try:
        yield
    except BaseException as error:
        if (store := _store) is not None:
            store.is_failing = True
            if not isinstance(error, USER_ERRORS):
                traceback.print_exception(error)
            store.put(_ERROR, _cause(store, error))
        raise


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends all processes with code 1 after an error in the block, or else waits for all of them.

    There is no short limit for those that end well, which may still be writing.
    """
    try:
        with telling():
            yield
            exchange("end", "")
    finally:
        if (store := _store) is not None and store.get(_ERROR) is not None:
            _end(store)
    disconnect()


def end_all(error: Exception) -> None:
    """Ends this process and all others with an error, whatever their main threads are doing."""
    if _store is None:
        end_now(1, printable(f"error: {error}\n", keep="\n"))
    log.error("%s", error)  # of each process, though only the first one becomes the cause
    with contextlib.suppress(type(error)), telling():
        raise error


def disconnect() -> None:
    """Makes this process one that is alone."""
    global _store
    if _store is not None:
        _store.done.set()
        _store = None


def leave(code: int) -> NoReturn:
    """Ends this process at once; process 0, which holds the store, waits until others have left."""
    if (store := _store) is not None:
        store.ending.acquire()  # never released: only one thread ends the process
        _wait_for_others(store, SAVE_SECS + _ANSWER_SECS)
    end_now(code)


def end_now(code: int, last_line: str = "") -> NoReturn:
    """Ends this process without waiting for anything."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, last_line)):
        with contextlib.suppress(OSError):  # the terminal may be gone
            stream.write(text)
            stream.flush()
    os._exit(code)


def when_told_to_stop(act: Callable[[], None] | None) -> None:
    """Calls a function, in another thread, when a signal has told one of the processes to stop."""
    if _store is not None:
        _store.on_stop = act


def _watch(store: _Store) -> None:
    """Looks for news, in a thread of its own, as long as the run lasts."""
    has_answered = False
    while not store.done.wait(_WATCH_SECS):
        try:
            news = dict(store.client.key_value_dir_get("news/"))
        except jax.errors.JaxRuntimeError:
            continue  # process 0 is gone: JAX ends this one
        if _ROLL in news and not has_answered:
            store.put(f"here/{store.me}")
            has_answered = True
        if _ERROR in news:
            if store.is_failing:  # the main thread closes what it can
                time.sleep(_UNWIND_SECS)
            _end(store)
        if store.on_stop is not None and store.get(_STOP) is not None:
            threading.Thread(target=store.on_stop, daemon=True).start()
            store.on_stop = None


def _cause(store: _Store, error: BaseException) -> str:
    """What the others are told of an error."""
    if isinstance(error, HostsDiffer):
        return str(error)
    kind = "" if isinstance(error, USER_ERRORS) else f"{type(error).__name__}: "
    if isinstance(error, jax.errors.JaxRuntimeError):  # maybe since another process has ended
        store.put(_ROLL)
        store.put(f"here/{store.me}")
        found = store.gather("here", _ANSWER_SECS)
        if len(found) < store.num_processes:
            return f"{store.missing(found)} has ended or does not answer ({kind}{error})"
    return f"{store.name(store.me)}: {kind}{error}"


def _end(store: _Store) -> NoReturn:
    """Ends this process with the cause as its last line."""
    store.ending.acquire()
    cause = store.get(_ERROR)
    _wait_for_others(store, _ANSWER_SECS)
    end_now(1, printable(f"error: {cause}\n", keep="\n"))


def _wait_for_others(store: _Store, secs: float) -> None:
    """Says that this process ends; process 0 must be the last."""
    store.put(f"gone/{store.me}")
    if store.me == 0:
        store.gather("gone", secs)
        time.sleep(_LINGER_SECS)
