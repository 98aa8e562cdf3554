"""Run folders are where checkpoints can be written, and read again."""

import dataclasses
import json
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from convert.models import PROJECTOR
from convert.stored import open_stored
from convert.trees import unflatten
from flax_projector.config import PRESETS, to_json
from flax_projector.data.bad_rows import BadRowLog
from flax_projector.run_folder import RunFolder
from flax_projector.training.best import Best
from flax_projector.training.metrics import MetricsWriter
from tests.checkpoints import CONFIGS, write_run
from tests.tiny import read_all

CONFIG = PRESETS["tiny"][1]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("lr[0.1]", r"--out: .*lr\[0.1\]: parameters cannot be written to a path with \[ in it"),
        ("lr[0.1]/run", "parameters cannot be written"),
        ("a*b", r"a path with \* in it"),
        ("a?b", r"a path with \? in it"),
        ("a\\b", r"a path with \\ in it"),
        ("", "--out = '': must not be empty"),
        ("s3://bucket/run", "--out: s3://bucket/run is a URL that cannot be used .* gs://BUCKET/"),
        ("gs://bucket", "expected gs://BUCKET/FOLDER"),
        ("gs://bucket/../run", "expected gs://BUCKET/FOLDER"),
        ("file:///tmp/run", "is a URL"),
    ],
)
def test_a_run_that_could_not_be_restored_does_not_begin(tmp_path, monkeypatch, out, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        RunFolder.of(dataclasses.replace(CONFIG, out=out))
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    folder = RunFolder.of(dataclasses.replace(CONFIG, out="~/run"))
    assert str(folder.checkpoints) == "/home/me/run/checkpoints"


@pytest.mark.parametrize("name", ["a b", "ä", "lr=0.1,seed=3", "a]b", "50%", "a#b", "{x}"])
def test_whatever_is_not_refused_can_be_restored(tmp_path, name):
    config = CONFIGS[PROJECTOR]
    leaves = {path: np.full(x.shape, 3, x.dtype) for path, x in PROJECTOR.leaves(config).items()}
    run = RunFolder.of(dataclasses.replace(CONFIG, out=str(tmp_path / name)))
    write_run(run.on_disk, config, unflatten(leaves), steps=[3])
    for path, array in read_all(open_stored(run.path).checkpoint).items():
        np.testing.assert_array_equal(array, leaves[path])


def write_metrics(folder: RunFolder) -> None:
    with MetricsWriter(folder, first_step=3):
        pass


READERS = {
    "prompt.json": RunFolder.read_prompt,
    "origin.json": RunFolder.read_origin,
    "best.json": lambda folder: Best(folder, lambda *_: None),
    "metrics.jsonl": write_metrics,
    "bad_rows.jsonl": lambda folder: BadRowLog(folder.bad_rows, max_rate=0.1),
}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "7", "null", '{"x": 1}', 100_000 * "["])
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_of_a_run_is_named_with_a_way_out(tmp_path, name, text):
    folder = RunFolder(tmp_path)
    for path in (folder.config, tmp_path / name):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (tmp_path / name).write_text(f"{text}\n")
    # Nothing is known yet.
    is_fine = text == "{}" and name[:4] in ("orig", "best")
    with nullcontext() if is_fine else pytest.raises(ValueError, match=r" is damaged \(.*\): \w+"):
        READERS[name](folder)


def damaged(**changes: Any) -> str:
    return json.dumps(json.loads(to_json(CONFIG)) | changes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '"x"',
        100_000 * "[",
        100_000 * '{"data":',
        "\ud800",
        "{}",
        damaged(data=None),
        damaged(data=[1]),
        damaged(data={"train": 5}),
        damaged(data={"window_secs": float("inf")}),
        damaged(projector="x"),
        damaged(num_steps="x"),
        damaged(num_steps=[]),
        damaged(mesh={"data": None}),
        damaged(model_type="llama"),
    ],
)
def test_a_config_that_is_not_that_of_a_run_is_one_clear_error(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(
        ValueError, match=r"config.json is (not the config of a training run|empty): "
    ):
        RunFolder(tmp_path).read_config()
    (tmp_path / "config.json").write_text(to_json(CONFIG))
    assert RunFolder(tmp_path).read_config() == CONFIG
