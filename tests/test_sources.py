"""From the names of sources to batches: what is checked before a run begins, and how sets start."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from flax_projector.config import PRESETS, DataConfig, MeshConfig, TrainConfig
from flax_projector.data.bad_rows import BadRowLog
from flax_projector.data.sources import BatchMaker, check_sources, eval_names, source_name
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

    def encode(samples: np.ndarray):
        pytest.fail("encodes")

    bad_rows = BadRowLog(folder / "bad_rows.jsonl", max_rate=config.data.max_bad_rate)
    mesh = make_mesh(MeshConfig())
    return BatchMaker(config, RunFolder(folder), tiny_prompt(), mesh, bad_rows, encode)


def test_names_under_which_sources_are_reported():
    assert source_name("hf:owner/name:en:train[:100]") == "owner-name-en-train-100"
    assert source_name("gs://bucket/dev.jsonl") == source_name("a/b/dev.tsv") == "dev"


def test_sources_that_are_there_or_elsewhere_pass(tmp_path):
    here = make_speech(tmp_path, 1)
    elsewhere = ("hf:owner/name:train", "gs://bucket/dev.jsonl")
    check_sources(with_data(train=(here, *elsewhere), eval=elsewhere))


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
    "sources",
    [
        ("x/clips.jsonl", "y/clips.jsonl"),
        ("clips.jsonl", "gs://bucket/clips.tsv"),
        ("hf:owner/name:dev", "hf:owner-name:dev"),
        ("speech/train.jsonl",),  # the name of the training set
    ],
)
def test_evaluation_sets_whose_names_clash_are_an_error(sources):
    config = with_data(train=("hf:owner/name:train",), eval=sources)
    message = re.escape(f"--data.eval {' '.join(sources)}: names must differ, and not be 'train'")
    for use in (check_sources, eval_names):
        with pytest.raises(ValueError, match=message):
            use(config)


def test_evaluation_sets_are_found_by_name(tmp_path):
    sources = tuple(make_speech(tmp_path / part, 2) for part in "xy")
    clash = make_maker(with_data(eval=sources), tmp_path / "run")
    with pytest.raises(ValueError, match="names must differ"):
        clash.eval()
    other = Path(sources[1]).rename(Path(sources[1]).with_name("other.jsonl"))
    sets = make_maker(with_data(eval=(sources[0], str(other))), tmp_path / "run").eval()
    assert {name: batches.utterances[0].row.source for name, batches in sets.items()} == {
        "clips": sources[0],
        "other": str(other),
    }


def test_hosts_that_see_different_rows_do_not_start(tmp_path, monkeypatch):
    maker = make_maker(with_data(train=(make_speech(tmp_path, 13),)), tmp_path / "run")
    maker.train()
    monkeypatch.setattr(
        "jax.experimental.multihost_utils.process_allgather", lambda x: np.stack([x, x[::-1]])
    )
    with pytest.raises(ValueError, match="train: the hosts see different rows"):
        maker.train()


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
