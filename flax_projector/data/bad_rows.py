"""Rows that cannot be used: listed in a file and counted by reason; too many are an error.

Rows whose clips are doubtful are listed and counted, too, whether or not they are used.
"""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import jax
import numpy as np

from flax_projector import hosts
from flax_projector.data.audio import Problem
from flax_projector.files import reading, write_atomically
from flax_projector.storage import AnyPath
from flax_projector.storage.growing import growing, publish

log = logging.getLogger(__name__)

_MAX_SHOWN = 50  # in the log
_MAX_LISTED = 10_000  # rows that are bad as written, of each set and reason


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used.

    Attributes:
      id: the row's id, or its place in the source.
      source: the manifest or data set that it comes from.
      reason: why it cannot be used.
      detail: what is wrong, for whoever repairs it.
      text: the transcript, if there is one.
      is_used: whether the clip is used nevertheless, since it is only doubtful.
    """

    id: str
    source: str
    reason: Problem
    detail: str
    text: str = ""
    is_used: bool = False

    @property
    def key(self) -> str:
        """The same as `manifest.ManifestRow.key`."""
        return f"{self.source}\t{self.id}"


class BadRows(Sequence[BadRow]):
    """Bad rows of a set, each made only when somebody asks for it: there may be millions.

    Attributes:
      problems: i8[N], the values of their reasons.
    """

    def __init__(self, problems: np.ndarray, make: Callable[[int], BadRow]):
        """Takes the reasons, and what makes each row."""
        self.problems, self._make = problems, make

    @classmethod
    def of(cls, rows: Sequence[BadRow]) -> "BadRows":
        """Rows that are there already, or such an object as it is."""
        if isinstance(rows, BadRows):
            return rows
        return cls(np.array([row.reason.value for row in rows], np.int8), rows.__getitem__)

    @classmethod
    def joined(cls, parts: Sequence["BadRows"]) -> "BadRows":
        """All rows of several."""
        ends = np.cumsum([len(part) for part in parts])

        def make(index: int) -> BadRow:
            number = int(np.searchsorted(ends, index, side="right"))
            return parts[number][index - int(ends[number])]

        return cls(np.concatenate([part.problems for part in parts]), make)

    def __len__(self) -> int:
        return len(self.problems)

    @overload
    def __getitem__(self, index: int) -> BadRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[BadRow]: ...
    def __getitem__(self, index: int | slice) -> BadRow | list[BadRow]:
        if isinstance(index, slice):
            return [self._make(number) for number in range(*index.indices(len(self)))]
        return self._make(range(len(self))[index])

    def counts(self) -> dict[Problem, int]:
        """How many there are of each reason."""
        values, counts = np.unique(self.problems, return_counts=True)
        return {Problem(int(v)): int(n) for v, n in zip(values, counts, strict=True)}

    def first(self, limit: int) -> list[BadRow]:
        """The first rows of each reason, in order."""
        numbers = [np.flatnonzero(self.problems == value)[:limit] for value in set(self.problems)]
        return [self[int(i)] for i in np.sort(np.concatenate([np.zeros(0, int), *numbers]))]


class BadRowLog:
    """The current bad rows of all sets of a run.

    A row counts once, however many epochs come across it. Only defects count towards the share that
    stops the run; clips beyond the limits are left out by design, and only listed, as are clips
    that are doubtful.

    Counts are exact; of rows that are bad as written, the file lists the first 10,000 of each set
    and reason.

    The file survives restarts. Each start replaces what earlier ones found in a set with what it
    finds itself: rows that are bad in the manifest, and clips that it tries again because an
    earlier start could not read them (`known`). So a repaired row is no longer listed or counted.

    Every process finds the same bad rows in a manifest. A clip that cannot be read is known only to
    the process that reads it, until all of them share what they have found. So all count the same
    rows and stop at the same step, and process 0 writes the list.
    """

    def __init__(self, path: AnyPath | None, *, max_rate: float):
        """Opens the list.

        Args:
          path: a `.jsonl` file; None keeps the list in memory, and logs it.
          max_rate: largest allowed share of defective rows in a set.
        """
        self._path, self._max_rate = path, max_rate
        self._file = None if path is None else growing(path)
        self._num_rows: dict[str, int] = {}
        self._lines: dict[str, str] = {}  # of the rows that are bad as written, by set
        self._found: list[tuple[str, BadRow]] = []  # and not yet shared
        self._written: dict[str, BadRows] = {}  # rows that are bad as written, by set
        # By set and key: clips that could not be read.
        self._unreadable = _read(self._file) if self._file and self._file.is_file() else {}

    def known(self, name: str) -> set[str]:
        """Keys of the rows of a set whose clips could not be read, now or by earlier starts.

        Before `start`, these are the clips to try again.
        """
        return set(self._unreadable.get(name, ()))

    def start(
        self,
        name: str,
        rows: Sequence[BadRow],
        *,
        num_rows: int,
        unreadable: Iterable[BadRow] = (),
    ) -> None:
        """Lists the rows of a set that are bad from the start, replacing what was known.

        Args:
          name: the set's name: "train", or an evaluation set's.
          rows: rows that are bad as written, the same on every process.
          num_rows: number of rows in the whole set, including bad ones.
          unreadable: the rows among `known` whose clips still cannot be read.

        Raises:
          ValueError: if too many are defective.
        """
        self._num_rows[name] = num_rows
        self._written[name] = BadRows.of(rows)
        self._lines.pop(name, None)
        self._unreadable[name] = {row.key: row for row in unreadable}
        self._rewrite()
        if left_out := self._left_out(name):
            num_left_out = left_out.total()
            log.warning(
                "%s: %d of %d rows are left out: %s",
                name,
                num_left_out,
                num_rows,
                by_reason(left_out),
            )
            if self._path is None:  # then the log is the list
                shown = self._listed(name, _MAX_SHOWN)
                for row in shown:
                    log.warning("  %s: %s: %s", row.id, row.reason.label, row.detail)
                if num_left_out > len(shown):
                    log.warning("  and %d more", num_left_out - len(shown))
        self._check(name)

    def add(self, name: str, rows: Iterable[BadRow]) -> None:
        """Takes rows whose clips could not be read or are doubtful; known rows change nothing.

        If there are several processes, they are listed when all have called `share`.

        Raises:
          ValueError: if too many are now defective.
        """
        known = self._unreadable[name]
        self._found += [(name, row) for row in rows if row.key not in known]
        if jax.process_count() == 1:
            self.share()

    def share(self) -> None:
        """Lists what has been added, by all processes; each must call it.

        Raises:
          ValueError: if too many are now defective.
        """
        lines = [to_line(name, row) for name, row in self._found]
        self._found.clear()
        everywhere = "".join(hosts.exchange("bad rows", "".join(lines)))
        if not everywhere:
            return
        found = _parse(everywhere.encode())
        for name, rows in found.items():
            self._list(name, rows)
        self._rewrite()
        for name in found:
            self._check(name)

    def _list(self, name: str, rows: dict[str, BadRow]) -> None:
        known = self._unreadable[name]
        new = [row for key, row in rows.items() if key not in known]
        before = {row.reason for row in known.values()}
        known.update({row.key: row for row in new})
        if left_out := [row for row in new if not row.is_used]:
            listed = "; ".join(f"{row.id}: {row.detail}" for row in left_out)
            log.warning("%s: left out %s", name, listed)
        for row in new:
            if row.is_used and row.reason not in before:
                before.add(row.reason)  # one line for each reason: there may be many such clips
                log.warning("%s: doubtful, but used: %s: %s", name, row.id, row.detail)

    def summary(self) -> str:
        """One line for the end of a run: how many rows were left out or doubtful, by reason."""
        parts = []
        for name, num_rows in self._num_rows.items():
            left_out = self._left_out(name)
            doubtful = Counter(row.reason for row in self._unreadable[name].values() if row.is_used)
            part = f"{name} {left_out.total()} of {num_rows}"
            part += f" ({by_reason(left_out)})" if left_out else ""
            part += f", and used but doubtful: {by_reason(doubtful)}" if doubtful else ""
            parts.append(part)
        return "rows left out: " + "; ".join(parts)

    def _left_out(self, name: str) -> Counter[Problem]:
        """How many rows of a set are not used, by reason."""
        unreadable = (row.reason for row in self._unreadable[name].values() if not row.is_used)
        return Counter(self._written[name].counts()) + Counter(unreadable)

    def _listed(self, name: str, limit: int) -> list[BadRow]:
        """The first rows of a set that are not used."""
        unreadable = (row for row in self._unreadable[name].values() if not row.is_used)
        return [*self._written[name][:limit], *unreadable][:limit]

    def _rewrite(self) -> None:
        if self._path is None or self._file is None or jax.process_index() > 0:
            return
        lines = [text for text in self._lines_of_written() if text]
        lines += [
            to_line(name, row) for name, rows in self._unreadable.items() for row in rows.values()
        ]
        if lines:
            write_atomically(self._file, "".join(lines))
        else:
            for path in (self._file, self._path):
                path.unlink(missing_ok=True)

    def _lines_of_written(self) -> Iterator[str]:
        for name, rows in self._written.items():
            if name not in self._lines:
                listed = rows.first(_MAX_LISTED)
                self._lines[name] = "".join(to_line(name, row) for row in listed)
            yield self._lines[name]

    def _check(self, name: str) -> None:
        defects = Counter({r: n for r, n in self._left_out(name).items() if r.is_defect})
        num_rows = self._num_rows[name]
        if defects.total() <= self._max_rate * num_rows:
            return
        place = ""
        if self._path is not None:
            publish(self._path.parent)
            place = f"; all of them are in {self._path}"
        listed = [*self._written[name].first(5), *self._unreadable[name].values()]
        shown = [row for row in listed if row.reason.is_defect][:5]
        examples = "\n".join(f"  {row.source}, {row.id}: {row.detail}" for row in shown)
        raise ValueError(
            f"{name}: {defects.total()} of {num_rows} rows are defective ({by_reason(defects)}), "
            f"more than --data.max-bad-rate {self._max_rate} allows{place}\n{examples}\n"
            "Repair these rows, remove them, or raise --data.max-bad-rate"
        )


def by_reason(counts: Counter[Problem]) -> str:
    """How many rows are bad for each reason, in plain words."""
    return ", ".join(f"{n} {reason.label}" for reason, n in counts.most_common())


def to_line(name: str, row: BadRow) -> str:
    """A row of a set as a line of the list."""
    entry = {"set": name, **dataclasses.asdict(row), "reason": row.reason.name.lower()}
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _read(path: AnyPath) -> dict[str, dict[str, BadRow]]:
    with reading(path, way_out="remove it, and bad rows are found anew"):
        return _parse(path.read_bytes())


def _parse(lines: bytes) -> dict[str, dict[str, BadRow]]:
    """Rows by set and key."""
    found: dict[str, dict[str, BadRow]] = {}
    for line in lines.splitlines():
        entry = json.loads(line)
        name, reason = entry.pop("set"), Problem[entry.pop("reason").upper()]
        row = BadRow(reason=reason, **entry)
        found.setdefault(name, {})[row.key] = row
    return found
