"""The state that is trained and the pure functions that move it."""

from collections.abc import Iterable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from flax_projector.config import SAMPLE_RATE, SAMPLES_PER_FRAME, CTCConfig, OptimizerConfig
from flax_projector.losses import can_spell, cross_entropy, ctc
from flax_projector.prompt import AUDIO_TOKEN
from flax_projector.speech_llm import Params, SpeechLLM, rms

Batch = dict[str, Array]
CTCClasses = tuple[int, ...]  # token ids; the first is the blank


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes: the projector's, never the towers'.

    Attributes:
      step: i32[] scalar, updates done so far.
      params: f32 master weights of the projector.
      opt_state: of the optimizer.
    """

    step: Any
    params: Params
    opt_state: Any


def make_schedule(config: OptimizerConfig, num_steps: int, ctc: CTCConfig) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine to `final_lr_rate` x the peak at the last step.

    A CTC warm start has the same form before it, with a peak of its own.
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


def is_decayed(path: tuple, _leaf: Any) -> bool:
    """Weight decay moves kernels only; norms pulled to zero would undo their initialisation."""
    return path[-1].key == "kernel"


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Clipping, then AdamW (decoupled decay, as torch's)."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(is_decayed, params),
        ),
    )


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, around f32 parameters."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def batch_frames(
    model: SpeechLLM,
    encoder_params: Params,
    batch: Batch,
    *,
    augment_key: Array | None = None,
) -> Float[Array, "B S E"]:
    """The batch's encoder frames: kept ones, or encoded now and cut to the bucket's length."""
    if "frames" in batch:
        return batch["frames"]
    num_samples = SAMPLES_PER_FRAME * jnp.sum(batch["frame_valid"], axis=1)  # in whole frames
    frames, _ = model.encode(encoder_params, batch["samples"], num_samples, augment_key=augment_key)
    return frames[:, : batch["frame_valid"].shape[1]]


def summed_loss(
    model: SpeechLLM,
    projector_params: Params,
    encoder_params: Params,
    llm_params: Params,
    batch: Batch,
    *,
    classes: CTCClasses | None = None,
    key: Array | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of a batch, summed over its labels (nats), and what is worth watching.

    Args:
      model: the modules.
      projector_params: of the projector; the only ones that anybody differentiates.
      encoder_params: of the frozen encoder.
      llm_params: of the frozen LLM.
      batch: from `data.BatchSource`.
      classes: from `ctc_classes`; the loss is CTC of the audio tokens against these rows of the
        LLM's embedding, without its layers. None: cross-entropy behind the LLM.
      key: of dropout and SpecAugment; None for evaluation, which has neither.

    Returns:
      The sum; and, where the LLM is run, "scale_ratio": the RMS of the audio tokens over that of
      the text embeddings.
    """
    dropout_key = augment_key = None
    if key is not None:
        dropout_key, augment_key = jax.random.split(key)
    frames = batch_frames(model, encoder_params, batch, augment_key=augment_key)
    audio = model.embed_audio(
        projector_params, frames, batch["frame_valid"], dropout_key=dropout_key
    )
    if classes is not None:
        logits = model.embedding_logits(llm_params, audio, np.array(classes))
        return ctc(logits, *_ctc_targets(model, batch, classes)), {}
    inputs = model.merge(llm_params, batch["tokens"], audio)
    logits = model.label_logits(llm_params, inputs, batch["label_positions"])
    is_audio = batch["tokens"] == AUDIO_TOKEN
    is_read = jnp.arange(inputs.shape[1]) < _num_tokens(batch)[:, None]  # not padding
    scales = rms(inputs, is_audio), rms(inputs, is_read & ~is_audio)
    metrics = {"scale_ratio": scales[0] / jnp.maximum(scales[1], 1e-9)}
    return cross_entropy(logits, batch["labels"], batch["label_valid"]), metrics


def num_labels(
    model: SpeechLLM, batch: Batch, classes: CTCClasses | None = None
) -> Float[Array, ""]:
    """How many labels `summed_loss` is summed over."""
    if classes is None:
        return jnp.sum(batch["label_valid"], dtype=jnp.float32)
    audio_valid, labels, is_spoken = _ctc_targets(model, batch, classes)
    is_spelt = is_spoken & can_spell(audio_valid, labels, is_spoken)[:, None]
    return jnp.sum(is_spelt, dtype=jnp.float32)


def _ctc_targets(
    model: SpeechLLM, batch: Batch, classes: CTCClasses
) -> tuple[Bool[Array, "B A"], Int[Array, "B T"], Bool[Array, "B T"]]:
    """Which audio tokens are of real audio, the labels as classes, and which of them are spoken."""
    k = model.projector.config.projector_pool_stride
    audio_valid = batch["frame_valid"][:, ::k]  # [B, A]: a token is valid if its first frame is
    # The end of turn, the last label of a row, is not spoken.
    is_spoken = batch["label_valid"] & jnp.roll(batch["label_valid"], -1, axis=1)
    is_spoken = is_spoken.at[:, -1].set(False)
    labels = 1 + jnp.searchsorted(jnp.array(classes[1:]), batch["labels"])
    return audio_valid, labels, is_spoken


def ctc_classes(targets: Iterable[Sequence[int]], blank: int) -> CTCClasses:
    """Token ids of the CTC classes: the blank, then the ids of all transcripts, ascending.

    Args:
      targets: labels of the training utterances, each with its end of turn.
      blank: token id.

    Raises:
      ValueError: if a transcript holds the blank.
    """
    spoken = {token for target in targets for token in target[:-1]}
    if blank in spoken:
        raise ValueError(f"token {blank} occurs in a transcript: choose another ctc.blank")
    return (blank, *sorted(spoken))


def _num_tokens(batch: Batch) -> Int[Array, "B"]:
    """Tokens of each row that the LLM reads: the last label is predicted, never read."""
    num_labels = jnp.sum(batch["label_valid"], axis=1)
    return jnp.where(num_labels > 0, batch["prompt_len"] + num_labels - 1, 0)


def batch_counts(
    batch: Batch, pool_stride: int, prefix_len: int = 0
) -> dict[str, Float[Array, ""]]:
    """How much a batch holds, padding left out.

    Args:
      batch: from `data.BatchSource`.
      pool_stride: k of the projector.
      prefix_len: tokens at the beginning of every row that are not computed.

    Returns:
      "audio_secs"; "num_clips", "num_audio_tokens" and "num_tokens", which the LLM computes; and
      "padding_rate", the share of the LLM's static length that they leave.
    """
    num_frames = jnp.sum(batch["frame_valid"], axis=1)  # [B]
    sums = {
        "audio_secs": num_frames * (SAMPLES_PER_FRAME / SAMPLE_RATE),
        "num_clips": num_frames > 0,
        "num_audio_tokens": -(-num_frames // pool_stride),
        "num_tokens": jnp.maximum(_num_tokens(batch) - prefix_len, 0),
    }
    counts = {name: jnp.sum(rows, dtype=jnp.float32) for name, rows in sums.items()}
    num_rows, length = batch["tokens"].shape
    capacity = num_rows * (length - prefix_len)
    return counts | {"padding_rate": 1 - counts["num_tokens"] / capacity}


def train_step(
    state: TrainState,
    encoder_params: Params,
    llm_params: Params,
    batch: Batch,
    *,
    model: SpeechLLM,
    optimizer: optax.GradientTransformation,
    seed: int,
    classes: CTCClasses | None = None,
    accumulation_steps: int = 1,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One update of the projector on the mean loss per label of the global batch.

    The batch may be computed in micro-batches, one after the other. Their losses are divided by the
    labels of the whole batch, so that every label weighs the same, wherever it stands.

    Args:
      state: donated by the caller.
      encoder_params: of the frozen encoder.
      llm_params: of the frozen LLM.
      batch: from `data.BatchSource`.
      model: the modules.
      optimizer: of the state.
      seed: of dropout and SpecAugment.
      classes: of CTC, which is then minimised; None for the LLM's cross-entropy.
      accumulation_steps: micro-batches; every device's rows must divide by it.

    Returns:
      The new state and "loss" with "num_labels", or "ctc_loss" with "num_ctc_labels"; "grad_norm",
      which is the one before clipping; and the metrics of `summed_loss` and `batch_counts`.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    count = num_labels(model, batch, classes)
    loss_name, count_name = (
        ("loss", "num_labels") if classes is None else ("ctc_loss", "num_ctc_labels")
    )

    def mean_loss(params: Params, micro_batch: Batch, index: Int[Array, ""]):
        total, metrics = summed_loss(
            *(model, params, encoder_params, llm_params, micro_batch),
            classes=classes,
            key=jax.random.fold_in(key, index),
        )
        mean = total / jnp.maximum(count, 1)
        return mean, {loss_name: mean} | metrics

    gradient = jax.grad(mean_loss, has_aux=True)
    if accumulation_steps == 1:
        grads, metrics = gradient(state.params, batch, jnp.int32(0))
    else:

        def accumulate(total, inputs):
            return jax.tree.map(jnp.add, total, gradient(state.params, *inputs)), None

        inputs = (_split(batch, accumulation_steps), jnp.arange(accumulation_steps))
        first = jax.tree.map(lambda x: x[0], inputs)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(gradient, state.params, *first),
        )
        (grads, metrics), _ = jax.lax.scan(accumulate, zeros, inputs)
        if "scale_ratio" in metrics:
            metrics["scale_ratio"] /= accumulation_steps
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    k = model.projector.config.projector_pool_stride
    metrics |= {count_name: count} | batch_counts(batch, k, model.prefix_len)
    if classes is not None:  # the LLM reads nothing
        del metrics["num_tokens"], metrics["padding_rate"]
    metrics["grad_norm"] = optax.tree.norm(grads)
    return TrainState(state.step + 1, params, opt_state), metrics


def _split(batch: Batch, count: int) -> Batch:
    """Micro-batches on a new axis 0, of rows from every device, so that none has to move."""
    return {
        name: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)  # [count, B / count, ...]
        for name, x in batch.items()
    }


def eval_step(
    projector_params: Params,
    encoder_params: Params,
    llm_params: Params,
    batch: Batch,
    *,
    model: SpeechLLM,
) -> dict[str, Float[Array, ""]]:
    """Summed loss and number of labels of one batch, without dropout."""
    total, _ = summed_loss(model, projector_params, encoder_params, llm_params, batch)
    return {"loss_sum": total, "num_labels": num_labels(model, batch)}
