"""Runs of ours beside the trainings of `tests.trainer`: the same projector and the same batches."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flax_projector.config import MeshConfig, TrainConfig
from flax_projector.models.projector import ResidualAudioProjector
from flax_projector.run_folder import RunFolder
from flax_projector.sharding import make_mesh
from flax_projector.training.checkpoints import open_manager, restore, save
from flax_projector.training.state import (
    TrainState,
    abstract_state,
    init_state,
    make_optimizer,
    make_schedule,
)
from tests.checkpoints import PROMPT
from tests.models import projector_to_flax
from tests.trainer import CONFIG, NUM_STEPS, OPTIMIZER, TorchTraining, batches

RUN = TrainConfig(
    encoder="some/whisper",
    llm="some/llama",
    projector=CONFIG,
    optimizer=OPTIMIZER,
    num_steps=NUM_STEPS,
)


def make_ours(config: TrainConfig) -> optax.GradientTransformation:
    """The optimizer of a run."""
    schedule = make_schedule(config.optimizer, config.num_steps, config.ctc)
    return make_optimizer(config.optimizer, schedule)


@functools.cache
def make_update(config: TrainConfig) -> Any:
    """A compiled step of a run, with the gradients of a mean square."""
    optimizer = make_ours(config)

    def loss(params, frames, target):
        audio = ResidualAudioProjector(config.projector).apply({"params": params}, frames)
        return jnp.mean((jnp.asarray(audio) - target) ** 2)

    @jax.jit
    def update(state, frames, target):
        grads = jax.grad(loss)(state.params, frames, target)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)

    return update


def steps_of_ours(state: TrainState, config: TrainConfig, last: int) -> TrainState:
    """The state after the steps up to `last`, with the batches that torch has."""
    for number, (frames, target) in enumerate(batches(last)):
        if number >= int(state.step):
            state = make_update(config)(state, frames, target)
    return state


def read_whole(folder: Path, step: int, config: TrainConfig) -> TrainState:
    """The state in a run folder, as `train_tpu.py` restores it."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = abstract_state(config.projector, make_ours(config), mesh)
    with open_manager(RunFolder(folder).checkpoints, keep=1) as manager:
        assert manager.latest_step() == step
        return restore(manager, step, abstract)[0]


def save_run(folder: Path, state: TrainState, config: TrainConfig) -> Path:
    """Writes the folder of a run with one checkpoint."""
    run = RunFolder(folder)
    run.claim(config, PROMPT, {}, 0.0)
    with open_manager(run.checkpoints, keep=1) as manager:
        save(manager, int(state.step), state, {})
    return folder


def run_after(steps: int, folder: Path, config: TrainConfig = RUN) -> Path:
    """The folder of a run of ours that began where torch's did."""
    params = projector_to_flax(config.projector, TorchTraining(config.projector).parameters())
    state = init_state(jax.tree.map(jnp.asarray, params), make_ours(config))
    return save_run(folder, steps_of_ours(state, config, steps), config)
