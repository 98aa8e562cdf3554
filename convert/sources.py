"""What lies at a path: any form of checkpoint that can be converted, told by its content."""

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from convert.checkpoint import Checkpoint
from convert.flax_files import is_flax_folder, open_flax, open_orbax
from convert.hf_config import (
    CONFIG,
    config_file,
    config_text,
    read_config_text,
    run_config_dict,
)
from convert.torch_files import has_weights, open_torch
from flax_projector.config import from_json

_log = logging.getLogger(__name__)

_OF_RUN = "checkpoints/*"  # one Orbax checkpoint a step
_OF_TRAINER = "checkpoint-*"
_FOLDERS = """\
  a model of PyTorch: model.safetensors, model.safetensors.index.json, pytorch_model.bin,
    pytorch_model.bin.index.json, or one .safetensors file of any name (of several, name one)
  the output of an HF Trainer: checkpoint-N/ with such files
  a converted model: config.json and params/
  a training run: config.json and checkpoints/N/"""


@dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
      path: of what holds the weights.
      side: whether it has torch keys or flax paths.
      checkpoint: its tensors.
      config_text: of the config.json that belongs to it; None if there is none.
    """

    path: Path
    side: Literal["torch", "flax"]
    checkpoint: Checkpoint
    config_text: str | None


def open_source(path: str | Path, *, step: int | None = None) -> Source:
    """Finds out what lies at a path and opens it; no tensor is read.

    Args:
      path: a `.safetensors`, `.index.json`, `.pt`, `.pth` or `.bin` file; an HF folder; a folder of
        the HF Trainer, either one `checkpoint-N` or the folder with all of them; a folder that
        `python -m convert to-flax` wrote; or the folder of a training run of ours.
      step: which checkpoint of a Trainer folder or of a run; None takes the latest.

    Raises:
      ValueError: naming the path, if it is none of these or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if steps := _steps(path, _OF_RUN):
        return _open_run(_choose(path, steps, step))
    steps = _steps(path, _OF_TRAINER)
    if steps and (step is not None or not has_weights(path)):
        source = open_source(_choose(path, steps, step))
        if source.config_text is None and config_file(path).exists():
            source = replace(source, config_text=read_config_text(path))
        return source
    if step is not None:
        raise ValueError(
            f"{path} has no step {step}: it is not a folder of checkpoint-N, nor a training run"
        )
    if is_flax_folder(path):
        return Source(path, "flax", open_flax(path), read_config_text(path))
    if path.is_dir() and not has_weights(path):
        held = ", ".join(sorted(file.name for file in path.iterdir()))
        raise ValueError(f"{path} holds {held or 'nothing'}, expected one of\n{_FOLDERS}")
    text = read_config_text(path) if config_file(path).exists() else None
    return Source(path, "torch", open_torch(path), text)


def has_steps(path: str | Path) -> bool:
    """Whether a step can be chosen: in a folder of the HF Trainer, or of a training run."""
    return any(_steps(Path(path), pattern) for pattern in (_OF_RUN, _OF_TRAINER))


def _steps(folder: Path, pattern: str) -> dict[int, Path]:
    """The folders that end in the number of a step."""
    found = {path: re.search(r"\d+$", path.name) for path in folder.glob(pattern) if path.is_dir()}
    return {int(match[0]): path for path, match in found.items() if match}


def _choose(folder: Path, steps: dict[int, Path], step: int | None) -> Path:
    if step is not None and step not in steps:
        known = ", ".join(map(str, sorted(steps)))
        raise ValueError(f"{folder} has no checkpoint of step {step}; it has {known}")
    chosen = max(steps) if step is None else step
    _log.info("%s: step %d of %d checkpoints", folder, chosen, len(steps))
    return steps[chosen]


def _open_run(step_folder: Path) -> Source:
    """The projector in a checkpoint of a training run, which holds the optimizer too."""
    run = step_folder.parents[1]
    try:
        text = config_text(run_config_dict(from_json(read_config_text(run))))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{run / CONFIG} is not the config of a training run: {error}") from error
    checkpoint = open_orbax(step_folder.resolve() / "state", subtree="params/")
    return Source(step_folder, "flax", checkpoint, text)
