"""What a run minimises: CTC during a warm start, then the LLM's cross-entropy."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flax_projector.batch import Batch
from flax_projector.models.speech_llm import Params, SpeechLLM, rms
from flax_projector.training.losses import can_spell, cross_entropy, ctc

Metrics = dict[str, Float[Array, ""]]


class Objective(abc.ABC):
    """A loss that is summed over labels, so that its mean gives every label the same weight.

    Attributes:
      loss_name: name of the mean loss in the metrics.
      count_name: name of the number of labels in the metrics.
      runs_llm: whether the LLM's layers run.
    """

    loss_name: ClassVar[str]
    count_name: ClassVar[str]
    runs_llm: ClassVar[bool]

    @abc.abstractmethod
    def num_labels(self, batch: Batch) -> Float[Array, ""]:
        """Number of labels that the loss is summed over."""

    @abc.abstractmethod
    def score(
        self, model: SpeechLLM, llm_params: Params, batch: Batch, audio: Float[Array, "B A D"]
    ) -> tuple[Float[Array, ""], Metrics]:
        """The loss of audio tokens, summed over the labels of their batch; see `summed_loss`."""

    def summed_loss(
        self,
        model: SpeechLLM,
        projector_params: Params,
        encoder_params: Params,
        llm_params: Params,
        batch: Batch,
        *,
        key: Array | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """The loss of a batch, summed over its labels, and further metrics.

        Args:
          model: the modules.
          projector_params: the projector's parameters, the only ones that are differentiated.
          encoder_params: the frozen encoder's parameters.
          llm_params: the frozen LLM's parameters.
          batch: the utterances.
          key: random key for dropout and SpecAugment; None for evaluation, which uses neither.

        Returns:
          The sum in nats, and metrics that are means over the batch.
        """
        audio = model.hear(projector_params, encoder_params, batch, key=key)
        return self.score(model, llm_params, batch, audio)


@dataclass(frozen=True)
class LLMObjective(Objective):
    """Cross-entropy of the transcript, predicted by the LLM."""

    loss_name: ClassVar[str] = "loss"
    count_name: ClassVar[str] = "num_labels"
    runs_llm: ClassVar[bool] = True

    def num_labels(self, batch: Batch) -> Float[Array, ""]:
        """Number of labels in the batch, including each row's end of turn."""
        return jnp.sum(batch.label_valid, dtype=jnp.float32)

    def score(
        self, model: SpeechLLM, llm_params: Params, batch: Batch, audio: Float[Array, "B A D"]
    ) -> tuple[Float[Array, ""], Metrics]:
        """See `Objective`. "scale_ratio" is the audio tokens' RMS divided by the text tokens'."""
        inputs = model.merge(llm_params, batch, audio)
        logits = model.label_logits(llm_params, inputs, batch.label_positions)
        text_rms = jnp.maximum(rms(inputs, batch.is_text), 1e-9)
        metrics = {"scale_ratio": rms(inputs, batch.is_audio) / text_rms}
        return cross_entropy(logits, batch.labels, batch.label_valid), metrics


@dataclass(frozen=True)
class CTCObjective(Objective):
    """CTC between the audio tokens and the LLM's embeddings, without the LLM's layers.

    Attributes:
      classes: token ids; the first is the blank, the others ascend.
      pool_stride: k, the projector's pool stride.
    """

    classes: tuple[int, ...]
    pool_stride: int

    loss_name: ClassVar[str] = "ctc_loss"
    count_name: ClassVar[str] = "num_ctc_labels"
    runs_llm: ClassVar[bool] = False

    def num_labels(self, batch: Batch) -> Float[Array, ""]:
        """Number of spoken labels in the clips that are long enough to spell them."""
        audio_valid, labels, is_spoken = self._targets(batch)
        is_spelt = is_spoken & can_spell(audio_valid, labels, is_spoken)[:, None]
        return jnp.sum(is_spelt, dtype=jnp.float32)

    def score(
        self, model: SpeechLLM, llm_params: Params, batch: Batch, audio: Float[Array, "B A D"]
    ) -> tuple[Float[Array, ""], Metrics]:
        """See `Objective`; there are no further metrics."""
        logits = model.embedding_logits(llm_params, audio, np.array(self.classes))
        return ctc(logits, *self._targets(batch)), {}

    def _targets(
        self, batch: Batch
    ) -> tuple[Bool[Array, "B A"], Int[Array, "B T"], Bool[Array, "B T"]]:
        """Which audio tokens belong to the clip; the labels as classes, and which are spoken."""
        audio_valid = batch.frame_valid[:, :: self.pool_stride]  # [B, A]: as its first frame
        # A label is spoken if another one follows: the last of a row is its end of turn.
        is_spoken = jnp.pad(batch.label_valid[:, 1:], ((0, 0), (0, 1)))
        labels = 1 + jnp.searchsorted(jnp.array(self.classes[1:]), batch.labels)
        return audio_valid, labels, is_spoken


def ctc_classes(spoken: Sequence[int] | np.ndarray, blank: int) -> tuple[int, ...]:
    """Token ids of the CTC classes: the blank, then the ids of all transcripts, ascending.

    Args:
      spoken: the ids that occur in transcripts, ascending.
      blank: token id of the blank.

    Raises:
      ValueError: if a transcript contains the blank.
    """
    if blank in spoken:
        raise ValueError(f"token {blank} occurs in a transcript: choose another --ctc.blank")
    return (blank, *map(int, spoken))


@dataclass(frozen=True)
class Stages:
    """Which objective each step of a run has.

    Attributes:
      warm_start: the objective of the warm start, if there is one.
      num_warm_steps: number of steps in the warm start.
    """

    warm_start: CTCObjective | None = None
    num_warm_steps: int = 0

    def objective(self, step: int) -> Objective:
        """The objective of the step with this number, from 0."""
        if self.warm_start is not None and step < self.num_warm_steps:
            return self.warm_start
        return LLMObjective()

    def objectives(self, first: int, end: int) -> list[Objective]:
        """The objectives of the steps from `first` to `end` - 1, in order, each once."""
        steps = [first, max(first, self.num_warm_steps)]
        return list(dict.fromkeys(self.objective(step) for step in steps if step < end))
