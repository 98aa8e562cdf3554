"""The trained state: the projector, its optimizer, and how both begin."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from flax_projector.config import CTCConfig, OptimizerConfig, ProjectorConfig, TrainConfig
from flax_projector.models.projector import (
    ResidualAudioProjector,
    abstract_projector,
    last_norm_name,
)
from flax_projector.models.speech_llm import Params
from flax_projector.sharding import replicated, strip_axes


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes; the frozen towers are not part of it.

    Attributes:
      step: i32[], updates done so far.
      params: f32 master weights of the projector.
      opt_state: the optimizer's state.
    """

    step: Any
    params: Params
    opt_state: Any


def make_schedule(config: OptimizerConfig, num_steps: int, ctc: CTCConfig) -> optax.Schedule:
    """Linear warm-up from 0, then cosine decay to `final_lr_rate` x the peak at the last step.

    A CTC warm start comes first, with the same shape and its own peak.
    """

    def stage(peak: float, length: int) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=peak,
            warmup_steps=config.warmup_steps,
            decay_steps=max(length, config.warmup_steps + 1),
            end_value=peak * config.final_lr_rate,
        )

    llm = stage(config.learning_rate, num_steps - ctc.num_steps)
    if not ctc.num_steps:
        return llm
    return optax.join_schedules([stage(ctc.learning_rate, ctc.num_steps), llm], [ctc.num_steps])


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of the update after this many steps of a run."""
    return float(np.asarray(make_schedule(config.optimizer, config.num_steps, config.ctc)(step)))


def decay_mask(params: Params, config: OptimizerConfig) -> Any:
    """Which parameters are decayed: kernels, and the weights of norms if the config says so."""
    decayed = {"kernel", "scale"} if config.decay_norms else {"kernel"}
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in decayed, params)


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Gradient clipping, then AdamW with decoupled weight decay, as in torch."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=functools.partial(decay_mask, config=config),
        ),
    )


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, from f32 parameters."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def continued_state(
    params: Params, adam: optax.ScaleByAdamState, optimizer: optax.GradientTransformation, step: int
) -> TrainState:
    """The state after the first steps of a training that another program began.

    Args:
      params: f32 parameters.
      adam: its running means, and how often they were updated.
      optimizer: the run's optimizer.
      step: steps done, which is also the place in the schedule of the learning rate.
    """
    state = init_state(params, optimizer)
    opt_state = optax.tree.set(state.opt_state, count=jnp.int32(step))
    opt_state = jax.tree.map(
        lambda part: adam if _is_adam(part) else part, opt_state, is_leaf=_is_adam
    )
    return TrainState(jnp.int32(step), params, opt_state)


def adam_state(state: TrainState) -> optax.ScaleByAdamState:
    """Adam's part of the optimizer's state: its running means, and how often they were updated."""
    (adam,) = filter(_is_adam, jax.tree.leaves(state.opt_state, is_leaf=_is_adam))
    return adam


def _is_adam(part: Any) -> bool:
    return isinstance(part, optax.ScaleByAdamState)


def abstract_state(
    config: ProjectorConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state; moments are sharded like their parameters."""
    params = abstract_projector(config, mesh=mesh)
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), params)
    place = functools.partial(_with_sharding, sharding=replicated(mesh))
    opt_state = optax.tree.map_params(
        optimizer,
        lambda leaf, param: _with_sharding(leaf, param.sharding),
        state.opt_state,
        params,
        transform_non_params=place,
    )
    return TrainState(place(state.step), params, opt_state)


def _with_sharding(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def shardings_of(tree: Any) -> Any:
    """The sharding of every leaf of a tree of arrays or ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def begin_with(
    params: Params, optimizer: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """The state before the first step, from existing projector parameters.

    Args:
      params: f32 parameters, sharded as in `abstract`.
      optimizer: the run's optimizer.
      abstract: the state's shapes and shardings, from `abstract_state`.
    """
    init = functools.partial(init_state, optimizer=optimizer)
    return jax.jit(init, out_shardings=shardings_of(abstract))(params)


def begin_anew(
    projector: ResidualAudioProjector,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    *,
    seed: int,
    output_scale: float,
) -> TrainState:
    """The state before the first step, from random projector parameters, created in their shards.

    Args:
      projector: the module.
      optimizer: the run's optimizer.
      abstract: the state's shapes and shardings, from `abstract_state`.
      seed: seed of the random numbers.
      output_scale: initial weight of the last norm.
    """

    def init(key: jax.Array) -> TrainState:
        frames = jnp.zeros((1, 1, projector.config.encoder_dim))
        params = strip_axes(projector.init(key, frames)["params"])
        last_norm = params[last_norm_name(projector.config)]
        last_norm["scale"] = last_norm["scale"] * output_scale
        return init_state(params, optimizer)

    return jax.jit(init, out_shardings=shardings_of(abstract))(jax.random.key(seed))
