"""From a `checkpoint-N` of the HF Trainer to a run folder that `train_tpu.py` continues."""

import logging
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax

from convert import engine
from convert.checkpoint import DTYPES, Checkpoint
from convert.hf_config import training as heard
from convert.models import PROJECTOR, config_text_of, detect
from convert.paths import replacing
from convert.round_trip import check_round_trip
from convert.stored import open_stored
from convert.trainer.files import Training, read_training
from convert.trees import read_tree
from flax_projector.config import ProjectorConfig, option
from flax_projector.data.reader import state_at
from flax_projector.files import check_orbax_path, local_path
from flax_projector.handover.states import any_optimizer, read_state
from flax_projector.run_folder import RunFolder
from flax_projector.training.checkpoints import open_manager, save
from flax_projector.training.handed_over import HandedOver, write_handed_over
from flax_projector.training.state import continued_state
from flax_projector.training.step_log import Totals

_log = logging.getLogger(__name__)

_F32 = DTYPES["float32"]


def to_run(
    src: str | Path,
    dst: str | Path,
    *,
    step: int | None = None,
    given: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> Path:
    """Makes a run folder of a checkpoint of the HF Trainer.

    Args:
      src: a `checkpoint-N`, or the folder with all of them.
      dst: the run folder.
      step: which `checkpoint-N`; None takes the latest.
      given: fields of `ProjectorConfig` that its config.json lacks.
      overwrite: replace an earlier one that no run has continued yet.
      verify: read the result and compare every byte.

    Returns:
      `dst`.

    Raises:
      ValueError: if it is not a complete checkpoint of a projector that AdamW trains; nothing is
        written then.
    """
    stored = open_stored(src, step=step)
    if stored.side == "flax":
        raise ValueError(f"{src} is no checkpoint of the HF Trainer: train_tpu.py continues a run")
    kind = detect(stored)
    if kind is not PROJECTOR:
        raise ValueError(f"{src} is a {kind.name}, but only projectors are trained")
    text = config_text_of(stored, kind, given or {})
    config: ProjectorConfig = kind.parse_text(text, str(stored.path))
    folder = stored.path if stored.path.is_dir() else stored.path.parent
    leaves = kind.leaves_for(config, stored)
    training = read_training(folder, config)
    found = {
        "weights": stored.checkpoint,
        "running means of gradients": training.exp_avg,
        "running means of their squares": training.exp_avg_sq,
    }
    parts = {
        what: engine.as_flax(engine.plan_to_flax(kind.table, tensors.infos, leaves), tensors)
        for what, tensors in found.items()
    }
    wide = {what: _widened(what, checkpoint) for what, checkpoint in parts.items()}
    params, mu, nu = map(read_tree, wide.values())
    adam = optax.ScaleByAdamState(jnp.int32(training.updates), mu, nu)
    state = continued_state(params, adam, any_optimizer(), training.step)
    options = _options(training, config, heard(text))

    dst = local_path(dst)
    check_orbax_path(dst, is_new=True)
    names = {RunFolder(dst).checkpoints.name, RunFolder(dst).handed_over.name}
    with replacing(dst, names=names, overwrite=overwrite) as part:
        run = RunFolder(part)
        handed_over = HandedOver(training.step, training.next_rate, options)
        write_handed_over(run, handed_over)
        position = {"iterator": state_at(training.step), "totals": asdict(Totals())}
        with open_manager(run.checkpoints, keep=1) as manager:
            save(manager, training.step, state, position)
        if verify:
            back = read_state(run, training.step, config)
            for before, after in zip(wide.values(), (back.params, back.mu, back.nu), strict=True):
                check_round_trip(before, after)
            _log.info("verified: %d parameters and their moments are identical", len(leaves))
    if (warmup := _warmup_steps(training)) is not None:
        options["optimizer.warmup_steps"] = warmup
    shown = _command(dst, options)
    _log.info("step %d of %d; to continue:\n%s", training.step, training.num_steps, shown)
    return dst


def _widened(what: str, checkpoint: Checkpoint) -> Checkpoint:
    """In float32, as a run keeps everything."""
    others = {str(info.dtype) for info in checkpoint.infos.values()} - {_F32.name}
    if others:
        _log.info("%s: %s -> float32", what, ", ".join(sorted(others)))
    return checkpoint.cast(_F32)


def _options(
    training: Training, config: ProjectorConfig, heard: Mapping[str, str]
) -> dict[str, Any]:
    """What the files say of our options, by dotted name."""
    projector = {f"projector.{name}": value for name, value in asdict(config).items()}
    del projector["projector.projector_init_std"]  # is of no use any more
    projector["projector.projector_hidden_dim"] = config.hidden_dim
    return {
        **projector,
        **heard,
        "ctc.num_steps": 0,
        "num_steps": training.num_steps,
        "optimizer.learning_rate": training.learning_rate,
        "optimizer.b1": training.b1,
        "optimizer.b2": training.b2,
        "optimizer.eps": training.eps,
        "optimizer.weight_decay": training.weight_decay,
        "optimizer.decay_norms": training.decay_norms,
    }


def _warmup_steps(training: Training) -> int | None:
    """The length of the warm-up with which a cosine to 0 has this learning rate, if there is one.

    It is in no file that can be read without running code.
    """
    done, total = training.step, training.num_steps
    wanted = training.next_rate / training.learning_rate

    def error(warmup: int) -> float:
        decay = 0.5 * (1 + math.cos(math.pi * (done - warmup) / (total - warmup)))
        return abs((done / warmup if done < warmup else decay) - wanted)

    progress = math.acos(min(1.0, max(-1.0, 2 * wanted - 1))) / math.pi
    found = {round(done / wanted)} if wanted > 0 else set()
    if progress < 1:
        found.add(round((done - progress * total) / (1 - progress)))
    fitting = [n for n in found if 0 <= n < total and error(n) < 1e-6]
    return min(fitting, key=error, default=None)


def _command(dst: Path, options: Mapping[str, Any]) -> str:
    """The command that continues the run, but for its data and towers."""
    lines = [f"  python train_tpu.py PRESET --out {shlex.quote(str(dst))}"]
    for name, value in options.items():
        if value is True:
            lines.append(option(name))
        elif value is not False:
            lines.append(f"{option(name)} {shlex.quote(str(value))}")
    return " \\\n    ".join(lines)
