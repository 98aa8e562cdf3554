"""From the names of sources to batches: what is checked before a run begins, and how sets start."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile

from flax_projector.config import PRESETS, DataConfig, MeshConfig, TrainConfig
from flax_projector.data.bad_rows import BadRowLog
from flax_projector.data.sources import BatchMaker, check_sources, eval_names, set_names
from flax_projector.run_folder import RunFolder
from flax_projector.sharding import make_mesh
from tests.clips import tiny_prompt
from tests.tiny import make_speech

pytestmark = pytest.mark.torch  # tests.tiny makes towers with it


def with_data(preset: str = "tiny", /, **data) -> TrainConfig:
    config = PRESETS[preset][1]
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


def make_maker(config: TrainConfig, folder: Path) -> BatchMaker:
    """Needs no model, since it keeps no frames."""

    def encode(samples: jax.Array):
        pytest.fail("encodes")

    bad_rows = BadRowLog(folder / "bad_rows.jsonl", max_rate=config.data.max_bad_rate)
    mesh = make_mesh(MeshConfig())
    return BatchMaker(config, RunFolder(folder), tiny_prompt(), mesh, bad_rows, encode, "")


def test_names_under_which_sources_are_reported():
    assert list(set_names(["hf:owner/name:en:train[:100]"])) == ["owner-name-en-train-100"]
    assert list(set_names(["gs://bucket/dev.jsonl"])) == list(set_names(["a/b/dev.tsv"])) == ["dev"]


def test_sources_that_are_there_or_elsewhere_pass(tmp_path):
    here = make_speech(tmp_path, 1)
    elsewhere = ("hf:owner/name:train", "gs://bucket/dev.jsonl")
    check_sources(with_data(train=(here, *elsewhere), eval=elsewhere))


def test_a_cache_that_cannot_be_used_names_the_option(tmp_path):
    config = with_data(train=(make_speech(tmp_path, 1),), cache_dir="s3://bucket/cache")
    with pytest.raises(ValueError, match=r"--data.cache-dir: s3://bucket/cache is a URL that cann"):
        make_maker(config, tmp_path).train()


def test_a_run_without_training_data_names_the_option():
    with pytest.raises(ValueError, match=r"no training data: pass --data.train MANIFEST.jsonl"):
        check_sources(with_data(train=()))


@pytest.mark.parametrize("part", ["train", "eval"])
def test_a_missing_manifest_is_named_with_the_folder_where_it_was_looked_for(
    tmp_path, monkeypatch, part
):
    sources = {"train": (make_speech(tmp_path, 1),), "eval": ()}
    monkeypatch.chdir(tmp_path)
    message = rf"^manifest data/no\.jsonl does not exist in {re.escape(str(tmp_path))}$"
    with pytest.raises(ValueError, match=message):
        check_sources(with_data(**sources | {part: ("data/no.jsonl",)}))
    absolute = str(tmp_path / "no.jsonl")
    with pytest.raises(ValueError, match=rf"^manifest {re.escape(absolute)} does not exist$"):
        check_sources(with_data(**sources | {part: (absolute,)}))


def test_the_demo_without_its_speech_says_where_that_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = (
        rf"^manifest examples/demo/speech/train\.jsonl does not exist in {re.escape(str(tmp_path))}"
        r"\. The demo's speech is in examples/demo/speech of the repository .*: run the demo in a"
    )
    with pytest.raises(ValueError, match=message):
        check_sources(with_data("demo"))


@pytest.mark.parametrize(
    "named",
    [
        {"dev": "x/dev.jsonl", "other": "x/other.jsonl"},
        {"a-clean": "a/clean.jsonl", "b-clean": "b/clean.jsonl", "noisy": "a/noisy.jsonl"},
        {"x-dev-clips": "/x/dev/clips.jsonl", "y-dev-clips": "/y/dev/clips.jsonl"},
        {"clips": "clips.jsonl", "bucket-clips": "gs://bucket/clips.tsv"},
        {"clips.jsonl": "x/clips.jsonl", "clips.tsv": "x/clips.tsv"},
        {"x-Clips": "x/Clips.jsonl", "y-clips": "y/clips.jsonl"},  # one name on some systems
        {
            "clean.jsonl": "x/clean.jsonl",
            "x-clean": "x-clean.jsonl",
            "y-clean": "y/clean.jsonl",
        },
        {"x-train": "x/train.jsonl", "y-train": "y/train.jsonl"},
        {
            "owner-name-dev-14d4ae3e": "hf:owner/name:dev",
            "owner-name-dev-546b20ff": "hf:owner-name:dev",
        },
        {"a-dev-10-a654400d": "hf:a:dev[:10]", "a-dev-10-7d659974": "hf:a:dev[:10%]"},
        {"clean": "hf:clean", "b-clean": "b/clean.jsonl"},
        {"gehört-词": "x/gehört 词.jsonl"},
    ],
)
def test_the_names_of_evaluation_sets_tell_them_apart(named):
    """By the shortest part of their paths, whatever the order."""
    sources = tuple(named.values())
    assert eval_names(with_data(train=("a.jsonl",), eval=sources)) == named
    assert eval_names(with_data(train=("a.jsonl",), eval=sources[::-1])) == named


@pytest.mark.parametrize(
    "path", ["a b\x1b[31m\n.jsonl", "???.jsonl", "...jsonl", "x" * 250 + ".jsonl", "\udcff.jsonl"]
)
def test_names_of_evaluation_sets_are_names_of_files(path, tmp_path):
    (name,) = eval_names(with_data(train=("a.jsonl",), eval=(f"x/{path}",)))
    assert re.fullmatch(r"\w[\w.-]*", name) and len(name.encode()) <= 100
    assert RunFolder(tmp_path).transcripts(name, 0).parent == tmp_path / "transcripts"


def test_no_evaluation_set_is_called_like_the_training_set():
    config = with_data(train=("hf:owner/name:train",), eval=("speech/train.jsonl",))
    for use in (check_sources, eval_names):
        with pytest.raises(
            ValueError, match=r"--data.eval speech/train.jsonl: 'train' is the name"
        ):
            use(config)


def test_evaluation_sets_are_found_by_name(tmp_path):
    """Every set keeps to its name: its rows, and its list of bad rows."""
    sources = tuple(make_speech(tmp_path / part, 2) for part in "xy")
    Path(sources[1]).with_name("1.wav").unlink()
    maker = make_maker(with_data(eval=sources, max_bad_rate=0.5), tmp_path / "run")
    sets = maker.eval()
    assert {name: batches.utterances[0].row.source for name, batches in sets.items()} == {
        "x-clips": sources[0],
        "y-clips": sources[1],
    }
    assert [batches.name for batches in sets.values()] == ["x-clips", "y-clips"]
    (line,) = (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["set"] == "y-clips"


@pytest.mark.parametrize("drop", [False, True])
def test_doubtful_clips_are_dropped_in_training_only_and_at_every_start(tmp_path, drop):
    manifest = make_speech(tmp_path, 13)
    path = Path(manifest).with_name("2.wav")
    soundfile.write(path, np.zeros(soundfile.info(path).frames), 16_000)
    config = with_data(train=(manifest,), eval=(manifest,), max_bad_rate=0.0, drop_doubtful=drop)
    config = dataclasses.replace(config, num_steps=2)
    seen = []
    for _ in range(2):
        maker = make_maker(config, tmp_path / "run")
        sets = {"train": maker.train(), **maker.eval()}
        used = {}
        for name, batches in sets.items():
            local = [batches[i] for i in range(len(batches))]
            used[name] = sum(np.count_nonzero(part.batch.num_frames) for part in local)
            for part in local:
                maker.bad_rows.add(name, part.bad)
        lines = (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()
        listed = {(row["set"], row["id"], row["is_used"]) for row in map(json.loads, lines)}
        assert listed == {("train", "clip2", not drop), ("clips", "clip2", True)}
        seen.append((used, sets["train"].fingerprint))
    assert seen[0] == seen[1] and seen[0][0] == {"train": 13 - drop, "clips": 13}


def test_a_set_of_which_no_row_can_be_used_is_an_error_that_lists_them(tmp_path):
    manifest = Path(make_speech(tmp_path, 3))
    for i in range(3):
        manifest.with_name(f"{i}.wav").unlink()
    config = with_data(train=(str(manifest),), max_bad_rate=1.0)
    with pytest.raises(ValueError, match="train: none of 3 rows can be used"):
        make_maker(config, tmp_path / "run").train()
    lines = (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all("missing_file" in line for line in lines)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": ("a", "b"), "train_weights": (1.0,)}, "one weight above 0 for each of 2 train"),
        ({"train": ("a",), "train_weights": (0.0,)}, "one weight above 0 for each of 1 train"),
        ({"train": ("a", "a")}, "must not name anything twice"),
        ({"max_bad_rate": 1.5}, r"must be in \[0, 1\]"),
        ({"num_workers": -1}, "must be at least 0"),
    ],
)
def test_a_data_config_that_makes_no_sense_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)
