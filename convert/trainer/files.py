"""Reads and writes optimizer.pt, scheduler.pt and trainer_state.json."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.checkpoint import DTYPES, Checkpoint
from convert.errors import Problem, raise_any
from convert.torch_save import load_saved, save_content, to_tensor
from convert.trainer.groups import Shape, grouped, registered
from flax_projector.config import ProjectorConfig
from flax_projector.file_types import recognise
from flax_projector.files import parse_json, reading

OPTIMIZER, SCHEDULER, STATE = "optimizer.pt", "scheduler.pt", "trainer_state.json"
NAMES = frozenset({OPTIMIZER, SCHEDULER, STATE})

_MOMENTS = ("exp_avg", "exp_avg_sq")
_WAY_OUT = "copy it again, or take another checkpoint-N"


@dataclass(frozen=True)
class Training:
    """A training by AdamW that is under way, without its weights.

    Attributes:
      step: updates done, which is where the schedule of the learning rate is.
      num_steps: updates of the whole training.
      updates: what Adam corrects its moments by; `step`, unless it began before the schedule.
      learning_rate: the schedule's highest.
      next_rate: learning rate of the next update.
      b1: decay of the running mean of gradients.
      b2: decay of the running mean of their squares.
      eps: added to its root.
      weight_decay: of the parameters that are decayed: the kernels, and maybe norms.
      decay_norms: whether the weights of norms are decayed.
      exp_avg: the running mean of every parameter's gradients, by torch key without prefix.
      exp_avg_sq: that of their squares.
    """

    step: int
    num_steps: int
    updates: int
    learning_rate: float
    next_rate: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    decay_norms: bool
    exp_avg: Checkpoint
    exp_avg_sq: Checkpoint


def read_training(folder: Path, config: ProjectorConfig) -> Training:
    """Reads what lies beside the weights in a `checkpoint-N` of the HF Trainer.

    Args:
      folder: the checkpoint.
      config: of the projector, the only model with parameters that are trained.

    Raises:
      ValueError: naming the file, if one is missing, damaged or contains objects other than
        tensors; or if torch is not installed.
      ConversionError: if they do not describe a training of this projector by AdamW.
    """
    if missing := sorted(name for name in NAMES if not (folder / name).is_file()):
        raise ValueError(
            f"{folder} has no {' and no '.join(missing)}: the Trainer saves them unless "
            "save_only_model is set. Without them, convert the projector alone (leave out "
            "--trainer), and begin a new run with it (train_tpu.py --init-projector)"
        )
    with _reading(folder / STATE) as path:
        done, total = _parse_state(path.read_text("utf-8"))
    saved = {name: load_saved(_checked(folder / name)) for name in (OPTIMIZER, SCHEDULER)}
    with _reading(folder / SCHEDULER):
        place = _parse_scheduler(saved[SCHEDULER].content)
    with _reading(folder / OPTIMIZER):
        optimizer = _parse_optimizer(saved[OPTIMIZER].content)
    title = f"{folder} does not hold a training that can be continued"
    raise_any(title, _misfits(optimizer, place, done, total))
    shapes = registered(config)
    names, decay_norms = _names(optimizer, shapes, title)
    raise_any(title, _misfitting_states(optimizer, names))

    moments = {
        moment: saved[OPTIMIZER].checkpoint(
            {name: optimizer.states[number][moment] for number, name in enumerate(names)}
        )
        for moment in _MOMENTS
    }
    raise_any(title, _misfitting_moments(moments, shapes))
    first = optimizer.groups[0]
    return Training(
        step=done,
        num_steps=total,
        updates=int(optimizer.states[0]["step"]),
        learning_rate=place.base_rates[0],
        next_rate=place.next_rates[0],
        b1=first.betas[0],
        b2=first.betas[1],
        eps=first.eps,
        weight_decay=first.weight_decay,
        decay_norms=decay_norms and first.weight_decay > 0,
        **moments,
    )


def write_training(
    folder: Path, training: Training, config: ProjectorConfig, *, batch_size: int
) -> None:
    """Writes the files that `read_training` reads into a folder, for the HF Trainer.

    Args:
      folder: to which the weights belong as well.
      training: whose moments are written in the dtype that they have.
      config: of the projector.
      batch_size: clips per update, which the Trainer compares with its own.

    Raises:
      OSError: if they cannot be written.
    """
    import torch

    groups = grouped(
        registered(config), decay_norms=training.decay_norms or not training.weight_decay
    )
    names = [name for group in groups for name in group]
    states = {
        number: {
            "step": torch.tensor(float(training.updates)),
            "exp_avg": to_tensor(training.exp_avg.read(name)),
            "exp_avg_sq": to_tensor(training.exp_avg_sq.read(name)),
        }
        for number, name in enumerate(names)
    }
    numbers = {name: number for number, name in enumerate(names)}
    param_groups = [
        {
            "weight_decay": decay,
            "lr": training.next_rate,
            "betas": (training.b1, training.b2),
            "eps": training.eps,
            "amsgrad": False,
            "maximize": False,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": None,
            "decoupled_weight_decay": True,
            "initial_lr": training.learning_rate,
            "params": [numbers[name] for name in group],
        }
        for group, decay in zip(groups, (training.weight_decay, 0.0), strict=True)
    ]
    save_content(folder / OPTIMIZER, {"state": states, "param_groups": param_groups})
    scheduler = {  # of `LambdaLR`
        "base_lrs": [training.learning_rate] * len(groups),
        "last_epoch": training.step,
        "_step_count": training.step + 1,
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "_last_lr": [training.next_rate] * len(groups),
        "lr_lambdas": [{} for _ in groups],
    }
    save_content(folder / SCHEDULER, scheduler)
    state = {
        "global_step": training.step,
        "max_steps": training.num_steps,
        "train_batch_size": batch_size,
        "stateful_callbacks": {"TrainerControl": {"args": {}, "attributes": {}}},  # must be there
        "log_history": [],
    }
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n", "utf-8")


# --- what the files hold ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Parameters with the same settings."""

    numbers: list[int]
    rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    is_adamw: bool


@dataclass(frozen=True)
class _Optimizer:
    groups: list[_Group]
    states: dict[int, dict[str, Any]]


@dataclass(frozen=True)
class _Schedule:
    step: int
    base_rates: list[float]
    next_rates: list[float]


def _checked(path: Path) -> Path:
    """A file that is not something else, as the pointer of Git LFS is."""
    if kind := recognise(path):
        raise ValueError(f"{path} {kind}")
    return path


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Path]:
    with reading(_checked(path), way_out=_WAY_OUT):
        yield path


def _parse_state(text: str) -> tuple[int, int]:
    data = parse_json(text)
    return _int(data["global_step"]), _int(data["max_steps"])


def _parse_scheduler(content: Any) -> _Schedule:
    rates = ([float(rate) for rate in content[key]] for key in ("base_lrs", "_last_lr"))
    return _Schedule(_int(content["last_epoch"]), *rates)


def _parse_optimizer(content: Any) -> _Optimizer:
    import torch

    groups = [
        _Group(
            numbers=[_int(number) for number in group["params"]],
            rate=float(group["lr"]),
            betas=(float(group["betas"][0]), float(group["betas"][1])),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            is_adamw=group.get("decoupled_weight_decay", True)
            and not group.get("amsgrad")
            and not group.get("maximize"),
        )
        for group in content["param_groups"]
    ]
    states = {_int(number): dict(state) for number, state in content["state"].items()}
    for state in states.values():
        if "step" in state:
            state["step"] = float(state["step"])
        for moment in state.keys() & set(_MOMENTS):
            if not isinstance(state[moment], torch.Tensor):
                raise TypeError(f"{moment} is a {type(state[moment]).__name__}")
    return _Optimizer(groups, states)


def _int(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} where a whole number was expected")
    return value


# --- what is wrong with them -----------------------------------------------------------------


def _misfits(optimizer: _Optimizer, place: _Schedule, done: int, total: int) -> list[Problem]:
    """What the files say of the training as a whole, and we cannot continue."""
    groups, states = optimizer.groups, optimizer.states
    settings = {(group.rate, group.betas, group.eps) for group in groups}
    rates = {*place.next_rates, *(group.rate for group in groups)}
    kinds = {tuple(sorted(map(str, state))) for state in states.values()}
    updates = {f"{state.get('step', 0):g}" for state in states.values()}
    problems = []
    if kinds - {("exp_avg", "exp_avg_sq", "step")} or not all(g.is_adamw for g in groups):
        held = ", ".join(sorted({key for kind in kinds for key in kind})) or "nothing"
        text = f"is not that of torch.optim.AdamW, without amsgrad and maximize: it holds {held}"
        problems.append(Problem("optimizer", OPTIMIZER, text))
    elif len(updates) > 1:
        text = f"parameters have done different numbers of updates: {', '.join(sorted(updates))}"
        problems.append(Problem("step", OPTIMIZER, text))
    if len(settings) > 1 or len(set(place.base_rates)) != 1 or len(rates) > 1:
        text = "groups of parameters have different learning rates, betas or eps"
        problems.append(Problem("groups", f"{OPTIMIZER}, {SCHEDULER}", text))
    if not all(0 < rate < math.inf for rate in place.base_rates):
        problems.append(Problem("rate", SCHEDULER, f"has base_lrs {place.base_rates}"))
    if place.step != done:
        text = f"is at step {place.step}, but global_step in {STATE} is {done}"
        problems.append(Problem("step", SCHEDULER, text))
    if not 0 < done < total:
        text = f"{done} of {total} steps are done: nothing can be continued"
        problems.append(Problem("step", STATE, text))
    return problems


def _names(
    optimizer: _Optimizer, shapes: Mapping[str, Shape], title: str
) -> tuple[list[str], bool]:
    """The parameters by number, and whether the norms are among those that are decayed."""
    sizes = [len(group.numbers) for group in optimizer.groups]
    known = {}
    for decay_norms in (True, False):
        groups = grouped(shapes, decay_norms=decay_norms)
        known[tuple(map(len, groups))] = groups, decay_norms
    if tuple(sizes) not in known:
        expected = " or ".join(f"{a} that are decayed and {b} others" for a, b in known)
        text = f"has groups of {_listed(sizes)} parameters, the projector has {expected}"
        raise_any(title, [Problem("parameters", OPTIMIZER, text)])
    (decayed, others), decay_norms = known[tuple(sizes)]
    first, second = optimizer.groups
    problems = []
    if first.numbers + second.numbers != [*range(len(shapes))]:
        problems.append(Problem("parameters", OPTIMIZER, "are not numbered from 0 on"))
    if second.weight_decay:
        text = (
            f"biases are decayed by {second.weight_decay:g}; train_tpu.py decays kernels alone, "
            "and with --optimizer.decay-norms the weights of norms"
        )
        problems.append(Problem("decay", OPTIMIZER, text))
    raise_any(title, problems)
    return decayed + others, decay_norms


def _misfitting_states(optimizer: _Optimizer, names: list[str]) -> list[Problem]:
    numbers = set(range(len(names)))
    return [
        Problem("missing", f"{number} ({names[number]})", f"has no state in {OPTIMIZER}")
        for number in numbers - optimizer.states.keys()
    ] + [
        Problem("unexpected", str(number), f"has a state in {OPTIMIZER}, but is in no group")
        for number in optimizer.states.keys() - numbers
    ]


def _misfitting_moments(
    moments: Mapping[str, Checkpoint], shapes: Mapping[str, Shape]
) -> list[Problem]:
    return [
        Problem("moment", f"{moment} of {name}", f"is {info.dtype}{list(info.shape)}, {expected}")
        for moment, checkpoint in moments.items()
        for name, info in checkpoint.infos.items()
        if (expected := f"expected {list(shapes[name])} of floats")
        and (info.shape != shapes[name] or info.dtype not in DTYPES.values())
    ]


def _listed(numbers: list[int]) -> str:
    return " and ".join(map(str, numbers)) or "no"
