"""One update of the projector as a pure function, and the programs that it compiles to."""

import functools
import itertools
import logging
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from flax_projector.batch import Batch, Bucket
from flax_projector.config import TrainConfig
from flax_projector.lengths import FRAME_SECS
from flax_projector.models.layers import products_of
from flax_projector.models.speech_llm import Params, SpeechLLM
from flax_projector.sharding import replicated
from flax_projector.training.objectives import LLMObjective, Metrics, Objective
from flax_projector.training.state import TrainState, shardings_of

log = logging.getLogger(__name__)


def train_step(
    state: TrainState,
    encoder_params: Params,
    llm_params: Params,
    batch: Batch,
    *,
    model: SpeechLLM,
    optimizer: optax.GradientTransformation,
    seed: int,
    objective: Objective = LLMObjective(),  # noqa: B008 - it has no state
    accumulation_steps: int = 1,
) -> tuple[TrainState, Metrics]:
    """One update of the projector on the mean loss per label of the global batch.

    The batch may be computed in micro-batches, one after the other. Their losses are divided by the
    number of labels in the whole batch, so that every label has the same weight wherever it is.

    Args:
      state: the current state, donated by the caller.
      encoder_params: the frozen encoder's parameters.
      llm_params: the frozen LLM's parameters.
      batch: the global batch.
      model: the modules.
      optimizer: the state's optimizer.
      seed: seed for dropout and SpecAugment.
      objective: what is minimised.
      accumulation_steps: number of micro-batches; it must divide each device's rows.

    Returns:
      The new state, and the metrics: the loss and the number of labels under the objective's names,
      the objective's other metrics, "grad_norm" before clipping, `weight_norms` of the new state,
      and `batch_counts`.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    count = objective.num_labels(batch)

    def mean_loss(
        params: Params, micro_batch: Batch, index: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        total, metrics = objective.summed_loss(
            model,
            params,
            encoder_params,
            llm_params,
            micro_batch,
            key=jax.random.fold_in(key, index),
        )
        mean = total / jnp.maximum(count, 1)
        # Metrics are summed over micro-batches, but these are means over a batch.
        means = {name: value / accumulation_steps for name, value in metrics.items()}
        return mean, {objective.loss_name: mean} | means

    def gradient(*args: Any) -> tuple[Params, Metrics]:
        with products_of(model.llm.dtype):
            return jax.grad(mean_loss, has_aux=True)(*args)

    if accumulation_steps == 1:
        grads, metrics = gradient(state.params, batch, jnp.int32(0))
    else:

        def accumulate(total, inputs):
            return jax.tree.map(jnp.add, total, gradient(state.params, *inputs)), None

        inputs = (batch.split(accumulation_steps), jnp.arange(accumulation_steps))
        first = jax.tree.map(lambda x: x[0], inputs)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(gradient, state.params, *first),
        )
        (grads, metrics), _ = jax.lax.scan(accumulate, zeros, inputs)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics |= {objective.count_name: count, "grad_norm": optax.tree.norm(grads)}
    metrics |= weight_norms(params)
    metrics |= batch_counts(batch, model, runs_llm=objective.runs_llm)
    return TrainState(state.step + 1, params, opt_state), metrics


def weight_norms(params: Params) -> Metrics:
    """How large the projector's weights are.

    A norm takes out the scale of the layer before it. The larger the kernel of that layer, the less
    a step of the same length turns it.

    Returns:
      "weight_norm/PATH", the Frobenius norm of each kernel, and "scale_rms/PATH", the root mean
      square of each norm's scale; PATH is that of the layer.
    """
    norms = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        *layer, name = (part.key for part in path)
        length = optax.tree.norm(leaf)
        if name == "kernel":
            norms["/".join(["weight_norm", *layer])] = length
        elif name == "scale":
            norms["/".join(["scale_rms", *layer])] = length / math.sqrt(leaf.size)
    return norms


def batch_counts(batch: Batch, model: SpeechLLM, *, runs_llm: bool = True) -> Metrics:
    """How much a batch holds, without its padding.

    Returns:
      "audio_secs", "num_clips" and "num_audio_tokens". If the LLM runs, also "num_tokens", the
      tokens that it computes, and "padding_rate", the share of its static length that is padding.
    """
    k = model.projector.config.projector_pool_stride
    sums = {
        "audio_secs": batch.num_frames * FRAME_SECS,
        "num_clips": batch.num_frames > 0,
        "num_audio_tokens": batch.frame_valid[:, ::k],
    }
    if runs_llm:
        sums["num_tokens"] = jnp.maximum(batch.num_tokens - model.prefix_len, 0)
    counts = {name: jnp.sum(rows, dtype=jnp.float32) for name, rows in sums.items()}
    if runs_llm:
        num_rows, length = batch.tokens.shape
        capacity = num_rows * (length - model.prefix_len)
        counts["padding_rate"] = 1 - counts["num_tokens"] / capacity
    return counts


def lower_step(
    objective: Objective,
    batch: Batch,
    abstract: TrainState,
    frozen: tuple[Params, Params],
    optimizer: optax.GradientTransformation,
    model: SpeechLLM,
    config: TrainConfig,
) -> jax.stages.Lowered:
    """The step for one objective and an abstract batch, to be compiled; see `compile_steps`."""
    step = jax.jit(
        functools.partial(
            train_step,
            model=model,
            optimizer=optimizer,
            seed=config.seed,
            objective=objective,
            accumulation_steps=config.accumulation_steps,
        ),
        in_shardings=shardings_of((abstract, *frozen, batch)),
        out_shardings=(shardings_of(abstract), replicated(abstract.step.sharding.mesh)),
        donate_argnums=0,
    )
    return step.lower(abstract, *frozen, batch)


def compile_steps(
    objectives: list[Objective],
    batches: list[tuple[Bucket, Batch]],
    abstract: TrainState,
    frozen: tuple[Params, Params],
    optimizer: optax.GradientTransformation,
    model: SpeechLLM,
    config: TrainConfig,
) -> dict[tuple[Objective, Bucket], jax.stages.Compiled]:
    """Compiles the step for every objective and bucket before the loop, so none compiles in it.

    Args:
      objectives: the objectives of the run's stages.
      batches: an abstract batch for each bucket.
      abstract: the state's shapes and shardings, from `abstract_state`; calls donate the state.
      frozen: parameters of the encoder and the LLM.
      optimizer: the state's optimizer.
      model: the modules.
      config: gives the seed and the number of micro-batches.
    """
    compiled, start = {}, time.monotonic()
    for objective, (bucket, batch) in itertools.product(objectives, batches):
        step = lower_step(objective, batch, abstract, frozen, optimizer, model, config)
        compiled[objective, bucket] = step.compile()
    log.info("compiled %d steps in %.0f s", len(compiled), time.monotonic() - start)
    return compiled
