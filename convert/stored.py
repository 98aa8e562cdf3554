"""Recognises and opens whatever is stored at a path, by its content."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from etils import epath

from convert.checkpoint import Checkpoint
from convert.flax_files import FLAX_NAMES, is_flax_folder, open_flax, open_orbax
from convert.hf_config import (
    config_file,
    config_text,
    read_config_text,
    run_config_dict,
)
from convert.torch_files import check_adapters, has_weights, open_torch
from convert.wrappers import without_wrappers
from flax_projector.file_types import recognise
from flax_projector.files import any_path
from flax_projector.run_folder import STATE, RunFolder
from flax_projector.storage import AnyPath, temporary_folder
from flax_projector.storage.bucket import filesystem

_log = logging.getLogger(__name__)

_FOLDERS = """\
  a PyTorch model: model.safetensors, model.safetensors.index.json, pytorch_model.bin,
    pytorch_model.bin.index.json, or a single .safetensors file of any name
  the output of an HF Trainer: checkpoint-N/ with such files
  a converted model: config.json and params/
  a training run: config.json and checkpoints/N/"""


@dataclass(frozen=True)
class StoredModel:
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


def open_stored(path: str | AnyPath, *, step: int | None = None) -> StoredModel:
    """Finds out what is stored at a path and opens it, without reading any tensor.

    Args:
      path: a `.safetensors`, `.index.json`, `.pt`, `.pth` or `.bin` file; an HF folder; a folder of
        the HF Trainer, either one `checkpoint-N` or the folder with all of them; a folder that
        `to_flax` wrote; or the folder of a training run. The last two may be in a bucket.
      step: which checkpoint of a Trainer folder or a run; None takes the latest.

    Raises:
      ValueError: naming the path, if it is none of these or damaged.
    """
    path = any_path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if not isinstance(path, Path):
        path = _fetched(path, step)
    if is_flax_folder(path) and has_weights(path):
        raise ValueError(
            f"{path} holds a model in PyTorch's form and, in params/, one in Flax's: move one of "
            "them to a folder of its own"
        )
    if steps := _run_steps(path):
        return _open_run(RunFolder(path), Path(_choose(path, steps, step)))
    steps = _trainer_steps(path)
    if steps and (step is not None or not has_weights(path)):
        stored = open_stored(_choose(path, steps, step))
        if stored.config_text is None and config_file(path).exists():
            stored = replace(stored, config_text=read_config_text(path))
        return stored
    if step is not None:
        raise ValueError(
            f"{path} has no step {step}: it is neither a folder of checkpoint-N nor a training run"
        )
    if is_flax_folder(path):
        return StoredModel(path, "flax", open_flax(path), read_config_text(path))
    check_adapters(path)
    if path.is_dir() and not has_weights(path):
        names = ", ".join(sorted(file.name for file in path.iterdir()))
        raise ValueError(f"{path} contains {names or 'nothing'}, expected one of\n{_FOLDERS}")
    text = read_config_text(path) if config_file(path).exists() else None
    named = json.loads(text).get("transformers_weights") if text is not None else None
    if named and path.is_dir():  # transformers prefers it to any other file
        raise ValueError(
            f"{config_file(path)} says that the weights are in {named} (transformers_weights): "
            f"pass {path}/{named}"
        )
    return StoredModel(path, "torch", without_wrappers(open_torch(path), str(path)), text)


def _fetched(folder: epath.Path, step: int | None) -> Path:
    """A copy, for the time of this process, of a Flax folder or of one checkpoint of a run."""
    run, names = RunFolder(folder), {path.name for path in folder.iterdir()}
    wanted = []
    if names >= FLAX_NAMES:
        wanted = [folder]
    elif steps := run.steps():
        state = _choose(folder, steps, step) / STATE
        wanted = [run.config, run.prompt, state]
    if not wanted:
        raise ValueError(
            f"{folder} contains {', '.join(sorted(names)) or 'nothing'}, expected config.json and "
            "params/ or checkpoints/N/. Other models are not read from buckets: copy them first, "
            f"`gcloud storage cp -r {folder} .`"
        )
    bucket, local = filesystem(), temporary_folder() / folder.name
    for path in wanted:
        for name in bucket.find(str(path)):
            file = local / epath.Path(f"gs://{name}").relative_to(folder)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bucket.cat_file(name))
    return local


def has_steps(path: str | AnyPath) -> bool:
    """Whether there are several checkpoints to choose from, of the HF Trainer or of a run."""
    path = any_path(path)
    if not isinstance(path, Path):
        return bool(RunFolder(path).steps())
    return bool(_run_steps(path) or _trainer_steps(path))


def _run_steps(folder: Path) -> dict[int, AnyPath]:
    """The checkpoints of a training run by step; other models may have a `checkpoints` as well."""
    is_model = is_flax_folder(folder) or has_weights(folder)
    return {} if is_model else RunFolder(folder).steps()


def _trainer_steps(folder: Path) -> dict[int, Path]:
    """The checkpoints of an HF Trainer by step."""
    found = {p: re.fullmatch(r"checkpoint-(\d+)", p.name) for p in folder.glob("checkpoint-*")}
    return {int(match[1]): path for path, match in found.items() if match and path.is_dir()}


def _choose(folder: AnyPath, steps: Mapping[int, AnyPath], step: int | None) -> AnyPath:
    if step is not None and step not in steps:
        known = ", ".join(map(str, sorted(steps)))
        raise ValueError(f"{folder} has no checkpoint of step {step}, only of {known}")
    chosen = max(steps) if step is None else step
    if len(steps) > 1:
        _log.info("%s: step %d of %d checkpoints", folder, chosen, len(steps))
    return steps[chosen]


def _open_run(run: RunFolder, step_folder: Path) -> StoredModel:
    """The projector in a checkpoint of a training run, which holds the optimizer state as well."""
    config = run.read_config()
    try:
        prompt = run.prompt.read_text("utf-8") if run.prompt.is_file() else None
        text = config_text(run_config_dict(config, prompt))
    except (LookupError, RecursionError, TypeError, ValueError) as error:
        kind = recognise(run.prompt) or f"is not the prompt of a training run: {error!r}"
        raise ValueError(f"{run.prompt} {kind}") from error
    checkpoint = open_orbax(step_folder.resolve() / STATE, subtree="params/")
    return StoredModel(step_folder, "flax", checkpoint, text)
