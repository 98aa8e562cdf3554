"""Rows that point into a file: a range of its bytes is read as if it were a file."""

import json
import pickle
import re
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile

from flax_projector.data.audio import (
    BadAudio,
    Problem,
    Slice,
    StoredClip,
    file_of,
    file_stamp,
    load_audio,
    read_duration,
)
from flax_projector.data.manifest import read_manifest
from tests.test_audio import FORMATS, tone


@pytest.mark.parametrize("offset", [None, 0.25])
@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("place", ["local", "memory://parts"])
def test_a_part_of_a_file_is_read_like_a_file(tmp_path, monkeypatch, suffix, offset, place):
    """By one request for its bytes, even in a process that got it from another one."""
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, tone(16_000), 16_000)
    content, around = path.read_bytes(), 3 * b"RIFF fLaC OggS "
    joined = tmp_path / "all.tar"
    joined.write_bytes(around + content + around)
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/parts/all.tar", joined.read_bytes())
    url = str(joined) if place == "local" else f"{place}/all.tar"
    part: Slice = pickle.loads(pickle.dumps(Slice(url, len(around), len(content))))
    asked, cat_file = [], type(fs).cat_file

    def count(self, path, start=None, end=None, **options):
        asked.append((start, end))
        return cat_file(self, path, start, end, **options)

    monkeypatch.setattr(type(fs), "cat_file", count)
    assert isinstance(part, StoredClip) and part.fetch() == content
    assert asked == ([] if place == "local" else [(part.start, part.end)])
    assert str(part) == f"{url}[45:{45 + len(content)}]" and file_of(part) == url
    assert file_stamp(part) == file_stamp(url) and bool(file_stamp(url)) == (place == "local")
    np.testing.assert_array_equal(load_audio(part, offset=offset), load_audio(path, offset=offset))
    assert read_duration(part) == read_duration(path)


@pytest.mark.parametrize(
    ("name", "start", "length", "problem", "message"),
    [
        ("none", 0, 4, Problem.MISSING_FILE, "none does not exist"),
        ("x", 6, 5, Problem.INCOMPLETE, "x[6:11]: the file ends before byte 11"),
        ("x", 10, 1, Problem.INCOMPLETE, "x[10:11]: the file ends before byte 11"),
        ("x", 11, 1, Problem.INCOMPLETE, "x[11:12]: the file ends before byte 12"),
        ("x", 0, 10, Problem.UNDECODABLE, "x[0:10] is not a readable audio file"),
        ("folder", 0, 10, Problem.UNREADABLE, "folder is a folder: name the files in it"),
        ("x/y", 0, 10, Problem.UNREADABLE, "y cannot be read: NotADirectoryError"),
        ("refused", 11, 1, Problem.INCOMPLETE, "refused[11:12]: the file ends before byte 12"),
        ("refused", 5, 1, Problem.UNREADABLE, "refused cannot be read: OSError: 416"),
    ],
)
@pytest.mark.parametrize("place", ["local", "memory://slices"])
def test_what_is_wrong_with_a_part_of_a_file_has_a_name(
    tmp_path, monkeypatch, name, start, length, problem, message, place
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "x").write_bytes(b"not audio!")
    if place == "local":
        folder = str(tmp_path)
        if name == "refused":
            pytest.skip("disks refuse no ranges")
    else:
        folder = place
        if name in ("folder", "x/y"):
            pytest.skip("memory has other errors for folders")
        fs = fsspec.filesystem("memory")
        fs.pipe({f"/slices/{stored}": b"not audio!" for stored in ("x", "refused")})
        if name == "refused":  # as servers do

            def refuse(*args, **options):
                raise OSError("416")

            monkeypatch.setattr(type(fs), "cat_file", refuse)
    with pytest.raises(BadAudio, match=re.escape(message)) as caught:
        load_audio(Slice(f"{folder}/{name}", start, length))
    assert caught.value.problem == problem


@pytest.mark.parametrize("name", ["a.jsonl", "a.tsv"])
@pytest.mark.parametrize("place", ["local", "memory://joined"])
def test_a_row_may_point_into_a_file(tmp_path, name, place):
    """Whatever surrounds its clip there, on a disk or at a URL."""
    quiet, loud = tmp_path / "0.wav", tmp_path / "1.flac"
    soundfile.write(quiet, np.zeros(16_000), 16_000)
    soundfile.write(loud, np.linspace(-1, 1, 8_000), 16_000)
    parts = [b"x" * 7, quiet.read_bytes(), loud.read_bytes(), b"not audio"]
    first, second = (7, len(parts[1])), (7 + len(parts[1]), len(parts[2]))
    rows: list[dict] = [
        {"audio": "all.tar", "text": "go", "bytes": list(first)},
        {"audio": "all.tar", "text": "go", "bytes": list(second), "duration": 0.5},
        {"audio": "all.tar", "text": "go", "bytes": list(second), "offset": 0.25},
        {"audio": "all.tar", "text": "go", "bytes": list(second), "id": "own", "duration": 0.5},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".tsv"):
        columns = ["audio", "text", "bytes", "duration", "offset", "id"]
        lines = [[str(row.get(column, "")) for column in columns] for row in rows]
        text = "\n".join("\t".join(line) for line in [columns, *lines])
    manifest, tar = str(tmp_path / name), str(tmp_path / "all.tar")
    Path(manifest).write_text(text)
    Path(tar).write_bytes(b"".join(parts))
    if place != "local":
        for path in (manifest, tar):
            fsspec.filesystem("memory").pipe_file(
                f"/joined/{Path(path).name}", Path(path).read_bytes()
            )
        manifest, tar = f"{place}/{name}", f"{place}/all.tar"
    found, bad = read_manifest(manifest)
    assert not bad
    assert [(row.id, row.audio, row.duration, row.offset) for row in found] == [
        ("all[7:32051]", Slice(tar, *first), 1.0, None),
        (f"all[{second[0]}:{sum(second)}]", Slice(tar, *second), 0.5, None),
        (f"all[{second[0]}:{sum(second)}]@0.25", Slice(tar, *second), 0.25, 0.25),
        ("own", Slice(tar, *second), 0.5, None),
    ]
    whole = load_audio(loud)
    for row, expected in zip(found, [np.zeros(16_000), whole, whole[4_000:], whole], strict=True):
        samples = load_audio(row.audio, offset=row.offset, duration=row.duration)
        np.testing.assert_array_equal(samples, expected)


def test_the_length_of_a_part_of_a_file_is_kept_until_the_file_changes(tmp_path):
    row = {"audio": "all.tar", "text": "go", "bytes": [0, 16_044]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    for secs in (0.5, 0.25, 0.4):
        soundfile.write(tmp_path / "0.wav", np.zeros(round(16_000 * secs)), 16_000)
        content = (tmp_path / "0.wav").read_bytes()
        (tmp_path / "all.tar").write_bytes(content.ljust(20_000, b"x"))
        for _ in range(2):
            found, _ = read_manifest(tmp_path / "a.jsonl", cache=tmp_path / "cache")
            assert found[0].duration == secs
