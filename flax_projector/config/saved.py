"""A run's config as JSON: written, read back, and compared with another."""

import dataclasses
import json
import reprlib
import typing
from typing import Any

from flax_projector.config.fields import may_change, option
from flax_projector.config.train import TrainConfig
from flax_projector.files import parse_json


def to_json(config: TrainConfig) -> str:
    """The resolved config, as it is saved in the run folder."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> TrainConfig:
    """Reads what `to_json` wrote.

    Raises:
      ValueError: if it is not JSON, or a field is unknown, missing or invalid.
    """
    return _build(TrainConfig, parse_json(text))


def _build(cls: Any, values: Any) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__}: expected an object, got {reprlib.repr(values)}")
    types = typing.get_type_hints(cls)
    if unknown := sorted(set(values) - set(types)):
        raise ValueError(f"{cls.__name__} has no field {unknown}: written by another version?")
    kwargs = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(types[name]):
            value = _build(types[name], value)
        kwargs[name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**kwargs)
    except (ArithmeticError, AttributeError, TypeError) as error:  # of values of other types
        raise ValueError(f"{cls.__name__}: {error}") from error


def changes(saved: TrainConfig, current: TrainConfig) -> tuple[list[str], list[str]]:
    """The options that differ between two configs, as `--name: saved -> current`.

    Returns:
      Those that decide what is learnt; and those that may change when a run is resumed.
    """
    before, now = _leaves(saved), _leaves(current)
    refused, allowed = [], []
    for name, (value, is_free) in before.items():
        if value != now[name][0]:
            change = f"{option(name)}: {value!r} -> {now[name][0]!r}"
            (allowed if is_free else refused).append(change)
    return refused, allowed


def _leaves(config: Any, prefix: str = "", *, is_free: bool = False) -> dict[str, tuple[Any, bool]]:
    """Dotted name -> value, and whether a resumed run may have another."""
    leaves = {}
    free = may_change(type(config))
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        is_field_free = is_free or field.name in free
        if dataclasses.is_dataclass(value):
            leaves |= _leaves(value, f"{name}.", is_free=is_field_free)
        else:
            leaves[name] = (value, is_field_free)
    return leaves
