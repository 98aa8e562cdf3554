"""The HF Trainer itself hands a training over, and goes on with one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer import Trainer

from convert.hf_config import projector_config_dict
from convert.trees import flatten
from flax_projector.handover.to_run import to_run
from flax_projector.handover.to_trainer import to_trainer
from tests.handover import RUN, read_whole, run_after, steps_of_ours
from tests.models import projector_to_flax
from tests.parity import assert_close
from tests.trainer import CONFIG, NUM_STEPS, OPTIMIZER, TorchTraining, batches

pytest.importorskip("accelerate", reason="the Trainer needs it: pip install 'flax-projector[test]'")
pytestmark = [
    pytest.mark.torch,
    pytest.mark.usefixtures("log_level"),
    pytest.mark.xdist_group("test_handover"),
    # PyTorch's own, of what the Trainer asks of it
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


class Model(nn.Module):
    """The projector as it stands in tiny-audio's model, with the loss of `tests.handover`."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = TorchTraining().projector

    def forward(self, frames: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """The mean square."""
        return {"loss": (self.projector(frames) - target).square().mean()}


def train(folder: Path, *, steps: int, resume: Path | None = None) -> Model:
    """Trains up to a step of `NUM_STEPS`; the checkpoint of step 10 is kept."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=NUM_STEPS,
        per_device_train_batch_size=2,
        learning_rate=OPTIMIZER.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=OPTIMIZER.warmup_steps,
        weight_decay=OPTIMIZER.weight_decay,
        adam_beta1=OPTIMIZER.b1,
        adam_beta2=OPTIMIZER.b2,
        adam_epsilon=OPTIMIZER.eps,
        max_grad_norm=OPTIMIZER.clip_norm,
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        save_steps=10,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [
        {"frames": torch.from_numpy(row), "target": torch.from_numpy(target)}
        for frames, targets in batches(NUM_STEPS)
        for row, target in zip(frames, targets, strict=True)
    ]
    model = Model()
    trainer: Any = Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert trainer.state.global_step == steps
    return model


def parameters(model: Model) -> dict[str, Any]:
    """Its parameters by flax path."""
    found = {name: p.detach().clone() for name, p in model.projector.named_parameters()}
    return flatten(projector_to_flax(CONFIG, found))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The Trainer's folder, and the parameters at the end of its training."""
    folder = tmp_path_factory.mktemp("outputs")
    return folder, parameters(train(folder, steps=NUM_STEPS))


@pytest.mark.parity("PyTorch")
def test_a_training_of_the_trainer_goes_on_in_jax(outputs, tmp_path) -> None:
    folder, expected = outputs
    checkpoint = folder / "checkpoint-10"
    # A model of transformers, as tiny-audio's is, has written it.
    (checkpoint / "config.json").write_text(
        json.dumps(projector_config_dict(CONFIG, dtype="float32"))
    )
    state = read_whole(to_run(checkpoint, tmp_path / "run"), 10, RUN)
    for name, leaf in flatten(steps_of_ours(state, RUN, NUM_STEPS).params).items():
        assert_close(leaf, expected[name], 1e-5, name)


@pytest.mark.parity("PyTorch")
def test_the_trainer_goes_on_with_a_run(outputs, tmp_path) -> None:
    checkpoint = to_trainer(run_after(10, tmp_path / "run"), tmp_path / "checkpoint-10")
    found = parameters(train(tmp_path / "outputs", steps=NUM_STEPS, resume=checkpoint))
    for name, leaf in outputs[1].items():
        assert_close(found[name], leaf, 1e-5, name)
