"""Data sets of Hugging Face: folders at random access and streamed, without the network."""

import contextlib
import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import datasets.config
import numpy as np
import pytest
import soundfile

from flax_projector.config import DataConfig
from flax_projector.data import hf_source, hf_stream
from flax_projector.data.audio import Problem, load_audio
from flax_projector.data.hf_data import read_hf
from flax_projector.data.hf_source import HFSource, parse_hf_source

COLUMNS = ":audio=sound:text=said"


def make_clip(number: int, suffix: str = "flac") -> bytes:
    """Noise of 0.1 x (number + 1) seconds."""
    file = io.BytesIO()
    samples = np.random.default_rng(number).uniform(-0.5, 0.5, 1_600 * (number + 1))
    soundfile.write(file, samples, 16_000, format=suffix)
    return file.getvalue()


def read_lists(*args) -> tuple[list, list]:
    rows, bad = read_hf(*args)
    return list(rows), list(bad)


@pytest.fixture
def folders(tmp_path) -> dict[str, str]:
    """The same 7 rows in every layout; row 5 is no audio, row 6 has no text."""
    clips = [{"bytes": make_clip(i), "path": f"{i}.flac"} for i in range(7)]
    clips[5]["bytes"] = b"not audio"
    columns = {"sound": clips, "said": [*(f"word {i}" for i in range(6)), " "]}
    columns["speaker"] = [f"s{i}" for i in range(7)]
    table = datasets.Dataset.from_dict(columns)
    table = table.cast_column("sound", datasets.Audio(decode=False))
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "several"))
    (tmp_path / "parquet").mkdir()
    for shard in range(2):
        table.shard(2, shard, contiguous=True).to_parquet(
            str(tmp_path / "parquet" / f"train-{shard:05d}-of-00002.parquet")
        )
    sounds = tmp_path / "sounds" / "train"
    sounds.mkdir(parents=True)
    rows = []
    for clip, said, speaker in zip(clips, columns["said"], columns["speaker"], strict=True):
        (sounds / clip["path"]).write_bytes(clip["bytes"])
        rows.append({"file_name": clip["path"], "said": said, "speaker": speaker})
    (sounds / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(tmp_path / name) for name in ("one", "several", "parquet", "sounds")}


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("layout", ["one", "several", "parquet", "sounds"])
def test_rows_of_every_layout(folders, tmp_path, layout, streaming):
    audio = "" if layout == "sounds" else ":audio=sound"
    source = f"hf:{folders[layout]}:train{audio}:text=said:id=speaker"
    rows, bad = read_hf(source, DataConfig(hf_streaming=streaming), tmp_path / "kept")
    assert [(row.id, row.text) for row in rows] == [(f"s{i}", f"word {i}") for i in range(5)]
    assert {row.source for row in rows} == {source}
    assert [(row.id, row.reason) for row in bad] == [
        ("s5", Problem.UNDECODABLE),
        ("s6", Problem.EMPTY_TEXT),
    ]
    for i, row in enumerate(rows):
        expected, _ = soundfile.read(io.BytesIO(make_clip(i)), dtype="float32")
        assert row.duration == pytest.approx(0.1 * (i + 1))
        np.testing.assert_array_equal(load_audio(row.audio, duration=row.duration), expected)
        again = pickle.loads(pickle.dumps(row))
        np.testing.assert_array_equal(load_audio(again.audio), expected)


def stream_config(**kwargs) -> DataConfig:
    return DataConfig(hf_streaming=True, **kwargs)


def number_of(part: Path, number: int) -> int:
    """Number of a row of the parquet files, the first of which has 4 rows."""
    return 4 * int(part.name.removeprefix("part-")) + number


@pytest.fixture
def opened(monkeypatch) -> list[int]:
    """Numbers of the rows that were taken from a stream."""
    taken, keep = [], hf_stream._keep_row

    def count(row, hf, folder, number):
        taken.append(number_of(folder, number))
        return keep(row, hf, folder, number)

    monkeypatch.setattr(hf_stream, "_keep_row", count)
    return taken


def test_a_stream_is_read_once_up_to_the_limit(folders, tmp_path, opened):
    source, kept = f"hf:{folders['parquet']}:train{COLUMNS}", tmp_path / "kept"
    first = read_lists(source, stream_config(hf_max_rows=3), kept)
    assert opened == [0, 1, 2] and [row.id for row in first[0]] == ["0", "1", "2"]
    assert read_lists(source, stream_config(hf_max_rows=3), kept) == first
    assert read_lists(source, stream_config(hf_max_rows=2), kept)[0] == first[0][:2]
    assert opened == [0, 1, 2]
    more = read_hf(source, stream_config(hf_max_rows=5), kept)
    assert opened == [0, 1, 2, 3, 4] and len(more[0]) == 5
    rows, bad = read_hf(source, stream_config(), kept)
    assert opened == list(range(7)) and len(rows) == 5 and len(bad) == 2
    (manifest,) = kept.glob("*/rows.jsonl")
    assert [json.loads(line)["text"] for line in manifest.read_text().splitlines()] == [
        *(f"word {i}" for i in range(6)),
        "",
    ]
    read_hf(source, stream_config(hf_max_rows=100), kept)
    assert opened == list(range(7))


def test_a_whole_stream_is_not_asked_for_again(folders, tmp_path, monkeypatch):
    source, kept = f"hf:{folders['parquet']}:train{COLUMNS}", tmp_path / "kept"
    whole = read_lists(source, stream_config(), kept)
    monkeypatch.setattr(hf_stream, "open_hf", lambda *args, **kwargs: pytest.fail("opened"))
    assert read_lists(source, stream_config(), kept) == whole


def start_and_kill(source: str, kept: Path, at_row: int, monkeypatch) -> None:
    """Leaves in `kept` what is on disk when a process is killed at a row, without its buffers."""
    keep = hf_stream._keep_row

    def break_off(row, hf, folder, number):
        if number_of(folder, number) == at_row:
            shutil.copytree(kept, kept.with_name("killed"))
            raise KeyboardInterrupt
        return keep(row, hf, folder, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hf_stream, "_keep_row", break_off)
        read_hf(source, stream_config(), kept)
    shutil.rmtree(kept)
    kept.with_name("killed").rename(kept)


def test_a_stream_that_is_killed_again_and_again_continues(folders, tmp_path, opened, monkeypatch):
    monkeypatch.setattr(hf_stream, "_SAVE_EVERY_ROWS", 2)
    source, kept = f"hf:{folders['parquet']}:train{COLUMNS}", tmp_path / "kept"
    start_and_kill(source, kept, 5, monkeypatch)
    assert opened == [0, 1, 2, 3, 4]
    start_and_kill(source, kept, 5, monkeypatch)  # before it saves for the first time
    assert opened == [0, 1, 2, 3, 4, 4]  # row 4 was not yet saved
    (manifest,) = kept.glob("*/part-0001/rows.jsonl")
    with manifest.open("a") as file:
        file.write('{"id": "4", "aud')  # a row that was not written whole
    rows, bad = read_hf(source, stream_config(), kept)
    assert opened == [0, 1, 2, 3, 4, 4, 4, 5, 6]
    whole, _ = read_hf(source, stream_config(), tmp_path / "elsewhere")
    assert len(rows) + len(bad) == 7
    assert [(r.id, r.text, r.duration) for r in rows] == [(r.id, r.text, r.duration) for r in whole]
    for row, expected in zip(rows, whole, strict=True):
        assert Path(str(row.audio)).read_bytes() == Path(str(expected.audio)).read_bytes()


@pytest.mark.parametrize("limit", [3, 0])
def test_a_kept_stream_that_lost_rows_is_an_error(folders, tmp_path, limit):
    source, kept = f"hf:{folders['parquet']}:train{COLUMNS}", tmp_path / "kept"
    read_hf(source, stream_config(hf_max_rows=limit), kept)
    (manifest,) = kept.glob("*/rows.jsonl")
    manifest.write_bytes(b"".join(manifest.read_bytes().splitlines(keepends=True)[:2]))
    with pytest.raises(
        ValueError, match=rf"rows.jsonl has 2 rows, .* says that {limit or 7} were kept: delete"
    ):
        read_hf(source, stream_config(), kept)


def test_other_shards_than_those_that_are_kept_are_an_error(folders, tmp_path):
    source, kept = f"hf:{folders['parquet']}:train{COLUMNS}", tmp_path / "kept"
    read_hf(source, stream_config(hf_max_rows=5), kept)
    (Path(folders["parquet"]) / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match=r"has 1 shards now: delete .*kept/.*in 2 parts, to downl"):
        read_hf(source, stream_config(), kept)


def as_processes(monkeypatch, source: str, count: int, max_rows: int, kept: Path):
    """Calls `read_hf` as that many processes would, the rounds of which are known beforehand.

    Returns what the last one has read.
    """
    result = [], []
    for me in [*range(count), 0]:  # process 0 joins what all have kept
        with monkeypatch.context() as patch:
            patch.setattr("jax.process_count", lambda: count)
            patch.setattr("jax.process_index", lambda me=me: me)
            patch.setattr(hf_stream, "check_shared", lambda *_: None)
            result = read_hf(source, stream_config(hf_max_rows=max_rows), kept)
    return result


@pytest.mark.parametrize("counts", [(2, 1), (1, 2), (3, 2, 1), (1, 3)], ids=str)
def test_the_rows_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch, counts):
    """A start with another number goes on, and the order stays that of the data set."""
    folder = tmp_path / "set"
    folder.mkdir()
    for shard, rows in enumerate([(0, 1, 2), (3,), (4, 5, 6, 7), (8, 9)]):
        clips = [{"bytes": make_clip(i), "path": f"{i}.flac"} for i in rows]
        table = datasets.Dataset.from_dict({"audio": clips, "text": [f"word {i}" for i in rows]})
        table = table.cast_column("audio", datasets.Audio(decode=False))
        table.to_parquet(str(folder / f"train-{shard:05d}-of-00004.parquet"))
    source, taken, keep = f"hf:{folder}:train", [], hf_stream._keep_row

    def count(row, hf, folder, number):
        taken.append(row["text"])
        return keep(row, hf, folder, number)

    monkeypatch.setattr(hf_stream, "_keep_row", count)
    limits = [5, 8, 0][-len(counts) :]
    for processes, limit in zip(counts, limits, strict=True):
        rows, bad = as_processes(monkeypatch, source, processes, limit, tmp_path / "kept")
        expected = list(range(limit or 10))
        assert not bad and [row.id for row in rows] == [str(i) for i in expected]
        assert [row.text for row in rows] == [f"word {i}" for i in expected]
        for i, row in zip(expected, rows, strict=True):
            assert Path(str(row.audio)).read_bytes() == make_clip(i)
    assert sorted(taken) == [f"word {i}" for i in range(10)], "a row was kept twice"


def test_a_row_limit_holds_at_random_access_too(folders, tmp_path):
    config = DataConfig(hf_max_rows=3)
    rows, bad = read_hf(f"hf:{folders['several']}:train{COLUMNS}", config, tmp_path)
    assert [row.id for row in rows] == ["0", "1", "2"] and not bad


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf:owner/name:train", HFSource("owner/name", None, "train")),
        ("hf:owner/name:en:train", HFSource("owner/name", "en", "train")),
        ("hf:owner/name:train[:100]", HFSource("owner/name", None, "train[:100]")),
        ("hf:/a/b:clean:test[10%:]", HFSource("/a/b", "clean", "test[10%:]")),
        ("hf:/a=b:train:text=a b", HFSource("/a=b", None, "train", text="a b")),
        (
            "hf:owner/name:en:train[:9]:id=path:audio=sound:text=x=y",
            HFSource("owner/name", "en", "train[:9]", "sound", "x=y", "path"),
        ),
    ],
)
def test_names_of_data_sets(source, expected):
    assert parse_hf_source(source) == expected


@pytest.mark.parametrize(
    "source",
    ["hf:owner/name", "hf:", "hf:a:b:c:d", "hf:a:text=x", "hf:a:train:txt=x", "hf:a:train:text="],
)
def test_a_malformed_name_says_what_to_write(source):
    with pytest.raises(
        ValueError, match=r"write hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT.*:text=COLU"
    ):
        parse_hf_source(source)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_cannot_be_opened_says_why(folders, tmp_path, streaming):
    config = DataConfig(hf_streaming=streaming)
    for source, message in [
        (
            "hf:no/such:train",
            "cannot be opened: .*\nName a data set on the hub, .* or a folder",
        ),
        (
            f"hf:{folders['several']}:test{COLUMNS}",
            r"Unknown split \"test\". Should be one of \['train'\]",
        ),
        (f"hf:{folders['parquet']}:test", "test"),
    ]:
        with pytest.raises(ValueError, match=r"(?s)" + message):
            read_hf(source, config, tmp_path)
    message = r"no column \['audio', 'text'\], but \['said', 's.*:audio=COLUMN:text=COLUMN"
    with pytest.raises(ValueError, match=message):
        read_hf(f"hf:{folders['several']}:train", config, tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("texts", [[7], [["go"]], [{"a": "go"}], [b"go"], [None, 2.5]])
def test_a_column_of_texts_that_holds_something_else_is_an_error(tmp_path, streaming, texts):
    clips = [{"bytes": make_clip(0), "path": "0.flac"}] * len(texts)
    table = datasets.Dataset.from_dict({"audio": clips, "text": texts})
    table.save_to_disk(str(tmp_path / "set"))
    with pytest.raises(ValueError, match=r"column 'text' holds .*, not strings: name the column"):
        read_hf(f"hf:{tmp_path / 'set'}:train", DataConfig(hf_streaming=streaming), tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_of_data_sets_are_in_nfc(tmp_path, streaming):
    row = {"audio": [{"bytes": make_clip(0), "path": "0.flac"}], "text": ["cafe\u0301 "]}
    datasets.Dataset.from_dict(row).save_to_disk(str(tmp_path / "set"))
    source, config = f"hf:{tmp_path / 'set'}:train", DataConfig(hf_streaming=streaming)
    (found,), _ = read_hf(source, config, tmp_path / "kept")
    assert found.text == "caf\xe9"


def test_without_datasets_the_error_names_the_extra(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'flax-projector\[hf\]'"):
        read_hf(f"hf:{folders['one']}:train", DataConfig(), tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
def test_datasets_is_left_as_it_was(folders, tmp_path, monkeypatch, streaming, split):
    """For this process, which may use it for other things: with torch, if it is installed."""
    load, seen = hf_source._load, []

    def look(*args, **kwargs):
        seen.append((datasets.config.TORCH_AVAILABLE, datasets.Audio.encode_example))
        return load(*args, **kwargs)

    monkeypatch.setattr(hf_source, "_load", look)
    before = datasets.config.TORCH_AVAILABLE, datasets.Audio.encode_example
    assert before[0], "the tests have torch"
    outcome = contextlib.nullcontext() if split == "train" else pytest.raises(ValueError)
    with outcome:
        source = f"hf:{folders['sounds']}:{split}:text=said"
        read_hf(source, DataConfig(hf_streaming=streaming), tmp_path / "kept")
    assert (datasets.config.TORCH_AVAILABLE, datasets.Audio.encode_example) == before
    (within,) = seen
    assert not within[0] and within[1] != before[1]


@pytest.mark.parametrize("streaming", [False, True])
def test_reading_data_sets_never_imports_torch(folders, tmp_path, streaming):
    script = (
        "import pathlib, sys\n"
        "from flax_projector.data.audio import load_audio\n"
        "from flax_projector.config import DataConfig\n"
        "from flax_projector.data.hf_data import read_hf\n"
        f"config = DataConfig(hf_streaming={streaming})\n"
        "rows, _ = read_hf(sys.argv[1], config, pathlib.Path(sys.argv[2]))\n"
        "assert len(load_audio(rows[0].audio)) == 1600\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    source = f"hf:{folders['several']}:train{COLUMNS}"
    result = subprocess.run(
        [sys.executable, "-c", script, source, str(tmp_path / "kept")],
        text=True,
        capture_output=True,
        cwd=Path(__file__).parents[1],
    )
    assert result.returncode == 0, result.stderr[-2000:]
