"""Manifests of existing shards: every clip is found, and whatever is wrong is named and counted."""

import gzip
import io
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

import flax_projector.__main__
from flax_projector.data.audio import load_audio
from flax_projector.data.manifest import read_manifest
from flax_projector.data.shards.index import write_index
from tests.bucket import BUCKET


def clip(secs: float = 0.5, format: str = "flac", level: float = 0.1) -> bytes:
    file = io.BytesIO()
    samples = np.random.default_rng(round(1000 * secs)).uniform(-level, level, round(16_000 * secs))
    soundfile.write(file, samples, 16_000, format=format)
    return file.getvalue()


def tar(path: Path, *members: tuple[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def index(folder: Path, *shards: str, **options) -> tuple[list[dict], list[dict]]:
    """The rows of a manifest in the folder, and the list of what is wrong."""
    write_index(shards or (f"{folder}/*.tar",), f"{folder}/train.jsonl", **options)
    bad = folder / "train.bad.jsonl"
    rows, wrong = (
        [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for path in (folder / "train.jsonl", bad)
    )
    return rows, wrong


def test_every_clip_is_found_and_read_as_it_was_stored(tmp_path):
    formats = {"flac": "flac", "wav": "wav", "mp3": "mp3", "ogg": "ogg"}
    clips = {key: clip(0.5 + 0.1 * i, formats[key]) for i, key in enumerate(formats)}
    long = "deep/" + 150 * "x"
    tar(
        tmp_path / "a.tar",
        *((f"{key}.{key}", content) for key, content in clips.items()),
        *((f"{key}.txt", f" said in {key}\n") for key in clips),
        ("notes.cls", "3"),
        ("folder/x.FLAC", clips["flac"]),
        ("folder/x.json", json.dumps({"text": "from json"})),
        ("folder/x.cls", "7"),
        (f"{long}.seg.flac", clips["flac"]),
        (f"{long}.txt", "a long name"),
        ("__meta__.json", "{}"),
        ("._x.flac", "resource fork"),
    )
    tar(tmp_path / "b.tar", ("x.wav", clips["wav"]), ("x.json", '{"said": "x"}'), ("x.txt", "b"))
    rows, bad = index(tmp_path)
    assert [(row["id"], row["text"]) for row in rows] == [
        *((f"a/{key}", f"said in {key}") for key in clips),
        ("a/folder/x", "from json"),
        (f"a/{long}", "a long name"),
        ("b/x", "b"),
    ]
    assert [(row["id"], row["reason"]) for row in bad] == [("a/notes", "malformed")]
    assert {row["audio"] for row in rows} == {"a.tar", "b.tar"}
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in tmp_path.glob("*.*"):
        path.rename(moved / path.name)
    found, wrong = read_manifest(moved / "train.jsonl")
    assert not wrong and len(found) == 7
    for row, key in zip(found, clips, strict=False):
        (tmp_path / f"x.{key}").write_bytes(clips[key])
        samples = load_audio(row.audio, offset=row.offset, duration=row.duration)
        np.testing.assert_array_equal(samples, load_audio(tmp_path / f"x.{key}"))


GOOD = (("good.flac", clip()), ("good.txt", "go"))
WRONG = {
    "no clip": ((("x.cls", "1"), ("x.txt", "go")), "malformed", "no clip, only cls, txt"),
    "unknown suffix": ((("x.m4a", clip()), ("x.txt", "go")), "malformed", "only m4a, txt: the suf"),
    "no text": ((("x.flac", clip()),), "empty_text", "no transcript, only flac"),
    "empty text": ((("x.flac", clip()), ("x.txt", " \n")), "empty_text", "no transcript"),
    "no key": ((("x.flac", clip()), ("x.json", "{}")), "empty_text", "only flac, json"),
    "text in latin 1": ((("x.flac", clip()), ("x.txt", b"caf\xe9")), "malformed", "codec can't"),
    "number": ((("x.flac", clip()), ("x.json", '{"text": 7}')), "malformed", "7 is not a string"),
    "no json": ((("x.flac", clip()), ("x.json", "{")), "malformed", "transcript cannot be read"),
    "no audio": (
        (("x.flac", b"noise"), ("x.txt", "go")),
        "undecodable",
        "x.flac is not a readable",
    ),
    "empty clip": ((("x.flac", b""), ("x.txt", "go")), "undecodable", "x.flac is not a readable"),
    "cut clip": ((("x.wav", clip(format="wav")[:-9000]), ("x.txt", "go")), "incomplete", "end"),
    "twice": (
        (*GOOD, ("x.flac", clip()), ("x.txt", "go"), ("x.flac", clip(0.7))),
        "duplicate_id",
        "x.flac: its key 'x' occurs twice; the first one is used",
    ),
    "two clips": (
        (("x.flac", clip()), ("x.wav", clip(0.7)), ("x.txt", "go")),
        "duplicate_id",
        "x.wav: its key 'x' occurs twice",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_sample_is_named_and_counted(tmp_path, caplog, case):
    members, reason, detail = WRONG[case]
    tar(tmp_path / "a.tar", *members)
    tar(tmp_path / "b.tar", *GOOD)
    with caplog.at_level(logging.INFO, "flax_projector"):
        rows, (bad,) = index(tmp_path)
    assert "b/good" in {row["id"] for row in rows}
    if reason == "duplicate_id":
        assert next(row for row in rows if row["id"] == "a/x")["duration"] == 0.5
    assert (bad["reason"], bad["source"]) == (reason, f"{tmp_path}/a.tar")
    assert detail in bad["detail"] and f"{tmp_path}/a.tar" in bad["detail"]
    assert f"1 of {len(rows) + 1} rows are left out: 1 {reason.replace('_', ' ')}" in caplog.text


def damaged(path: Path, how: str) -> str:
    content = path.read_bytes()
    cuts = {"in a clip": 3000, "in a header": 512 * 3 + 100, "between": 512, "empty": 0}
    if how in cuts:
        keep = {"between": content.index(b"b.flac"), "in a header": content.index(b"b.flac") + 99}
        keep |= {"in a clip": content.index(b"b.flac") + 700, "empty": 0}
        path.write_bytes(content[: keep[how]])
    elif how == "header of noise":
        at = content.index(b"b.flac")
        path.write_bytes(content[:at] + 512 * b"?" + content[at + 512 :])
    elif how == "compressed":
        path.write_bytes(gzip.compress(content))
    else:
        path.write_bytes(b"not a tar" * 200)
    return how


@pytest.mark.parametrize("place", ["local", "memory://damaged"])
@pytest.mark.parametrize(
    ("how", "reason", "detail", "num_rows"),
    [
        ("in a clip", "incomplete", "breaks off at byte", 1),
        ("in a header", "incomplete", "breaks off at byte", 1),
        ("between", "incomplete", "breaks off at byte", 1),
        ("header of noise", "incomplete", "breaks off at byte", 1),
        ("empty", "undecodable", "it is no tar", 0),
        ("compressed", "undecodable", "a compressed one, which must be unpacked", 0),
        ("no tar", "undecodable", "it is no tar", 0),
    ],
)
def test_a_damaged_shard_is_named_and_what_is_before_is_used(
    tmp_path, place, how, reason, detail, num_rows
):
    import fsspec

    names = [("a.flac", clip()), ("a.txt", "go"), ("b.flac", clip(0.6)), ("b.txt", "on")]
    damaged(tar(tmp_path / "bad.tar", *names), how)
    tar(tmp_path / "good.tar", *GOOD)
    shards = [f"{tmp_path}/{name}.tar" for name in ("bad", "good")]
    if place != "local":
        fs = fsspec.filesystem("memory")
        for name in ("bad", "good"):
            fs.pipe_file(f"/damaged/{name}.tar", (tmp_path / f"{name}.tar").read_bytes())
        shards = [f"{place}/{name}.tar" for name in ("bad", "good")]
    rows, bad = index(tmp_path, *shards)
    assert [row["id"] for row in rows] == [*["bad/a"] * num_rows, "good/good"]
    assert (bad[0]["id"], bad[0]["reason"]) == ("bad", reason)
    assert detail in bad[0]["detail"] and shards[0] in bad[0]["detail"] and len(bad) == 1


@pytest.mark.parametrize("way", ["nemo", "lhotse"])
def test_transcripts_may_be_elsewhere(tmp_path, way):
    names = ["1.5-a", "1.5-b"]  # dots, which WebDataset would take for suffixes
    for n in range(2):
        members = [(f"{name}.flac", clip(0.5 + 0.1 * n)) for name in names]
        others = [(f"{name}.json", '{"sampling_rate": 16000}') for name in names]
        tar(tmp_path / f"audio_0{n}.tar", *members, *(others if way == "lhotse" else ()))
    texts = []
    for n in range(2):
        if way == "nemo":
            path = tmp_path / f"m{n}.json"
            lines = [
                {"audio_filepath": f"{name}.flac", "text": f"{n} {name}", "shard_id": n}
                for name in names
            ]
            path.write_text("\n".join(map(json.dumps, lines)))
        else:
            path = tmp_path / f"cuts.{n}.jsonl.gz"
            lines = [
                {"id": name, "supervisions": [{"text": "go"}, {"text": name}, {}]} for name in names
            ]
            path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
        texts.append(str(path))
    rows, bad = index(tmp_path, texts=texts)
    assert not bad
    expected = {"nemo": "{n} {name}", "lhotse": "go {name}"}[way]
    assert [(row["id"], row["text"]) for row in rows] == [
        (f"audio_0{n}/{name}", expected.format(n=n, name=name)) for n in range(2) for name in names
    ]


def test_paths_are_relative_to_the_manifest_where_that_is_possible(tmp_path, bucket_server):
    shard = tar(tmp_path / "below/a.tar", *GOOD)
    files, folder = bucket_server.files(), f"gs://{BUCKET}/index"
    files.put_file(str(shard), f"{folder}/below/a.tar")
    for shards, out, expected in [
        (str(shard), tmp_path / "m.jsonl", "below/a.tar"),
        (str(shard), tmp_path / "other/m.jsonl", str(shard)),
        (f"{folder}/below/*.tar", f"{folder}/m.jsonl", "below/a.tar"),
        (f"{folder}/below/a.tar", f"{folder}/other/m.jsonl", f"{folder}/below/a.tar"),
        (f"{folder}/below/a.tar", tmp_path / "far.jsonl", f"{folder}/below/a.tar"),
    ]:
        write_index([shards], str(out))
        rows, bad = read_manifest(str(out))
        assert not bad and len(load_audio(rows[0].audio)) == 8_000
        text = files.cat_file(out) if str(out).startswith("gs:") else Path(out).read_bytes()
        assert json.loads(text)["audio"] == expected
    assert not [name for name in files.find(f"{folder}") if "partial" in name]


def test_shards_of_one_name_are_told_apart(tmp_path):
    for name in ("a/0", "b/0"):
        tar(tmp_path / f"{name}.tar", *GOOD)
    rows, _ = index(tmp_path, f"{tmp_path}/*/0.tar")
    assert [row["id"] for row in rows] == ["a/0/good", "b/0/good"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.tar", "--out", "m.jsonl"], "there is no shard none.tar: name tar files"),
        (["*.tgz", "--out", "m.jsonl"], "there is no shard *.tgz"),
        (["memory://no/a.tar", "--out", "m.jsonl"], "there is no shard memory://no/a.tar"),
        (["nosuch://a.tar", "--out", "m.jsonl"], "nosuch://a.tar cannot be opened"),
        (["a.tar", "--out", "m.txt"], "--out m.txt: the name must end in .jsonl"),
        (["a.tar", "--out", "old.jsonl"], "--out old.jsonl exists: choose another name, or pass"),
        (["--out", "m.jsonl"], "name at least one shard"),
        (["noise.tar", "--out", "m.jsonl"], "no clip with a transcript in 1 shards: noise: "),
        (["a.tar", "--texts", "no.json", "--out", "m.jsonl"], "--texts no.json does not exist in"),
        (["a.tar", "--texts", "a.tar", "--out", "m.jsonl"], "--texts a.tar cannot be read: Unico"),
        (["a.tar", "--texts", "c.json", "--out", "m.jsonl"], "c.json, line 2: a.flac is a segment"),
        (["a.tar", "--texts", "b.json", "--out", "m.jsonl"], "b.json, line 1: expected a row of a"),
    ],
)
def test_what_cannot_be_indexed_is_one_line_and_leaves_nothing(
    tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    tar(tmp_path / "a.tar", *GOOD)
    (tmp_path / "noise.tar").write_bytes(b"noise")
    (tmp_path / "old.jsonl").write_text("old")
    (tmp_path / "b.json").write_text('{"audio": "a.flac"}')
    lines = [{"audio_filepath": "a.flac", "text": "go", "offset": x} for x in (0, 1.5)]
    (tmp_path / "c.json").write_text("\n".join(map(json.dumps, lines)))
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as ended:
        flax_projector.__main__.cli(["index", *arguments])
    assert f"error: {message}" in str(ended.value) and "\n" not in str(ended.value)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "old.jsonl").read_text() == "old"


def test_a_manifest_is_replaced_if_told(tmp_path):
    tar(tmp_path / "a.tar", *GOOD, ("x.flac", clip()))
    _, bad = index(tmp_path)
    assert bad
    tar(tmp_path / "a.tar", *GOOD)
    rows, bad = index(tmp_path, overwrite=True)
    assert len(rows) == 1 and not bad, "nor is anything said any more to be wrong"
