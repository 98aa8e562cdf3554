"""Rows as they are written, and those of them that occur twice."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flax_projector.data.audio import Audio, Problem, Slice
from flax_projector.data.bad_rows import BadRow
from flax_projector.data.kept import open_table
from flax_projector.data.rows import hash64, name_digest, row_key


@dataclass(frozen=True, slots=True)
class Draft:
    """A row as written. If it has no duration, that will be read from the file.

    Attributes:
      id: as written, or made from the audio's name and the offset.
      audio: see `ManifestRow`, as for the attributes that follow.
      text: transcript.
      duration: in seconds.
      offset: in seconds.
      has_own_id: whether the id is written in the row.
    """

    id: str
    audio: Audio
    text: str
    duration: float | None
    offset: float | None
    has_own_id: bool = True


class Names:
    """Finds ids and rows that occur twice, by hashes: all rows of a source are not in memory."""

    def __init__(self, source: str) -> None:
        self._source, self._num_rows = source, 0
        self._numbers: list[np.ndarray] = []  # of the drafts among the rows
        self._hashes: list[np.ndarray] = []  # u64[N, 2]: of the id, and of the whole row
        self._are_own: list[np.ndarray] = []

    def add(self, rows: list[Draft | BadRow]) -> None:
        """Takes the next rows."""
        drafts = [(i, row) for i, row in enumerate(rows) if isinstance(row, Draft)]
        self._numbers.append(np.array([self._num_rows + i for i, _ in drafts], np.int64))
        hashes = [(_hash(d.id), _hash(repr(_content(d)))) for _, d in drafts]
        self._hashes.append(np.array(hashes, np.uint64).reshape(-1, 2))
        self._are_own.append(np.array([d.has_own_id for _, d in drafts], bool))
        self._num_rows += len(rows)

    def changes(self, path: Path) -> dict[int, dict[str, Any]]:
        """What to change in a table, by the number of the row.

        Ids that are made from the same name are numbered; rows that occur twice become bad rows.
        """
        numbers, hashes = np.concatenate(self._numbers), np.concatenate(self._hashes)
        are_own = np.concatenate(self._are_own)
        repeated = _repeated(hashes[:, 0]) | _repeated(hashes[:, 1])
        if not repeated.any():
            return {}
        table, ids = open_table(path), np.sort(hashes[:, 0])
        own_ids = np.sort(hashes[are_own, 0])
        made, seen, counts, changes = set(), set(), Counter(), {}

        def is_taken(name: str) -> bool:
            return name in made or _contains(own_ids, _hash(name))

        for number, is_own in zip(numbers[repeated].tolist(), are_own[repeated], strict=True):
            record = table.slice(number, 1).to_pylist()[0]
            row_id = base = record["id"]
            content = row_id if is_own else _values(record)
            if content in seen:
                what = f"id {row_id!r}" if is_own else f"the same row of {_audio_name(record)}"
                changes[number] = {
                    "id": f"row {number + 1}",
                    "text": "",
                    "problem": Problem.DUPLICATE_ID.value,
                    "detail": f"{what} occurs twice",
                    "depends_on_file": False,
                }
            elif not is_own:
                # A number that some other made id happens to end in is passed over.
                while is_taken(row_id) or (row_id != base and _contains(ids, _hash(row_id))):
                    counts[base] += 1
                    row_id = f"{base}#{counts[base] + 1}"
                made.add(row_id)
                if row_id != base:
                    name = name_digest(row_id, record["offset"])
                    key = row_key(self._source, row_id)
                    changes[number] = {"id": row_id, "name": name, "key": key}
            seen.add(content)
        return changes


def _content(draft: Draft) -> Any:
    if draft.has_own_id:
        return draft.id
    return (str(draft.audio), draft.text, draft.duration, draft.offset)


def _values(record: Mapping[str, Any]) -> tuple[Any, ...]:
    values = (record[name] for name in ("text", "duration", "offset"))
    return (_audio_name(record), record["read_secs"] is None, *values)


def _audio_name(record: Mapping[str, Any]) -> str:
    if record["start"] is None:
        return str(record["audio"])
    return str(Slice(record["audio"], record["start"], record["length"]))


def _hash(text: str) -> int:
    return hash64(text.encode())


def _repeated(hashes: np.ndarray) -> np.ndarray:
    """Whether each of u64[N] occurs more than once."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    same = ordered[1:] == ordered[:-1]
    repeated = np.zeros(len(hashes), bool)
    repeated[order[1:][same]] = True
    repeated[order[:-1][same]] = True
    return repeated


def _contains(ordered: np.ndarray, value: int) -> bool:
    place = np.searchsorted(ordered, np.uint64(value))
    return bool(place < len(ordered) and ordered[place] == value)
