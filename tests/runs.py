"""Runs that nobody has trained."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from convert.torch_projector import ResidualAudioProjector as TorchProjector
from flax_projector.config import TrainConfig
from flax_projector.run import load_prompt, resolve_config
from flax_projector.run_folder import RunFolder
from flax_projector.training.checkpoints import open_manager, save
from flax_projector.training.state import TrainState
from tests.models import make_projector_pair
from tests.tiny import tiny_config


def make_run(folder: Path, towers: dict[str, str], **data: Any) -> TrainConfig:
    """A run with a random projector, which nobody has trained."""
    config = resolve_config(tiny_config(folder, towers, data=data, max_new_tokens=11))
    params = make_projector_pair(TorchProjector, config.projector)[1]
    run = RunFolder(Path(config.out))
    run.claim(config, load_prompt(config, Path(config.llm)).to_json(), {}, 0.0)
    state = TrainState(jnp.int32(1), jax.tree.map(jnp.asarray, params), {"count": jnp.int32(1)})
    with open_manager(run.checkpoints, keep=1) as manager:
        save(manager, 1, state, {})
    return config
