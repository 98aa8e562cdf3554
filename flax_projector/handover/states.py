"""The trained state in a checkpoint of a run, as the converter sees tensors."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from convert.checkpoint import Checkpoint, in_memory
from convert.orbax_readers import reason
from convert.trees import flatten
from flax_projector.config import CTCConfig, MeshConfig, OptimizerConfig, ProjectorConfig
from flax_projector.run_folder import RunFolder
from flax_projector.sharding import make_mesh
from flax_projector.training.checkpoints import open_manager, restore
from flax_projector.training.state import abstract_state, adam_state, make_optimizer, make_schedule


@dataclass(frozen=True)
class ReadState:
    """What a checkpoint of a run holds of the training.

    Attributes:
      params: the projector's parameters, by flax path.
      mu: the running means of their gradients.
      nu: those of the squares.
      updates: how often Adam has updated them.
    """

    params: Checkpoint
    mu: Checkpoint
    nu: Checkpoint
    updates: int


def any_optimizer() -> optax.GradientTransformation:
    """The optimizer with some settings: what its state consists of depends on none of them."""
    config = OptimizerConfig()
    return make_optimizer(config, make_schedule(config, 1, CTCConfig()))


def read_state(folder: RunFolder, step: int, config: ProjectorConfig) -> ReadState:
    """Reads a checkpoint of a run onto the host.

    Args:
      folder: of the run.
      step: of the checkpoint.
      config: of the projector.

    Raises:
      ValueError: naming the checkpoint, if it is damaged or of another projector.
    """
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = abstract_state(config, any_optimizer(), mesh)
    with open_manager(folder.checkpoints, keep=1) as manager:
        try:
            state, _ = restore(manager, step, abstract)
        except Exception as error:  # on damaged files Orbax raises all kinds of errors
            place = folder.checkpoints / str(step)
            raise ValueError(f"{place} cannot be read: {reason(error)}") from error
    adam: Any = adam_state(state)
    params, mu, nu = (_on_host(tree) for tree in (state.params, adam.mu, adam.nu))
    return ReadState(params, mu, nu, int(adam.count))


def _on_host(tree: Any) -> Checkpoint:
    return in_memory({path: np.array(leaf) for path, leaf in flatten(tree).items()})
