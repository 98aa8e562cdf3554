"""A run's config as JSON: written, read back, and compared with another."""

import dataclasses
import json
import reprlib
import typing
from dataclasses import dataclass
from typing import Any

from flax_projector.config.fields import (
    MAY_CHANGE,
    MAY_MOVE,
    OF_PROCESS,
    OnResume,
    on_resume,
    option,
)
from flax_projector.config.train import TrainConfig
from flax_projector.files import parse_json

_OF_HOST = {"out", "data.cache_dir"}  # the one is compared by its contents


def to_json(config: TrainConfig) -> str:
    """The resolved config, as it is saved in the run folder."""
    return json.dumps(_shared(TrainConfig, dataclasses.asdict(config)), indent=2) + "\n"


def from_json(text: str) -> TrainConfig:
    """Reads what `to_json` wrote.

    Raises:
      ValueError: if it is not JSON, or a field is unknown, missing or invalid.
    """
    return _build(TrainConfig, parse_json(text))


def _shared(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Without what belongs to a process and not to the run."""
    marks = on_resume(cls)
    return {name: value for name, value in values.items() if marks.get(name) is not OF_PROCESS}


def _build(cls: Any, values: Any) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__}: expected an object, got {reprlib.repr(values)}")
    types = typing.get_type_hints(cls)
    if unknown := sorted(set(values) - set(types)):
        raise ValueError(f"{cls.__name__} has no field {unknown}: written by another version?")
    kwargs = {}
    for name, value in _shared(cls, values).items():
        if dataclasses.is_dataclass(types[name]):
            value = _build(types[name], value)
        kwargs[name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**kwargs)
    except (ArithmeticError, AttributeError, TypeError) as error:  # of values of other types
        raise ValueError(f"{cls.__name__}: {error}") from error


@dataclass(frozen=True)
class Changes:
    """The options that differ between two configs, by name, as `--name: saved -> current`.

    Attributes:
      refused: those that decide what is learnt.
      moved: those that name what is learnt from, which may be the same in another place.
      allowed: those that may change when a run is resumed.
    """

    refused: dict[str, str]
    moved: dict[str, str]
    allowed: dict[str, str]


def changes(saved: TrainConfig, current: TrainConfig) -> Changes:
    """The options that differ between two configs."""
    before, now = _leaves(saved), _leaves(current)
    found: dict[OnResume | None, dict[str, str]] = {None: {}, MAY_MOVE: {}, MAY_CHANGE: {}}
    for name, (value, mark) in before.items():
        if value != now[name][0]:
            found[mark][name] = f"{option(name)}: {value!r} -> {now[name][0]!r}"
    return Changes(*found.values())


def shared_options(config: TrainConfig) -> dict[str, str]:
    """The options that all processes of a run must be given alike, and their values.

    Not those that name contents by paths, which may be different ones on every host.
    """
    marks = {MAY_MOVE, OF_PROCESS}
    return {
        option(name): repr(value)
        for name, (value, mark) in _leaves(config).items()
        if mark not in marks and name not in _OF_HOST
    }


def _leaves(
    config: Any, prefix: str = "", mark: OnResume | None = None
) -> dict[str, tuple[Any, OnResume | None]]:
    """Dotted name -> value, and what a resumed run may do with it."""
    leaves = {}
    marks = on_resume(type(config))
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        mine = mark or marks.get(field.name)
        if mine is OF_PROCESS:
            continue
        if dataclasses.is_dataclass(value):
            leaves |= _leaves(value, f"{name}.", mine)
        else:
            leaves[name] = (value, mine)
    return leaves
