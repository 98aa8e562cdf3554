"""Rows and labels in columns: what is kept, when it is made anew, and that nobody can tell."""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import pickle
import uuid
from pathlib import Path

import numpy as np
import pytest
import soundfile

from flax_projector.config import DataConfig
from flax_projector.data import kept, labels, manifest, row_file
from flax_projector.data.audio import Problem
from flax_projector.data.bad_rows import BadRow, BadRowLog, BadRows
from flax_projector.data.batch_plan import epoch_members, epoch_plan
from flax_projector.data.manifest import read_manifest
from flax_projector.data.shared_arrays import SharedArrays
from flax_projector.data.utterances import Utterances, prepare
from flax_projector.files import any_path
from tests.bucket import BUCKET
from tests.clips import CONFIG, make_batches, tiny_prompt

pytestmark = pytest.mark.torch  # tests.tiny makes towers with it

NUM_ROWS = 40


@pytest.fixture
def path(tmp_path) -> Path:
    """A manifest of clips of 0.5 to 1.4 s, one of which is missing, and one whose text is."""
    lines = []
    for i in range(NUM_ROWS):
        name, text = f"{i}.wav", "" if i == 7 else f"go left {i}"
        if i != 3:
            soundfile.write(tmp_path / name, np.full(8_000 + 1_600 * (i % 10), 0.1), 16_000)
        row = {"audio": name, "text": text} | ({"duration": 0.8} if i == 3 else {})
        lines.append(json.dumps(row))
    path = tmp_path / "clips.jsonl"
    path.write_text("\n".join(lines))
    return path


def read(path, cache: Path) -> tuple[list, list]:
    rows, bad = read_manifest(path, cache=cache)
    return list(rows), list(bad)


def prepared(path, cache: Path, **options) -> list:
    rows, _ = read_manifest(path, cache=cache)
    return list(prepare([rows], tiny_prompt(), dataclasses.replace(CONFIG, **options))[0])


@pytest.fixture
def count(monkeypatch) -> dict[str, int]:
    """How often rows are made of a manifest, and labels of rows."""
    counts = {"rows": 0, "labels": 0}

    def counted(module, name, key):
        original = getattr(module, name)

        def call(*args):
            counts[key] += 1
            return original(*args)

        monkeypatch.setattr(module, name, call)

    counted(manifest, "_make_draft", "rows")
    counted(labels, "_encode", "labels")
    return counts


def test_rows_and_labels_are_made_once(path, tmp_path, count):
    first = prepared(path, tmp_path / "kept")
    assert count == {"rows": NUM_ROWS, "labels": 1} and len(first) == NUM_ROWS - 2
    again = prepared(path, tmp_path / "kept")
    assert again == first and count == {"rows": NUM_ROWS, "labels": 1}
    lower = prepared(path, tmp_path / "kept", text_case="lower")
    assert lower == first and count == {"rows": NUM_ROWS, "labels": 2}


def change_manifest(path: Path) -> None:
    path.write_text(path.read_text().replace("go left 5", "go right 5"))


def change_clip(path: Path) -> None:
    soundfile.write(path.with_name("5.wav"), np.full(16_000, 0.1), 16_000)


def remove_clip(path: Path) -> None:
    path.with_name("5.wav").unlink()


def repair_clip(path: Path) -> None:
    soundfile.write(path.with_name("3.wav"), np.full(12_800, 0.1), 16_000)


def damage(path: Path) -> None:
    for file in path.parent.glob("kept/*.arrow"):
        file.write_bytes(file.read_bytes()[:-100])


def empty(path: Path) -> None:
    for file in path.parent.glob("kept/*.arrow"):
        file.write_bytes(b"")


@pytest.mark.parametrize(
    "change", [change_manifest, change_clip, remove_clip, repair_clip, damage, empty]
)
def test_what_has_changed_is_made_anew(path, tmp_path, count, change):
    """And is then what a first start would find; nothing else is read a second time."""
    prepared(path, tmp_path / "kept")
    change(path)
    found = read(path, tmp_path / "kept"), prepared(path, tmp_path / "kept")
    assert count == {"rows": 2 * NUM_ROWS, "labels": 2}
    assert found == (read(path, tmp_path / "other"), prepared(path, tmp_path / "other"))


def test_only_clips_that_have_changed_are_measured_again(path, tmp_path, monkeypatch):
    read(path, tmp_path / "kept")
    change_clip(path)
    measured = []
    read_duration = soundfile.info
    monkeypatch.setattr(
        "flax_projector.data.row_file.read_duration",
        lambda audio: measured.append(Path(audio).name) or read_duration(audio).duration,
    )
    rows, _ = read(path, tmp_path / "kept")
    assert measured == ["5.wav"] and rows[4].duration == 1.0


def test_files_are_looked_at_in_few_tasks(tmp_path, monkeypatch):
    """A task a file would take gigabytes for millions of files, which all wait at once."""
    rows = [{"audio": f"{i}.wav", "text": "go", "duration": 1} for i in range(3_000)]
    path = tmp_path / "clips.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for row in rows:
        (tmp_path / row["audio"]).touch()
    first, _ = read_manifest(path, cache=tmp_path / "kept")
    submitted, submit = [], row_file.ThreadPoolExecutor.submit
    monkeypatch.setattr(
        row_file.ThreadPoolExecutor,
        "submit",
        lambda pool, act, *args: submitted.append(act) or submit(pool, act, *args),
    )
    again, _ = read_manifest(path, cache=tmp_path / "kept")
    assert again.table.equals(first.table) and 0 < len(submitted) < 300


def test_columns_of_a_small_manifest_are_in_the_cache_if_there_is_one(path, tmp_path):
    before = set(tmp_path.iterdir())
    read_manifest(path)
    assert set(tmp_path.iterdir()) == before
    read_manifest(path, cache=tmp_path / "kept")
    assert set(tmp_path.iterdir()) == {*before, tmp_path / "kept"}


def test_columns_of_a_large_manifest_are_beside_it(path, tmp_path, monkeypatch, count):
    monkeypatch.setattr(kept, "_MANY_ROWS", NUM_ROWS)
    first = prepared(path, tmp_path / "kept")
    beside = sorted(file.name.partition("-")[0] for file in tmp_path.glob("clips.jsonl.columns/*"))
    assert beside == ["labels", "rows"] and not list(tmp_path.glob("kept/*"))
    assert prepared(path, tmp_path / "other cache") == first
    assert count == {"rows": NUM_ROWS, "labels": 1}


def test_where_nobody_may_write_the_cache_is_used(path, tmp_path, monkeypatch, count, caplog):
    monkeypatch.setattr(kept, "_MANY_ROWS", NUM_ROWS)
    (tmp_path / "clips.jsonl.columns").write_text("in the way")
    first = prepared(path, tmp_path / "kept")
    assert "is not kept: " in caplog.text
    assert prepared(path, tmp_path / "kept") == first
    assert count == {"rows": NUM_ROWS, "labels": 1}


def fill_disk(monkeypatch, *folders: Path) -> None:
    """Files in some folders cannot grow from now on."""
    new_file = kept.pa.ipc.new_file

    def on_full_disk(path: str, *args):
        is_full = Path(path).parent in folders or not folders
        return new_file("/dev/full" if is_full else path, *args)

    def copy_nothing(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(kept.pa.ipc, "new_file", on_full_disk)
    monkeypatch.setattr(kept.shutil, "copyfile", copy_nothing)


def test_on_a_full_disk_columns_are_made_for_this_run_only(
    path, tmp_path, monkeypatch, count, caplog
):
    cache = tmp_path / "kept"
    expected = prepared(path, tmp_path / "other")
    with monkeypatch.context() as patch:
        fill_disk(patch, cache)
        rows, _ = read_manifest(path, cache=cache)
        found, _ = prepare([rows], tiny_prompt(), CONFIG)
        assert list(found) == expected == list(pickle.loads(pickle.dumps(found)))
    assert count == {"rows": 3 * NUM_ROWS, "labels": 2}
    assert not list(cache.iterdir()) and "is not kept: No space left on device" in caplog.text


def test_where_there_is_no_room_at_all_one_line_says_so(path, tmp_path, monkeypatch):
    fill_disk(monkeypatch)
    with pytest.raises(OSError, match=r"could not be written: .*No space left.*make room") as error:
        read(path, tmp_path / "kept")
    assert "\n" not in str(error.value) and not list((tmp_path / "kept").iterdir())


def test_arrays_that_cannot_be_shared_are_one_line(tmp_path, monkeypatch):
    """And are written whole the next time."""
    arrays, save = SharedArrays(a=np.arange(3), b=np.arange(4)), np.save

    def save_one(path: Path, array: np.ndarray) -> None:
        if path.stem == "b":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(path, array)

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space.*: make room"):
        patch.setattr(np, "save", save_one)
        pickle.dumps(arrays)
    shared = pickle.loads(pickle.dumps(arrays))
    assert [*shared] == ["a", "b"] and (shared["b"] == np.arange(4)).all()


def test_what_killed_starts_have_left_is_removed_when_nobody_writes_to_it(path, tmp_path):
    read(path, tmp_path / "kept")
    (table,) = (tmp_path / "kept").iterdir()
    old, new = (table.with_name(f".{table.name}.{age}.partial") for age in ("old", "new"))
    for left in (old, new, old.with_name(f"{old.name}.other")):
        left.write_bytes(b"x")
        if left != new:
            os.utime(left, (0, 0))
    change_manifest(path)
    read(path, tmp_path / "kept")
    assert set((tmp_path / "kept").iterdir()) == {table, new}


def test_runs_that_start_at_the_same_time_use_the_same_columns(path, tmp_path, monkeypatch, count):
    """Whoever is last takes those of the other one, whose labels stay good."""
    others, write = [], row_file.write_rows

    def write_late(*args, **options):
        write(*args, **options)
        if not others:
            others.append(0)
            others.append(prepared(path, tmp_path / "kept"))

    monkeypatch.setattr(row_file, "write_rows", write_late)
    assert prepared(path, tmp_path / "kept") == others[1]
    assert count == {"rows": 2 * NUM_ROWS, "labels": 1}
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_columns_that_another_run_replaces_are_not_taken_for_those_of_this_one(path, tmp_path):
    """Its source has changed since this run has read it."""
    rows, _ = read_manifest(path, cache=tmp_path / "kept")
    expected, content = list(rows), pickle.dumps(rows)
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    other = prepared(path, tmp_path / "kept")
    utterances, _ = prepare([rows], tiny_prompt(), CONFIG)
    assert list(rows) == expected and [u.row for u in utterances] == expected
    for utterance in utterances:
        assert utterance.target == tuple(tiny_prompt().encode_target(utterance.row.text))
    with pytest.raises(ValueError, match=r"is no longer what it was .* start the same command"):
        pickle.loads(content)
    assert prepared(path, tmp_path / "kept") == other


def test_columns_of_a_large_manifest_in_a_bucket_are_there(
    path, tmp_path, bucket_server, monkeypatch, count
):
    monkeypatch.setattr(kept, "_MANY_ROWS", NUM_ROWS)
    folder = f"gs://{BUCKET}/{uuid.uuid4().hex}"
    for file in tmp_path.iterdir():
        any_path(f"{folder}/{file.name}").write_bytes(file.read_bytes())
    url = f"{folder}/clips.jsonl"
    first = prepared(url, tmp_path / "kept")
    names = [file.name for file in any_path(f"{url}.columns").iterdir()]
    assert sorted(name.partition("-")[0] for name in names) == ["labels", "rows"]
    assert prepared(url, tmp_path / "other") == first
    assert count == {"rows": NUM_ROWS, "labels": 1}


def test_workers_share_the_columns(path, tmp_path):
    """What is sent to them does not grow with the number of rows; they see the same batches."""
    rows, _ = read_manifest(path, cache=tmp_path / "kept")
    batches = make_batches(rows, shuffle_seed=0)
    content = pickle.dumps(batches.utterances)
    shared = pickle.loads(content)
    assert isinstance(shared, Utterances) and list(shared) == list(batches.utterances)
    assert isinstance(shared.durations, np.memmap)
    assert len(content) < 2_000
    assert pickle.dumps(rows).__sizeof__() < 2_000


def test_utterances_are_found_by_their_keys(path, tmp_path):
    rows, _ = read_manifest(path, cache=tmp_path / "kept")
    batches = make_batches(rows)
    wanted = [rows[5], rows[20]]
    found = batches.utterances.find([row.key for row in wanted] + ["other\t1", f"{path}\tnone"])
    assert [utterance.row for utterance in found] == wanted


def test_the_order_of_batches_is_that_of_earlier_versions():
    """The hash is that of plans that were made row by row, of the same sources and buckets."""
    rng, digest = np.random.default_rng(0), hashlib.sha256()
    sources, assigned = rng.integers(0, 3, 1000), rng.integers(0, 4, 1000)
    for epoch in range(3):
        members = epoch_members(sources, [1.0, 0.4, 2.3], 7, epoch)
        plan = epoch_plan(members, assigned, [16] * 4, np.random.default_rng((7, epoch)))
        for number in range(len(plan)):
            bucket, batch = plan[number]
            digest.update(repr((bucket, batch.tolist())).encode())
    assert digest.hexdigest()[:16] == "c91b93bda4d8c7f7"


def test_millions_of_rows_that_are_too_long_are_counted_and_some_are_listed(tmp_path, caplog):
    made = []

    def make(number: int) -> BadRow:
        made.append(number)
        return BadRow(f"{number}", "s", Problem.TOO_LONG, "30 s")

    rows = BadRows(np.full(3_000_000, Problem.TOO_LONG.value, np.int8), make)
    log = BadRowLog(tmp_path / "bad.jsonl", max_rate=0.0)
    with caplog.at_level(logging.WARNING):
        log.start("train", rows, num_rows=4_000_000)
    assert "3000000 of 4000000 rows are left out: 3000000 too long" in caplog.text
    assert log.summary() == "rows left out: train 3000000 of 4000000 (3000000 too long)"
    lines = (tmp_path / "bad.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [str(i) for i in range(10_000)]
    assert len(made) < 20_000
    log.add("train", [BadRow("x", "s", Problem.SILENT, "silent", "", True)])
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 10_001


def test_bad_rows_of_several_sources_are_one_sequence():
    parts = [[BadRow(f"{i}{j}", "s", Problem(i + 1), "") for j in range(i)] for i in range(4)]
    joined = BadRows.joined([BadRows.of(part) for part in parts])
    assert list(joined) == [row for part in parts for row in part]
    assert joined.counts() == {Problem(i + 1): i for i in range(1, 4)}
    assert joined[-1] == parts[3][2] and joined[1:3] == parts[2]


def test_a_set_needs_no_python_object_a_row(path, tmp_path, monkeypatch):
    """All that a start does to plan its batches and to compare them with other hosts."""
    rows, _ = read_manifest(path, cache=tmp_path / "kept")
    made, row = [], type(rows).row
    monkeypatch.setattr(type(rows), "row", lambda self, n: made.append(n) or row(self, n))
    config = DataConfig(window_secs=6.0, bucket_secs=(0.7, 6.0))
    batches = make_batches(rows, config=config, shuffle_seed=0)
    assert len(batches.fingerprint) == 16 and batches.utterances.spoken().size
    assert batches.utterances.keys("clip").shape == (2, NUM_ROWS - 2)
    batches.abstract_batches()
    assert len(made) < NUM_ROWS // 2  # those that the type checker looks at
