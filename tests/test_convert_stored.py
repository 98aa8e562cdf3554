"""Every form of checkpoint is recognised by its content."""

import json
import shutil
from pathlib import Path

import pytest

from convert import api
from convert.errors import ConversionError
from convert.models import PROJECTOR, detect
from convert.stored import open_stored
from tests.checkpoints import assert_same_tensors, random_tensors, write_weights
from tests.tiny import make_projector


@pytest.fixture
def hf(tmp_path) -> Path:
    """A random projector in an HF folder."""
    return make_projector(tmp_path / "hf")


@pytest.fixture
def trainer(tmp_path) -> Path:
    """The output folder of an HF Trainer: checkpoint-10, -100 and -9, each another projector."""
    for step in (10, 100, 9):
        folder = make_projector(tmp_path / "out" / f"checkpoint-{step}", seed=step)
        (folder / "optimizer.pt").write_bytes(b"moments")
    (tmp_path / "out" / "checkpoint-tmp").mkdir()
    return tmp_path / "out"


def test_the_latest_checkpoint_of_a_trainer_is_taken(tmp_path, trainer) -> None:
    api.to_flax(trainer, tmp_path / "flax")
    api.to_torch(tmp_path / "flax", tmp_path / "hf")
    assert_same_tensors(trainer / "checkpoint-100", tmp_path / "hf")


def test_a_step_of_a_trainer_is_taken(tmp_path, trainer) -> None:
    api.to_flax(trainer, tmp_path / "flax", step=9)
    api.to_torch(tmp_path / "flax", tmp_path / "hf")
    assert_same_tensors(trainer / "checkpoint-9", tmp_path / "hf")
    with pytest.raises(ValueError, match=r"out has no checkpoint of step 11, only of 9, 10, 100"):
        api.to_flax(trainer, tmp_path / "x", step=11)


def test_the_model_that_a_trainer_saved_last_comes_before_its_checkpoints(trainer) -> None:
    make_projector(trainer, seed=3)
    assert open_stored(trainer).path == trainer
    assert open_stored(trainer, step=10).path == trainer / "checkpoint-10"


def test_one_config_may_serve_all_checkpoints(trainer) -> None:
    shutil.copy(trainer / "checkpoint-9/config.json", trainer)
    for folder in trainer.glob("checkpoint-1*"):
        (folder / "config.json").unlink()
    assert open_stored(trainer).config_text == (trainer / "config.json").read_text()


def test_a_step_of_what_has_no_steps_is_an_error(hf) -> None:
    with pytest.raises(ValueError, match=r"hf has no step 3: it is neither a folder"):
        open_stored(hf, step=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "run is not the folder of a run: no config.json"),
        ('{"model_type": "asr_model"}', "config.json is not the config of a training run"),
        ('{"data": ["train"]}', "config.json is not the config of a training run"),
        ('{"data": 3}', "config.json is not the config of a training run"),
    ],
)
def test_checkpoints_beside_another_config_are_not_a_run(tmp_path, text, message) -> None:
    (tmp_path / "run/checkpoints/5").mkdir(parents=True)
    if text is not None:
        (tmp_path / "run/config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_stored(tmp_path / "run")


@pytest.mark.parametrize("name", ["flax_model.msgpack", "checkpoints", None])
def test_a_folder_of_another_form_names_the_forms_that_exist(tmp_path, name) -> None:
    if name:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"contains {name or 'nothing'}, expected one") as caught:
        open_stored(tmp_path)
    for form in ("pytorch_model.bin.index.json", "checkpoint-N/", "params/", "checkpoints/N/"):
        assert form in str(caught.value)


def test_detect_by_the_names_of_tensors(tmp_path) -> None:
    folder = make_projector(tmp_path)
    (folder / "config.json").unlink()
    assert detect(open_stored(folder)) is PROJECTOR


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "unknown  names  of the 2 tensors fit no single model, supported: "),
        ({"model_type": "gpt2"}, "unsupported  model_type  = 'gpt2', supported: "),
    ],
)
def test_unknown_model_is_an_error(tmp_path, config, message) -> None:
    write_weights(tmp_path, random_tensors())
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"is not a model that can be converted") as caught:
        detect(open_stored(tmp_path))
    assert f"{message}projector (asr_model), whisper encoder (whisper), ll" in str(caught.value)
