"""The state that is trained and the pure functions that move it."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from flax_projector.config import SAMPLE_RATE, SAMPLES_PER_FRAME, CTCConfig, OptimizerConfig
from flax_projector.losses import cross_entropy, ctc
from flax_projector.prompt import AUDIO_TOKEN
from flax_projector.speech_llm import Params, SpeechLLM, rms

Batch = dict[str, Array]


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


def batch_frames(model: SpeechLLM, encoder_params: Params, batch: Batch) -> Float[Array, "B S E"]:
    """The batch's encoder frames: kept ones, or encoded now and cut to the bucket's length."""
    if "frames" in batch:
        return batch["frames"]
    frames, _ = model.encode(encoder_params, batch["samples"])
    return frames[:, : batch["frame_valid"].shape[1]]


def loss_sums(
    model: SpeechLLM,
    projector_params: Params,
    encoder_params: Params,
    llm_params: Params,
    batch: Batch,
    *,
    dropout_key: Array | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Summed cross-entropy of a batch's labels (nats), and what is worth watching.

    Args:
      model: the modules.
      projector_params: of the projector; the only ones that anybody differentiates.
      encoder_params: of the frozen encoder.
      llm_params: of the frozen LLM.
      batch: from `data.BatchSource`.
      dropout_key: None for evaluation.

    Returns:
      The sum, and {"num_labels", "audio_secs", "scale_ratio"}: the last is the RMS of the audio
      tokens over that of the text embeddings.
    """
    frames = batch_frames(model, encoder_params, batch)
    audio = model.embed_audio(
        projector_params, frames, batch["frame_valid"], dropout_key=dropout_key
    )
    inputs = model.merge(llm_params, batch["tokens"], audio)
    logits = model.label_logits(llm_params, inputs, batch["label_positions"])
    total, num_labels = cross_entropy(logits, batch["labels"], batch["label_valid"])
    is_audio = batch["tokens"] == AUDIO_TOKEN
    return total, {
        "num_labels": num_labels,
        "audio_secs": audio_secs(batch),
        "scale_ratio": rms(inputs, is_audio) / jnp.maximum(rms(inputs, ~is_audio), 1e-9),
    }


def ctc_sums(
    model: SpeechLLM,
    projector_params: Params,
    encoder_params: Params,
    llm_params: Params,
    batch: Batch,
    *,
    classes: np.ndarray,
    dropout_key: Array | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Summed CTC loss of a batch's transcripts (nats), against rows of the LLM's embedding.

    Args:
      model: the modules; of the LLM only the embedding.
      projector_params: of the projector; the only ones that anybody differentiates.
      encoder_params: of the frozen encoder.
      llm_params: of the frozen LLM.
      batch: from `data.BatchSource`.
      classes: from `ctc_classes`.
      dropout_key: None for evaluation.

    Returns:
      The sum, and {"num_labels", "audio_secs"}.
    """
    frames = batch_frames(model, encoder_params, batch)
    audio = model.embed_audio(
        projector_params, frames, batch["frame_valid"], dropout_key=dropout_key
    )
    logits = model.embedding_logits(llm_params, audio, classes)
    k = model.projector.config.projector_pool_stride
    audio_valid = batch["frame_valid"][:, ::k]  # [B, A]: a token is valid if its first frame is
    # The end of turn, the last label of a row, is not spoken.
    is_spoken = batch["label_valid"] & jnp.roll(batch["label_valid"], -1, axis=1)
    is_spoken = is_spoken.at[:, -1].set(False)
    labels = 1 + jnp.searchsorted(classes[1:], batch["labels"])
    total, num_labels = ctc(logits, audio_valid, labels, is_spoken)
    return total, {"num_labels": num_labels, "audio_secs": audio_secs(batch)}


def ctc_classes(targets: Iterable[Sequence[int]], blank: int) -> np.ndarray:
    """Token ids of the CTC classes: the blank, then the ids of all transcripts, ascending.

    Args:
      targets: labels of the training utterances, each with its end of turn.
      blank: token id.

    Raises:
      ValueError: if a transcript holds the blank.
    """
    spoken = np.unique([token for target in targets for token in target[:-1]])
    if blank in spoken:
        raise ValueError(f"token {blank} occurs in a transcript: choose another ctc.blank")
    return np.array([blank, *spoken])


def audio_secs(batch: Batch) -> Float[Array, ""]:
    """Seconds of real audio in a batch."""
    return jnp.sum(batch["frame_valid"]) * (SAMPLES_PER_FRAME / SAMPLE_RATE)


def train_step(
    state: TrainState,
    encoder_params: Params,
    llm_params: Params,
    batch: Batch,
    *,
    model: SpeechLLM,
    optimizer: optax.GradientTransformation,
    seed: int,
    classes: np.ndarray | None = None,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One update of the projector on the mean loss per label of the global batch.

    Args:
      state: donated by the caller.
      encoder_params: of the frozen encoder.
      llm_params: of the frozen LLM.
      batch: from `data.BatchSource`.
      model: the modules.
      optimizer: of the state.
      seed: of the dropout.
      classes: makes it a step of the CTC warm start.

    Returns:
      The new state and {"loss", "grad_norm"} with the metrics of `loss_sums`; or "ctc_loss" and
      those of `ctc_sums`. The gradient norm is the one before clipping.
    """
    dropout_key = None
    if model.projector.config.projector_dropout:
        dropout_key = jax.random.fold_in(jax.random.key(seed), state.step)
    sums, name = loss_sums, "loss"
    if classes is not None:
        sums, name = functools.partial(ctc_sums, classes=classes), "ctc_loss"

    def mean_loss(params: Params):
        total, metrics = sums(
            model, params, encoder_params, llm_params, batch, dropout_key=dropout_key
        )
        return total / jnp.maximum(metrics["num_labels"], 1), metrics

    (loss, metrics), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics |= {name: loss, "grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, opt_state), metrics


def eval_step(
    projector_params: Params,
    encoder_params: Params,
    llm_params: Params,
    batch: Batch,
    *,
    model: SpeechLLM,
) -> dict[str, Float[Array, ""]]:
    """Summed loss and number of labels of one batch, without dropout."""
    total, metrics = loss_sums(model, projector_params, encoder_params, llm_params, batch)
    return {"loss_sum": total, "num_labels": metrics["num_labels"]}
