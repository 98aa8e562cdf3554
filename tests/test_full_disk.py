"""What happens when the run folder cannot be written to, or is in use: one line, and no loss."""

import contextlib
import dataclasses
import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
import soundfile

import train_tpu
from flax_projector import files
from flax_projector.config import MeshConfig
from flax_projector.data.audio import Problem
from flax_projector.data.bad_rows import BadRow, BadRowLog
from flax_projector.data.frames.keep import keep_frames
from flax_projector.data.frames.shards import Encoding
from flax_projector.data.manifest import read_manifest
from flax_projector.files import lock_file, write_atomically
from flax_projector.run_folder import RunFolder
from flax_projector.run_folder.owner import lock
from flax_projector.sharding import make_mesh
from flax_projector.training.metrics import MetricsWriter
from flax_projector.training.step_log import StepLog
from tests.clips import make_batches, read_speech
from tests.scored import scored
from tests.tiny import final_params, make_speech, tiny_config

pytestmark = pytest.mark.torch


@contextlib.contextmanager
def full_disk(num_bytes: int = 0):
    """Inside the block, no file can grow beyond a size: to a program, a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run_cli(config, monkeypatch) -> str:
    """The error that the program ends with."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
        patch.setattr(train_tpu, "read_config", lambda _: config)
        train_tpu.cli([])
    return str(error.value)


@pytest.mark.parametrize("at", ["checkpoints", "metrics.jsonl"])
def test_a_run_on_a_full_disk_is_one_line_and_continues_when_there_is_room(
    tmp_path, tiny_towers, monkeypatch, capfd, at
):
    config = tiny_config(
        tmp_path, tiny_towers, num_steps=4, data={"eval": (), "bucket_secs": (2.0,)}
    )
    size = {"checkpoints": 8000, "metrics.jsonl": 0}[at]
    add = StepLog.add
    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:

        def fill(self, metrics):
            stack.enter_context(full_disk(size))
            add(self, metrics)

        patch.setattr(StepLog, "add", fill)
        message = run_cli(config, patch)
    assert message.startswith(f"error: {config.out}/{at}") and message.count("\n") == 0
    assert "could not be written: File too large: make room, then start the same" in message
    assert "Traceback" not in capfd.readouterr().err
    train_tpu.main(config)
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    train_tpu.main(whole)
    expected = final_params(whole)
    for name, leaf in final_params(config).items():
        assert leaf.tobytes() == expected[name].tobytes(), name


BAD = BadRow("a", "s", Problem.MALFORMED, "x")
(HEARD,) = scored({"a": ("x", "y")})


def write_bad_rows(folder: RunFolder) -> None:
    log = BadRowLog(folder.bad_rows, max_rate=1.0)
    log.start("train", [], num_rows=1)
    with full_disk():
        log.add("train", [BAD])


ENCODING = Encoding("tiny", 4, "float32", window_samples=32_000)


def write_frames(folder: RunFolder) -> None:
    rows = make_batches(read_speech(folder.on_disk, 2)).utterances
    encode = lambda x: jnp.ones((len(x), 100, 4), device=x.sharding)  # noqa: E731
    options = {"mesh": make_mesh(MeshConfig()), "batch_size": 2, "num_threads": 1}
    with full_disk(200):
        keep_frames(folder.data_cache / "frames", "train", rows, encode, ENCODING, **options)


def with_writer(write):
    def run(folder: RunFolder) -> None:
        with MetricsWriter(folder) as writer, full_disk():
            write(writer)

    return run


WRITERS = {
    "metrics.jsonl": with_writer(lambda w: w.write(1, {"loss": 1.0})),
    "transcripts/dev-000001.jsonl": with_writer(lambda w: w.write_transcripts(1, "dev", [HEARD])),
    "bad_rows.jsonl": write_bad_rows,
    f"data/frames/{ENCODING.address}": write_frames,
    "best.json": lambda folder: write_atomically(folder.best_scores, "{}"),
    "lock": lambda folder: lock(folder).__enter__(),
}


@pytest.mark.parametrize("name", WRITERS)
def test_whatever_cannot_be_written_is_named_with_the_way_out(tmp_path, name):
    write = WRITERS[name]
    limit = full_disk() if name in ("best.json", "lock") else contextlib.nullcontext()
    with pytest.raises(OSError) as error, limit:
        write(RunFolder(tmp_path))
    text = str(error.value).removeprefix("--out: ")
    assert text.startswith(f"{tmp_path}/{name} could not be written: File too large: make room")
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.rglob("*.frames"))


def test_rows_need_not_be_kept(tmp_path, caplog):
    (tmp_path / "folder").write_text("a file")
    manifest = make_speech(tmp_path, 1)
    (clip,), _ = read_manifest(manifest, cache=tmp_path / "folder")
    assert clip.duration == soundfile.info(str(clip.audio)).duration
    assert "folder/rows-" in caplog.text and "is not kept: " in caplog.text


@pytest.mark.parametrize(
    ("out", "make", "reason"),
    [
        ("file", "file", "Not a directory|File exists"),
        ("file/run", "file", "Not a directory"),
        ("/proc/run", None, "No such file or directory|Permission denied"),
    ],
)
def test_an_out_that_cannot_be_a_folder_is_one_line(
    tmp_path, tiny_towers, monkeypatch, out, make, reason
):
    if make:
        (tmp_path / make).write_text("mine")
    config = tiny_config(tmp_path / "data", tiny_towers, out=str(tmp_path / out))
    message = run_cli(config, monkeypatch)
    place = str(tmp_path / out)
    assert message.startswith(f"error: --out: {place}/lock could not be written: ")
    assert any(text in message for text in reason.split("|")) and "\n" not in message
    if make:
        assert (tmp_path / make).read_text() == "mine"


def test_a_second_program_is_refused_and_a_dead_one_is_no_obstacle(
    tmp_path, tiny_towers, monkeypatch
):
    config = tiny_config(tmp_path, tiny_towers, num_steps=1, data={"eval": ()})
    folder = RunFolder.of(config)
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from flax_projector.files import lock_file\n"
        "with lock_file(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder.path / "lock")],
        cwd=Path(train_tpu.__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        message = run_cli(config, monkeypatch)
        assert f"{folder.path} is in use by process {other.pid} on " in message
        assert "wait until it has ended, or choose another folder" in message
        other.send_signal(signal.SIGKILL)
    assert [path.name for path in folder.path.iterdir()] == ["lock"]
    with lock(folder):
        assert str(os.getpid()) in (folder.path / "lock").read_text()
        with pytest.raises(ValueError, match="is in use"), lock(folder):
            pass
    assert not list(folder.path.iterdir())


def test_where_files_cannot_be_locked_there_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with lock(RunFolder(tmp_path / "run")):
        assert caplog.text.count("other programs are not kept out: No locks available") == 1
    assert not (tmp_path / "run").exists(), "nothing is left over"


def test_a_lock_that_its_holder_has_just_removed_is_taken_anew(tmp_path, monkeypatch):
    lock, flock = tmp_path / "lock", fcntl.flock
    removed = []

    def remove_first(*args):
        if not removed:
            removed.append(lock.unlink())
        flock(*args)

    monkeypatch.setattr(files.fcntl, "flock", remove_first)
    with lock_file(lock), pytest.raises(BlockingIOError), lock_file(lock):
        pass
    assert removed and not lock.exists()
