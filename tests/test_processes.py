"""A run of two processes on loopback, as two hosts would run it."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import train_tpu
from flax_projector.config import TrainConfig, to_json
from flax_projector.training.checkpoints import open_manager
from tests.parity import assert_within
from tests.tiny import read_losses, tiny_config

pytestmark = pytest.mark.torch

PROGRAM = """
import sys, time
import train_tpu
from flax_projector.config import from_json
from flax_projector.data.reader import BatchIterator

config_path, *flags = sys.argv[1:]
read = BatchIterator.__next__

def read_slowly(self):
    time.sleep(0.2)
    return read(self)

BatchIterator.__next__ = read_slowly
train_tpu.PRESETS = {"two": ("", from_json(open(config_path).read()))}
train_tpu.cli(["two", *flags])
"""


def place(by: str, number: int, port: int) -> tuple[list[str], dict[str, str]]:
    """Flags and variables that tell one of two processes its place."""
    if by == "flags":
        run = f"--distributed.coordinator localhost:{port} --distributed.num-processes 2"
        return [*run.split(), "--distributed.process-id", str(number)], {}
    return [], {  # of SLURM's srun
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
        "JAX_COORDINATOR_PORT": str(port),
    }


def start(config_path: Path, by: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    xla_flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, config_path, *flags],
            cwd=Path(train_tpu.__file__).parent,
            env=os.environ | {"XLA_FLAGS": xla_flags} | variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for flags, variables in (place(by, number, port) for number in range(2))
    ]


def finish(processes: list[subprocess.Popen]) -> str:
    """What they said, once both have ended well."""
    errors = [process.communicate(timeout=300)[1] for process in processes]
    for process, text in zip(processes, errors, strict=True):
        assert process.returncode == 0, text[-3000:]
    return "".join(errors)


def num_losses(config: TrainConfig) -> int:
    metrics = Path(config.out) / "metrics.jsonl"
    return metrics.read_text().count('"grad_norm"') if metrics.is_file() else 0


@pytest.mark.consistency("ours in one process")
def test_two_processes_train_as_one_and_stop_together(tmp_path, tiny_towers) -> None:
    """A signal to one of them saves and ends both; started again, by srun, they finish.

    JAX notices only SIGTERM by itself.
    """
    one, two = (
        tiny_config(
            tmp_path / name,
            tiny_towers,
            num_steps=20,
            eval_every_steps=5,
            data={"bucket_secs": (2.0,)},
        )
        for name in ("one", "two")
    )
    two = dataclasses.replace(two, save_every_steps=1)
    config_path = tmp_path / "config.json"
    config_path.write_text(to_json(two))

    processes = start(config_path, "flags")
    while num_losses(two) < 3 and all(process.poll() is None for process in processes):
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGUSR1)
    assert "which is saved: the same command continues" in finish(processes)
    with open_manager(Path(two.out) / "checkpoints", keep=2) as manager:
        stopped_at = manager.latest_step()
    assert stopped_at is not None and 3 <= stopped_at < 20

    assert f"resumed at step {stopped_at}" in finish(start(config_path, "srun"))
    train_tpu.main(one)
    assert_within(np.array(read_losses(two), np.float32), read_losses(one), 1e-4)
    names = [Path(c.out) / "transcripts" / "clips-000020.jsonl" for c in (one, two)]
    assert names[0].read_text() == names[1].read_text()
