"""The text of a manifest, and the rows that are written in it."""

import contextlib
import os
import reprlib
import unicodedata
from typing import Any

from flax_projector.config.presets import DEMO_SPEECH
from flax_projector.files import is_url, parse_json, read_bytes
from flax_projector.storage.urls import filesystem_of

AUDIO, TEXT, BYTES = ("audio", "path"), ("text",), ("bytes",)
DURATION, OFFSET = ("duration", "seconds"), ("offset",)
"""The columns of a manifest: each has one or two names."""

_MAX_BYTES = 1 << 63  # what systems can count
_BOM = "\ufeff"  # begins what Windows programs write, also within files that were joined


def read_raw_rows(path: str) -> list[dict[str, Any] | str]:
    """Reads the rows of a manifest as they are written.

    Args:
      path: a local path, or a URL.

    Returns:
      Each row's values by column, or what is wrong with it.

    Raises:
      ValueError: if the manifest cannot be read, has another suffix than `.jsonl` or `.tsv`, has no
        rows, or has no column for the audio or the text.
    """
    text = _read_text(path)
    # Not splitlines, which would also split a row at U+2028 in its transcript.
    lines = text.split("\n" if "\n" in text else "\r")
    lines = [line.removeprefix(_BOM).removesuffix("\r") for line in lines]
    lines = [line for line in lines if line.strip()]
    if path.endswith(".jsonl"):
        rows = [_parse_json(line) for line in lines]
        columns = sorted({column for row in rows if isinstance(row, dict) for column in row})
    elif path.endswith(".tsv"):
        columns = [column.strip() for column in lines[0].split("\t")] if lines else []
        if len(set(columns)) < len(columns):
            raise ValueError(f"manifest {path}: two columns have one name: {columns}")
        rows = [_parse_fields(line, columns) for line in lines[1:]]
    else:
        raise ValueError(f"manifest {path}: the name must end in .jsonl or .tsv")
    if not rows:
        raise ValueError(f"manifest {path} has no rows")
    for names in (AUDIO, TEXT):
        if columns and not set(names) & set(columns):
            raise ValueError(
                f"manifest {path} has no column {' or '.join(map(repr, names))}, but "
                f"{columns[:20]}: name its columns as docs/data.md says"
            )
    return rows


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


def _read_text(path: str) -> str:
    if is_url(path):
        filesystem_of(path)
    try:
        return read_bytes(path).decode()
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
