"""Runs that another program has begun: they go on with its settings."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax_projector.config import TrainConfig, option
from flax_projector.files import reading, write_atomically
from flax_projector.run_folder import RunFolder
from flax_projector.training.state import learning_rate

_CLOSE = 3e-6
"""Of the highest learning rate: ours is computed in f32."""


@dataclass(frozen=True)
class HandedOver:
    """What a run must have in common with the training that it continues.

    Attributes:
      step: steps that were done before.
      learning_rate: of the next step.
      options: values of options by dotted name.
    """

    step: int
    learning_rate: float
    options: Mapping[str, Any]


def write_handed_over(folder: RunFolder, handed_over: HandedOver) -> None:
    """Saves it in a run folder."""
    text = json.dumps(dataclasses.asdict(handed_over), indent=2) + "\n"
    write_atomically(folder.handed_over, text)


def check_run(folder: RunFolder, config: TrainConfig) -> frozenset[str]:
    """Checks that a folder holds no run, this one, or one that was handed over to it.

    Args:
      folder: the run folder.
      config: of the run; resolved.

    Returns:
      What `RunFolder.check` returns.

    Raises:
      ValueError: as `RunFolder.check`; or, if the training that it continues had other settings,
        listing them.
    """
    moved = folder.check(config)
    if not folder.handed_over.is_file():
        return moved
    with reading(folder.handed_over, way_out="hand the training over again"):
        before = HandedOver(**json.loads(folder.handed_over.read_text("utf-8")))
        values = {name: (value, _value(config, name)) for name, value in before.options.items()}
        rate = float(before.learning_rate)
        ours = learning_rate(config, before.step)
    wrong = [f"{option(name)}: {a!r} -> {b!r}" for name, (a, b) in values.items() if a != b]
    if wrong:
        listed = "\n  ".join(wrong)
        raise ValueError(
            f"{folder.path} continues a training with other settings:\n  {listed}\n"
            "Give these options as they were there, or begin a new run with its projector "
            "(--init-projector)."
        )
    if abs(ours - rate) > _CLOSE * config.optimizer.learning_rate:
        raise ValueError(
            f"{folder.path} continues a training whose next learning rate, of step "
            f"{before.step + 1}, is {rate:g}, but this run's is {ours:g}: set "
            "--optimizer.warmup-steps and --optimizer.final-lr-rate as they were there. Its "
            "schedule must be a warm-up with cosine decay"
        )
    return moved


def _value(config: TrainConfig, name: str) -> Any:
    """The value of an option by its dotted name."""
    if name == "projector.projector_hidden_dim":
        return config.projector.hidden_dim  # its default is resolved
    return functools.reduce(getattr, name.split("."), config)
