"""Logging, progress bars, and texts of users on terminals."""

import contextlib
import functools
import io
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

_LOGGERS = ("flax_projector", "convert", "train")
# Orbax raises an error once, and logs it once more by absl, with all its causes; asyncio then logs
# those of every other write that failed.
_REPEATING = ("absl", "asyncio")
_LINE_EVERY_SECS = 30.0
# Control characters, line ends, what turns the direction of a line, and lone surrogates.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, keep: str = "") -> str:
    """A text of a user in one line: what a terminal would obey or cannot show is escaped.

    File names may hold any bytes; those that are not UTF-8 are lone surrogates in Python, which no
    encoding takes.

    Args:
      text: a name, a transcript, or a message that contains some.
      keep: control characters to leave as they are.
    """

    def escape(match: re.Match[str]) -> str:
        char = match[0]
        return char if char in keep else char.encode("unicode_escape").decode("ascii")

    return _UNPRINTABLE.sub(escape, text)


class _Formatter(logging.Formatter):
    """Messages contain names of files; some have several lines.

    Attributes:
      process: the number of this process, if there are several.
      step: the last step that it has begun.
    """

    process: int | None = None
    step: int | None = None

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")

    def formatMessage(self, record: logging.LogRecord) -> str:
        if self.process is not None:
            step = "" if self.step is None else f" step {self.step}"
            record.message = f"[{self.process}{step}] {record.message}"
        return super().formatMessage(record)


def setup_logging(format: str = "%(asctime)s %(message)s") -> None:
    """Shows this project's messages, and only warnings from other libraries."""
    # force: absl, which Orbax imports, has already installed its own handler.
    logging.basicConfig(level=logging.WARNING, force=True)
    logging.root.handlers[0].setFormatter(_Formatter(format, datefmt="%H:%M:%S"))
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    for name in _REPEATING:
        logging.getLogger(name).addFilter(_has_no_traceback)
    threading.excepthook = _ignore_os_errors
    sys.unraisablehook = _ignore_closed_loops


@contextlib.contextmanager
def raised_only() -> Iterator[None]:
    """Inside the block of a library function, Orbax does not log the errors that it raises."""
    loggers = [logging.getLogger(name) for name in _REPEATING]
    own_filter = functools.partial(_has_no_traceback)  # the program may have this filter already
    for logger in loggers:
        logger.addFilter(own_filter)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(own_filter)


def _has_no_traceback(record: logging.LogRecord) -> bool:
    """Leaves out errors that are logged with all their causes."""
    return not record.exc_info


def _ignore_os_errors(args: threading.ExceptHookArgs) -> None:
    """Is silent about a full disk in TensorBoard's thread, which the main thread raises as well."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def _ignore_closed_loops(args: Any) -> None:
    """Is silent about the writes that are still in flight when Orbax has failed to save."""
    if "Event loop is closed" not in str(args.exc_value):
        sys.__unraisablehook__(args)


def start_in_utf8() -> None:
    """Starts the program anew in Python's UTF-8 mode, if the locale's file names are in ASCII.

    Without it, no file could be opened whose name has other characters, and texts could not be
    printed. Where standard output is in ASCII all the same, it escapes them.
    """
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode:
        os.execve(sys.executable, sys.orig_argv, os.environ | {"PYTHONUTF8": "1"})
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def one_of_several(process: int) -> None:
    """Gives every line the number of this process, and lets only process 0 show progress.

    The other processes only log warnings.
    """
    _Formatter.process = process
    if process > 0:
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)


def at_step(step: int | None) -> None:
    """Gives the lines of several processes the number of a step; None before the first one."""
    _Formatter.step = step


def is_terminal() -> bool:
    """Whether stderr is a terminal: bars are drawn only there."""
    return sys.stderr.isatty()


@contextlib.contextmanager
def lines_above_bars() -> Iterator[None]:
    """Inside the block, log lines on a terminal appear above the progress bars, not among them."""
    with logging_redirect_tqdm() if is_terminal() else contextlib.nullcontext():
        yield


def write_above_bars(text: str) -> None:
    """Writes to standard output at once; on a terminal, progress bars stay below it."""
    tqdm.write(text, end="")
    sys.stdout.flush()


def progress_bar(log: logging.Logger, label: str, *, total: int | None, **options: Any) -> tqdm:
    """Shows progress: as a bar on a terminal, as plain log lines elsewhere.

    Args:
      log: the caller's logger; nothing is shown if it is not enabled for INFO.
      label: text in front of the bar.
      total: number of units of work; None if unknown.
      options: passed on to `tqdm`.

    Returns:
      A bar; its `update` takes the number of units done since the last call. Where there is no
      terminal, it writes a line every half minute, and one at the end if it has written any.
    """
    label = printable(label)
    is_quiet = not log.isEnabledFor(logging.INFO)
    if is_terminal() or is_quiet:
        return tqdm(total=total, desc=label, disable=is_quiet, **options)
    return _Lines(log, total=total, desc=label, **options)


class _Lines(tqdm):
    """A progress bar that writes log lines instead of drawing."""

    monitor_interval = 0  # no monitor thread

    def __init__(self, log: logging.Logger, **options: Any) -> None:
        self._log, self._shown = log, None
        ours = {
            "file": io.StringIO(),
            "mininterval": _LINE_EVERY_SECS,
            "delay": _LINE_EVERY_SECS,
            "miniters": 1,
            "leave": True,  # the last line says that the work is done
            "bar_format": "{desc}: {n_fmt}/{total_fmt} {unit} in {elapsed}, {rate_fmt}{postfix}",
        }
        super().__init__(**(options | ours))

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Writes a line where `tqdm` would draw."""
        del pos
        state = (self.n, self.postfix)
        if msg is None and state != self._shown:  # the end may be when a line was due anyway
            self._shown = state
            self._log.info("%s", " ".join(str(self).split()))
        return True

    def clear(self, nolock: bool = False) -> None:
        """Does nothing, since nothing was drawn."""
        del nolock

    def set_postfix(self, ordered_dict: Any = None, refresh: bool = False, **kwargs: Any) -> None:
        """Stores the numbers for the next line, which is due by time, not when they change."""
        del refresh
        super().set_postfix(ordered_dict, refresh=False, **kwargs)
