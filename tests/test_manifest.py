"""Manifests: which rows are used, which are not, and why."""

import json
import re
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile

from flax_projector.data.audio import Problem, load_audio
from flax_projector.data.bad_rows import BadRowLog
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
        (
            '{"audio": "0.wav", "text": "x", "duration": [2.5]}',
            Problem.MALFORMED,
            "duration: [2.5] is not a number",
        ),
        ('{"audio": "0.wav", "text": "x", "duration": true}', Problem.MALFORMED, "True is not a"),
        (
            f'{{"audio": "0.wav", "text": "x", "offset": 1{400 * "0"}}}',
            Problem.MALFORMED,
            "is not a number of seconds",
        ),
        (f'{{"audio": "0.wav", "offset": 1{5000 * "0"}}}', Problem.MALFORMED, "not JSON"),
        ('{"audio": ' + 100_000 * "[", Problem.MALFORMED, "not JSON"),
        (2_000 * "[" + 2_000 * "]", Problem.MALFORMED, ""),
        ('{"audio": ["0.wav"], "text": "x"}', Problem.MALFORMED, "['0.wav'] is neither a path"),
        ('{"audio": {"path": "0.wav"}, "text": "x"}', Problem.MALFORMED, "neither a path nor"),
        ('{"audio": 7, "text": "x"}', Problem.MALFORMED, "the audio 7 is neither a path nor"),
        ('{"id": ["a"], "audio": "0.wav", "text": "x"}', Problem.MALFORMED, "the id ['a'] is"),
        ('{"audio": "0.wav", "text": ["go"]}', Problem.MALFORMED, "['go'] is not a string"),
        ('{"audio": "0.wav", "text": {"a": "go"}}', Problem.MALFORMED, "is not a string"),
        ('{"audio": "0.wav", "text": 7}', Problem.MALFORMED, "the text 7 is not a string"),
        ('{"audio": "0.wav", "text": NaN}', Problem.MALFORMED, "the text nan is not a string"),
        ('{"audio": "0.wav", "text": false}', Problem.MALFORMED, "the text False is not"),
        (
            '{"audio": "0.wav", "text": "go \\ud83d"}',
            Problem.MALFORMED,
            "'go \\ud83d' is not UTF-8",
        ),
        ('{"audio": "\\udcff.wav", "text": "x"}', Problem.MALFORMED, "audio '\\udcff.wav' is not"),
        ('{"id": "\\ud800", "audio": "0.wav", "text": "x"}', Problem.MALFORMED, "the id '\\ud800'"),
        ('{"audio": "0.wav\\u0000x", "text": "x"}', Problem.MALFORMED, "neither a path nor a URL"),
        *(
            (
                f'{{"audio": "0.wav", "text": "x", "bytes": {written}}}',
                Problem.MALFORMED,
                f"bytes: {read} is not a range of bytes: expected [start, length], two integers",
            )
            for written, read in [
                ("[0]", "[0]"),
                ("[0, 1, 2]", "[0, 1, 2]"),
                ("[-1, 4]", "[-1, 4]"),
                ("[0, 0]", "[0, 0]"),
                ("[0, 1.5]", "[0, 1.5]"),
                ("[false, 4]", "[False, 4]"),
                ("[0, true]", "[0, True]"),
                ("[0, null]", "[0, None]"),
                ('["0", "4"]', "['0', '4']"),
                ("[9223372036854775807, 1]", "[9223372036854775807, 1]"),
                ('{"start": 0}', "{'start': 0}"),
                ("7", "7"),
                ("false", "False"),
                ('"0 4"', "'0 4'"),
            ]
        ),
        (
            '{"audio": "no.tar", "text": "x", "bytes": [0, 9], "duration": 1}',
            Problem.MISSING_FILE,
            "no.tar does not exist",
        ),
        (
            '{"audio": "no.tar", "text": "x", "bytes": [0, 9]}',
            Problem.MISSING_FILE,
            "no.tar does not exist",
        ),
        *(
            (
                f'{{"audio": "0.wav", "text": "x", "bytes": [5, 32040]{duration}}}',
                Problem.INCOMPLETE,
                "0.wav[5:32045]: the file ends before byte 32045",
            )
            for duration in ("", ', "duration": 1')
        ),
        (
            '{"audio": "0.wav", "text": "x", "bytes": [99999, 4]}',
            Problem.INCOMPLETE,
            "0.wav[99999:100003]: the file ends before byte",
        ),
        (
            '{"audio": "0.wav", "text": "x", "bytes": [44, 100]}',
            Problem.UNDECODABLE,
            "0.wav[44:144] is not a readable audio file",
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
    manifest = write(good + line + "\n")
    rows, bad = read_manifest(manifest)
    assert [row.id for row in rows] == ["good"]
    assert [row.reason for row in bad] == [reason]
    BadRowLog(manifest.with_name("bad_rows.jsonl"), max_rate=1.0).start("x", bad, num_rows=2)
    assert detail in bad[0].detail and bad[0].source.endswith("a.jsonl")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("a.jsonl", "", "has no rows"), ("a.txt", "", "must end in .jsonl or .tsv")],
)
def test_a_manifest_of_nothing_is_an_error(write, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_manifest(write(text, name))


def test_texts_are_in_nfc(write):
    text = json.dumps({"audio": "0.wav", "text": "cafe\u0301 \u1112\u1161\u11ab"})
    (row,), _ = read_manifest(write(text))
    assert row.text == "caf\xe9 \ud55c"


def test_a_manifest_whose_name_is_not_utf8_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"the manifest .*udcff.jsonl' is not UTF-8"):
        read_manifest("\udcff.jsonl")


def test_a_manifest_that_is_not_there_is_an_error(tmp_path):
    for path in (tmp_path / "no.jsonl", "memory://no/no.jsonl"):
        with pytest.raises(ValueError, match="does not exist"):
            read_manifest(path)


def test_a_manifest_that_cannot_be_read_is_an_error_of_one_line(tmp_path):
    (tmp_path / "latin.tsv").write_bytes("path\ttext\na.wav\tcaf\xe9\n".encode("latin-1"))
    for name, reason in [("", "IsADirectoryError"), ("latin.tsv", "UnicodeDecodeError")]:
        with pytest.raises(ValueError, match=f"manifest .*{name} cannot be read: {reason}.*\nName"):
            read_manifest(tmp_path / name)


@pytest.mark.parametrize("part", [{}, {"bytes": [0, 9]}])
def test_a_scheme_that_nothing_opens_is_an_error(write, part):
    row = {"audio": "nosuch://bucket/a.wav", "text": "x", "duration": 1, **part}
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
    expected, actual = (read_lists(path, source="x") for path in (first, second))
    assert actual == expected
    assert [(r.duration, r.offset) for r in actual[0]] == [(1.0, None), (0.5, 0.25)]


@pytest.mark.parametrize(
    ("name", "separator"), [("a.jsonl", "\n"), ("a.tsv", "\n"), ("b.tsv", "\r\n")]
)
def test_byte_order_marks_lose_nothing(write, name, separator):
    """Windows programs begin files with one; files that were joined have them in the middle."""
    rows = [{"audio": "0.wav", "text": word, "id": word} for word in ("one", "two")]
    lines = ["audio\ttext\tid", *("\t".join(row.values()) for row in rows)]
    if name.endswith(".jsonl"):
        lines = [json.dumps(row) for row in rows]
    found, bad = read_manifest(write(separator.join(f"\ufeff{line}" for line in lines), name))
    assert not bad and [(row.id, row.text) for row in found] == [("one", "one"), ("two", "two")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.tsv"])
def test_lines_end_as_on_any_system(write, name, end):
    lines = ["path\ttext", "0.wav\tgo on", "\t", "", "0.wav\tstop"]
    if name.endswith(".jsonl"):
        lines = ['{"audio": "0.wav", "text": "go on"}', "", '{"path": "0.wav", "text": "stop"}']
    manifest = write("", name)
    manifest.write_bytes(end.join(lines).encode())
    rows, bad = read_manifest(manifest)
    assert not bad and [row.text for row in rows] == ["go on", "stop"]


def test_a_row_of_a_tsv_that_is_cut_by_a_tab_or_a_line_end_is_bad(write):
    lines = ["path\ttext\tseconds", "0.wav\tgo\ton\t1.0", "0.wav\tgo", "on\t1.0", "0.wav\tgo\t1.0"]
    rows, bad = read_manifest(write("\n".join(lines) + "\n", "a.tsv"))
    assert [row.text for row in rows] == ["go"]
    assert [(row.id, row.reason) for row in bad] == [
        (f"row {n}", Problem.MALFORMED) for n in (1, 2, 3)
    ]
    assert "4 fields, but the header has 3: texts with tabs or line ends need" in bad[0].detail


def test_a_field_of_a_tsv_may_be_long_and_hold_anything_else(write):
    text = 'say "go" \r ' + 150_000 * "x"
    rows, bad = read_manifest(write(f"path\ttext\n0.wav\t{text}\n", "a.tsv"))
    assert not bad and [row.text for row in rows] == [text]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "path\tsentence\n0.wav\tgo\n", "no column 'text', but ['path', 'sentence']"),
        ("a.tsv", "0.wav\tgo\n0.wav\tgo\n", "no column 'audio' or 'path', but ['0.wav', 'go']"),
        ("a.jsonl", '{"audio": "0.wav", "said": ""}', "no column 'text', but ['audio', 'said']"),
        ("a.jsonl", '{"audio_filepath": "a", "text": "x"}', "no column 'audio' or 'path', but"),
        ("a.tsv", "path\ttext\ttext\n0.wav\tgo\tgo\n", "two columns have one name"),
    ],
)
def test_a_manifest_without_a_column_is_an_error_that_names_those_it_has(
    write, name, text, message
):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_manifest(write(text, name))


@pytest.mark.parametrize(
    ("times", "lasts"),
    [
        ({"duration": 120_000}, "lasts 120.00 s, not 120000.00 s as stated"),
        ({"offset": 61_500, "duration": 4_200}, "lasts 0.00 s from 61500 s on, not 4200.00 s"),
        ({"offset": 0, "duration": 4_200}, "lasts 120.00 s from 0 s on, not 4200.00 s"),
    ],
)
def test_times_in_milliseconds_are_bad_rows_that_say_so(write, tmp_path, times, lasts):
    """And not clips that are too long by design."""
    manifest = write(jsonl({"audio": "long.wav", "text": "go", **times}))
    soundfile.write(tmp_path / "long.wav", np.zeros(120 * 8_000), 8_000)
    rows, (bad,) = read_manifest(manifest)
    assert not rows and bad.reason == Problem.WRONG_DURATION
    assert lasts in bad.detail and "seem to be in milliseconds" in bad.detail


def test_stated_times_that_are_long_but_right_are_used(write, tmp_path):
    times = [{"duration": 120.03}, {"offset": 20, "duration": 90}, {"offset": 20, "duration": 100}]
    manifest = write(jsonl(*({"audio": "long.wav", "text": "go", **t} for t in times)))
    soundfile.write(tmp_path / "long.wav", np.zeros(120 * 8_000), 8_000)
    rows, bad = read_manifest(manifest)
    assert not bad and [row.duration for row in rows] == [120.03, 90, 100]


def test_rows_without_ids_are_told_apart(write, tmp_path):
    segments = [{"offset": 12_345.67 + x, "duration": 0.5} for x in (0, 0.02)]
    rows = [
        {"audio": "0.wav", "text": "go"},
        {"audio": "0.wav", "text": "go on"},  # another reference
        {"audio": "0.flac", "text": "go"},
        {"audio": "0.wav", "text": "go", "id": "0#2"},
        {"audio": "0.wav", "text": "go", "offset": 0.25, "duration": 0.5},
        {"audio": "0.wav", "text": "go", "offset": 0.25, "duration": 0.25},
        *({"audio": "0.wav", "text": "go", **segment} for segment in segments),
    ]
    manifest = write(jsonl(*rows))
    soundfile.write(tmp_path / "0.flac", np.zeros(16_000), 16_000)
    found, bad = read_manifest(manifest)
    assert not bad
    assert [row.id for row in found] == [
        "0",
        "0#3",
        "0#4",
        "0#2",
        "0@0.25",
        "0@0.25#2",
        "0@12345.67",
        "0@12345.69",
    ]


@pytest.mark.parametrize("audio", ["0.wav", "no.wav"])
def test_a_row_that_occurs_twice_is_used_and_counted_once(write, audio):
    """With an id or without one, and even if its clip is bad."""
    rows = [{"audio": audio, "text": "go"}, {"audio": audio, "text": "stop", "id": "x"}]
    found, bad = read_manifest(write(jsonl(*rows, *rows)))
    assert len({row.key for row in [*found, *bad]}) == 4
    duplicates = [(row.id, row.detail) for row in bad if row.reason == Problem.DUPLICATE_ID]
    assert [place for place, _ in duplicates] == ["row 3", "row 4"]
    assert "0.wav occurs twice" in duplicates[0][1] or audio == "no.wav"
    assert duplicates[1][1] == "id 'x' occurs twice"


@pytest.mark.parametrize("number", [0, 7, 1.5])
def test_an_id_may_be_a_number(write, number):
    (row,), _ = read_manifest(write(jsonl({"id": number, "audio": "0.wav", "text": "go"})))
    assert row.id == str(number)


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


def read_lists(path, **options) -> list[list]:
    return [list(rows) for rows in read_manifest(path, **options)]


def test_durations_are_read_once_unless_a_file_changes(write, tmp_path, monkeypatch):
    manifest = write(jsonl(*({"audio": "0.wav", "text": "go", "offset": x} for x in (0, 0.5))))
    cache = tmp_path / "cache"
    first = read_lists(manifest, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(
            "flax_projector.data.row_file.read_duration", lambda audio: pytest.fail("read")
        )
        assert read_lists(manifest, cache=cache) == first
    soundfile.write(tmp_path / "0.wav", np.zeros(32_000), 16_000)
    assert [row.duration for row in read_manifest(manifest, cache=cache)[0]] == [2.0, 1.5]


def test_a_transcript_may_hold_what_unicode_calls_line_ends(write):
    text = "one\u2028two\x85three"
    line = json.dumps({"audio": "0.wav", "text": text}, ensure_ascii=False) + "\r\n"
    rows, bad = read_manifest(write(line))
    assert not bad and [row.text for row in rows] == [text]
