"""`train_tpu.py` continues what the HF Trainer began."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import train_tpu
from flax_projector.config import PRESETS, TrainConfig
from flax_projector.handover.to_run import to_run
from flax_projector.handover.to_trainer import to_trainer
from flax_projector.run_folder import RunFolder
from tests.tiny import final_params, read_losses, tiny_config

pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("test_handover_run")]


@pytest.fixture(scope="module")
def finished(tiny_towers, tmp_path_factory) -> TrainConfig:
    """A run of six steps with checkpoints at 2, 4 and 6."""
    config = tiny_config(
        tmp_path_factory.mktemp("finished"),
        tiny_towers,
        optimizer=dataclasses.replace(PRESETS["tiny"][1].optimizer, decay_norms=True),
        keep_checkpoints=3,
    )
    train_tpu.main(config, devices=jax.devices()[:1])
    return config


def handed_over(finished: TrainConfig, folder: Path) -> TrainConfig:
    """The same run from step 2 on, after its state went to the Trainer's files and back."""
    between = to_trainer(finished.out, folder / "checkpoint-2", step=2)
    return dataclasses.replace(finished, out=str(to_run(between, folder / "run")))


def test_a_run_that_went_to_the_trainer_and_back_ends_with_the_same_bytes(
    finished, tmp_path
) -> None:
    config = handed_over(finished, tmp_path)
    train_tpu.main(config, devices=jax.devices()[:1])
    assert read_losses(config) == read_losses(finished)[2:]
    found, expected = final_params(config), final_params(finished)
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, name)
    assert sorted(RunFolder(Path(config.out)).steps()) == [2, 4, 6]
    with pytest.raises(ValueError, match="holds a run with another config"):  # it is a run now
        train_tpu.main(dataclasses.replace(config, seed=1), devices=jax.devices()[:1])


def test_other_settings_end_it_before_anything_is_loaded(finished, tmp_path) -> None:
    config = handed_over(finished, tmp_path)
    optimizer = dataclasses.replace(config.optimizer, decay_norms=False)
    towers = {"encoder": "nowhere", "llm": "nowhere"}
    with pytest.raises(ValueError, match=r"--optimizer\.decay-norms: True -> False"):
        train_tpu.main(dataclasses.replace(config, optimizer=optimizer, **towers))
    assert not (Path(config.out) / "config.json").exists()
    assert not (Path(config.out) / "owner.json").exists()
