"""Buckets, batches, mixtures, and the iterators over them."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from flax_projector import data
from flax_projector.audio import Problem, load_audio
from flax_projector.bad_rows import BadRowLog
from flax_projector.batch_plan import epoch_members, epoch_plan, prepare
from flax_projector.config import DataConfig, MeshConfig, PromptConfig
from flax_projector.data import (
    BatchIterator,
    BatchSource,
    Waveforms,
    find_unreadable,
    take_problems,
    to_global,
)
from flax_projector.manifest import ManifestRow, read_manifest
from flax_projector.prompt import AUDIO_TOKEN, make_prompt
from flax_projector.sharding import make_mesh
from tests.tiny import make_speech, make_tokenizer

pytestmark = pytest.mark.torch  # tests.tiny makes towers with it

CONFIG = DataConfig(window_secs=2.0, bucket_secs=(0.7, 1.1, 2.0), max_text_tokens=20)


@pytest.fixture
def source(tmp_path):
    """Makes sources, by default over 13 clips: they do not divide into batches of 8."""
    prompt = make_prompt(make_tokenizer(), PromptConfig())

    def make(rows: list[ManifestRow] | None = None, **kwargs) -> BatchSource:
        rows = read_manifest(make_speech(tmp_path, 13))[0] if rows is None else rows
        return BatchSource(
            prepare(rows, prompt, CONFIG)[0],
            inputs=Waveforms(CONFIG.window_samples),
            prompt=prompt,
            config=CONFIG,
            pool_stride=4,
            mesh=make_mesh(MeshConfig()),
            **{"batch_size": 8, **kwargs},
        )

    return make


def seen(batches: BatchSource, first: int = 0, last: int | None = None) -> list[str]:
    """Ids in the order of the batches."""
    numbers = range(first, len(batches) if last is None else last)
    return [u.row.id for i in numbers for u in batches.members(i) if u]


@pytest.mark.parametrize("shuffle_seed", [None, 3])
@pytest.mark.parametrize("batch_size", [8, 16])
def test_every_utterance_is_seen_once_an_epoch(source, shuffle_seed, batch_size):
    batches = source(shuffle_seed=shuffle_seed, batch_size=batch_size)
    assert sorted(seen(batches)) == sorted(f"clip{i}" for i in range(13))


@pytest.mark.parametrize("sizes", [(0, 0, 1), (3, 5, 0), (8, 8, 8), (1, 0, 30), (17, 2, 3)])
@pytest.mark.parametrize("seed", [None, 0])
def test_plan_pads_only_one_batch_and_moves_leftovers_up(sizes, seed):
    assigned = np.repeat(np.arange(3), sizes)
    rng = None if seed is None else np.random.default_rng(seed)
    plan = epoch_plan(np.arange(len(assigned)), assigned, 3, 4, rng)
    members = np.concatenate([batch for _, batch in plan])
    assert sorted(members[members >= 0]) == list(range(sum(sizes)))
    assert sum((batch < 0).any() for _, batch in plan) <= 1
    assert len(plan) == -(-sum(sizes) // 4)
    for bucket, batch in plan:
        assert all(assigned[i] <= bucket for i in batch if i >= 0)


def test_epochs_differ_and_are_the_same_for_everyone(source):
    batches, again = (source(shuffle_seed=1, num_batches=40) for _ in range(2))
    epoch = len(source(shuffle_seed=1))
    order = [[u and u.row.id for u in batches.members(i)] for i in range(2 * epoch)]
    assert order == [[u and u.row.id for u in again.members(i)] for i in range(2 * epoch)]
    assert order[:epoch] != order[epoch:]


def test_batches_hold_the_clips_and_mark_what_is_real(source):
    batches = source()
    for index in range(len(batches)):
        batch = batches[index]
        for row, utterance in enumerate(batches.members(index)):
            if utterance is None:
                assert not batch["frame_valid"][row].any()
                assert not batch["label_valid"][row].any()
                assert batch["prompt_len"][row] == 0
                continue
            samples = load_audio(utterance.row.audio)
            np.testing.assert_array_equal(batch["samples"][row, : len(samples)], samples)
            assert not batch["samples"][row, len(samples) :].any()
            num_frames = -(-len(samples) // 320)
            assert batch["frame_valid"][row].sum() == num_frames
            assert (batch["tokens"][row] == AUDIO_TOKEN).sum() == -(-num_frames // 4)
            assert batch["label_valid"][row].sum() == len(utterance.target)


def test_number_of_shapes_is_at_most_the_number_of_buckets(source):
    batches = source(shuffle_seed=0, num_batches=50)
    shapes = {
        tuple(sorted((k, v.shape) for k, v in batches[i].items())) for i in range(len(batches))
    }
    assert 1 < len(shapes) <= len(CONFIG.bucket_secs)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 3), (2, 0)])
def test_iterator_resumes_where_it_stood_whoever_reads(source, before, after):
    batches = source(shuffle_seed=0, num_batches=7)
    whole = [batches[i] for i in range(7)]
    first = BatchIterator(batches, num_threads=2, num_workers=before)
    begun = [next(first) for _ in range(3)]
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    resumed = BatchIterator(batches, num_threads=2, num_workers=after)
    resumed.set_state(state)
    rest = list(resumed)
    resumed.close()
    assert len(begun) == 3 and len(rest) == 4
    for expected, actual in zip(whole, begun + rest, strict=True):
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(actual[name], value, err_msg=name)


def is_running(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    try:
        return path.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
def test_workers_end_with_a_main_process_that_is_killed(source, tmp_path):
    (tmp_path / "source").write_bytes(pickle.dumps(source(shuffle_seed=0, num_batches=100)))
    script = (
        "import multiprocessing, pickle, sys, time\n"
        "from flax_projector.data import BatchIterator\n"
        "if __name__ == '__main__':\n"
        "    batches = pickle.load(open(sys.argv[1], 'rb'))\n"
        "    iterator = BatchIterator(batches, num_threads=1, num_workers=2)\n"
        "    next(iterator)\n"
        "    print(*(p.pid for p in multiprocessing.active_children()), flush=True)\n"
        "    time.sleep(300)\n"
    )
    (tmp_path / "read.py").write_text(script)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "read.py"), str(tmp_path / "source")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        workers = list(map(int, process.stdout.readline().split()))
        process.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, workers))


def test_resuming_on_other_rows_says_so(source, tmp_path, caplog):
    state = BatchIterator(source(), num_threads=1).get_state()
    BatchIterator(source(), num_threads=1).set_state(state)
    assert not caplog.text
    rows = read_manifest(make_speech(tmp_path, 13))[0]
    BatchIterator(source(rows[:12]), num_threads=1).set_state(state)
    assert "its rows are not those that the run began with: batches from 0 on" in caplog.text


def test_a_source_pickles_without_its_devices(source):
    batches = source(shuffle_seed=0)
    copy = pickle.loads(pickle.dumps(batches))
    assert not hasattr(copy, "mesh") and copy.fingerprint == batches.fingerprint
    np.testing.assert_array_equal(copy[0]["samples"], batches[0]["samples"])


@pytest.mark.parametrize("num_processes", [2, 4])
@pytest.mark.parametrize("shuffle_seed", [None, 1])
def test_processes_share_an_epoch_without_gap_or_overlap(
    source, monkeypatch, num_processes, shuffle_seed
):
    whole = source(shuffle_seed=shuffle_seed)
    parts = []
    for process in range(num_processes):
        rows = np.arange(8).reshape(num_processes, -1)[process]
        monkeypatch.setattr(data, "local_rows", lambda mesh, num_rows, rows=rows: rows)
        parts.append(source(shuffle_seed=shuffle_seed))
    for index in range(len(whole)):
        batches = [part[index] for part in parts]
        for name, value in whole[index].items():
            np.testing.assert_array_equal(np.concatenate([b[name] for b in batches]), value)


def mixture(tmp_path) -> list[ManifestRow]:
    """Sources a, b and c with 13, 6 and 3 clips."""
    rows = []
    for name, count in (("a", 13), ("b", 6), ("c", 3)):
        manifest = make_speech(tmp_path / name, count)
        found = read_manifest(manifest, source=name)[0]
        rows += [dataclasses.replace(row, id=f"{name}{i}") for i, row in enumerate(found)]
    return rows


WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}


def test_a_weight_is_how_often_an_epoch_holds_each_utterance(source, tmp_path):
    batches = source(mixture(tmp_path), shuffle_seed=4, weights=WEIGHTS, num_batches=100)
    length = -(-(13 + 2 * 6 + 2) // 8)  # round(0.5 * 3) = 2 of c
    for epoch in range(6):
        counts = Counter(seen(batches, epoch * length, (epoch + 1) * length))
        assert [counts[f"a{i}"] for i in range(13)] == [1] * 13
        assert [counts[f"b{i}"] for i in range(6)] == [2] * 6
        assert sum(counts[f"c{i}"] for i in range(3)) == 2
    counts = Counter(seen(batches, 0, 6 * length))
    assert [counts[f"c{i}"] for i in range(3)] == [4] * 3  # 6 epochs x 2 draws over 3 utterances


@pytest.mark.parametrize("weight", [0.3, 0.5, 1.0, 1.7, 3.0])
def test_no_utterance_of_a_source_is_drawn_twice_more_than_another(weight):
    counts = np.zeros(11, int)
    for epoch in range(25):
        members = epoch_members(np.zeros(11, int), [weight], seed=5, epoch=epoch)
        assert len(members) == round(11 * weight)
        counts += np.bincount(members, minlength=11)
        assert np.ptp(counts) <= 1


def test_mixtures_are_the_same_for_everyone_and_differ_between_epochs(source, tmp_path):
    rows = mixture(tmp_path)
    first, again = (source(rows, shuffle_seed=4, weights=WEIGHTS, num_batches=20) for _ in range(2))
    assert seen(first) == seen(again)
    assert seen(first, 0, 4) != seen(first, 4, 8)
    assert seen(first) != seen(source(rows, shuffle_seed=5, weights=WEIGHTS, num_batches=20))
    even = source(rows, shuffle_seed=4, weights=dict.fromkeys("abc", 1.0))
    assert seen(even) == seen(source(rows, shuffle_seed=4))


def test_weights_without_a_shuffle_are_an_error(source):
    with pytest.raises(ValueError, match="need a shuffle_seed"):
        source(weights={"a": 2.0})


def test_global_batch_is_split_over_the_devices(source):
    batches = source()
    arrays = to_global(batches[0], batches)
    assert {len(a.sharding.device_set) for a in arrays.values()} == {8}
    assert arrays["tokens"].addressable_shards[0].data.shape[0] == 1
    np.testing.assert_array_equal(np.asarray(arrays["tokens"]), batches[0]["tokens"])


def test_a_batch_that_does_not_divide_over_the_devices_is_padded(source, caplog):
    batches = source(batch_size=6)
    assert "a multiple of 8 has none" in caplog.text
    assert len(batches) == 3
    ids = []
    for index in range(len(batches)):
        members = batches.members(index)
        assert len(members) == 8 and members[6:] == [None, None]
        assert not batches[index]["label_valid"][6:].any()
        ids += [u.row.id for u in members if u]
    assert sorted(ids) == sorted(f"clip{i}" for i in range(13))


def test_what_no_bucket_holds_is_left_out_and_counted(tmp_path):
    prompt = make_prompt(make_tokenizer(), PromptConfig())
    rows, _ = read_manifest(make_speech(tmp_path, 13))
    short = DataConfig(window_secs=2.0, bucket_secs=(0.9,), max_text_tokens=12)
    kept, bad = prepare(rows, prompt, short)
    assert 0 < len(kept) < 13 and len(kept) + len(bad) == 13
    assert {row.reason for row in bad} == {Problem.TOO_LONG, Problem.TOO_MANY_LABELS}
    assert all(u.row.duration <= 0.9 and len(u.target) <= 12 for u in kept)
    with pytest.raises(ValueError, match="none of 13 utterances fits"):
        prepare(rows, prompt, DataConfig(window_secs=2.0, bucket_secs=(0.1,)))


def break_clip(path: str, how: str) -> None:
    """Damages a clip after its manifest was read."""
    rng = np.random.default_rng(0)
    if how == "missing":
        Path(path).unlink()
    elif how == "undecodable":
        Path(path).write_bytes(b"not audio")
    elif how == "nan":
        samples = np.full(soundfile.info(path).frames, np.nan)
        soundfile.write(path, samples, 16_000, subtype="FLOAT")
    else:
        secs = {"longer": 1.9, "shorter": 0.1}[how]
        soundfile.write(path, rng.uniform(-0.1, 0.1, round(secs * 16_000)), 16_000)


@pytest.mark.parametrize(
    ("how", "problem", "detail", "num_workers"),
    [
        ("missing", Problem.MISSING_FILE, "4.wav does not exist", 0),
        ("undecodable", Problem.UNDECODABLE, "4.wav is not a readable audio file", 0),
        ("nan", Problem.NOT_FINITE, "4.wav has samples that are not finite", 0),
        ("longer", Problem.WRONG_DURATION, "4.wav lasts 1.90 s, not the", 0),
        ("shorter", Problem.WRONG_DURATION, "4.wav lasts 0.10 s, not the", 2),
    ],
)
def test_what_shows_when_a_clip_is_read_becomes_padding(
    source, tmp_path, how, problem, detail, num_workers
):
    batches = source(shuffle_seed=0)
    whole = [batches[i] for i in range(len(batches))]
    bad = next(u for u in batches.utterances if u.row.id == "clip4")
    break_clip(str(bad.row.audio), how)
    bad_rows = BadRowLog(tmp_path / "bad_rows.jsonl", max_rate=0.1)
    bad_rows.start("train", [], num_rows=13)
    iterator = BatchIterator(batches, num_threads=2, num_workers=num_workers)
    for index, batch in enumerate(iterator):
        rows = [u is bad for u in batches.members(index)]
        assert list(batch["problem"]) == [problem if is_bad else 0 for is_bad in rows]
        taken = take_problems(batch, batches, index, bad_rows)
        assert "problem" not in taken
        for name, value in taken.items():
            good = ~np.array(rows)
            np.testing.assert_array_equal(value[good], whole[index][name][good], err_msg=name)
        assert not taken["samples"][rows].any() and not taken["label_valid"][rows].any()
        assert not taken["frame_valid"][rows].any() and not taken["prompt_len"][rows].any()
    iterator.close()
    (entry,) = map(json.loads, (tmp_path / "bad_rows.jsonl").read_text().splitlines())
    assert (entry["id"], entry["reason"]) == ("clip4", problem.name.lower())
    assert detail in entry["detail"]


def test_clips_that_can_be_read_again_are_no_longer_bad(source):
    batches = source()
    paths = [str(u.row.audio) for u in batches.utterances]
    for path in paths[:2]:
        break_clip(path, "nan")
    inputs = Waveforms(CONFIG.window_samples)
    (first, second) = find_unreadable(batches.utterances, inputs, num_threads=2)
    assert [first.key, second.key] == [u.row.key for u in batches.utterances[:2]]
    assert first.reason == Problem.NOT_FINITE and f"{paths[0]} has samples" in first.detail
    soundfile.write(paths[0], np.zeros(soundfile.info(paths[0]).frames), 16_000)
    assert find_unreadable(batches.utterances, inputs, num_threads=2) == [second]


def test_too_many_bad_clips_stop_the_run(source, tmp_path):
    batches = source()
    for i in range(3):
        break_clip(str(batches.utterances[i].row.audio), "nan")
    bad_rows = BadRowLog(None, max_rate=0.2)
    bad_rows.start("train", [], num_rows=13)
    with pytest.raises(ValueError, match="3 of 13 rows are defective"):
        for index in range(len(batches)):
            take_problems(batches[index], batches, index, bad_rows)


def test_a_clip_longer_than_the_window_is_never_cut(source, tmp_path):
    samples = np.random.default_rng(0).uniform(-0.1, 0.1, 32_640)  # 2.04 s
    soundfile.write(tmp_path / "long.wav", samples, 16_000)
    row = ManifestRow("long", str(tmp_path / "long.wav"), "go", 2.0)
    assert list(source([row])[0]["problem"]) == [Problem.WRONG_DURATION] + [0] * 7


def test_segments_are_batched_like_files(source, tmp_path):
    samples = np.random.default_rng(0).uniform(-0.1, 0.1, 160_000).astype(np.float32)
    soundfile.write(tmp_path / "long.wav", samples, 16_000, subtype="FLOAT")
    rows = [
        ManifestRow(str(i), str(tmp_path / "long.wav"), "go", 0.5, offset=0.5 * i)
        for i in range(16)
    ]
    batches = source(rows)
    batch = np.concatenate([batches[i]["samples"][:, :8000] for i in range(2)])
    np.testing.assert_array_equal(batch.ravel(), samples[:128_000])
