"""Files of runs in a bucket, on a real server of Google Cloud Storage (`tests/bucket.py`)."""

import collections
import http.server
import io
import json
import os
import re
import sys
import threading
import types
import urllib.request

import gcsfs
import numpy as np
import pytest
import soundfile
from fsspec.registry import _registry

import flax_projector.__main__
import train_tpu
from convert.bucket import copy_small_files
from convert.stored import open_stored
from flax_projector.data.audio import Problem, Slice, load_audio, read_duration
from flax_projector.data.bad_rows import BadRow, BadRowLog
from flax_projector.data.manifest import read_manifest
from flax_projector.files import any_path
from flax_projector.inference import listen
from flax_projector.run_folder import RunFolder
from flax_projector.run_folder.owner import Owner, check_owner, lock, read_owner, take_over
from flax_projector.storage import bucket
from flax_projector.storage.growing import publish
from flax_projector.training import checkpoints, metrics
from flax_projector.training.best import Best, find_best
from flax_projector.training.metrics import MetricsWriter
from tests.bucket import BUCKET, environment
from tests.scored import scores_of


def test_an_owner_without_a_run_leaves_nothing(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with lock(folder):
        nonce, owner = take_over(folder), read_owner(folder)
        assert isinstance(owner, Owner) and owner.nonce == nonce
        check_owner(folder)
    assert not folder.path.exists()


@pytest.fixture
def refusal(request):
    """A server that refuses everything with one status."""

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(request.param)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("refusal", "program", "message"),
    [
        (403, "train", "--out: gs://mine: no rights (403): give the account the roles"),
        (401, "train", "--out: gs://mine: no valid credentials: log in with `gcloud auth"),
        (404, "train", "--out: gs://mine: there is no such bucket: check the name, or create it"),
        (404, "evaluate", "gs://mine: there is no such bucket"),
    ],
    indirect=["refusal"],
)
def test_a_bucket_that_cannot_be_used_is_one_line(refusal, program, message, monkeypatch):
    for name, value in environment(refusal).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train_tpu, "find_towers", lambda _: pytest.fail("loads a model"))
    monkeypatch.setattr(listen, "find_towers", lambda _: pytest.fail("loads a model"))
    use = {
        "train": lambda: train_tpu.cli(["tiny", "--out", "gs://mine/run"]),
        "evaluate": lambda: flax_projector.__main__.cli(["evaluate", "gs://mine/run", "x.jsonl"]),
    }
    with pytest.raises(SystemExit) as ended:
        use[program]()
    assert str(ended.value).startswith(f"error: {message}") and "\n" not in str(ended.value)


@pytest.fixture
def unstable(bucket_server, monkeypatch):
    """The bucket's server behind one that fails so many times before it passes a request on."""
    failures = collections.Counter()

    class Unstable(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            failures[self.path] += 1
            if failures[self.path] <= 6:  # as often as gcsfs itself tries
                return self.send_error(503)
            request = urllib.request.Request(bucket_server.url + self.path)
            if "Range" in self.headers:
                request.add_header("Range", self.headers["Range"])
            with urllib.request.urlopen(request) as answer:
                content = answer.read()
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers["Content-Type"])
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    async def no_time(_: float) -> None:
        pass

    monkeypatch.setattr("gcsfs.retry.asyncio", types.SimpleNamespace(sleep=no_time))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Unstable) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        for name, value in environment(f"http://127.0.0.1:{server.server_port}").items():
            monkeypatch.setenv(name, value)
        yield failures
        server.shutdown()


CLIP = {"text": "go", "duration": 1.0}
READS = {
    "manifest": lambda folder: read_manifest(f"{folder}/a.jsonl")[0],
    "clip": lambda folder: load_audio(f"{folder}/0.wav"),
    "segment": lambda folder: load_audio(f"{folder}/0.wav", offset=0.5),
    "header": lambda folder: read_duration(f"{folder}/0.wav"),
    "slice": lambda folder: load_audio(Slice(f"{folder}/all.tar", 512, 32_044)),
    "model": lambda folder: bool(list(copy_small_files(f"{folder}/llm").iterdir())),
}


@pytest.mark.parametrize("read", READS)
def test_an_outage_is_survived_whatever_is_read(bucket_server, unstable, monkeypatch, read):
    """Also by processes that have no run in the bucket: nothing else makes the client patient."""
    for protocol in ("gs", "gcs"):
        monkeypatch.setitem(_registry, protocol, gcsfs.GCSFileSystem)
    sound, folder = io.BytesIO(), f"gs://{BUCKET}/{read}"
    soundfile.write(sound, np.zeros(16_000), 16_000, format="wav")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket_server.url)
    files, through = bucket_server.files(), os.environ["TENSORSTORE_GCS_HTTP_URL"]
    files.pipe_file(f"{folder}/0.wav", sound.getvalue())
    files.pipe_file(f"{folder}/all.tar", bytes(512) + sound.getvalue())
    files.pipe_file(f"{folder}/a.jsonl", json.dumps({"audio": "0.wav", **CLIP}).encode())
    files.pipe_file(f"{folder}/llm/model.safetensors", b"")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", through)
    assert np.any(READS[read](folder) is not None)
    assert max(unstable.values()) > 6  # a request that another one has made needless is given up


@pytest.mark.parametrize("refusal", [403, 401], indirect=True)
@pytest.mark.parametrize("read", READS)
def test_a_bucket_that_refuses_is_one_line_whatever_is_read(refusal, read, monkeypatch):
    for name, value in environment(refusal).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as error:
        READS[read](f"gs://mine/{refusal.rpartition(':')[2]}")
    assert re.search(
        r"gs://mine.* cannot be read: .*gs://mine[^?]*: no (rights \(403\)|valid credentials): ",
        str(error.value),
    )
    assert "\n" not in str(error.value)


def test_an_error_of_tensorstore_in_a_bucket_is_one_line(bucket_server):
    text = 'PERMISSION_DENIED: Error writing "gs://runs/x": HTTP 403 [http_response_code=403]'
    folder = RunFolder(any_path(f"gs://{BUCKET}/refused")).checkpoints
    with pytest.raises(OSError) as error, checkpoints._writing(folder):
        raise ValueError(text)
    assert str(error.value) == f"{folder} could not be written: {text.partition(' [')[0]}"


def test_without_gcsfs_a_bucket_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"need gcsfs: `pip install 'flax-projector\[gcs\]'`"):
        bucket._patient_filesystem.__wrapped__()


def test_the_log_is_uploaded_when_it_is_due_and_not_at_every_line(bucket_server, monkeypatch):
    folder, uploads = RunFolder(any_path(f"gs://{BUCKET}/log")), []
    client = bucket.filesystem()
    upload = client.pipe_file

    def count(path, *args):
        uploads.append(path.rpartition("/")[2])
        return upload(path, *args)

    def lines() -> int:
        return len(folder.metrics.read_text().splitlines())

    monkeypatch.setattr(client, "pipe_file", count)
    with MetricsWriter(folder) as writer:
        for step in range(1, 11):
            writer.write(step, {"loss": 1.0, "grad_norm": 1.0})
        assert not uploads
        writer.publish()
        assert lines() == 10 and len(uploads) == 2  # with TensorBoard's
        writer.publish()
        assert len(uploads) == 2, "nothing is new"
        monkeypatch.setattr(metrics, "_PUBLISH_EVERY_SECS", 0.0)
        writer.write(11, {"loss": 1.0})
        assert uploads.count("metrics.jsonl") == 1, "the next line uploads this one"
        writer.write(12, {"loss": 1.0})
        assert lines() == 11
    assert lines() == 12
    with MetricsWriter(folder, first_step=10):  # on the same machine or another one
        pass
    assert lines() == 10


def test_bad_rows_are_uploaded_with_the_log(bucket_server):
    folder = RunFolder(any_path(f"gs://{BUCKET}/bad rows"))
    row = BadRow("id", "clips.jsonl", Problem.UNDECODABLE, "noise")
    log = BadRowLog(folder.bad_rows, max_rate=1.0)
    log.start("train", [], num_rows=2)
    log.add("train", [row])
    assert not folder.bad_rows.exists()
    publish(folder.path)
    again = BadRowLog(folder.bad_rows, max_rate=1.0)
    assert again.known("train") == {row.key}
    again.start("train", [], num_rows=2)
    assert not folder.bad_rows.exists(), "it can be read again"
    with pytest.raises(ValueError, match=f"all of them are in {folder.bad_rows}"):
        BadRowLog(folder.bad_rows, max_rate=0.1).start("train", [row], num_rows=2)
    assert "noise" in folder.bad_rows.read_text()


def test_the_best_projector_is_not_lost_while_the_next_one_is_written(bucket_server):
    folder = RunFolder(any_path(f"gs://{BUCKET}/best"))

    def write(path, text):
        (path / "part").write_text("")
        if text == "killed":
            raise KeyboardInterrupt
        (path / "config.json").write_text(text)

    def offer(step: int, wer: float, text: str) -> None:
        Best(folder, write).offer(step, [scores_of(wer, loss=1.0)], text)

    def kept() -> str:
        found = find_best(folder)
        assert found is not None
        return (found / "config.json").read_text()

    assert find_best(folder) is None
    offer(2, 0.5, "first")
    assert kept() == "first"
    with pytest.raises(KeyboardInterrupt):
        offer(4, 0.4, "killed")
    assert kept() == "first"
    offer(6, 0.3, "third")
    assert kept() == "third" and len(list(folder.path.glob("best-*"))) == 1


def test_caches_of_a_run_in_a_bucket_are_on_this_machine(bucket_server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = [RunFolder(any_path(f"gs://{BUCKET}/{name}/run")) for name in "ab"]
    for folder in folders:
        assert re.fullmatch(r"run-\w{8}", folder.data_cache.parent.name)
        assert folder.data_cache.is_relative_to(tmp_path / "flax-projector")
    assert folders[0].data_cache != folders[1].data_cache
    assert RunFolder(tmp_path).data_cache == tmp_path / "data"


def test_what_is_not_read_from_a_bucket_says_so(bucket_server):
    bucket_server.files().pipe_file(f"gs://{BUCKET}/hf/model.safetensors", b"x")
    with pytest.raises(ValueError, match=r"`gcloud storage cp -r gs://runs/hf \.`"):
        open_stored(f"gs://{BUCKET}/hf")
    with pytest.raises(ValueError, match="gs://runs/none does not exist"):
        open_stored(f"gs://{BUCKET}/none")
