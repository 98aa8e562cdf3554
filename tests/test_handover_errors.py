"""Trainings that cannot be handed over, and starts that would not continue them: one error each."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.__main__ import main
from flax_projector.config import CTCConfig
from flax_projector.handover.to_run import to_run
from flax_projector.run_folder import RunFolder
from flax_projector.training.handed_over import check_run
from tests.checkpoints import files_in
from tests.handover import RUN, run_after
from tests.trainer import CONFIG, NUM_STEPS, OPTIMIZER

pytestmark = [
    pytest.mark.torch,
    pytest.mark.usefixtures("log_level"),
    pytest.mark.xdist_group("test_handover"),
]


@pytest.fixture
def checkpoint(after_10, tmp_path) -> Path:
    """A copy of `checkpoint-10` that may be damaged."""
    return shutil.copytree(after_10, tmp_path / "checkpoint-10")


# --- wrong input -----------------------------------------------------------------------------


def change(folder: Path, name: str, edit: Any) -> None:
    """Edits the content of a file of torch.save, or of JSON."""
    file = folder / name
    if name.endswith(".json"):
        content = json.loads(file.read_text())
        edit(content)
        file.write_text(json.dumps(content))
    else:
        content = torch.load(file, weights_only=True)
        edit(content)
        torch.save(content, file)


def groups_of(content: dict) -> list[dict]:
    return content["param_groups"]


def swap(content: dict) -> None:
    """Two moments of other shapes."""
    states = content["state"]
    states[0], states[1] = states[1], states[0]


def move_last(content: dict) -> None:
    """A bias that is decayed."""
    groups_of(content)[0]["params"].append(groups_of(content)[1]["params"].pop(0))


def cut(folder: Path, name: str) -> None:
    """As after a copy that was interrupted."""
    file = folder / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


FILES = ("optimizer.pt", "scheduler.pt", "trainer_state.json")
OPT, SCHED, STATE = FILES
CODE = b"cposix\nsystem\n(S'false'\ntR."
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"

BAD: dict[str, tuple[Any, str]] = {
    **{
        f"no {name}": (lambda f, name=name: (f / name).unlink(), f"has no {name}: the Trainer")
        for name in FILES
    },
    **{f"half of {name}": (lambda f, name=name: cut(f, name), name) for name in FILES},
    **{
        f"{name} of other content": (
            lambda f, name=name: torch.save([1, 2], f / name),
            rf"{name} is damaged \(TypeError",
        )
        for name in (OPT, SCHED)
    },
    **{
        f"code in {name}": (lambda f, name=name: (f / name).write_bytes(CODE), "refused|pickle")
        for name in (OPT, SCHED)
    },
    "pointer": (lambda f: (f / OPT).write_bytes(POINTER), "optimizer.pt is a pointer of Git LFS"),
    "state is a list": (
        lambda f: (f / STATE).write_text("[]"),
        r"trainer_state.json is damaged \(TypeError",
    ),
    "state without a step": (
        lambda f: change(f, STATE, lambda s: s.pop("global_step")),
        r"trainer_state.json is damaged \(KeyError: 'global_step'",
    ),
    "other model": (
        lambda f: change(f, OPT, lambda c: (c["state"].pop(12), groups_of(c)[1]["params"].pop())),
        "has groups of 8 and 4 parameters, the projector has 8 that are decayed and 5 others or 5 "
        "that are decayed and 8 others",
    ),
    "one group": (
        lambda f: change(f, OPT, lambda c: groups_of(c).pop()),
        "has groups of 8 parameters, the projector",
    ),
    "no group": (lambda f: change(f, OPT, lambda c: groups_of(c).clear()), "has groups of no par"),
    "a decayed bias": (lambda f: change(f, OPT, move_last), "has groups of 9 and 4 parameters"),
    "decayed biases": (
        lambda f: change(f, OPT, lambda c: groups_of(c)[1].update(weight_decay=0.2)),
        r"biases are decayed by 0.2; .* with --optimizer.decay-norms the weights of norms",
    ),
    "numbers": (
        lambda f: change(f, OPT, lambda c: groups_of(c)[0]["params"].reverse()),
        "are not numbered from 0 on",
    ),
    "no state": (
        lambda f: change(f, OPT, lambda c: c["state"].pop(3)),
        r"3 \(layers.0.fc2.weight\) +has no state",
    ),
    "one state more": (
        lambda f: change(f, OPT, lambda c: c["state"].update({13: c["state"][0]})),
        "13 +has a state in optimizer.pt, but is in no group",
    ),
    "swapped": (
        lambda f: change(f, OPT, swap),
        r"4 problems\)\n.*exp_avg of input_proj.weight +is float32\[13\], expected \[13, 21\]",
    ),
    "integers": (
        lambda f: change(
            f, OPT, lambda c: c["state"][0].update(exp_avg=c["state"][0]["exp_avg"].int())
        ),
        r"exp_avg of input_proj.weight +is int32\[13, 21\], expected \[13, 21\] of floats",
    ),
    "no tensor": (
        lambda f: change(f, OPT, lambda c: c["state"][0].update(exp_avg=3)),
        r"optimizer.pt is damaged \(TypeError: exp_avg is a int",
    ),
    "SGD": (
        lambda f: change(f, OPT, lambda c: c.update(state={0: {"momentum_buffer": None}})),
        "is not that of torch.optim.AdamW.*: it holds momentum_buffer",
    ),
    "amsgrad": (
        lambda f: change(f, OPT, lambda c: groups_of(c)[0].update(amsgrad=True)),
        "is not that of torch.optim.AdamW, without amsgrad",
    ),
    "Adam": (
        lambda f: change(f, OPT, lambda c: groups_of(c)[0].update(decoupled_weight_decay=False)),
        "is not that of torch.optim.AdamW",
    ),
    "updates": (
        lambda f: change(f, OPT, lambda c: c["state"][2].update(step=torch.tensor(9.0))),
        "different numbers of updates: 10, 9",
    ),
    "rates": (
        lambda f: change(f, OPT, lambda c: groups_of(c)[0].update(lr=1.0)),
        "groups of parameters have different learning rates, betas or eps",
    ),
    "betas": (
        lambda f: change(f, OPT, lambda c: groups_of(c)[0].update(betas=(0.1, 0.2))),
        "groups of parameters have different learning rates, betas or eps",
    ),
    "no rate": (
        lambda f: change(f, SCHED, lambda s: s.update(base_lrs=[0.0, 0.0])),
        r"scheduler.pt +has base_lrs \[0.0, 0.0\]",
    ),
    "two steps": (
        lambda f: change(f, STATE, lambda s: s.update(global_step=11)),
        "is at step 10, but global_step in trainer_state.json is 11",
    ),
    "at its end": (
        lambda f: change(f, STATE, lambda s: s.update(max_steps=10)),
        "10 of 10 steps are done: nothing can be continued",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "contains config.json"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_one_clear_error_and_nothing_is_written(
    checkpoint, tmp_path, what, caplog
) -> None:
    damage, message = BAD[what]
    damage(checkpoint)
    before = files_in(checkpoint)
    with pytest.raises(ValueError, match=message) as caught:
        to_run(checkpoint, tmp_path / "run")
    assert str(checkpoint) in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]
    assert files_in(checkpoint) == before


def test_what_a_command_cannot_hand_over(after_10, tmp_path, caplog) -> None:
    trainer, run = str(after_10), str(run_after(4, tmp_path / "run"))
    finished = str(run_after(NUM_STEPS, tmp_path / "finished"))
    warm = dataclasses.replace(RUN, ctc=CTCConfig(num_steps=9))
    spelling = str(run_after(5, tmp_path / "spelling", warm))
    out = str(tmp_path / "out")
    commands = {
        ("to-flax", run, out): "is no checkpoint of the HF Trainer",
        ("to-flax", trainer, out, "--dtype", "bfloat16"): "goes with neither --dtype nor",
        ("to-flax", trainer, out, "--ignore", "x"): "goes with neither --dtype nor",
        ("to-flax", trainer, run): "exists: choose another destination",
        ("to-flax", trainer, run, "--overwrite"): "will not be overwritten",
        ("to-torch", trainer, out): "is not the config of a training run",
        ("to-torch", run, out, "--prefix", ""): "--prefix is for weights alone",
        ("to-torch", run, out, "--dtype", "float16"): "too narrow for an optimizer's moments",
        ("to-torch", run, out, "--step", "5"): "has no checkpoint of step 5, only of 4",
        ("to-torch", finished, out): "has done all its 20 steps",
        ("to-torch", spelling, out): "hand it over after step 9",
    }
    for command, message in commands.items():
        caplog.clear()
        assert main([*command, "--trainer"]) == 2, command
        assert message in caplog.text, command
        assert not Path(out).exists()


def test_a_damaged_run_is_one_clear_error(tmp_path, caplog) -> None:
    run = run_after(4, tmp_path / "run")
    for file in (run / "checkpoints/4/state").rglob("*"):
        if file.is_file() and file.stat().st_size > 500 and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:100])
    assert main(["to-torch", str(run), str(tmp_path / "out"), "--trainer"]) == 2
    assert str(run / "checkpoints/4") in caplog.text
    assert not (tmp_path / "out").exists()


# --- the first start -------------------------------------------------------------------------


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "decay": (
        {"optimizer": dataclasses.replace(OPTIMIZER, decay_norms=False)},
        "--optimizer.decay-norms: True -> False",
    ),
    "AdamW": (
        {"optimizer": dataclasses.replace(OPTIMIZER, b1=0.9, weight_decay=0.01)},
        "--optimizer.b1: 0.8 -> 0.9\n  --optimizer.weight-decay: 0.1 -> 0.01",
    ),
    "length": ({"num_steps": 30}, "--num-steps: 20 -> 30"),
    "warm start": ({"ctc": CTCConfig(num_steps=3)}, "--ctc.num-steps: 0 -> 3"),
    "projector": (
        {"projector": dataclasses.replace(CONFIG, rms_norm_eps=1e-5, projector_hidden_dim=None)},
        "--projector.projector-hidden-dim: 21 -> 52\n  --projector.rms-norm-eps: 1e-06 -> 1e-05",
    ),
    "warm-up": (
        {"optimizer": dataclasses.replace(OPTIMIZER, warmup_steps=2)},
        "of step 11, is 0.00191049, but this run's is 0.00176047: set --optimizer.warmup-steps",
    ),
    "final rate": (
        {"optimizer": dataclasses.replace(OPTIMIZER, final_lr_rate=0.1)},
        "set --optimizer.warmup-steps and --optimizer.final-lr-rate as they were there",
    ),
    "no resume": ({"resume": False}, "holds a run: choose another --out, or pass --resume"),
}


@pytest.fixture(scope="module")
def handed_over(after_10, tmp_path_factory) -> RunFolder:
    """A run folder made of `checkpoint-10`."""
    return RunFolder(to_run(after_10, tmp_path_factory.mktemp("handed_over") / "run"))


@pytest.mark.parametrize("what", OTHERS)
def test_a_start_with_other_settings_is_an_error_that_says_how_to_keep_theirs(
    handed_over, what
) -> None:
    assert check_run(handed_over, RUN) == frozenset()
    changed, message = OTHERS[what]
    with pytest.raises(ValueError, match=message):
        check_run(handed_over, dataclasses.replace(RUN, **changed))


def test_the_command_that_continues_is_complete(after_10, tmp_path, caplog) -> None:
    assert main(["to-flax", str(after_10), str(tmp_path / "run"), "--trainer"]) == 0
    for option in (
        f"python train_tpu.py PRESET --out {tmp_path / 'run'}",
        "--num-steps 20",
        "--optimizer.warmup-steps 3",  # which no file says
        "--optimizer.decay-norms",
        "--projector.projector-hidden-dim 21",
    ):
        assert option in caplog.text
