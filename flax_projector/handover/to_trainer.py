"""From a run folder to a `checkpoint-N` that the HF Trainer continues."""

import logging
from pathlib import Path

from convert import engine
from convert.api import check_apart
from convert.checkpoint import DTYPES, Checkpoint
from convert.hf_config import CONFIG, with_dtype
from convert.models import PROJECTOR
from convert.paths import replacing
from convert.round_trip import check_round_trip
from convert.stored import open_stored
from convert.torch_files import WEIGHTS, open_torch, write_safetensors
from convert.trainer.files import NAMES, Training, read_training, write_training
from flax_projector.config import TrainConfig
from flax_projector.files import any_path, local_path
from flax_projector.handover.states import read_state
from flax_projector.run_folder import RunFolder
from flax_projector.training.state import learning_rate

_log = logging.getLogger(__name__)


def to_trainer(
    src: str | Path,
    dst: str | Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> Path:
    """Makes a checkpoint of the HF Trainer of one of a run.

    Args:
      src: the folder of a run.
      dst: the new folder.
      step: which checkpoint of the run; None takes the latest.
      dtype: cast weights and moments to "bfloat16"; None keeps every bit.
      overwrite: replace an earlier one.
      verify: read the result and compare every byte.

    Returns:
      `dst`.

    Raises:
      ValueError: if it is not a run with a checkpoint that the Trainer can continue; nothing is
        written then.
    """
    if dtype == "float16":
        raise ValueError("float16 is too narrow for an optimizer's moments: choose bfloat16")
    folder = RunFolder(any_path(src))
    config = folder.read_config()
    stored = open_stored(src, step=step)
    number = int(stored.path.name)
    _check_schedule(config, number, folder)
    found = read_state(folder, number, config.projector)
    plan = engine.plan_to_torch(
        PROJECTOR.table, found.params.infos, PROJECTOR.leaves(config.projector), prefix=""
    )
    weights, exp_avg, exp_avg_sq = (
        _cast(engine.as_torch(plan, leaves), dtype) for leaves in (found.params, found.mu, found.nu)
    )
    optimizer = config.optimizer
    training = Training(
        step=number - config.ctc.num_steps,
        num_steps=config.num_steps - config.ctc.num_steps,
        updates=found.updates,
        learning_rate=optimizer.learning_rate,
        next_rate=learning_rate(config, number),
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        decay_norms=optimizer.decay_norms,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
    )
    text = stored.config_text or ""
    prefix = PROJECTOR.table.prefixes[0]
    prefixed = weights.renamed({prefix + name: name for name in weights.infos})
    dst = local_path(dst)
    check_apart(stored, dst)
    with replacing(dst, names={CONFIG, WEIGHTS, *NAMES}, overwrite=overwrite) as part:
        part.mkdir()
        write_safetensors(part / WEIGHTS, prefixed)
        (part / CONFIG).write_text(with_dtype(text, dtype) if dtype else text, "utf-8")
        write_training(part, training, config.projector, batch_size=config.data.batch_size)
        if verify:
            check_round_trip(prefixed, open_torch(part / WEIGHTS))
            back = read_training(part, config.projector)
            check_round_trip(exp_avg, back.exp_avg)
            check_round_trip(exp_avg_sq, back.exp_avg_sq)
            _log.info("verified: %d parameters and their moments are identical", len(plan.leaves))
    if dtype:
        _log.info("weights and moments were cast from float32 to %s: not bit for bit", dtype)
    _say_how(config, training, dst)
    return dst


def _cast(tensors: Checkpoint, dtype: str | None) -> Checkpoint:
    return tensors if dtype is None else tensors.cast(DTYPES[dtype])


def _check_schedule(config: TrainConfig, step: int, folder: RunFolder) -> None:
    if step >= config.num_steps:
        raise ValueError(
            f"{folder.path} has done all its {step} steps: there is nothing to continue, so leave "
            "out --trainer"
        )
    if step <= config.ctc.num_steps > 0:
        raise ValueError(
            f"{folder.path} is in its warm start by CTC at step {step}, which the HF Trainer does "
            f"not have: hand it over after step {config.ctc.num_steps}"
        )


def _say_how(config: TrainConfig, training: Training, dst: Path) -> None:
    """Logs what the Trainer must be given, which it does not take from the folder."""
    optimizer, kind = config.optimizer, "cosine"
    more = {}
    if optimizer.final_lr_rate:
        kind = "cosine_with_min_lr"
        more = {"lr_scheduler_kwargs": {"min_lr_rate": optimizer.final_lr_rate}}
    arguments = {
        "max_steps": training.num_steps,
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": kind,
        "warmup_steps": optimizer.warmup_steps,
        **more,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.b1,
        "adam_beta2": optimizer.b2,
        "adam_epsilon": optimizer.eps,
        "max_grad_norm": optimizer.clip_norm,
    }
    listed = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    _log.info(
        "step %d of %d; to continue: trainer.train(resume_from_checkpoint=%r) with\n"
        "  TrainingArguments(%s)",
        training.step,
        training.num_steps,
        str(dst),
        listed,
    )
    if optimizer.weight_decay and not optimizer.decay_norms:
        _log.warning(
            "WARNING: this run does not decay the weights of norms. The HF Trainer does, and will "
            "refuse optimizer.pt unless its get_decay_parameter_names leaves them out: "
            "docs/convert.md shows how"
        )
