"""Runs of several processes from shards in a bucket, and what they keep of large manifests."""

import dataclasses
import json
import shutil
import signal
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

import train_tpu
from flax_projector.config import DataConfig, TrainConfig
from flax_projector.data.shards.pack import pack
from flax_projector.files import any_path
from tests import processes
from tests.bucket import BUCKET
from tests.parity import assert_within
from tests.tiny import final_params, make_speech, read_losses, tiny_config

# One at a time: two processes at once are as many as CI has cores.
pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("processes")]

NUM_STEPS = 16


@pytest.fixture
def files(tmp_path, tiny_towers) -> TrainConfig:
    """A run on two sets of single files, one of which has more clips and half the weight."""
    many, few = (make_speech(tmp_path / name, n, seed=n) for name, n in (("many", 90), ("few", 13)))
    data = {
        "train": (many, few),
        "train_weights": (0.5, 1.0),
        "eval": (),
        "bucket_secs": (1.1, 2.0),
    }
    options = {"num_steps": NUM_STEPS, "eval_every_steps": 0, "save_every_steps": 2}
    return tiny_config(tmp_path / "run", tiny_towers, data=data, log_every_steps=1, **options)


def with_data(config: TrainConfig, name: str, *train: str) -> TrainConfig:
    """Another run, on other sources."""
    data = dataclasses.replace(config.data, train=train)
    return dataclasses.replace(config, data=data, out=str(Path(config.out).with_name(name)))


def fingerprint(config: TrainConfig) -> str:
    """Of the batches of a finished run, with their order."""
    path = Path(config.out) / "checkpoints" / str(NUM_STEPS) / "position" / "metadata"
    state = json.loads(path.read_text())["iterator"]
    assert state["next_batch"] == NUM_STEPS
    return state["data"]


@pytest.mark.slow
def test_two_processes_with_shards_in_a_bucket_end_as_one_with_single_files(
    bucket_server, files, tmp_path, monkeypatch
):
    """One of the two is killed in the middle; the same command ends the run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    many, few = files.data.train
    shards = f"gs://{BUCKET}/{uuid.uuid4().hex}"
    pack(many, shards, shard_mb=1, flac=False, config=DataConfig())
    assert len(list(any_path(shards).glob("*.tar"))) > 2
    packed = f"{shards}/manifest.jsonl"
    two, one = (with_data(files, name, packed, few) for name in ("two", "one"))

    begun = processes.start(two, patch=processes.SLOWLY)
    metrics = Path(two.out) / "metrics.jsonl"
    while not metrics.is_file() or len(read_losses(two)) < NUM_STEPS // 2:
        assert all(process.poll() is None for process in begun.running), begun.end()
        time.sleep(0.05)
    begun.send(signal.SIGKILL, 1)
    killed = [end.code for end in begun.end()]
    assert killed[0] != 0 and killed[1] == -signal.SIGKILL
    assert NUM_STEPS // 2 <= len(read_losses(two)) < NUM_STEPS
    assert "resumed at step" in processes.start(two).finish()

    train_tpu.main(files)
    train_tpu.main(one)
    assert fingerprint(files) == fingerprint(one) == fingerprint(two)
    expected = read_losses(files)
    assert len(expected) == NUM_STEPS and read_losses(one) == expected
    for name, leaf in final_params(one).items():
        assert leaf.tobytes() == final_params(files)[name].tobytes(), name
    assert_within(np.array(read_losses(two), np.float32), expected, 1e-5)


# --- columns of a large manifest ----------------------------------------------------------------

MANY = "from flax_projector.data import kept\nkept._MANY_ROWS = 10\n"
FIRST_ONLY = MANY + (
    "def fail(*args): raise RuntimeError('process 1 makes a table')\nkept._write = fail\n"
)


def short(config: TrainConfig) -> TrainConfig:
    """A run of two steps on the smaller set, with one bucket."""
    data = dataclasses.replace(
        config.data, train=config.data.train[1:], train_weights=(), bucket_secs=(2.0,)
    )
    return dataclasses.replace(config, data=data, num_steps=2)


def columns(folder: Path) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in folder.glob("*.columns/*"))


@pytest.mark.slow
def test_process_0_makes_the_columns_of_a_manifest_that_both_see(files, tmp_path):
    config = short(files)
    text = processes.start(config, patches={0: MANY, 1: FIRST_ONLY}).finish()
    assert "is not kept" not in text and "made anew" not in text
    assert columns(tmp_path / "few") == ["labels", "rows"]
    assert not list(Path(config.out).rglob("*.arrow"))


@pytest.mark.slow
def test_hosts_that_know_a_manifest_by_other_paths_make_their_own_columns(files, tmp_path):
    config = short(files)
    shutil.copytree(tmp_path / "few", tmp_path / "copy")
    options = {
        1: [
            *("--data.train", str(tmp_path / "copy" / "clips.jsonl")),
            *("--data.cache-dir", str(tmp_path / "of another host")),
        ]
    }
    processes.start(config, patch=MANY, options=options).finish()
    assert columns(tmp_path / "few") == columns(tmp_path / "copy") == ["labels", "rows"]
