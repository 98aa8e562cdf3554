"""The error that conversions raise: a complete, sorted list of problems."""

from collections.abc import Collection
from typing import NamedTuple


class Problem(NamedTuple):
    """One line of a `ConversionError`."""

    kind: str
    name: str
    text: str


_MAX_LINES = 100
_MAX_TEXT = 500


class ConversionError(ValueError):
    """Everything that prevents a conversion, in one message of at most a hundred lines.

    Attributes:
      problems: without repeats, sorted.
    """

    def __init__(self, title: str, problems: Collection[Problem]) -> None:
        self.problems = sorted(set(problems))
        shown = [Problem(*map(_capped, problem)) for problem in self.problems[:_MAX_LINES]]
        kinds = max(len(problem.kind) for problem in shown)
        names = max(len(problem.name) for problem in shown)
        lines = [f"  {kind:<{kinds}}  {name:<{names}}  {text}" for kind, name, text in shown]
        if more := len(self.problems) - len(shown):
            lines.append(f"  and {more} more")
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        super().__init__("\n".join([f"{title} ({count})", *lines]))


def _capped(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."


def raise_any(title: str, problems: Collection[Problem]) -> None:
    """Raises a `ConversionError` if there is any problem."""
    if problems:
        raise ConversionError(title, problems)
