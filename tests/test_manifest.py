"""Manifests: which rows are used, which are not, and why."""

import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile

from flax_projector.data.audio import Problem, load_audio
from flax_projector.data.manifest import read_manifest


@pytest.fixture
def write(tmp_path):
    """Writes a manifest of one line beside a good clip of 1 s, one that is no audio and a NaN."""

    def write(text: str, name: str = "a.jsonl") -> Path:
        soundfile.write(tmp_path / "0.wav", np.zeros(16_000), 16_000)
        soundfile.write(tmp_path / "short.wav", np.zeros(300), 16_000)
        (tmp_path / "bad.wav").write_bytes(b"not audio")
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def jsonl(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        ("{", Problem.MALFORMED, "not JSON"),
        ("[1]", Problem.MALFORMED, "need an object"),
        ('{"text": "x"}', Problem.MALFORMED, "no 'audio' in ['text']"),
        ('{"audio": "0.wav", "text": "x", "duration": "1 s"}', Problem.MALFORMED, "'1 s'"),
        ('{"audio": "0.wav", "text": "x", "offset": -1}', Problem.MALFORMED, "-1 is not a number"),
        (
            '{"audio": "0.wav", "text": "x", "duration": NaN}',
            Problem.MALFORMED,
            "nan is not a number",
        ),
        ('{"audio": "0.wav"}', Problem.EMPTY_TEXT, "has no transcript"),
        ('{"audio": "0.wav", "text": " "}', Problem.EMPTY_TEXT, "has no transcript"),
        ('{"audio": "no.wav", "text": "x"}', Problem.MISSING_FILE, "no.wav does not exist"),
        ('{"audio": "no.wav", "text": "x", "duration": 1}', Problem.MISSING_FILE, "does not exist"),
        ('{"audio": "bad.wav", "text": "x"}', Problem.UNDECODABLE, "not a readable audio file"),
        ('{"audio": "short.wav", "text": "x"}', Problem.TOO_SHORT, "less than an encoder frame"),
        ('{"audio": "0.wav", "text": "x", "offset": 2}', Problem.TOO_SHORT, "less than an encoder"),
        ('{"id": "good", "audio": "0.wav", "text": "x"}', Problem.DUPLICATE_ID, "'good' occurs"),
    ],
)
def test_a_bad_row_is_left_out_with_its_reason(write, line, reason, detail):
    good = '{"id": "good", "audio": "0.wav", "text": "go"}\n'
    rows, bad = read_manifest(write(good + line + "\n"))
    assert [row.id for row in rows] == ["good"]
    assert [row.reason for row in bad] == [reason]
    assert detail in bad[0].detail and bad[0].source.endswith("a.jsonl")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("a.jsonl", "", "has no rows"), ("a.txt", "", "must end in .jsonl or .tsv")],
)
def test_a_manifest_of_nothing_is_an_error(write, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_manifest(write(text, name))


def test_a_manifest_that_is_not_there_is_an_error(tmp_path):
    for path in (tmp_path / "no.jsonl", "memory://no/no.jsonl"):
        with pytest.raises(ValueError, match="does not exist"):
            read_manifest(path)


def test_a_manifest_that_cannot_be_read_is_an_error_of_one_line(tmp_path):
    (tmp_path / "latin.tsv").write_bytes("path\ttext\na.wav\tcaf\xe9\n".encode("latin-1"))
    for name, reason in [("", "IsADirectoryError"), ("latin.tsv", "UnicodeDecodeError")]:
        with pytest.raises(ValueError, match=f"manifest .*{name} cannot be read: {reason}.*\nName"):
            read_manifest(tmp_path / name)


def test_a_scheme_that_nothing_opens_is_an_error(write):
    row = {"audio": "nosuch://bucket/a.wav", "text": "x", "duration": 1}
    with pytest.raises(ValueError, match=r"nosuch://bucket/a.wav cannot be opened"):
        read_manifest(write(jsonl(row)))


def test_tsv_and_jsonl_give_the_same_rows(write):
    rows = [
        {"audio": "0.wav", "text": "go on", "duration": 1.0, "id": "whole"},
        {"audio": "0.wav", "text": "on", "duration": 0.5, "offset": 0.25, "id": "part"},
    ]
    first = write(jsonl(*rows))
    lines = ["path\tseconds\ttext\tid\toffset", "0.wav\t1.0\tgo on\twhole\t"]
    lines += ["0.wav\t0.5\ton\tpart\t0.25"]
    second = write("\n".join(lines) + "\n", "rows.tsv")
    expected, actual = (read_manifest(path, source="x") for path in (first, second))
    assert actual == expected
    assert [(r.duration, r.offset) for r in actual[0]] == [(1.0, None), (0.5, 0.25)]


def test_segments_of_one_file_get_ids_and_durations(write):
    audio = {"audio": "0.wav", "text": "go"}
    offsets = [{**audio, "offset": x} for x in (0, 0.25)]
    rows, bad = read_manifest(write(jsonl(audio, *offsets)))
    assert not bad
    assert [(r.id, r.duration) for r in rows] == [("0", 1.0), ("0@0", 1.0), ("0@0.25", 0.75)]
    lengths = [len(load_audio(r.audio, offset=r.offset, duration=r.duration)) for r in rows]
    assert lengths == [16_000, 16_000, 12_000]


def test_files_of_one_name_in_two_folders_are_two_rows(tmp_path):
    for speaker in "ab":
        (tmp_path / speaker).mkdir()
        soundfile.write(tmp_path / speaker / "1.wav", np.zeros(1600), 16_000)
    text = jsonl(*({"audio": f"{s}/1.wav", "text": "go"} for s in "ab"))
    (tmp_path / "m.jsonl").write_text(text)
    rows, bad = read_manifest(tmp_path / "m.jsonl")
    assert [row.id for row in rows] == ["a/1", "b/1"] and not bad


def test_remote_manifests_name_remote_audio(write, tmp_path):
    fs = fsspec.filesystem("memory")
    write("")
    fs.pipe_file("/corpus/audio/0.wav", (tmp_path / "0.wav").read_bytes())
    fs.pipe_file("/corpus/dev.jsonl", jsonl({"audio": "audio/0.wav", "text": "go"}).encode())
    rows, bad = read_manifest("memory://corpus/dev.jsonl")
    assert not bad and rows[0].audio == "memory://corpus/audio/0.wav"
    assert rows[0].duration == 1.0 and len(load_audio(rows[0].audio)) == 16_000


def test_durations_are_read_once_unless_a_file_changes(write, tmp_path, monkeypatch):
    manifest = write(jsonl(*({"audio": "0.wav", "text": "go", "offset": x} for x in (0, 0.5))))
    cache = tmp_path / "cache"
    first = read_manifest(manifest, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(
            "flax_projector.data.manifest.read_duration", lambda audio: pytest.fail("read")
        )
        assert read_manifest(manifest, cache=cache) == first
    soundfile.write(tmp_path / "0.wav", np.zeros(32_000), 16_000)
    assert [row.duration for row in read_manifest(manifest, cache=cache)[0]] == [2.0, 1.5]


def test_a_transcript_may_hold_what_unicode_calls_line_ends(write):
    text = "one\u2028two\x85three"
    line = json.dumps({"audio": "0.wav", "text": text}, ensure_ascii=False) + "\r\n"
    rows, bad = read_manifest(write(line))
    assert not bad and [row.text for row in rows] == [text]
