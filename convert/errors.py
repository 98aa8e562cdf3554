"""The error that conversions raise: a complete, sorted list of problems."""

from collections.abc import Collection
from typing import NamedTuple


class Problem(NamedTuple):
    """One line of a `ConversionError`."""

    kind: str
    name: str
    text: str


class ConversionError(ValueError):
    """Everything that prevents a conversion, in one message.

    Attributes:
      problems: without repeats, sorted.
    """

    def __init__(self, title: str, problems: Collection[Problem]) -> None:
        self.problems = sorted(set(problems))
        kinds = max(len(problem.kind) for problem in self.problems)
        names = max(len(problem.name) for problem in self.problems)
        lines = [
            f"  {kind:<{kinds}}  {name:<{names}}  {text}" for kind, name, text in self.problems
        ]
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        super().__init__("\n".join([f"{title} ({count})", *lines]))


def raise_any(title: str, problems: Collection[Problem]) -> None:
    """Raises a `ConversionError` if there is any problem."""
    if problems:
        raise ConversionError(title, problems)
