"""The text of a manifest, and the rows that are written in it."""

import contextlib
import itertools
import os
import reprlib
import unicodedata
from collections.abc import Iterator
from typing import Any

from flax_projector.config.presets import DEMO_SPEECH
from flax_projector.files import is_url, open_to_read, parse_json
from flax_projector.storage.urls import filesystem_of

AUDIO, TEXT, BYTES = ("audio", "path"), ("text",), ("bytes",)
DURATION, OFFSET = ("duration", "seconds"), ("offset",)
"""The columns of a manifest: each has one or two names."""

_BLOCK = 1 << 22  # bytes
_MAX_BYTES = 1 << 63  # what systems can count
_BOM = "\ufeff"  # begins what Windows programs write, also within files that were joined


def read_raw_rows(path: str) -> Iterator[dict[str, Any] | str]:
    """Reads the rows of a manifest as they are written, one after the other.

    Args:
      path: a local path, or a URL.

    Yields:
      A row's values by column, or what is wrong with it.

    Raises:
      ValueError: if the manifest cannot be read, has another suffix than `.jsonl` or `.tsv`, or, at
        its end, if it has no rows, or no column for the audio or the text.
    """
    lines = (line.removeprefix(_BOM).removesuffix("\r") for line in _read_lines(path))
    lines = (line for line in lines if line.strip())
    first = next(lines, None)  # opens the file
    if not path.endswith((".jsonl", ".tsv")):
        raise ValueError(f"manifest {path}: the name must end in .jsonl or .tsv")
    columns: dict[str, None] = {}  # a set that keeps its order
    num_rows = 0
    if path.endswith(".tsv"):
        header = [column.strip() for column in (first or "").split("\t")]
        columns = dict.fromkeys(header)
        if len(columns) < len(header):
            raise ValueError(f"manifest {path}: two columns have one name: {header}")
        rows = (_parse_fields(line, header) for line in lines)
    else:
        all_lines = itertools.chain([] if first is None else [first], lines)
        rows = (_parse_json(line) for line in all_lines)
    for row in rows:
        num_rows += 1
        if isinstance(row, dict):
            columns |= dict.fromkeys(row)
        yield row
    if not num_rows:
        raise ValueError(f"manifest {path} has no rows")
    for names in (AUDIO, TEXT):
        if columns and not set(names) & set(columns):
            raise ValueError(
                f"manifest {path} has no column {' or '.join(map(repr, names))}, but "
                f"{sorted(columns)[:20]}: name its columns as docs/data.md says"
            )


def read_text(value: Any) -> str:
    """A transcript as it is used: in NFC, without spaces around it; empty if there is none.

    Raises:
      ValueError: if it is not a string, or not one that UTF-8 can hold.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"the text {reprlib.repr(value)} is not a string")
    check_utf8("text", value)
    return unicodedata.normalize("NFC", value).strip()


def read_range(value: Any) -> tuple[int, int] | None:
    """Where a clip begins in its file and how many bytes it has; None if it is all of the file.

    Args:
      value: a list or, in a `.tsv` manifest, its JSON text.

    Raises:
      ValueError: if these are not two integers, or no range.
    """
    if value is None:
        return None
    found = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            found = parse_json(value)
    match found:
        case [int(start), int(length)] if bool not in map(type, found):
            if start >= 0 and length > 0 and start + length < _MAX_BYTES:
                return start, length
    raise ValueError(
        f"bytes: {reprlib.repr(value)} is not a range of bytes: expected [start, length], two "
        "integers, the length above 0"
    )


def check_utf8(what: str, value: str) -> None:
    """Raises ValueError if UTF-8 cannot hold a string, because of a lone surrogate."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the {what} {reprlib.repr(value)} is not UTF-8: {error.reason}"
        ) from error


def missing_manifest(path: str) -> ValueError:
    """The error for a manifest that does not exist; says where a relative path was looked for."""
    where = "" if is_url(path) or os.path.isabs(path) else f" in {os.getcwd()}"
    hint = ""
    if path.startswith(DEMO_SPEECH):
        hint = (
            f". The demo's speech is in {DEMO_SPEECH} of the repository and not part of the "
            "installed package: run the demo in a clone"
        )
    return ValueError(f"manifest {path} does not exist{where}{hint}")


def _read_lines(path: str) -> Iterator[str]:
    """The lines of a file, which end in \\n, or in \\r if none ends in \\n.

    Not those of `splitlines`, which would also split a row at U+2028 in its transcript.
    """
    if is_url(path):
        filesystem_of(path)
    try:
        rest, separator = b"", b"\r"
        with open_to_read(path) as file:
            while block := file.read(_BLOCK):
                if b"\n" in block:
                    separator = b"\n"
                    *lines, rest = (rest + block).split(b"\n")
                    yield from map(bytes.decode, lines)
                else:
                    rest += block
        yield from map(bytes.decode, rest.split(separator))
    except FileNotFoundError as error:
        raise missing_manifest(path) from error
    except PermissionError as error:  # says the way out
        raise ValueError(f"manifest {path} cannot be read: {error}") from error
    except Exception as error:  # file systems raise the errors of their clients
        raise ValueError(
            f"manifest {path} cannot be read: {type(error).__name__}: {error}\n"
            "Name a .jsonl or .tsv file in UTF-8, or a data set as hf:NAME:SPLIT"
        ) from error


def _parse_json(line: str) -> dict[str, Any] | str:
    """The row, or what is wrong with it."""
    try:
        raw = parse_json(line)
    except ValueError as error:  # numbers of 5000 digits are ValueErrors, too
        return f"not JSON ({error})"
    return raw if isinstance(raw, dict) else f"need an object, got {reprlib.repr(raw)}"


def _parse_fields(line: str, columns: list[str]) -> dict[str, Any] | str:
    """The row, or what is wrong with it: a row cut by a tab or a line end is not used."""
    fields = line.split("\t")
    if len(fields) != len(columns):
        return (
            f"{len(fields)} fields, but the header has {len(columns)}: texts with tabs or line "
            "ends need a .jsonl manifest"
        )
    return dict(zip(columns, fields, strict=True))
