"""Keeps numbers that a file contains from growing into something that fits no memory."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from convert.checkpoint import TensorInfo
from convert.errors import Problem, raise_any
from flax_projector.config.fields import number_fields

MAX_LAYERS = 10_000
_MAX_INT = 2**31 - 1
_MAX_FLOAT = 3.4e38


def too_large(cls: type, data: Mapping[str, Any]) -> list[Problem]:
    """The numbers in a config.json that no model has."""
    problems = []
    for name, kind in number_fields(cls).items():
        value = data.get(name)
        most = MAX_LAYERS if name.endswith("layers") else _MAX_INT if kind is int else _MAX_FLOAT
        if isinstance(value, int | float) and abs(value) > most:
            text = f"= {_short(value)}, expected at most {most:g}"
            problems.append(Problem("wrong", name, text))
    return problems


def check_sizes(config: Any, infos: Mapping[str, TensorInfo], where: str) -> None:
    """Checks that no size in a config is beyond all sizes in the checkpoint.

    Shapes are compared later, one by one; by then, a model of that size has been laid out.

    Args:
      config: a config dataclass.
      infos: of every tensor or leaf.
      where: the file, for messages.

    Raises:
      ConversionError: naming each such field.
    """
    most = max((size for info in infos.values() for size in info.shape), default=0)
    layers = max(len(infos), *(x.shape[0] for p, x in infos.items() if p.startswith("layers/")), 0)
    limits = {
        name: layers if name.endswith("layers") else most for name in number_fields(type(config))
    }
    raise_any(
        f"{where} is not the config of this checkpoint",
        [
            Problem(
                "size", name, f"= {value}, but nothing in the checkpoint is above {limits[name]}"
            )
            for name, value in asdict(config).items()
            if isinstance(value, int) and name in limits and value > max(1000, limits[name])
        ],
    )


def _short(value: float) -> str:
    text = repr(value)
    return text if len(text) < 30 else f"{text[:12]}... ({len(text)} digits)"
