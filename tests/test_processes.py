"""Runs of several processes on loopback, as hosts would run them: as one, and with every fault.

`make test` has the most telling cases. All of them, with their seconds:

  python -m pytest -s -m '' tests/test_processes.py
"""

import collections
import dataclasses
import json
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file, save_file

import train_tpu
from flax_projector.config import TrainConfig
from flax_projector.training.checkpoints import open_manager
from tests.parity import assert_within
from tests.processes import SLOWLY, Ended, Processes, by_srun, start
from tests.tiny import read_losses, tiny_config

# One at a time: two processes at once are as many as CI has cores.
pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("processes")]

LIMIT_SECS = 60.0
"""In which all processes end after a fault in one: 30 s, doubled for slow machines."""

BATCH = "from flax_projector.data.reader import BatchIterator\n"
MANAGER = "from flax_projector.training.checkpoints import _Manager\n"


def make_config(folder: Path, towers: dict[str, str], **overrides) -> TrainConfig:
    """A run with one bucket, which compiles fast."""
    data = {"bucket_secs": (2.0,), **overrides.pop("data", {})}
    options = {"num_steps": 20, "eval_every_steps": 5, **overrides}
    return tiny_config(folder, towers, data=data, **options)


@pytest.fixture
def config(tmp_path, tiny_towers) -> TrainConfig:
    """A run without evaluations, which would have to be compiled."""
    return make_config(tmp_path / "several", tiny_towers, data={"eval": ()}, eval_every_steps=0)


def num_losses(config: TrainConfig) -> int:
    metrics = Path(config.out) / "metrics.jsonl"
    return metrics.read_text().count('"grad_norm"') if metrics.is_file() else 0


def wait_for_losses(processes: Processes, config: TrainConfig, count: int) -> None:
    while num_losses(config) < count and all(p.poll() is None for p in processes.running):
        time.sleep(0.05)


def assert_all_say(ends: list[Ended], cause: str) -> None:
    """All end with code 1 and the same last line."""
    for end in ends:
        assert end.code == 1, end.text[-3000:]
        assert cause in end.last_line, end.text[-3000:]
    assert len({end.last_line for end in ends}) == 1


@pytest.mark.consistency("ours in one process")
def test_two_processes_train_as_one_and_stop_together(tmp_path, tiny_towers) -> None:
    """A signal to one of them saves and ends both; started again, by srun, they finish.

    JAX notices only SIGTERM by itself.
    """
    one, two = (make_config(tmp_path / name, tiny_towers) for name in ("one", "two"))
    two = dataclasses.replace(two, save_every_steps=1)
    processes = start(two, patch=SLOWLY)
    wait_for_losses(processes, two, 3)
    processes.send(signal.SIGUSR1, 1)
    assert "which is saved: the same command continues" in processes.finish()
    with open_manager(Path(two.out) / "checkpoints", keep=2) as manager:
        stopped_at = manager.latest_step()
    assert stopped_at is not None and 3 <= stopped_at < 20

    assert f"resumed at step {stopped_at}" in start(two, place=by_srun).finish()
    train_tpu.main(one)
    assert_within(np.array(read_losses(two), np.float32), read_losses(one), 1e-4)
    names = [Path(c.out) / "transcripts" / "clips-000020.jsonl" for c in (one, two)]
    assert names[0].read_text() == names[1].read_text()


# --- hosts that differ ------------------------------------------------------------------------


def other_option(config: TrainConfig) -> dict:
    return {"options": {1: ["--optimizer.learning-rate", "0.02"]}}


def other_folder(config: TrainConfig) -> dict:
    return {"options": {1: ["--out", config.out + "-of-another-host"]}}


def longer_clip(config: TrainConfig) -> dict:
    """The longest clip is 0.3 s longer on one host."""
    folder = Path(config.data.train[0]).parent
    other = folder.with_name("longer")
    shutil.copytree(folder, other)
    longest = max(other.glob("*.wav"), key=lambda file: soundfile.info(file).duration)
    samples, rate = soundfile.read(longest)
    soundfile.write(longest, np.append(samples, samples[: int(0.3 * rate)]), rate)
    return {"options": {1: ["--data.train", str(other / "clips.jsonl")]}}


def other_weights(config: TrainConfig) -> dict:
    other = Path(config.out).with_name("llm")
    shutil.copytree(config.llm, other)
    tensors = load_file(other / "model.safetensors")
    tensors[min(tensors)] = tensors[min(tensors)] * 1.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return {"options": {1: ["--llm", str(other)]}}


def other_version(config: TrainConfig) -> dict:
    patch = "import importlib.metadata as m\nv = m.version\n"
    return {"patches": {1: patch + "m.version = lambda name: '9.9' if name == 'jax' else v(name)"}}


def no_checkpoint(config: TrainConfig) -> dict:
    """A host does not see the newest checkpoint."""
    train_tpu.main(dataclasses.replace(config, num_steps=4))
    # As if it had been stopped: the config says 20 steps.
    saved = Path(config.out) / "config.json"
    saved.write_text(saved.read_text().replace('"num_steps": 4', '"num_steps": 20'))
    return {"patches": {1: MANAGER + "_Manager.latest_step = lambda self: None"}}


DIFFERENT = {  # what is different, and what all processes say of it
    other_option: r"--optimizer.learning-rate: 0.01 (process 0 on ",
    longer_clip: "lengths of train: ",
    other_folder: "a folder that all hosts must share: ",
    other_weights: "contents of --llm: ",
    other_version: "jax: ",
    no_checkpoint: "newest checkpoint: 4 (process 0 on ",
}
FAST = (other_option, longer_clip)


@pytest.mark.parametrize(
    "case",
    [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in DIFFERENT],
    ids=lambda case: case.__name__,
)
def test_hosts_that_differ_are_named_before_the_first_step(case, config, report):
    before = num_losses(config)
    options = case(config)
    ends = start(config, **options).end()
    assert_all_say(ends, DIFFERENT[case])
    assert "process 1 on " in ends[0].last_line and "differ: start the same" in ends[1].text
    assert num_losses(config) == before or case is no_checkpoint
    report(f"{case.__name__}: all had ended {max(end.secs for end in ends):.0f} s after the start")


# --- faults while training --------------------------------------------------------------------


READ = BATCH + "at(BatchIterator, '__next__', 9, {})"
FULL = """
import errno
from orbax.checkpoint import StandardCheckpointHandler
from orbax.checkpoint import future
original = StandardCheckpointHandler.async_save
class Failing:
    def result(self, timeout=None):
        say("NOW")
        raise OSError(errno.ENOSPC, "No space left on device")
async def async_save(self, *args, **kwargs):
    return [*(await original(self, *args, **kwargs) or ()), Failing()]
StandardCheckpointHandler.async_save = async_save
"""
FAULTS = {  # where, what, and the cause that all name
    "reading fails": (1, READ.format("fail(OSError('no disk'))"), "process 1 on {}: no disk"),
    "reading fails in process 0": (
        0,
        READ.format("fail(OSError('no disk'))"),
        "process 0 on {}: n",
    ),
    "a bug": (1, READ.format("fail(KeyError('x'))"), "process 1 on {}: KeyError: 'x'"),
    "a bug in a save": (
        0,
        MANAGER + "at(_Manager, 'save', 2, fail(TypeError('x')))",
        "process 0 on {}: TypeError: x",
    ),
    "a full disk in a background save": (1, FULL, "process 1 on {}: "),
    "a full disk in a background save of process 0": (0, FULL, "process 0 on {}: "),
}


@pytest.mark.parametrize(
    "case", [c if c == "reading fails" else pytest.param(c, marks=pytest.mark.slow) for c in FAULTS]
)
def test_an_error_in_one_process_ends_all_with_its_cause(case, config, report):
    where, patch, cause = FAULTS[case]
    processes = start(config, patches={where: patch})
    moment = processes.wait_for("NOW", where)
    ends = processes.end()
    assert_all_say(ends, cause.format(socket.gethostname()))
    assert ("Traceback" in ends[where].text) == ("bug" in case)
    secs = max(end.secs_after(moment, processes) for end in ends)
    assert secs < LIMIT_SECS
    report(f"{case}: all had ended {secs:.1f} s later")


GONE = {  # which process, what happens to it, and what the other one says, whoever notices first
    "killed": (1, signal.SIGKILL, "has ended or does not answer|stopped sending heartbeats"),
    "process 0 killed": (0, signal.SIGKILL, "coordination service"),
    "its machine is gone": (1, signal.SIGSTOP, "stopped sending heartbeats"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", GONE)
def test_a_process_that_is_gone_ends_the_others(case, config, report):
    where, number, cause = GONE[case]
    processes = start(dataclasses.replace(config, num_steps=500), patch=SLOWLY)
    wait_for_losses(processes, config, 3)
    processes.send(number, where)
    moment = time.monotonic()
    processes.running[1 - where].wait(LIMIT_SECS + 30)
    secs = time.monotonic() - moment
    processes.running[where].kill()
    end = processes.end()[1 - where]
    assert end.code != 0 and re.search(cause, end.text), end.text[-3000:]
    report(f"{case}: the other one ended {secs:.1f} s later with code {end.code}")


STOPPED = {  # where a process is when the signal comes, and whether it saves
    "in a step": (READ.format("lambda: time.sleep(2)"), True),
    "in a save": (MANAGER + "at(_Manager, 'save', 2, lambda: time.sleep(2))", True),
    "in compilation": (
        "import jax\nat(jax.stages.Lowered, 'compile', 1, lambda: time.sleep(3))",
        False,
    ),
    "reading hangs": (READ.format("lambda: time.sleep(300)"), True),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", STOPPED)
def test_sigterm_ends_all_well_even_if_one_is_stuck(case, config, report):
    patch, saves = STOPPED[case]
    processes = start(config, patches={1: patch})
    moment = processes.wait_for("NOW", 1)
    processes.send(signal.SIGTERM)
    ends = processes.end()
    assert [end.code for end in ends] == [0, 0], ends[0].text[-3000:] + ends[1].text[-3000:]
    secs = max(end.secs_after(moment, processes) for end in ends)
    assert secs < 2 * LIMIT_SECS
    report(f"SIGTERM {case}: all had ended {secs:.1f} s later")
    assert ("start the same command again" in ends[0].text) != ("which is saved" in ends[0].text), (
        ends[0].text[-3000:]
    )
    processes = start(config)
    assert ("resumed at step" in processes.finish()) == saves
    assert num_losses(config) == config.num_steps


@pytest.mark.slow
def test_sigterm_in_an_evaluation_saves(tmp_path, tiny_towers):
    config = make_config(tmp_path, tiny_towers)
    patch = "from flax_projector.training.evaluate import Evaluator\n"
    processes = start(
        config, patches={1: patch + "at(Evaluator, 'loss', 2, lambda: time.sleep(2))"}
    )
    processes.wait_for("NOW", 1)
    processes.send(signal.SIGTERM)
    assert "step 5, which is saved" in processes.finish()
    assert "resumed at step 5" in start(config).finish()


@pytest.mark.slow
def test_a_slow_good_ending_stays_good(config, report):
    patch = "from flax_projector.run import LoadedModel\nat(LoadedModel, 'write_projector', 1, "
    processes = start(config, patches={0: patch + "lambda: time.sleep(45))"})
    processes.wait_for("NOW")
    processes.finish()
    assert (Path(config.out) / "projector").is_dir()
    report("45 s of writing in process 0: all ended with code 0")


# --- as one -----------------------------------------------------------------------------------


LIST_CLIPS = """
from flax_projector.data import batches
read_clip = batches.read_clip
def listed(utterance, *args, **kwargs):
    with open(os.environ["CLIPS"], "a") as file:
        file.write(utterance.row.id + "\\n")
    return read_clip(utterance, *args, **kwargs)
batches.read_clip = listed
"""


def spoil(config: TrainConfig, numbers: list[int]) -> TrainConfig:
    """Makes clips unreadable, which is only seen when they are read: the manifest has durations."""
    manifest = Path(config.data.train[0])
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for number, row in enumerate(rows):
        clip = manifest.with_name(row["audio"])
        row["duration"] = soundfile.info(clip).duration
        if number in numbers:
            clip.write_bytes(b"no audio")
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_read_every_row_once_and_write_everything_once(count, config, report):
    config = spoil(config, [3, 8])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_bad_rate=1.0))
    lists = [Path(config.out).with_name(f"clips.{i}") for i in range(count)]
    patches = {i: f"os.environ['CLIPS'] = {str(file)!r}" for i, file in enumerate(lists)}
    text = start(config, count, patches={i: p + LIST_CLIPS for i, p in patches.items()}).finish()
    read = [collections.Counter(file.read_text().splitlines()) for file in lists]
    # 20 batches of 8 rows: 13 clips, of which an epoch has 8 and 5.
    assert sum(sum(each.values()) for each in read) == 10 * 13
    assert sum(read, collections.Counter()) == {f"clip{i}": 10 for i in range(13)}
    assert text.count("rows left out: train 2 of 13 (2 undecodable)") == 1
    assert text.count("projector saved in") == 1
    folder = Path(config.out)
    lines = (folder / "bad_rows.jsonl").read_text().splitlines()
    bad = [json.loads(line)["id"] for line in lines]
    assert sorted(bad) == ["clip3", "clip8"] and len(list(folder.glob("bad_rows*"))) == 1
    steps = [
        json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, 21))
    assert len(list((folder / "tensorboard").iterdir())) == 1
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["18", "20"]
    alone = dataclasses.replace(config, out=config.out + "-alone")
    train_tpu.main(alone)
    assert_within(np.array(read_losses(config), np.float32), read_losses(alone), 1e-4)
    report(f"{count} processes: read {[sum(each.values()) for each in read]} clips")


@pytest.mark.slow
def test_too_many_bad_clips_stop_all_at_the_same_step(config):
    config = spoil(config, [2, 3, 8, 9])
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_bad_rate=0.25))
    ends = start(config).end()
    for end in ends:
        assert end.code == 1
        assert "train: 4 of 13 rows are defective (4 undecodable)" in end.text, end.text[-3000:]
    assert ends[0].text.splitlines()[-1] == ends[1].text.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("then", [1, 2, 3])
def test_a_run_whose_process_0_is_killed_in_a_save_goes_on_with_any_number(config, then, report):
    patch = MANAGER + "at(_Manager, '_wait_for_checkpointers', 3, lambda: os.kill(os.getpid(), 9))"
    ends = start(config, patches={0: patch}).end()
    assert ends[0].code == -signal.SIGKILL and ends[1].code != 0
    assert "resumed at step" in start(config, then).finish()
    alone = dataclasses.replace(config, out=config.out + "-alone")
    train_tpu.main(alone)
    ours, expected = np.array(read_losses(config)), np.array(read_losses(alone))
    assert len(ours) == len(expected)
    report(f"then {then} processes: losses within {np.abs(ours - expected).max():.1e}")
    assert_within(ours.astype(np.float32), list(expected), 1e-5)
