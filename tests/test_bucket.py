"""Runs in a bucket of Google Cloud Storage, on a real server of it (`tests/bucket.py`)."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import train_tpu
from flax_projector.config import TrainConfig, to_json
from tests.bucket import BUCKET, Emulator, emulator
from tests.tiny import final_params, read_losses, tiny_config

pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("bucket")]

ROOT = Path(train_tpu.__file__).parent
PROGRAM = """
import os, signal, sys, time
import train_tpu
from flax_projector.config import from_json
from flax_projector.training import best, checkpoints, metrics

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

{patch}
train_tpu.read_config = lambda args=None: from_json(open(sys.argv[1]).read())
train_tpu.cli()
"""


@pytest.fixture(scope="module")
def server():
    with emulator() as server:
        yield server


@pytest.fixture(scope="module")
def configs(tmp_path_factory, tiny_towers, server):
    """Makes configs that differ in their run folder only; in a bucket unless told otherwise."""
    folder = tmp_path_factory.mktemp("runs")
    options = {"num_steps": 6, "eval_every_steps": 2, "save_every_steps": 2, "log_every_steps": 1}

    def make(name: str, *, local: bool = False, **others) -> TrainConfig:
        config = tiny_config(folder / "data", tiny_towers, **options, **others)
        return dataclasses.replace(
            config, out=str(folder / name) if local else f"gs://{BUCKET}/some where/{name}"
        )

    return make


@pytest.fixture(scope="module")
def whole(configs):
    """A local run that is never stopped."""
    config = configs("whole", local=True)
    train_tpu.main(config)
    return config


def start(config: TrainConfig, tmp_path: Path, patch: str = "", **variables) -> subprocess.Popen:
    """The program on another machine: with other caches, and one device."""
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    home = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "XLA_FLAGS": os.environ["XLA_FLAGS"]}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(patch=patch), str(path)],
        cwd=ROOT,
        env=os.environ | home | variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(config: TrainConfig, tmp_path: Path, patch: str = "", **variables) -> tuple[int, str]:
    process = start(config, tmp_path, patch, **variables)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def download(server: Emulator, config: TrainConfig, tmp_path: Path) -> TrainConfig:
    """The run, as `gcloud storage cp -r` brings it home."""
    server.files().get(config.out, str(tmp_path / "home"), recursive=True)
    return dataclasses.replace(config, out=str(tmp_path / "home"))


def transcripts(config: TrainConfig) -> dict[str, str]:
    return {path.name: path.read_text() for path in Path(config.out).glob("transcripts/*")}


def assert_same(config: TrainConfig, expected: TrainConfig) -> None:
    assert read_losses(config) == read_losses(expected)
    assert transcripts(config) == transcripts(expected)
    found, wanted = final_params(config), final_params(expected)
    assert found.keys() == wanted.keys()
    for name, leaf in wanted.items():
        assert found[name].tobytes() == leaf.tobytes(), name


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard shows of a run."""
    return {
        (value.tag, event.step): value.tensor.float_val[0]
        for file in folder.glob("events.*")
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.tensor.float_val
    }


# Orbax writes in the background: the process ends while it does.
IN_A_SAVE = """
save = checkpoints.save

def save_and_die(manager, step, *args):
    save(manager, step, *args)
    if step == 4:
        time.sleep({secs})
        kill()

checkpoints.save = save_and_die
"""


def test_a_run_that_is_killed_in_a_save_continues_on_another_machine_as_a_local_one(
    server, configs, whole, tmp_path
):
    config = configs("killed")
    code, errors = run(config, tmp_path, IN_A_SAVE.format(secs=0))
    assert code == -signal.SIGKILL, errors[-3000:]
    (tmp_path / "other machine").mkdir()
    code, errors = run(config, tmp_path / "other machine")
    assert code == 0, errors[-3000:]
    assert "resumed at step" in errors
    home = download(server, config, tmp_path)
    assert_same(home, whole)
    assert scalars(Path(home.out) / "tensorboard") == scalars(Path(whole.out) / "tensorboard")
    caches = [tmp_path / "cache", tmp_path / "other machine" / "cache"]
    assert all(list(cache.glob("flax-projector/killed-*/data")) for cache in caches)
