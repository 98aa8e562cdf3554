"""Rows that cannot be used: listed in a file, counted by reason, and too many of them an error."""

import collections
import dataclasses
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jax

from flax_projector.audio import Problem
from flax_projector.files import write_atomically

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used.

    Attributes:
      id: of the row, or its place.
      source: manifest or data set.
      reason: never `Problem.NONE`.
      detail: for a person who wants to repair it.
      text: transcript, where there is one.
    """

    id: str
    source: str
    reason: Problem
    detail: str
    text: str = ""

    @property
    def key(self) -> str:
        """As that of `manifest.ManifestRow`."""
        return f"{self.source}\t{self.id}"


class BadRowLog:
    """The bad rows of a run's data sets, as they are now.

    A row counts once, however often an epoch meets it. Only defects count into the share that
    stops the run; clips that are longer than the limits are left out by design, and listed. The
    file outlives a restart. Every start replaces what earlier starts found in a set by what it
    finds itself: bad rows of the manifest, and clips that it reads again because an earlier start
    could not (`known`). What was repaired is therefore neither listed nor counted any more.

    What shows in a manifest is found by every process alike and written by process 0. What shows
    when a clip is read is known to the process that reads it: process i > 0 writes its own
    `<name>.<i>.jsonl`. The share is checked by each: one that stops takes the others with it.
    """

    def __init__(self, path: Path | None, *, max_rate: float):
        """Opens the list.

        Args:
          path: `.jsonl` file; None keeps it in memory.
          max_rate: share of defective rows of a set above which it is an error.
        """
        self._process = jax.process_index()
        if path is not None and self._process > 0:
            path = path.with_suffix(f".{self._process}{path.suffix}")
        self._path, self._max_rate = path, max_rate
        self._num_rows: dict[str, int] = {}
        # By set and key: of manifests, and of clips that were read by this process.
        self._written: dict[str, dict[str, BadRow]] = {}
        self._unreadable = _read(path) if path is not None and path.is_file() else {}

    def known(self, name: str) -> set[str]:
        """Keys of a set's rows that could not be used when clips were read, or by earlier starts.

        Before `start`, these are the clips that are worth reading again.
        """
        return set(self._unreadable.get(name, ()))

    def start(
        self,
        name: str,
        rows: Iterable[BadRow],
        *,
        num_rows: int,
        unreadable: Iterable[BadRow] = (),
    ) -> None:
        """Lists what is bad before training, in place of what was known, with one log line.

        Args:
          name: of the set: "train", or an evaluation set's.
          rows: bad as they are written, the same for every process.
          num_rows: of the whole set, bad ones included.
          unreadable: clips among `known` that still cannot be used.

        Raises:
          ValueError: if too many are defective.
        """
        self._num_rows[name] = num_rows
        self._written[name] = {row.key: row for row in rows}
        self._unreadable[name] = {row.key: row for row in unreadable}
        self._rewrite()
        if found := self._rows(name):
            log.warning(
                "%s: %d of %d rows are left out: %s",
                *(name, len(found), num_rows, _by_reason(found)),
            )
        self._check(name)

    def add(self, name: str, rows: Iterable[BadRow]) -> None:
        """Lists what showed when clips were read; rows that are known already change nothing.

        Raises:
          ValueError: if too many are defective by now.
        """
        known = self._unreadable[name]
        new = {row.key: row for row in rows if row.key not in known}
        if not new:
            return
        known.update(new)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(_to_line(name, row) for row in new.values())
        listed = "; ".join(f"{row.id}: {row.detail}" for row in new.values())
        log.warning("%s: trained or scored without %s", name, listed)
        self._check(name)

    def summary(self) -> str:
        """One line for the end of a run: the rows of every set that were left out, by reason.

        Of what shows only when clips are read, what this process has read.
        """
        parts = []
        for name, num_rows in self._num_rows.items():
            rows = self._rows(name)
            reasons = f" ({_by_reason(rows)})" if rows else ""
            parts.append(f"{name} {len(rows)} of {num_rows}{reasons}")
        return "rows left out: " + "; ".join(parts)

    def _rows(self, name: str) -> list[BadRow]:
        return list((self._written[name] | self._unreadable[name]).values())

    def _rewrite(self) -> None:
        if self._path is None:
            return
        parts = [self._unreadable] if self._process > 0 else [self._written, self._unreadable]
        lines = [
            _to_line(name, row)
            for part in parts
            for name, rows in part.items()
            for row in rows.values()
        ]
        if lines:
            write_atomically(self._path, "".join(lines))
        else:
            self._path.unlink(missing_ok=True)

    def _check(self, name: str) -> None:
        defects = [row for row in self._rows(name) if row.reason.is_defect]
        num_rows = self._num_rows[name]
        if len(defects) <= self._max_rate * num_rows:
            return
        place = f"; all of them are in {self._path}" if self._path else ""
        examples = "\n".join(f"  {row.source}, {row.id}: {row.detail}" for row in defects[:5])
        raise ValueError(
            f"{name}: {len(defects)} of {num_rows} rows are defective, more than data.max_bad_rate"
            f" = {self._max_rate} allows ({_by_reason(defects)}){place}\n{examples}\n"
            "Repair such rows or take them out of the set, or raise data.max_bad_rate"
        )


def _by_reason(rows: Iterable[BadRow]) -> str:
    counts = collections.Counter(row.reason for row in rows)
    return ", ".join(f"{n} {reason.label}" for reason, n in counts.most_common())


def _to_line(name: str, row: BadRow) -> str:
    entry = {"set": name, **dataclasses.asdict(row), "reason": row.reason.name.lower()}
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _read(path: Path) -> dict[str, dict[str, BadRow]]:
    """Rows by set and key; without a last line in which the process was killed."""
    found: dict[str, dict[str, BadRow]] = {}
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            entry = json.loads(line)
            name, reason = entry.pop("set"), Problem[entry.pop("reason").upper()]
            row = BadRow(reason=reason, **entry)
            found.setdefault(name, {})[row.key] = row
    return found
