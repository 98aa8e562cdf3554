"""Runs in a bucket of Google Cloud Storage, on a real server of it (`tests/bucket.py`)."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import train_tpu
from convert import api
from flax_projector.config import TrainConfig, to_json
from flax_projector.files import any_path
from flax_projector.inference.listen import Listener
from flax_projector.report.writing import write_report
from flax_projector.run_folder import RunFolder
from flax_projector.run_folder.owner import Owner
from flax_projector.training.best import find_best
from flax_projector.training.metrics import MetricsWriter
from flax_projector.training.score_files import to_lines
from flax_projector.training.step_log import StepLog
from tests import processes
from tests.bucket import BUCKET, Emulator
from tests.reports import PAIRS, make_run
from tests.tiny import final_params, read_losses, tiny_config

pytestmark = pytest.mark.torch

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
def configs(tmp_path_factory, tiny_towers, bucket_server):
    """Makes configs that differ in their run folder only; in a bucket unless told otherwise."""
    folder = tmp_path_factory.mktemp("runs")
    options = {"num_steps": 6, "eval_every_steps": 2, "save_every_steps": 2, "log_every_steps": 1}

    def make(name: str, *, local: bool = False, **others) -> TrainConfig:
        config = tiny_config(folder / "data", tiny_towers, **options | others)
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


def download(bucket_server: Emulator, config: TrainConfig, to: Path) -> TrainConfig:
    """The run, as `gcloud storage cp -r` brings it home."""
    bucket_server.files().get(config.out, str(to), recursive=True)
    return dataclasses.replace(config, out=str(to))


def records(config: TrainConfig) -> list[dict]:
    """The lines of metrics of a run in a bucket."""
    lines = RunFolder(any_path(config.out)).metrics.read_text().splitlines()
    return [json.loads(line) for line in lines]


def transcripts(config: TrainConfig) -> dict[str, str]:
    return {path.name: path.read_text() for path in Path(config.out).glob("transcripts/*")}


def assert_same(config: TrainConfig, expected: TrainConfig) -> None:
    assert read_losses(config) == read_losses(expected)
    if config.data.eval:
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
        if value.tensor.float_val and (value.tag == "loss" or value.tag.startswith("eval/"))
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


def test_a_killed_run_continues_on_another_machine_and_ends_as_a_local_one(
    bucket_server, configs, whole, tmp_path, monkeypatch
):
    config = configs("killed")
    code, errors = run(config, tmp_path, IN_A_SAVE.format(secs=0))
    assert code == -signal.SIGKILL, errors[-3000:]
    killed = download(bucket_server, config, tmp_path / "killed")
    assert read_losses(killed) == read_losses(whole)[:4], "the log is ahead of the checkpoint"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    train_tpu.main(config)
    home = download(bucket_server, config, tmp_path / "home")
    assert_same(home, whole)
    assert scalars(Path(home.out) / "tensorboard") == scalars(Path(whole.out) / "tensorboard")
    for caches in (tmp_path / "cache", tmp_path / "another"):
        assert list(caches.glob("flax-projector/killed-*/data"))
    best = json.loads((Path(whole.out) / "best.json").read_text())["step"]
    for choice, step in ((None, 6), ("best", best)):
        scores = Listener(config.out, projector=choice).evaluate(config.data.eval[0], name="clips")
        assert to_lines(scores.transcripts) == transcripts(whole)[f"clips-{step:06d}.jsonl"]
    for src in (config.out, f"{config.out}/projector", str(find_best(RunFolder.of(config)))):
        converted = api.to_torch(src, tmp_path / "torch", overwrite=True)
        name = "best" if "/best-" in src else "projector"
        assert api.verify(converted, Path(whole.out) / name).is_same


def test_a_run_that_another_one_takes_over_ends_and_writes_nothing_more(
    bucket_server, configs, tmp_path, monkeypatch
):
    config = configs("taken", data={"eval": ()})
    other = Owner("x", "host-b", 7, "2026-01-02 03:04:05+00:00")
    write, files = StepLog.flush, bucket_server.files()

    def take_over(self, step):
        if step == 3:
            files.pipe_file(f"{config.out}/owner.json", json.dumps(asdict(other)).encode())
            files.pipe_file(f"{config.out}/metrics.jsonl", b"of the other one")
        write(self, step)

    monkeypatch.setattr(StepLog, "flush", take_over)
    with pytest.raises(OSError, match=r"was taken over by process 7 on host-b, started 2026-01-02"):
        train_tpu.main(config)
    assert files.cat_file(f"{config.out}/metrics.jsonl") == b"of the other one"
    assert RunFolder.of(config).steps().keys() == {2}
    assert not files.exists(f"{config.out}/projector")


def test_the_same_of_a_local_run(configs, monkeypatch):
    config = configs("taken", local=True, data={"eval": ()})
    flush, folder = StepLog.flush, RunFolder.of(config)

    def take_over(self, step):
        if step == 3:
            folder.owner.write_text(json.dumps(asdict(Owner("x", "host-b", 7, "today"))))
        flush(self, step)

    monkeypatch.setattr(StepLog, "flush", take_over)
    with pytest.raises(OSError, match=r"was taken over by process 7 on host-b, started today"):
        train_tpu.main(config)
    assert folder.steps().keys() == {2} and not folder.projector.exists()


def test_an_outage_is_survived(bucket_server, configs, whole, tmp_path, monkeypatch, caplog):
    """The real waiting times are kept, for an outage of seconds: they add up to 95 seconds."""
    config = configs("outage", data={"eval": ()})
    publish, saved, files = MetricsWriter.publish, [], bucket_server.files()

    def lose_the_server(self):
        if len(saved) == 2:  # before a checkpoint; it comes back while that is written
            while not files.exists(f"{config.out}/checkpoints/2/commit_success.txt"):
                time.sleep(0.05)  # the server forgets uploads that are going on
            bucket_server.stop()
            threading.Timer(1.5, bucket_server.start).start()
        saved.append(publish(self))

    monkeypatch.setattr(MetricsWriter, "publish", lose_the_server)
    train_tpu.main(config)
    assert len(saved) > 3 and "trying again" in caplog.text
    assert_same(download(bucket_server, config, tmp_path / "home"), whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "patch",
    [
        *(IN_A_SAVE.format(secs=secs) for secs in (0.02, 0.05, 0.1, 0.2, 0.4)),
        "metrics.MetricsWriter.publish = kill",
        "best.write_atomically = kill",
        "checkpoints.Saver.save = lambda self, step, state: step == 4 and kill()",
        "train_tpu.LoadedModel.write_projector = kill",
    ],
    ids=lambda patch: patch.strip().splitlines()[-1] if patch.count("\n") < 2 else None,
)
def test_a_run_may_be_killed_at_any_moment(bucket_server, configs, whole, tmp_path, request, patch):
    config = configs(request.node.name.replace("[", " ").rstrip("]"))
    code, errors = run(config, tmp_path, patch)
    assert code == -signal.SIGKILL, errors[-3000:]
    code, errors = run(config, tmp_path)
    assert code == 0, errors[-3000:]
    assert_same(download(bucket_server, config, tmp_path / "home"), whole)


@pytest.mark.slow
def test_two_processes_that_are_killed_in_a_save_continue(
    bucket_server, configs, tmp_path, monkeypatch
):
    """They end with the bytes of two that write to a disk and are never stopped."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pair, local = configs("two"), configs("two", local=True)
    begun = processes.start(pair)
    while not bucket_server.files().find(f"{pair.out}/checkpoints/4"):
        assert all(process.poll() is None for process in begun.running)
    begun.send(signal.SIGKILL)
    begun.end()
    assert "resumed at step" in processes.start(pair).finish()
    processes.start(local).finish()
    assert_same(download(bucket_server, pair, tmp_path / "home"), local)


# Of aiohttp: the event loop of gcsfs has nothing else to do meanwhile.
LARGE_BODIES = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")


@LARGE_BODIES
def test_a_run_in_a_bucket_has_its_report_there(bucket_server, tmp_path):
    local, url = make_run(tmp_path / "run"), f"gs://{BUCKET}/some where/reported"
    bucket_server.files().put(str(local), url, recursive=True)
    assert str(write_report([url], out=None, sources=())) == f"{url}/report.html"
    page = bucket_server.files().cat_file(f"{url}/report.html").decode()
    assert "step 40 of 40, finished" in page and page.count('"sound": "') == len(PAIRS)
    write_report([url, str(local)], out=f"gs://{BUCKET}/some where/both.html", sources=())
    assert bucket_server.files().exists(f"{BUCKET}/some where/both.html")


@LARGE_BODIES
@pytest.mark.slow
def test_a_run_in_a_bucket_has_a_profile_and_starts_others(bucket_server, configs):
    config = configs("first", num_steps=14, data={"eval": ()}, profile_steps=2)
    train_tpu.main(config)
    traces = [name for name in bucket_server.files().find(config.out) if "xplane.pb" in name]
    assert len(traces) == 1 and "/profile/" in traces[0]
    first, *_, last = (record["loss"] for record in records(config) if "grad_norm" in record)
    for number, source in enumerate([config.out, f"{config.out}/projector"]):
        other = configs(f"begun by {number}", num_steps=1, init_projector=source, data={"eval": ()})
        train_tpu.main(other)
        assert records(other)[0]["loss"] < (first + last) / 2, "not the projector that was trained"
