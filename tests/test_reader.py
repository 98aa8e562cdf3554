"""Batches read ahead: by whom does not matter, even after a restart; bad clips become padding."""

import itertools
import json
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from flax_projector.data.audio import Problem
from flax_projector.data.bad_rows import BadRowLog
from flax_projector.data.inputs import Clip, Waveforms
from flax_projector.data.reader import BatchIterator, read_batch
from flax_projector.data.utterances import Utterance
from tests.clips import CONFIG, assert_same_batch, break_clip, make_batches, read_speech

pytestmark = pytest.mark.torch  # tests.tiny makes towers with it


@pytest.mark.parametrize(
    "readers",
    [[(0, 3), (0, 4)], [(0, 2), (2, 4), (0, 1)]],
    ids=["threads", "threads, 2 workers, threads"],
)
def test_iterator_resumes_where_it_stood_whoever_reads(tmp_path, readers):
    batches = make_batches(read_speech(tmp_path, 13), shuffle_seed=0, num_batches=7)
    read, state = [], None
    for num_workers, count in readers:
        iterator = BatchIterator(batches, num_threads=2, num_workers=num_workers)
        if state is not None:
            iterator.set_state(json.loads(json.dumps(state)))
        read += itertools.islice(iterator, count)
        state = iterator.get_state()
        shared = maps_of_shared_memory()
        iterator.close()
        assert not maps_of_shared_memory(), "with the batches still there"
        deadline = time.monotonic() + 5
        while any(map(os.path.exists, shared)) and time.monotonic() < deadline:
            time.sleep(0.05)  # Grain removes it in a thread
        assert not any(map(os.path.exists, shared))
    assert len(read) == 7 and not list(iterator)
    for index, local in enumerate(read):
        assert_same_batch(local.batch, batches[index].batch)


def maps_of_shared_memory() -> set[str]:
    """The shared memory of worker processes that this process has open."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return {line.split()[5] for line in lines if "/dev/shm/psm_" in line}


def is_running(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    try:
        return path.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
def test_workers_end_with_a_main_process_that_is_killed_and_by_no_signal(tmp_path):
    batches = make_batches(read_speech(tmp_path, 13), shuffle_seed=0, num_batches=100)
    (tmp_path / "batches").write_bytes(pickle.dumps(batches))
    script = (
        "import multiprocessing, os, pickle, sys, threading, time\n"
        "from flax_projector.data.reader import STOP_SIGNALS, BatchIterator\n"
        "if __name__ == '__main__':\n"
        "    batches = pickle.load(open(sys.argv[1], 'rb'))\n"
        "    iterator = BatchIterator(batches, num_threads=1, num_workers=2)\n"
        "    def disturb():\n"  # while they are starting, and when they are working
        "        told, deadline = set(), time.monotonic() + 60\n"
        "        while len(told) < 2 and time.monotonic() < deadline:\n"
        "            for worker in multiprocessing.active_children():\n"
        "                told.add(worker.pid)\n"
        "                for number in STOP_SIGNALS:\n"
        "                    os.kill(worker.pid, number)\n"
        "    thread = threading.Thread(target=disturb)\n"
        "    thread.start()\n"
        "    next(iterator)\n"
        "    thread.join()\n"
        "    disturb()\n"
        "    next(iterator)\n"
        "    print(*(p.pid for p in multiprocessing.active_children()), flush=True)\n"
        "    time.sleep(300)\n"
    )
    (tmp_path / "read.py").write_text(script)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "read.py"), str(tmp_path / "batches")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        workers = list(map(int, process.stdout.readline().split()))
        assert len(workers) == 2 and all(map(is_running, workers))
        process.kill()
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, workers))


def test_resuming_on_other_rows_says_so(tmp_path, caplog):
    rows = read_speech(tmp_path, 13)
    state = BatchIterator(make_batches(rows), num_threads=1).get_state()
    BatchIterator(make_batches(rows), num_threads=1).set_state(state)
    assert not caplog.text
    BatchIterator(make_batches(rows[:12]), num_threads=1).set_state(state)
    assert "the rows are not those that the run began with: batches from 0 on" in caplog.text


@pytest.mark.parametrize(
    ("how", "problem", "detail", "num_workers"),
    [
        ("missing", Problem.MISSING_FILE, "4.wav does not exist", 0),
        ("undecodable", Problem.UNDECODABLE, "4.wav is not a readable audio file", 0),
        ("nan", Problem.NOT_FINITE, "4.wav has samples that are not finite", 0),
        ("longer", Problem.WRONG_DURATION, "4.wav lasts 1.90 s, not ", 0),
        ("shorter", Problem.WRONG_DURATION, "4.wav lasts 0.10 s, not ", 1),
    ],
)
def test_what_shows_when_a_clip_is_read_becomes_padding(
    tmp_path, how, problem, detail, num_workers
):
    batches = make_batches(read_speech(tmp_path, 13), shuffle_seed=0)
    whole = [batches[i].batch for i in range(len(batches))]
    bad = next(u for u in batches.utterances if u.row.id == "clip4")
    break_clip(str(bad.row.audio), how)
    bad_rows = BadRowLog(tmp_path / "bad_rows.jsonl", max_rate=0.1)
    bad_rows.start("train", [], num_rows=13)
    iterator = BatchIterator(batches, num_threads=2, num_workers=num_workers)
    for index, expected in enumerate(whole):
        is_bad = np.array([u == bad for u in batches.members(index)])
        found = [(row.key, row.reason) for row in batches[index].bad]
        assert found == [(bad.row.key, problem)] * int(is_bad.sum())
        batch = read_batch(iterator, batches, bad_rows)
        for value, before in zip(leaves(batch), leaves(expected), strict=True):
            np.testing.assert_array_equal(value[~is_bad], before[~is_bad])
        for name in ("samples", "label_valid", "frame_valid", "num_frames", "prompt_len"):
            assert not np.asarray(getattr(batch, name))[is_bad].any(), name
    with pytest.raises(StopIteration):
        read_batch(iterator, batches, bad_rows)
    iterator.close()
    (entry,) = map(json.loads, (tmp_path / "bad_rows.jsonl").read_text().splitlines())
    assert (entry["id"], entry["reason"]) == ("clip4", problem.name.lower())
    assert detail in entry["detail"]


def leaves(batch) -> list[np.ndarray]:
    return list(map(np.asarray, jax.tree.leaves(batch)))


def test_no_clip_is_read_twice_to_say_what_is_wrong_with_it(tmp_path):
    reads = Counter()

    class CountedWaveforms(Waveforms):
        def read(self, utterance: Utterance) -> Clip:
            reads[utterance.row.id] += 1
            return super().read(utterance)

    rows = read_speech(tmp_path, 13)
    batches = make_batches(rows, inputs=CountedWaveforms(CONFIG.window_samples))
    for row in rows[2:5]:
        break_clip(str(row.audio), "nan")
    bad_rows = BadRowLog(tmp_path / "bad_rows.jsonl", max_rate=1.0)
    bad_rows.start("train", [], num_rows=13)
    iterator = BatchIterator(batches, num_threads=2)
    for _ in range(len(batches)):
        read_batch(iterator, batches, bad_rows)
    iterator.close()
    assert reads == {f"clip{i}": 1 for i in range(13)}
    lines = (tmp_path / "bad_rows.jsonl").read_text().splitlines()
    details = {entry["id"]: entry["detail"] for entry in map(json.loads, lines)}
    assert details == {
        f"clip{i}": f"{rows[i].audio} has samples that are not finite" for i in (2, 3, 4)
    }


def test_too_many_bad_clips_stop_the_run(tmp_path):
    batches = make_batches(read_speech(tmp_path, 13))
    for utterance in batches.utterances[:3]:
        break_clip(str(utterance.row.audio), "nan")
    bad_rows = BadRowLog(None, max_rate=0.2)
    bad_rows.start("train", [], num_rows=13)
    iterator = BatchIterator(batches, num_threads=2)
    with pytest.raises(ValueError, match="3 of 13 rows are defective"):
        for _ in range(len(batches)):
            read_batch(iterator, batches, bad_rows)
    iterator.close()
