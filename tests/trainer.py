"""A training of the projector by the HF Trainer, as far as its checkpoints know of it.

It shares no code with ours: torch's AdamW, transformers' schedule and the Trainer's own choice of
what is decayed. `test_handover_trainer` takes the Trainer itself.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import get_cosine_schedule_with_warmup
from transformers.trainer import Trainer
from transformers.trainer_callback import TrainerState

from convert.hf_config import projector_config_dict
from convert.torch_projector import ResidualAudioProjector
from flax_projector.config import OptimizerConfig, ProjectorConfig
from tests.tiny import randomize

CONFIG = ProjectorConfig(7, 13, projector_pool_stride=3, projector_hidden_dim=21)
"""The shapes of input_proj.weight and fc2.weight are the same: none shows if they are swapped."""
OPTIMIZER = OptimizerConfig(
    learning_rate=3e-3, warmup_steps=3, weight_decay=0.1, b1=0.8, b2=0.95, decay_norms=True
)
NUM_STEPS = 20


def batches(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Frames and what the projector is to make of them."""
    rng = np.random.default_rng(3)
    for _ in range(count):
        frames = rng.normal(size=(2, 11, CONFIG.encoder_dim))
        target = rng.normal(scale=rng.uniform(0, 3), size=(2, 4, CONFIG.llm_dim))
        yield frames.astype(np.float32), target.astype(np.float32)


class TorchTraining:
    """A projector, its optimizer and its schedule."""

    def __init__(
        self,
        config: ProjectorConfig = CONFIG,
        optimizer: OptimizerConfig = OPTIMIZER,
        *,
        num_steps: int = NUM_STEPS,
        dtype: torch.dtype = torch.float32,
        decayed_names: Callable[[Any, nn.Module], list[str]] = Trainer.get_decay_parameter_names,
    ) -> None:
        """Starts from random parameters.

        Args:
          config: of the projector.
          optimizer: of the training.
          num_steps: of the whole training.
          dtype: of the parameters, and so of the moments.
          decayed_names: the method of a Trainer.
        """
        self.config, self.optimizer, self.num_steps = config, optimizer, num_steps
        self.model = nn.Module()  # in which the projector has the name that it has in tiny-audio's
        self.projector: Any = randomize(ResidualAudioProjector(config), 0).to(dtype)
        self.model.projector = self.projector
        decayed = decayed_names(None, self.model)
        named = [*self.model.named_parameters()]
        groups = [
            {
                "params": [p for name, p in named if (name in decayed) == is_decayed],
                "weight_decay": optimizer.weight_decay if is_decayed else 0.0,
            }
            for is_decayed in (True, False)
        ]
        self.adamw = torch.optim.AdamW(
            groups,
            lr=optimizer.learning_rate,
            betas=(optimizer.b1, optimizer.b2),
            eps=optimizer.eps,
        )
        self.schedule = get_cosine_schedule_with_warmup(
            self.adamw, optimizer.warmup_steps, num_steps
        )
        self.step = 0

    def update(self, frames: np.ndarray, target: np.ndarray) -> None:
        """One step of the Trainer."""
        dtype = self.projector.input_proj.weight.dtype
        error = self.projector(torch.from_numpy(frames).to(dtype)) - torch.from_numpy(target)
        error.square().mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.optimizer.clip_norm)
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad()
        self.step += 1

    def save(self, folder: Path) -> Path:
        """Writes what the Trainer and tiny-audio write."""
        folder.mkdir(parents=True)
        weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        dtype = str(self.projector.input_proj.weight.dtype).removeprefix("torch.")
        data = projector_config_dict(self.config, dtype=dtype)
        (folder / "config.json").write_text(json.dumps(data))
        torch.save(self.adamw.state_dict(), folder / "optimizer.pt")
        torch.save(self.schedule.state_dict(), folder / "scheduler.pt")
        state = TrainerState(
            global_step=self.step, max_steps=self.num_steps, train_batch_size=2, num_train_epochs=1
        )
        state.save_to_json(str(folder / "trainer_state.json"))
        return folder

    def load(self, folder: Path) -> None:
        """Continues a checkpoint, as `Trainer.train(resume_from_checkpoint=...)` does."""
        self.model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        options: Any = {"map_location": "cpu", "weights_only": True}
        self.adamw.load_state_dict(torch.load(folder / "optimizer.pt", **options))
        self.schedule.load_state_dict(torch.load(folder / "scheduler.pt", **options))
        self.step = state.global_step
        assert state.max_steps == self.num_steps

    def parameters(self) -> dict[str, torch.Tensor]:
        """Copies by torch name, without the prefix."""
        return {n: p.detach().clone() for n, p in self.projector.named_parameters()}


def trained(steps: int, **options: Any) -> TorchTraining:
    """A training after its first steps."""
    training = TorchTraining(**options)
    for frames, target in batches(steps):
        training.update(frames, target)
    return training
