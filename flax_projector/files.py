"""Which paths can be used, reading JSON, and writing small files completely or not at all."""

import json
import os
import re
import uuid
from pathlib import Path
from typing import IO, Any


def is_url(path: str | Path) -> bool:
    """Whether the path is a URL (`gs://...`), which fsspec opens, and not a local path."""
    return "://" in str(path)


def local_path(path: str | Path) -> Path:
    """The path that a user names, with "~" as the home folder.

    Raises:
      ValueError: if it is empty, a URL, not UTF-8, or a loop of links.
    """
    text = os.path.expanduser(path)
    if not text:
        raise ValueError("the path is empty: name a file or a folder")
    if re.match(r"[A-Za-z][\w+.-]+:/", text):  # `Path` makes one slash of two
        raise ValueError(f"{text} is a URL: expected a local or mounted path")
    try:
        text.encode()
        Path(text).resolve().exists()
    except UnicodeEncodeError as error:
        raise ValueError(f"the path {text!a} is not UTF-8: rename it") from error
    except (RuntimeError, OSError, ValueError) as error:  # RuntimeError: a loop, before Python 3.13
        raise ValueError(f"{text!r} cannot be used as a path: {error}") from error
    return Path(text)


def check_orbax_path(path: Path, *, is_new: bool) -> None:
    """Checks that Orbax, which stores parameters and runs, can handle a path.

    Args:
      path: of a folder.
      is_new: whether Orbax is to write there. It then searches the folder, and takes the path for
        a pattern.

    Raises:
      ValueError: naming what is in the way, also in the name of a folder above.
    """
    whole = path.resolve()
    wrong = {c for c in str(whole) if c in ("\\*?[" if is_new else "\\")}
    wrong |= {name for name in whole.parts if name in ("gs:", "s3:", "az:", "hf:")}
    if wrong:
        raise ValueError(
            f"{whole}: parameters cannot be {'written to' if is_new else 'read from'} a path with "
            f"{' or '.join(sorted(wrong))} in it. "
            + ("Choose another path" if is_new else "Rename the folder")
        )


def parse_json(text: str) -> Any:
    """`json.loads`, for a text that a user may have written or damaged.

    Raises:
      ValueError: whatever is wrong with it, even if it is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def sync(file: IO) -> None:
    """Flushes to disk, so that the data survives a machine crash, not just a process crash."""
    file.flush()
    os.fsync(file.fileno())


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file, replacing any earlier one, and creates its folder if needed.

    A reader sees either the old text or the new one, even if the process is killed or the machine
    goes down. Several processes may write the same file: the last one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            sync(file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
