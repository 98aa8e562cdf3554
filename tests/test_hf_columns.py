"""What the columns of a Hugging Face data set may hold, in which splits, and what is an error."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import numpy as np
import pytest
import soundfile
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, LargeList, List, Value

from flax_projector.config import DataConfig
from flax_projector.data.audio import BadAudio, Problem, check_samples, file_stamp, load_audio
from flax_projector.data.hf_data import read_hf

TEXTS = ["one", "two", "three"]


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=[False, True], ids=["random", "streamed"])
def config(request) -> DataConfig:
    return DataConfig(hf_streaming=request.param)


def make_clips(folder: Path, rate: int = 16_000, channels: int = 1) -> list[tuple[Path, Any]]:
    """Noise of 0.1, 0.2 and 0.3 s as wav files of 16 bits, with their samples i16[N, channels]."""
    folder.mkdir(exist_ok=True)
    clips = []
    for i in range(3):
        noise = np.random.default_rng(i).uniform(-0.5, 0.5, (rate * (i + 1) // 10, channels))
        path, samples = folder / f"{i}.wav", (32_768 * noise).astype(np.int16)
        soundfile.write(path, samples, rate)
        clips.append((path, samples))
    return clips


def save(folder: Path, clips: list[Any], feature: Any = None, **columns: Any) -> str:
    """Saves rows with the texts; returns the name of the source."""
    dataset = Dataset.from_dict({"audio": clips, "text": TEXTS[: len(clips)], **columns})
    if feature is not None:
        dataset = dataset.cast_column("audio", feature)
    dataset.save_to_disk(str(folder))
    return f"hf:{folder}:train"


def as_bytes(path: Path) -> dict[str, Any]:
    return {"bytes": path.read_bytes(), "path": path.name}


def decoded(samples: Any, rate: int = 16_000, **more: Any) -> dict[str, Any]:
    return {"array": samples, "sampling_rate": rate, **more}


STORED = {
    "audio": lambda p, _: (as_bytes(p), Audio()),
    "audio that is not decoded": lambda p, _: (as_bytes(p), Audio(decode=False)),
    "a struct": lambda p, _: (as_bytes(p), None),
    "a struct of a path": lambda p, _: ({"bytes": None, "path": str(p)}, Audio(decode=False)),
    "bytes": lambda p, _: (p.read_bytes(), Value("binary")),
    "large bytes": lambda p, _: (p.read_bytes(), Value("large_binary")),
    "a path": lambda p, _: (str(p), Value("string")),
    "a large path": lambda p, _: (str(p), Value("large_string")),
    "int16": lambda _, x: (decoded(x[:, 0]), None),
    "float32": lambda _, x: (decoded((x[:, 0] / 32_768).astype(np.float32)), None),
    "float64": lambda _, x: (decoded((x[:, 0] / 32_768).tolist(), path="x.flac"), None),
    "a large list": lambda _, x: (
        decoded((x[:, 0] / 32_768).tolist()),
        {"array": LargeList(Value("float32")), "sampling_rate": Value("int32")},
    ),
    "one channel of several": lambda _, x: (decoded(x.T), None),
}


@pytest.mark.parametrize("stored", STORED)
def test_clips_are_read_however_they_are_stored(tmp_path, config, stored):
    clips = make_clips(tmp_path / "clips")
    values, (feature, *_) = zip(*(STORED[stored](*clip) for clip in clips), strict=True)
    rows, bad = read_hf(save(tmp_path / "set", list(values), feature), config, tmp_path / "kept")
    assert not bad and [row.text for row in rows] == TEXTS
    for row, (path, _) in zip(rows, clips, strict=True):
        again = pickle.loads(pickle.dumps(row))
        np.testing.assert_array_equal(load_audio(again.audio), load_audio(path))
        assert row.duration == soundfile.info(path).duration


@pytest.mark.parametrize("rate", [8_000, 44_100])
@pytest.mark.parametrize("turned", [False, True], ids=["channels first", "channels last"])
def test_decoded_samples_of_any_rate_and_of_channels_in_either_order(tmp_path, rate, turned):
    clips = make_clips(tmp_path / "clips", rate, channels=2)
    values = [decoded(x if turned else x.T, rate) for _, x in clips]
    rows, _ = read_hf(save(tmp_path / "set", values), DataConfig(), tmp_path / "kept")
    for row, (path, _) in zip(rows, clips, strict=True):
        np.testing.assert_array_equal(load_audio(row.audio), load_audio(path))


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl", "train.parquet"])
def test_paths_may_be_relative_to_the_folder_of_the_data_set(tmp_path, config, name):
    clips = make_clips(tmp_path / "set")
    table = Dataset.from_dict({"audio": [path.name for path, _ in clips], "text": TEXTS})
    write = {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}
    write[name.rpartition(".")[2]](str(tmp_path / "set" / name))
    for path, _ in clips:  # otherwise it is a data set of sound files
        path.rename(path.with_suffix(".clip"))
    text = (tmp_path / "set" / name).read_bytes().replace(b".wav", b".clip")
    if name != "train.parquet":
        (tmp_path / "set" / name).write_bytes(text)
    else:
        table = Dataset.from_dict({"audio": [f"{i}.clip" for i in range(3)], "text": TEXTS})
        table.to_parquet(str(tmp_path / "set" / name))
    rows, bad = read_hf(f"hf:{tmp_path / 'set'}:train", config, tmp_path / "kept")
    assert not bad and [row.text for row in rows] == TEXTS
    assert [row.duration for row in rows] == [0.1, 0.2, 0.3]
    assert len(load_audio(rows[2].audio)) == 4_800


@pytest.mark.parametrize(
    ("value", "reason", "detail"),
    [
        (None, Problem.MISSING_FILE, "the row has no audio"),
        ({"bytes": None, "path": None}, Problem.MISSING_FILE, "the row has no audio"),
        ({"bytes": b"", "path": ""}, Problem.MISSING_FILE, "the row has no audio"),
        ({"bytes": None, "path": "no.wav"}, Problem.MISSING_FILE, "does not exist"),
        ({"bytes": None, "path": "a\0b"}, Problem.MISSING_FILE, "does not exist"),
        ({"bytes": b"not audio", "path": None}, Problem.UNDECODABLE, "not a readable audio file"),
        (decoded([0.1] * 4_000, 0), Problem.UNDECODABLE, "holds no sound"),
        (decoded([0.1] * 4_000, 2**40), Problem.UNDECODABLE, "holds no sound"),
        ({"array": [0.1] * 4_000, "sampling_rate": None}, Problem.UNDECODABLE, "holds no sound"),
        (decoded([[[0.1] * 4_000]]), Problem.UNDECODABLE, "have the shape (1, 1, 4000)"),
        (decoded([[0.1], [0.1, 0.2]]), Problem.UNDECODABLE, "holds no sound"),
        (decoded([]), Problem.TOO_SHORT, "less than an encoder frame"),
        (decoded([0.1, None] * 2_000), Problem.NOT_FINITE, "not finite"),
        (decoded([1e4] * 4_000), Problem.IMPOSSIBLE, "10000"),
    ],
)
def test_a_clip_that_is_no_sound_is_a_bad_row(tmp_path, value, reason, detail):
    feature = {"bytes": Value("binary"), "path": Value("string")}
    if isinstance(value, dict) and "array" in value:
        empty = {"array": List(Value("float32")), "sampling_rate": Value("int64")}
        feature = None if value["array"] else empty
    source = save(tmp_path / "set", [value], feature)
    rows, bad = read_hf(source, DataConfig(), tmp_path / "kept")
    if not bad:
        with pytest.raises(BadAudio) as caught:
            check_samples(rows[0].audio, load_audio(rows[0].audio))
        found = caught.value.problem, str(caught.value)
    else:
        found = bad[0].reason, bad[0].detail
    assert found[0] == reason and detail in found[1]
    (stream, stream_bad) = read_hf(source, DataConfig(hf_streaming=True), tmp_path / "kept")
    assert len(stream) + len(stream_bad) == 1


@pytest.mark.parametrize(
    ("clips", "feature", "message"),
    [
        ([[0.1] * 400], None, "neither files nor paths nor samples with"),
        ([{"array": [0.1] * 400}], None, "samples without their sampling_rate"),
        ([decoded([3] * 400)], None, "only int16 and floats have a known full scale"),
        ([7], None, "neither files"),
        ([[{"bytes": b"a", "path": None}]], None, "neither files"),
        ([0], ClassLabel(names=["a", "b"]), "neither files"),
        ([{"sound": "a.wav"}], None, "neither files"),
    ],
)
def test_a_column_that_holds_no_clips_is_an_error(tmp_path, config, clips, feature, message):
    source = save(tmp_path / "set", clips, feature)
    with pytest.raises(ValueError, match=rf"column 'audio' holds .*{message}.*:audio=COLUMN"):
        read_hf(source, config, tmp_path / "kept")


@pytest.mark.parametrize("ids", [[0.5, 1.5], [["a"], ["b"]], [True, False]])
def test_a_column_that_holds_no_ids_is_an_error(tmp_path, config, ids):
    source = save(tmp_path / "set", ["a.wav", "b.wav"], name=ids)
    with pytest.raises(ValueError, match=r"column 'name' holds .*neither strings nor .*:id=COLUMN"):
        read_hf(f"{source}:id=name", config, tmp_path / "kept")


def test_a_row_without_an_id_has_its_number(tmp_path, config):
    clips = [str(path) for path, _ in make_clips(tmp_path / "clips")]
    source = save(tmp_path / "set", clips, name=["a", None, None])
    rows, _ = read_hf(f"{source}:id=name", config, tmp_path / "kept")
    assert [row.id for row in rows] == ["a", "1", "2"]


def test_class_labels_are_no_transcripts(tmp_path, config):
    labels = ClassLabel(names=[f"label {i}" for i in range(5_000)])
    source = save(tmp_path / "set", ["a.wav"], word=[3])
    dataset = datasets.load_from_disk(str(tmp_path / "set")).cast_column("word", labels)
    dataset.save_to_disk(str(tmp_path / "labels"))
    source = f"hf:{tmp_path / 'labels'}:train:text=word"
    with pytest.raises(ValueError, match=r"column 'word' holds ClassLabel.*not strings") as caught:
        read_hf(source, config, tmp_path / "kept")
    assert len(str(caught.value)) < 600


EMPTY = Features({"audio": Value("string"), "text": Value("string")})


@pytest.mark.parametrize("layout", ["untyped", "typed", "split", "parquet", "slice"])
def test_a_data_set_without_rows_is_one_clear_line(tmp_path, config, layout):
    folder, split = tmp_path / "set", "train"
    empty = Dataset.from_dict({"audio": [], "text": []}, features=EMPTY)
    if layout == "untyped":
        Dataset.from_dict({"audio": [], "text": []}).save_to_disk(str(folder))
    elif layout == "typed":
        empty.save_to_disk(str(folder))
    elif layout == "parquet":
        folder.mkdir()
        empty.to_parquet(str(folder / "train.parquet"))
    else:
        full = Dataset.from_dict({"audio": ["a.wav"], "text": ["go"]})
        DatasetDict({"train": empty, "test": full}).save_to_disk(str(folder))
        split = "test[1:]" if layout == "slice" else "train"
    with pytest.raises(ValueError) as caught:
        read_hf(f"hf:{folder}:{split}", config, tmp_path / "kept")
    first = str(caught.value).splitlines()[0]
    assert "has no rows" in first or "corresponds to no data" in first


@pytest.fixture
def saved(tmp_path) -> dict[str, str]:
    """Folders of save_to_disk with 100 numbered rows for training and 20 to test."""
    path = str(make_clips(tmp_path / "clips")[0][0])

    def rows(name: str, count: int, split: Any = None) -> Dataset:
        columns = {"audio": [path] * count, "text": [f"{name}{i}" for i in range(count)]}
        return Dataset.from_dict(columns, split=split)

    folders = {
        "dict": DatasetDict({"train": rows("train", 100), "test": rows("test", 20)}),
        "bare": rows("train", 100),
        "named": rows("dev", 20, datasets.Split("dev")),
        "sliced": rows("test", 5, datasets.Split("test[5:10]")),
    }
    for name, dataset in folders.items():
        dataset.save_to_disk(str(tmp_path / name))
    return {name: str(tmp_path / name) for name in folders}


def names(kind: str, *numbers: int) -> list[str]:
    return [f"{kind}{i}" for i in numbers]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("dict:train", names("train", *range(100))),
        ("dict:test", names("test", *range(20))),
        ("dict:train[:10%]", names("train", *range(10))),
        ("dict:train[3:5]", names("train", 3, 4)),
        ("dict:train[-2:]", names("train", 98, 99)),
        ("dict:train[:1000]", names("train", *range(100))),
        ("dict:test[90%:]+train[:1]", names("test", 18, 19) + names("train", 0)),
        ("dict:train[:1%](pct1_dropremainder)", names("train", 0)),
        ("bare:train[:2]", names("train", 0, 1)),
        ("named:dev", names("dev", *range(20))),
        ("named:dev[50%:]", names("dev", *range(10, 20))),
        ("sliced:test[5:10]", names("test", *range(5))),
        ("sliced:test", names("test", *range(5))),
        ("sliced:test[:2]", names("test", 0, 1)),
    ],
)
def test_splits_of_save_to_disk(saved, tmp_path, config, source, expected):
    name, _, split = source.partition(":")
    rows, bad = read_hf(f"hf:{saved[name]}:{split}", config, tmp_path / "kept")
    assert not bad and [row.text for row in rows] == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("dict:validation", r"\"validation\". Should be one of \['train', 'test'\]"),
        ("dict:validation[:5]", r"\"validation\". Should be one of \['train', 'test'\]"),
        ("bare:test", r"\"test\". Should be one of \['train'\]"),
        ("bare:Train", r"\"Train\". Should be one of"),
        ("named:train", r"\"train\". Should be one of \['dev'\]"),
        ("named:test[:5]", r"\"test\". Should be one of \['dev'\]"),
        ("sliced:train", r"\"train\". Should be one of \['test'\]"),
        ("dict:train[x:]", "Unrecognized instruction format"),
        ("dict:en:train", "a folder of save_to_disk has no configurations such as 'en'"),
    ],
)
def test_an_unknown_split_is_an_error_that_names_those_there_are(
    saved, tmp_path, config, source, message
):
    name, _, split = source.partition(":")
    with pytest.raises(ValueError, match=message):
        read_hf(f"hf:{saved[name]}:{split}", config, tmp_path / "kept")


def test_a_stream_that_has_no_slices_says_what_to_do(tmp_path):
    (tmp_path / "set").mkdir()
    Dataset.from_dict({"audio": ["a"], "text": ["x"]}).to_parquet(
        str(tmp_path / "set/train.parquet")
    )
    source, config = f"hf:{tmp_path / 'set'}:train[:1]", DataConfig(hf_streaming=True)
    with pytest.raises(ValueError, match=r"has no slices: name the whole split"):
        read_hf(source, config, tmp_path / "kept")


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        (
            {"set.py": "import datasets"},
            "set",
            "Python programs. Run this one with datasets<4, call",
        ),
        ({"train.csv": "audio,text\n"}, "set/train.csv", "is a file: name the folder"),
        ({}, "set", "doesn't contain any data files"),
        (
            {"train.jsonl": '{"audio": "a"}\n{"audio": 1, "text": {}}\n[]\n'},
            "set",
            "cannot be opened",
        ),
        ({"train.parquet": "not parquet"}, "set", "cannot be opened"),
        ({"state.json": "{"}, "set", "cannot be opened: JSONDecodeError"),
        ({"state.json": '{"_data_files": [{"filename": "no.arrow"}]}'}, "set", "cannot be opened"),
        ({"dataset_dict.json": "[]"}, "set", "cannot be opened"),
    ],
)
def test_what_is_no_data_set_is_one_clear_error(tmp_path, config, files, name, message):
    (tmp_path / "set").mkdir()
    for file, text in files.items():
        (tmp_path / "set" / file).write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)^hf:.*set.*{message}") as caught:
        read_hf(f"hf:{tmp_path / name}:train", config, tmp_path / "kept")
    assert len(str(caught.value).splitlines()) <= 2


def test_a_stream_that_breaks_off_is_one_clear_error(saved, tmp_path, monkeypatch):
    def break_off(self):
        yield {"audio": "a.wav", "text": "go"}
        raise RuntimeError("the line is dead")

    source, config = f"hf:{saved['bare']}:train", DataConfig(hf_streaming=True)
    with monkeypatch.context() as patch:
        patch.setattr(datasets.IterableDataset, "__iter__", break_off)
        message = "broke off: RuntimeError: the line is dead\nThe same command continues it"
        with pytest.raises(ValueError, match=message):
            read_hf(source, config, tmp_path / "kept")
    rows, _ = read_hf(source, config, tmp_path / "kept")
    assert len(rows) == 100


@pytest.mark.parametrize("stored", ["bytes", "paths"])
def test_a_data_set_that_is_replaced_in_place_is_noticed(tmp_path, stored):
    """By its durations and by the stamps that kept frames go by; unchanged, it keeps both."""
    clips = make_clips(tmp_path / "clips")

    def write() -> list[Any]:
        values = [str(p) if stored == "paths" else as_bytes(p) for p, _ in clips]
        source = save(tmp_path / "new", values)
        if (tmp_path / "set").exists():
            (tmp_path / "set").rename(tmp_path / f"old{len(os.listdir(tmp_path))}")
        (tmp_path / "new").rename(tmp_path / "set")
        rows, bad = read_hf(source.replace("new", "set"), DataConfig(), tmp_path / "kept")
        assert not bad
        return list(rows)

    first = write()
    stamps = [file_stamp(row.audio) for row in first]
    assert json.loads(json.dumps(stamps)) == stamps and all(stamps)
    again, _ = read_hf(first[0].source, DataConfig(), tmp_path / "kept")
    assert [file_stamp(row.audio) for row in again] == stamps
    limited, _ = read_hf(first[0].source, DataConfig(hf_max_rows=2), tmp_path / "kept")
    assert [file_stamp(row.audio) for row in limited] == stamps[:2]
    soundfile.write(clips[1][0], np.full(8_000, 0.1), 16_000)
    second = write()
    assert [row.duration for row in second] == [0.1, 0.5, 0.3]
    changed = [file_stamp(row.audio) != stamp for row, stamp in zip(second, stamps, strict=True)]
    assert changed[1] and (stored == "paths" or all(changed))


def test_a_long_name_can_be_streamed(saved, tmp_path):
    folder = Path(saved["bare"])
    long = folder.rename(tmp_path / ("x" * 200))
    source, config = f"hf:{long}:train:text=text:audio=audio", DataConfig(hf_streaming=True)
    rows, _ = read_hf(source, config, tmp_path / "kept")
    assert len(rows) == 100


def test_kept_durations_of_a_data_set_are_not_read_again(saved, tmp_path, monkeypatch):
    source = f"hf:{saved['bare']}:train"
    read_hf(source, DataConfig(hf_max_rows=10), tmp_path / "kept")
    monkeypatch.setattr("flax_projector.data.row_file.read_duration", pytest.fail)
    rows, _ = read_hf(source, DataConfig(hf_max_rows=10), tmp_path / "kept")
    assert len(rows) == 10 and rows[0].duration == 0.1
