"""Runs that are stopped at any moment, and continue."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import train_tpu
from flax_projector.config import TrainConfig, to_json
from flax_projector.data.reader import STOP_SIGNALS
from flax_projector.training.checkpoints import open_manager
from flax_projector.training.evaluate import Evaluator
from flax_projector.training.metrics import MetricsWriter
from flax_projector.training.preemption import Preempted, PreemptionGuard
from tests.tiny import final_params, read_losses, tiny_config

pytestmark = pytest.mark.torch

ROOT = Path(train_tpu.__file__).parent
PROGRAM = """
import os, signal, sys, time
import train_tpu
from flax_projector import logs, run
from flax_projector.config import from_json
from flax_projector.training import evaluate, preemption, train_step

preemption.GRACE_SECS = 0.5
# Shells start jobs with the one ignored, nohup with the other.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

def stuck(*args, **kwargs):
    print("stuck", flush=True)
    time.sleep(300)

{patch}
logs.setup_logging()
train_tpu.main(from_json(open(sys.argv[1]).read()))
"""


def assert_same_bytes(config: TrainConfig, expected: TrainConfig) -> None:
    assert read_losses(config) == read_losses(expected)
    for name, leaf in final_params(expected).items():
        assert final_params(config)[name].tobytes() == leaf.tobytes(), name


@pytest.fixture
def default_handlers():
    """What the signals do in a program that is started from a terminal."""
    defaults: dict[signal.Signals, Any] = dict.fromkeys(STOP_SIGNALS, signal.SIG_DFL)
    defaults[signal.SIGINT] = signal.default_int_handler
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield defaults
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def configs(tmp_path_factory, tiny_towers):
    """Makes configs that differ in their run folder only."""
    folder = tmp_path_factory.mktemp("runs")
    return lambda name: tiny_config(folder / name, tiny_towers, eval_every_steps=2)


@pytest.fixture(scope="module")
def whole(configs):
    """A run that is never stopped."""
    config = configs("whole")
    train_tpu.main(config)
    return config


def stop_in(patch: pytest.MonkeyPatch, owner: type, method: str, when, number) -> None:
    """Sends a signal to this process at the beginning of a call of the method."""
    original = getattr(owner, method)

    def stop(self, *args, **kwargs):
        if when(*args):
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # for the thread that watches
        return original(self, *args, **kwargs)

    patch.setattr(owner, method, stop)


@pytest.mark.parametrize(
    ("owner", "method", "when", "stopped_at", "number"),
    [
        (MetricsWriter, "write", lambda step, _: step == 3, 3, signal.SIGINT),
        (Evaluator, "loss", lambda *_: True, 0, signal.SIGTERM),
        (Evaluator, "transcribe", lambda params, *_: params[0] is not None, 0, signal.SIGUSR1),
    ],
    ids=["training", "evaluation of the loss", "evaluation by decoding"],
)
def test_a_signal_saves_and_the_run_ends_with_the_same_bytes(
    configs, whole, monkeypatch, default_handlers, owner, method, when, stopped_at, number
):
    stopped = configs(f"stopped in {method}")
    with monkeypatch.context() as patch:
        stop_in(patch, owner, method, when, number)
        train_tpu.main(stopped)
    assert not (Path(stopped.out) / "projector").exists()
    with open_manager(Path(stopped.out) / "checkpoints", keep=2) as manager:
        assert manager.latest_step() == stopped_at
    assert {n: signal.getsignal(n) for n in default_handlers} == default_handlers
    train_tpu.main(stopped)
    assert_same_bytes(stopped, whole)


@pytest.mark.parametrize(
    ("patch", "number"),
    [
        ("run.load_tower = stuck", signal.SIGTERM),
        ("train_step.jax.stages.Lowered.compile = stuck", signal.SIGHUP),
        ("evaluate.Evaluator.__call__ = stuck", signal.SIGINT),
    ],
    ids=["loading", "compiling", "compiling the evaluation"],
)
def test_a_signal_ends_what_cannot_be_interrupted(configs, tmp_path, patch, number):
    config_path = tmp_path / "config.json"
    config_path.write_text(to_json(configs("a")))
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(patch=patch), str(config_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stuck\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors[-2000:]
    assert f"{number.name}: stopping" in errors and "start the same command again" in errors


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_every_signal_that_asks_to_stop_is_noticed(default_handlers, number):
    with PreemptionGuard().watching() as guard:
        guard.protect(lambda: pytest.fail("the main thread ends the run"))
        guard.check()
        os.kill(os.getpid(), number)
        time.sleep(0.1)  # for the thread that watches
        for _ in range(2):
            with pytest.raises(Preempted):
                guard.check()
    assert {n: signal.getsignal(n) for n in default_handlers} == default_handlers


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=["nohup", "&"])
def test_what_is_ignored_from_the_start_stays_ignored(default_handlers, number):
    signal.signal(number, signal.SIG_IGN)
    with PreemptionGuard().watching() as guard:
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        guard.check()
    assert signal.getsignal(number) == signal.SIG_IGN


@pytest.mark.parametrize(
    ("second", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, None)], ids=lambda x: str(x)
)
def test_a_second_ctrl_c_ends_at_once(second, code):
    """Another SIGTERM does not: whoever sends it may have sent it to all processes, twice."""
    program = (
        "import signal, time\n"
        "from flax_projector.training.preemption import PreemptionGuard\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with PreemptionGuard().watching() as guard:\n"
        "    guard.protect(lambda: time.sleep(300))\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(300)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(second)
        try:
            assert process.wait(20 if code else 1) == code
        except subprocess.TimeoutExpired:
            assert code is None
            process.kill()


@pytest.mark.slow
def test_a_run_that_is_stuck_says_where_and_ends(configs, tmp_path):
    config_path = tmp_path / "config.json"
    config = dataclasses.replace(configs("stuck"), stall_mins=0.05, eval_every_steps=0)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval=()))
    config_path.write_text(to_json(config))
    patch = "from flax_projector.training import checkpoints\ncheckpoints.save = stuck"
    command = [sys.executable, "-c", PROGRAM.format(patch=patch), str(config_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and ended.stdout == "stuck\n", ended.stderr[-2000:]
    expected = "error: no step for 0.05 minutes (--stall-mins); this process is in flax_projector."
    assert ended.stderr.splitlines()[-1].startswith(expected + "training.checkpoints.save: ")


def start(config_path: Path) -> subprocess.Popen:
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM.format(patch=""), str(config_path)]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, stdout=quiet, stderr=quiet, env=env)


def num_losses(config: TrainConfig) -> int:
    """Steps that a run, which may be writing, has recorded."""
    path = Path(config.out) / "metrics.jsonl"
    return path.read_text().count('"grad_norm"') if path.is_file() else 0


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_byte(tmp_path, tiny_towers):
    rng = random.Random(0)
    steps = {"num_steps": 400, "eval_every_steps": 50, "save_every_steps": 3}
    whole, killed = (tiny_config(tmp_path / name, tiny_towers, **steps) for name in ("a", "b"))
    paths = {}
    for config in (whole, killed):
        paths[config.out] = tmp_path / f"{Path(config.out).parent.name}.json"
        paths[config.out].write_text(to_json(config))
    began = time.monotonic()
    process = start(paths[whole.out])
    while not (metrics := Path(whole.out) / "metrics.jsonl").exists() or not metrics.read_text():
        time.sleep(0.05)
    startup_secs = time.monotonic() - began
    assert process.wait() == 0
    train_secs = time.monotonic() - began - startup_secs
    reached = []
    for kill in range(20):
        before = num_losses(killed)
        process = start(paths[killed.out])
        if kill % 4 == 0:  # somewhere before the first step
            time.sleep(rng.uniform(0, startup_secs))
        else:
            while process.poll() is None and num_losses(killed) <= before:
                time.sleep(0.05)
            time.sleep(rng.uniform(0, train_secs / 40))
        assert process.poll() is None, "it came to its end"
        process.send_signal(signal.SIGKILL)
        process.wait()
        reached.append(num_losses(killed))
    assert 0 < reached[-1] < 400
    assert start(paths[killed.out]).wait() == 0
    print(f"killed at steps {reached}")  # noqa: T201
    assert_same_bytes(killed, whole)
