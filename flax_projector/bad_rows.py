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


class BadRowLog:
    """The bad rows of a run's data sets.

    A row counts once, however often an epoch meets it. Only defects count into the share that
    stops the run; clips that are longer than the limits are left out by design, and listed. The
    file outlives a restart, and the count with it: who repairs rows deletes the file.

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
        self._found: dict[tuple[str, str, str], Problem] = {}  # by set, source, id
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                key = (entry["set"], entry["source"], entry["id"])
                self._found[key] = Problem[entry["reason"].upper()]

    def start(self, name: str, rows: Iterable[BadRow], *, num_rows: int) -> None:
        """Lists what was found before training, with one log line.

        Args:
          name: of the set: "train", or an evaluation set's.
          rows: bad ones.
          num_rows: of the whole set, bad ones included.

        Raises:
          ValueError: if too many are defective.
        """
        self._num_rows[name] = num_rows
        rows = list(rows)
        self._list(name, rows, write=self._process == 0)
        if rows:
            counts = collections.Counter(row.reason for row in rows)
            by_reason = ", ".join(f"{n} {reason.label}" for reason, n in counts.most_common())
            log.warning("%s: %d of %d rows are left out: %s", name, len(rows), num_rows, by_reason)
        self._check(name, rows)

    def add(self, name: str, rows: Iterable[BadRow]) -> None:
        """Lists what showed when clips were read; rows that are known already change nothing.

        Raises:
          ValueError: if too many are defective by now.
        """
        if new := self._list(name, rows, write=True):
            listed = "; ".join(f"{row.id}: {row.detail}" for row in new)
            log.warning("%s: trained or scored without %s", name, listed)
            self._check(name, new)

    def _list(self, name: str, rows: Iterable[BadRow], *, write: bool) -> list[BadRow]:
        """Those of the rows that were not known."""
        new = []
        for row in rows:
            key = (name, row.source, row.id)
            if key not in self._found:
                new.append(row)
            self._found[key] = row.reason
        if new and write and self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                for row in new:
                    entry = {"set": name, **dataclasses.asdict(row)}
                    entry["reason"] = row.reason.name.lower()
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        return new

    def _check(self, name: str, examples: list[BadRow]) -> None:
        reasons = [why for (of, _, _), why in self._found.items() if of == name and why.is_defect]
        num_rows = self._num_rows[name]
        if len(reasons) <= self._max_rate * num_rows:
            return
        counts = collections.Counter(reason.label for reason in reasons)
        lines = [f"{n:6d} {label}" for label, n in counts.most_common()]
        lines += [f"  {row.source}, {row.id}: {row.detail}" for row in examples[:5]]
        place = f"; all of them are in {self._path}" if self._path else ""
        raise ValueError(
            f"{name}: {len(reasons)} of {num_rows} rows are defective, more than data.max_bad_rate"
            f" = {self._max_rate} allows{place}\n" + "\n".join(lines)
        )
