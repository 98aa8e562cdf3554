"""A run in use: on other devices than those of its training, from elsewhere, before its end."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import train_tpu
from flax_projector import __main__ as program
from flax_projector.config import PRESETS, MeshConfig, to_json
from flax_projector.data.rows import ManifestRow, Rows
from flax_projector.inference.listen import Listener
from flax_projector.inference.projectors import choose_projector
from flax_projector.logs import printable
from flax_projector.run_folder import Origin, RunFolder
from tests.tiny import killed_at, make_projector, tiny_config

pytestmark = pytest.mark.torch

ROOT = Path(train_tpu.__file__).parent


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_towers):
    """Where a run on 8 devices (fsdp 4) was started, with relative paths; it stopped at step 5."""
    home = tmp_path_factory.mktemp("home")
    for name, folder in tiny_towers.items():
        shutil.copytree(folder, home / "models" / name)
    config = tiny_config(
        home,
        tiny_towers,
        eval_every_steps=2,
        mesh=MeshConfig(fsdp=4),
        data={"bucket_secs": (2.0,)},
    )
    relative = {"encoder": "models/encoder", "llm": "models/llm", "out": "runs/a"}
    with pytest.MonkeyPatch.context() as patch, killed_at(5, patch):
        patch.chdir(home)
        train_tpu.main(dataclasses.replace(config, **relative))
    return home


@pytest.fixture(scope="module")
def clip(home):
    return str(home / "heldout" / "0.wav")


def words(listener: Listener, *paths: str) -> list[tuple[str, str]]:
    """What is heard in files."""
    return [(heard.path, heard.text) for heard in listener.transcribe_files(paths)]


def heard_at(home: Path, step: int) -> str:
    """What the run itself heard in the clip when it was evaluated."""
    lines = (home / f"runs/a/transcripts/clips-{step:06d}.jsonl").read_text().splitlines()
    heard = {t["id"]: t["hypothesis"] for t in map(json.loads, lines)}["clip0"]
    return " ".join(heard.split())


def test_one_device_in_another_directory_uses_the_best_of_eight_before_the_end(
    home, clip, tmp_path
):
    best = json.loads((home / "runs/a/best.json").read_text())["step"]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    options = (str(home / "runs/a"), clip, "--projector", "best")
    done = subprocess.run(
        (sys.executable, "-m", "flax_projector", "transcribe", *options),
        cwd=tmp_path,
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, f"{clip}\t{printable(heard_at(home, best))}\n"), (
        done.stderr
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("choice", "path", "step"),
    [
        (None, "runs/a", 4),
        ("2", "runs/a", 2),
        ("best", "runs/a/best", None),
        ("runs/a/best", "runs/a/best", None),
    ],
)
def test_projectors_of_a_run_that_has_not_ended(home, monkeypatch, caplog, choice, path, step):
    monkeypatch.chdir(home)
    caplog.set_level(logging.INFO)
    assert choose_projector(RunFolder(Path("runs/a")), choice) == (Path(path), step)
    assert ("runs/a has not ended: its newest checkpoint is used" in caplog.text) == (not choice)


def test_steps_and_the_newest_are_what_the_run_had_then(home, clip, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    two, newest = (Listener(home / "runs/a", projector=name) for name in ("2", None))
    for listener, step in ((two, 2), (newest, 4)):
        assert words(listener, clip) == [(clip, heard_at(home, step))]
        leaf = jax.tree.leaves(listener.projector_params)[0]
        assert dict(leaf.sharding.mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    pairs = zip(*(jax.tree.leaves(x.projector_params) for x in (two, newest)), strict=True)
    assert not any(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("make", "choice", "message"),
    [
        ([], None, "has not ended, so it has no projector: wait for its first checkpoint"),
        ([], "best", "has no best projector: .* Leave out --projector"),
        (["checkpoints/7", "best"], "final", "pass --projector best or --projector 7$"),
    ],
)
def test_a_projector_that_is_not_there_is_an_error_with_a_way_out(tmp_path, make, choice, message):
    for name in make:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=message):
        choose_projector(RunFolder(tmp_path), choice)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--projector", "3"], "has no checkpoint of step 3, only of 2, 4"),
        (["--projector", "nowhere"], "nowhere does not exist"),
        (["--mesh.fsdp", "3"], "--mesh.fsdp 3 .* does not fit 8 devices: 3, .* must divide it"),
        (["--encoder", "gone"], "--encoder: 'gone' is not a folder"),
        (["--llm", "gone"], "--llm: 'gone' is not a folder"),
    ],
)
def test_errors_name_what_helps_in_this_command(home, clip, options, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        program.cli(["transcribe", str(home / "runs/a"), clip, *options])


def test_rows_of_padding_are_full_rows_on_another_mesh(home, monkeypatch, caplog):
    """The run's 8 do not divide over 3 devices, and no option of this command could help."""
    devices = jax.devices()[:3]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    listener = Listener(home / "runs/a")
    rows = [ManifestRow(f"{i}", str(home / f"heldout/{i}.wav"), "go", 1.5) for i in range(2)]
    assert listener._batches.make("files", [Rows.of(rows)], batch_size=listener._batch_size)
    assert listener._batch_size == 9 and "padding" not in caplog.text


def test_a_projector_of_another_training_is_used_with_a_warning(home, clip, tmp_path, caplog):
    (tmp_path / "other").mkdir()
    shutil.copytree(home / "runs/a/best/params", tmp_path / "other/params")
    config = json.loads((home / "runs/a/best/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"user_prompt": "Write:"}))
    listener = Listener(home / "runs/a", projector=str(tmp_path / "other"))
    best = json.loads((home / "runs/a/best.json").read_text())["step"]
    assert words(listener, clip) == [(clip, heard_at(home, best))]
    assert "--prompt.user is 'Transcribe: <audio>', but" in caplog.text
    with pytest.raises(ValueError, match="is not the projector that the run is configured for"):
        Listener(home / "runs/a", projector=str(make_projector(tmp_path / "misfit")))


def test_other_towers_are_used_with_a_warning(home, clip, tmp_path, caplog):
    shutil.copytree(home / "models/encoder", tmp_path / "encoder")
    Listener(home / "runs/a", encoder=str(tmp_path / "encoder"))
    assert "is not the one" not in caplog.text
    config = json.loads((tmp_path / "encoder/config.json").read_text())
    (tmp_path / "encoder/config.json").write_text(json.dumps(config | {"encoder_layers": 1}))
    with pytest.raises(ValueError):  # a layer is left over
        Listener(home / "runs/a", encoder=str(tmp_path / "encoder"))
    assert "--encoder is not the one that the run was trained with" in caplog.text


CONFIG = PRESETS["tiny"][1]


@pytest.mark.parametrize(
    ("encoder", "out", "exists", "run", "expected"),
    [
        ("m/w", "runs/a", "home/m/w", "home/runs/a", "home/m/w"),
        ("m/w", "{}/home/runs/a", "home/m/w", "home/runs/a", "home/m/w"),
        ("{}/home/m/w", "runs/a", "home/m/w", "home/runs/a", "home/m/w"),
        ("m/w", "runs/a", "moved/m/w", "moved/runs/a", "moved/m/w"),
        ("{}/home/m/w", "runs/a", "moved/m/w", "moved/runs/a", "moved/m/w"),
        ("m/w", "runs/a", "home/m/w", "moved/runs/a", "home/m/w"),
        ("../m/w", "{}/runs/a", "m/w", "runs/a", "m/w"),
        ("owner/name", "runs/a", "home/m/w", "home/runs/a", None),
    ],
    ids=[
        "not moved",
        "absolute run",
        "absolute model",
        "moved together",
        "moved together, absolute model",
        "only the run moved",
        "above the directory",
        "hub id",
    ],
)
def test_saved_paths_are_found_from_elsewhere(
    tmp_path, monkeypatch, encoder, out, exists, run, expected
):
    encoder, out = (text.format(tmp_path) for text in (encoder, out))
    for folder in (exists, run, "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    folder = RunFolder(tmp_path / run)
    folder.config.write_text(to_json(dataclasses.replace(CONFIG, encoder=encoder, out=out)))
    folder.origin.write_text(json.dumps(dataclasses.asdict(Origin(str(tmp_path / "home")))))
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = str(tmp_path / expected) if expected else encoder
    assert folder.find(encoder) == found
    monkeypatch.chdir(tmp_path)
    assert RunFolder(Path(run)).find(encoder) == found
