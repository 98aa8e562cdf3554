"""Shards that are packed: every clip as it was, and the same bytes after any kill."""

import errno
import hashlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

import flax_projector.__main__
from flax_projector.data.audio import BadAudio, Problem, load_audio
from flax_projector.data.manifest import read_manifest
from flax_projector.data.shards import output
from flax_projector.data.shards import pack as packing
from flax_projector.files import writing
from tests.bucket import BUCKET

ROOT = Path(flax_projector.__main__.__file__).parents[1]


def run(*arguments: str) -> None:
    flax_projector.__main__.cli(["pack", *arguments])


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A manifest of six clips of half a megabyte, segments of one of them, and two bad rows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, rng = tmp_path / "clips", np.random.default_rng(0)
    folder.mkdir()
    rows: list[dict] = []
    for i, suffix in enumerate(["wav", "wav", "flac", "flac", "ogg", "wav"]):
        name = f"{i}.{suffix}"
        soundfile.write(folder / name, rng.uniform(-0.1, 0.1, 22_050 * (12 + i)), 22_050)
        rows.append({"audio": name, "text": f"clip {i}", "id": f"row/{i}.x"})
    rows[1]["duration"] = 13.004  # of 13 s: rounded
    segments = [
        {"audio": "5.wav", "text": f"part {i}", "offset": 2.0 * i, "duration": 1.5}
        for i in (0, 2, 1)
    ]
    bad = [
        {"audio": "none.wav", "text": "x", "duration": 1},
        {"audio": "noise.wav", "text": "x", "duration": 1},
    ]
    (folder / "noise.wav").write_bytes(b"noise")
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, *bad, *segments])))
    return folder / "a.jsonl"


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def members(folder: Path) -> list[str]:
    names = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            names += tar.getnames()
    return names


def test_clips_are_as_they_were_and_segments_keep_their_places(source, tmp_path):
    run(str(source), str(tmp_path / "dst"), "--shard-mb", "1")
    dst = tmp_path / "dst"
    expected, _ = read_manifest(source)
    rows, bad = read_manifest(dst / "manifest.jsonl")
    assert not bad and len(rows) == len(expected) - 1 == 9
    expected = [row for row in expected if "noise" not in str(row.audio)]
    assert [(r.text, r.offset) for r in rows] == [(r.text, r.offset) for r in expected]
    assert [r.id for r in rows] == [r.id for r in expected]
    for new, old in zip(rows, expected, strict=True):
        assert new.audio.fetch() == Path(str(old.audio)).read_bytes()  # pyright: ignore
        assert new.duration == old.duration, "the order of batches depends on it"
    listed = [json.loads(line) for line in (dst / "manifest.bad.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in listed] == ["missing_file", "undecodable"]
    shards = sorted(dst.glob("*.tar"))
    assert len(shards) > 2 and {p.name for p in dst.iterdir()} == {
        *(p.name for p in shards),
        "manifest.jsonl",
        "manifest.bad.jsonl",
    }
    with tarfile.open(shards[0]) as tar:
        infos = tar.getmembers()
        assert [m.name for m in infos[:2]] == ["000000000.wav", "000000000.txt"]
        assert {(m.mtime, m.uid, m.uname, m.mode) for m in infos} == {(0, 0, "", 0o644)}
    assert len([name for name in members(dst) if name.endswith("wav")]) <= 4  # one for all segments
    before = contents(dst)
    with pytest.raises(SystemExit, match="holds something else"):
        run(str(source), str(dst), "--shard-mb", "1")
    assert contents(dst) == before


def test_flac_is_what_training_reads(source, tmp_path):
    run(str(source), str(tmp_path / "dst"), "--flac", "--shard-mb", "1")
    rows, bad = read_manifest(tmp_path / "dst/manifest.jsonl")
    expected = [row for row in read_manifest(source)[0] if "noise" not in str(row.audio)]
    assert not bad and len(rows) == 9 and not any(row.offset for row in rows)
    for new, old in zip(rows, expected, strict=True):
        samples = load_audio(old.audio, offset=old.offset, duration=old.duration)
        np.testing.assert_allclose(load_audio(new.audio, duration=new.duration), samples, atol=1e-4)
    names = members(tmp_path / "dst")
    assert sorted({name.rpartition(".")[2] for name in names}) == ["flac", "txt"]
    assert len(names) == 18


# Of aiohttp; nothing else is on the event loop of gcsfs meanwhile.
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_shards_packed_again_are_the_same_wherever_they_are(source, tmp_path, bucket_server):
    run(str(source), str(tmp_path / "a"), "--shard-mb", "1")
    shards, url = tmp_path / "a/manifest.jsonl", f"gs://{BUCKET}/packed/b"
    run(str(source), url, "--shard-mb", "1")
    bucket_server.files().get(url, str(tmp_path / "b"), recursive=True)
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    rows, _ = read_manifest(f"{url}/manifest.jsonl")
    assert len(load_audio(rows[0].audio)) == 12 * 16_000
    run(str(shards), str(tmp_path / "c"), "--shard-mb", "100")  # rows that point into files
    packed = [row.audio.fetch() for row in read_manifest(tmp_path / "c/manifest.jsonl")[0]]  # pyright: ignore
    assert packed == [row.audio.fetch() for row in read_manifest(shards)[0]]  # pyright: ignore


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_is_packed(tmp_path, monkeypatch, streaming):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    clips = []
    for i in range(4):
        soundfile.write(
            tmp_path / "x.flac", np.random.default_rng(i).uniform(-0.1, 0.1, 16_000), 16_000
        )
        clips.append((tmp_path / "x.flac").read_bytes())
    table = {"audio": [{"bytes": clip, "path": None} for clip in clips], "text": list("abcd")}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(table).to_parquet(str(tmp_path / "set/train.parquet"))
    options = ["--hf-streaming", "--hf-max-rows", "3"] if streaming else []
    run(f"hf:{tmp_path}/set:train", str(tmp_path / "dst"), *options)
    rows, bad = read_manifest(tmp_path / "dst/manifest.jsonl")
    assert not bad
    num_rows = 3 if streaming else 4
    assert [row.audio.fetch() for row in rows] == clips[:num_rows]  # pyright: ignore
    assert [row.text for row in rows] == list("abcd")[:num_rows]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_mb": "2"}, "was begun with "),
        ({"flac": True}, "was begun with "),
        ({"rows": True}, "was begun with "),
    ],
)
def test_what_was_begun_otherwise_is_not_continued(source, tmp_path, monkeypatch, change, message):
    dst = tmp_path / "dst"
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_verify", lambda *_, **__: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(SystemExit, match="killed"):
            run(str(source), str(dst), "--shard-mb", "1")
    before = contents(dst)
    if "rows" in change:
        source.write_text(source.read_text().replace("clip 3", "other"))
    options = ["--shard-mb", change.get("shard_mb", "1"), *(["--flac"] if "flac" in change else [])]
    with pytest.raises(SystemExit) as ended:
        run(str(source), str(dst), *options)
    assert message in str(ended.value) and "\n" not in str(ended.value)
    assert contents(dst) == before


def test_a_shard_that_does_not_read_back_is_named_and_written_again(source, tmp_path, monkeypatch):
    run(str(source), str(tmp_path / "whole"), "--shard-mb", "1")
    verify, dst = packing._verify, tmp_path / "dst"

    def damage(*arguments, **options):
        with (dst / "000001.tar").open("r+b") as file:
            file.write(b"damaged")
        verify(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_verify", damage)
        with pytest.raises(SystemExit, match=r"dst: 000001\.tar did not read back as written"):
            run(str(source), str(dst), "--shard-mb", "1")
    assert not (dst / "manifest.jsonl").exists()
    run(str(source), str(dst), "--shard-mb", "1")
    assert contents(dst) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl", "dst"], "manifest none.jsonl does not exist"),
        (["clips/a.jsonl", "clips"], "clips holds something else (0.wav, 1.wav, 2.flac)"),
        (["clips/a.jsonl", "dst", "--shard-mb", "0"], "--shard-mb 0: expected 1 or more"),
        (["clips/a.jsonl", "s3://b/dst"], "s3://b/dst is a URL that cannot be used here"),
    ],
)
def test_what_cannot_be_packed_is_one_line_and_leaves_nothing(
    source, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    before = set(contents(tmp_path))
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert f"error: {message}" in str(ended.value) and "\n" not in str(ended.value)
    left = {name for name in contents(tmp_path) if not name.startswith("cache/")}
    assert left == before and not (tmp_path / "dst").exists()


@pytest.mark.parametrize("kind", [OSError, ValueError])
def test_an_error_gets_from_one_process_to_another(tmp_path, kind):
    def fail(path: Path) -> None:
        if kind is ValueError:
            raise BadAudio(Problem.UNREADABLE, f"{path} is locked")
        with writing(path):
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(kind, match=r"x (is locked|could not be written: full: make room)") as error:
        output.sendable(fail, tmp_path / "x")
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


PROGRAM = """
import sys
from flax_projector.__main__ import cli
from flax_projector.data.shards import output

if __name__ == "__main__":
    output._WORTH_A_PROCESS = {least}
    cli(["pack", *sys.argv[1:]])
"""


def kill_and_continue(
    source: Path, tmp_path: Path, moments: list[tuple[int, float]], *, in_processes: bool
) -> None:
    """Kills `pack`, each time after so many new shards and seconds, and compares the bytes."""
    row = json.loads(source.read_text().splitlines()[4])
    source.write_text("\n".join(json.dumps(row | {"id": str(i)}) for i in range(60)))
    run(str(source), str(tmp_path / "whole"), "--flac", "--shard-mb", "1")
    (tmp_path / "program.py").write_text(PROGRAM.format(least=0 if in_processes else 1 << 40))
    dst = tmp_path / "dst"
    command = [sys.executable, str(tmp_path / "program.py"), str(source), str(dst), "--flac"]

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [*command, "--shard-mb", "1"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )

    def num_done() -> int:
        return len(list(dst.glob(".pack/[0-9]*.json")))

    num_killed = 0
    for num_shards, secs in moments:
        before, process, deadline = num_done(), start(), time.monotonic() + 100
        while num_done() < before + num_shards and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(secs)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=200)
        num_killed += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors[-3000:]
    if not (dst / "manifest.jsonl").exists():
        _, errors = start().communicate(timeout=200)
        assert (dst / "manifest.jsonl").exists(), errors[-3000:]
    assert num_killed and contents(dst) == contents(tmp_path / "whole")


def test_packing_may_be_killed(source, tmp_path):
    kill_and_continue(source, tmp_path, [(3, 0.0), (4, 0.03)], in_processes=False)


@pytest.mark.slow
def test_packing_may_be_killed_at_any_moment(source, tmp_path):
    rng = random.Random(0)
    moments = [(rng.randrange(4), rng.uniform(0, 0.2)) for _ in range(9)]
    moments.insert(0, (0, rng.uniform(2, 5)))
    kill_and_continue(source, tmp_path, moments, in_processes=True)
