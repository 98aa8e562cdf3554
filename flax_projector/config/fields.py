"""Rules for config fields: stated at the field, checked by one function.

A field's annotation says what it accepts, with `annotated-types` or a `Rule`:

  batch_size: Annotated[int, Ge(1)] = 8

Every config calls `check(self)` when it is created.
"""

import dataclasses
import enum
import functools
import math
import numbers
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt, Interval, MinLen


@dataclass(frozen=True)
class Rule:
    """A condition on a value that `annotated-types` cannot express.

    Attributes:
      is_ok: returns whether a value passes.
      text: completes the sentence "The value ...", as in "must be ascending".
    """

    is_ok: Callable[[Any], bool]
    text: str


class OnResume(enum.Enum):
    """What a resumed run may do with a field, and everything below it; by default nothing."""

    MAY_CHANGE = "may have another value"
    MAY_MOVE = "may name the same contents by another path"
    OF_PROCESS = "says where a process runs"


MAY_CHANGE = OnResume.MAY_CHANGE
"""For a field that does not affect what a run learns."""
MAY_MOVE = OnResume.MAY_MOVE
"""For a field that names what a run learns from: its contents must stay the same."""

OF_PROCESS = OnResume.OF_PROCESS
"""For a field that differs between the processes of a run: it is not part of what is saved."""

PositiveInt = Annotated[int, Ge(1)]
Count = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
Rate = Annotated[float, Interval(ge=0, lt=1)]
Text = Annotated[str, MinLen(1)]

ASCENDING = Rule(
    lambda v: len(v) > 0 and list(v) == sorted(set(v)),
    "must be ascending, without repeats and not empty",
)
NO_REPEATS = Rule(lambda v: len(v) == len(set(v)), "must not name anything twice")
POSITIVE_OR_AUTO = Rule(
    lambda v: v == "auto" or (_is_number(v, float) and v > 0),
    "must be a finite number greater than 0, or auto",
)
MESH_AXIS = Rule(
    lambda v: v >= 1 or v == -1, "must be at least 1, or -1 for all devices that are left over"
)
HOST_AND_PORT = Rule(
    lambda v: v is None or _is_address(v), "must be given as HOST:PORT, with a port below 65536"
)

NAMES_WITH_VALUES = Rule(
    lambda v: all(
        name.isidentifier() and equals for name, equals, _ in (x.partition("=") for x in v)
    ),
    "must be given as NAME=VALUE",
)


def multiple_of(divisor: int, what: str) -> Rule:
    """The rule for a number that `divisor` must divide; `what` is the divisor's name."""
    return Rule(
        lambda v: divisor >= 1 and v % divisor == 0, f"must be a multiple of {what} = {divisor}"
    )


def option(name: str) -> str:
    """A field as one types it on the command line: "data.bucket_secs" -> "--data.bucket-secs"."""
    return f"--{name.replace('_', '-')}"


def check(config: Any, *, prefix: str | None = None, **more: Rule) -> None:
    """Checks every field of a config against the rules in its annotation.

    Args:
      config: a config dataclass.
      prefix: the prefix of its options on the command line, such as "data."; None if it has none.
      more: further rules, by field name, that depend on other fields.

    Raises:
      ValueError: lists every field that should be a number and is not; or, if all are numbers,
        every field that breaks a rule.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    kinds = number_fields(type(config))
    problems = {
        name: f"must be {_NUMBERS[kind]}"
        for name, kind in kinds.items()
        if not _is_number(values[name], kind)
    }
    if not problems:
        rules = [(name, rule) for name, found in _rules(type(config)).items() for rule in found]
        for name, rule in [*rules, *more.items()]:
            if not rule.is_ok(values[name]):
                problems.setdefault(name, rule.text)
    if problems:
        title = f"{type(config).__name__}."
        names = {n: f"{title}{n}" if prefix is None else option(prefix + n) for n in problems}
        raise ValueError("\n".join(f"{names[n]} = {values[n]!r}: {t}" for n, t in problems.items()))


def on_resume(cls: type) -> dict[str, OnResume]:
    """The fields of a config class that a resumed run may give otherwise."""
    notes = _annotations(cls).items()
    return {name: note for name, found in notes for note in found if isinstance(note, OnResume)}


@functools.cache
def number_fields(cls: type) -> dict[str, Any]:
    """The numeric fields of a config class, with their types."""
    hints = typing.get_type_hints(cls)
    return {name: kind for name, kind in hints.items() if kind in _NUMBERS}


_NUMBERS = {int: "a whole number", int | None: "a whole number or None", float: "a finite number"}


def _is_address(value: str) -> bool:
    found = re.fullmatch(r"(\[[\da-fA-F:]+\]|[^\s:/]+):(\d{1,5})", value, re.ASCII)
    return found is not None and 0 < int(found[2]) < 2**16


def _is_number(value: Any, kind: Any) -> bool:
    if value is None:
        return kind == int | None
    if isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, numbers.Real) and math.isfinite(value)
    return isinstance(value, numbers.Integral)


@functools.cache
def _annotations(cls: type) -> dict[str, tuple[Any, ...]]:
    """The metadata in each field's `Annotated`."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}


@functools.cache
def _rules(cls: type) -> dict[str, list[Rule]]:
    return {
        name: [rule for note in notes if (rule := _as_rule(note))]
        for name, notes in _annotations(cls).items()
    }


def _as_rule(note: Any) -> Rule | None:
    """The rule that an annotation stands for, if any. None passes where the type allows it."""
    match note:
        case Rule():
            return note
        case Ge(ge=low):
            return Rule(lambda v: v is None or v >= low, f"must be at least {low}")
        case Gt(gt=low):
            return Rule(lambda v: v is None or v > low, f"must be greater than {low}")
        case Interval(gt=None, ge=low, lt=high, le=None):
            return Rule(lambda v: low <= v < high, f"must be in [{low}, {high})")
        case Interval(gt=None, ge=low, lt=None, le=high):
            return Rule(lambda v: low <= v <= high, f"must be in [{low}, {high}]")
        case MinLen(min_length=1):
            return Rule(lambda v: len(v) > 0, "must not be empty")
        case OnResume():
            return None
    raise TypeError(f"no rule is known for the annotation {note!r}")
