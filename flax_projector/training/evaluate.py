"""Scores a projector on held-out sets: loss, transcripts and error rates."""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from flax_projector.batch import Batch
from flax_projector.chat.prompt import Prompt
from flax_projector.config import LIMITS, DecodeConfig, NormalizerName, option
from flax_projector.data.bad_rows import BadRow, BadRowLog
from flax_projector.data.batches import Batches
from flax_projector.data.reader import BatchIterator, read_batch
from flax_projector.data.utterances import Utterance, Utterances
from flax_projector.lengths import FRAME_SECS
from flax_projector.logs import progress_bar
from flax_projector.models.decode import Decoded, decode
from flax_projector.models.limits import TOKENS_OF_ANY_CLIP, token_limits
from flax_projector.models.speech_llm import Params, SpeechLLM
from flax_projector.sharding import replicated
from flax_projector.training.normalizers import Normalizer, check_references
from flax_projector.training.objectives import LLMObjective
from flax_projector.training.scores import (
    ScoredTranscript,
    Summary,
    Transcript,
    score_transcripts,
    summarize,
)

log = logging.getLogger(__name__)

ModelParams = tuple[Params, Params, Params]  # projector, encoder, LLM


@dataclass(frozen=True)
class Scores:
    """The scores of one set of utterances.

    Attributes:
      loss: nats per label, over the clips that could be read.
      summary: the error rates. A defective clip that has a transcript counts as if nothing was
        heard, so that it never improves them.
      transcripts: one per utterance, in the order of the batches, then those of defective rows.
      num_left_out: rows that are not scored: they have no transcript or exceed the run's limits.
    """

    loss: float
    summary: Summary
    transcripts: tuple[ScoredTranscript, ...]
    num_left_out: int


def _never() -> None:
    """The default `check`, which never interrupts."""


class Evaluator:
    """Compiled evaluation of one model; every utterance of a set is scored exactly once."""

    def __init__(
        self,
        model: SpeechLLM,
        prompt: Prompt,
        normalizers: Mapping[NormalizerName, Normalizer],
        *,
        mesh: Mesh,
        decoding: DecodeConfig,
        num_threads: int,
        bad_rows: BadRowLog,
    ):
        """Compiles nothing yet: that happens on first use, once for every bucket.

        Args:
          model: the modules.
          prompt: the chat prompt, with the LLM's tokenizer.
          normalizers: what may be done to texts before they are compared, by name.
          mesh: the mesh that the parameters are on.
          decoding: how to decode, and the limits.
          num_threads: number of threads that read audio.
          bad_rows: receives clips that cannot be read.
        """
        self._bad_rows, self._decoding = bad_rows, decoding
        self._prompt, self._normalizers, self._num_threads = prompt, normalizers, num_threads

        def transcribe(
            projector_params: Params, encoder_params: Params, llm_params: Params, batch: Batch
        ) -> tuple[Decoded, Bool[Array, "B"]]:
            params = (projector_params, encoder_params, llm_params)
            decoded = decode(
                *params, batch, model=model, config=decoding, end_of_turn=prompt.end_of_turn
            )
            return decoded, batch.num_frames > 0

        # Replicated results are addressable by every process.
        everywhere = replicated(mesh)
        self._decode = jax.jit(transcribe, out_shardings=everywhere)
        self._loss = jax.jit(functools.partial(eval_step, model=model), out_shardings=everywhere)

    def loss(
        self,
        params: ModelParams,
        batches: Batches,
        *,
        name: str,
        check: Callable[[], None] = _never,
    ) -> float:
        """Nats per label over one epoch of `batches`.

        Args:
          params: the model's parameters.
          batches: the set's batches.
          name: the set's name, for the progress bar and messages.
          check: called before every batch; may raise to interrupt.

        Raises:
          ValueError: if no clip can be read.
          FloatingPointError: if the loss is not finite; names the clips.
        """
        loss_sum = num_labels = 0.0  # labels of clips that cannot be read do not count
        for index, batch in self._read(batches, f"{name} loss", check):
            sums = jax.device_get(self._loss(*params, batch))
            if not np.isfinite(sums["loss_sum"]):
                raise self._not_finite(params, batch, batches.members(index), name)
            loss_sum += float(sums["loss_sum"])
            num_labels += float(sums["num_labels"])
        if not num_labels:
            raise ValueError(f"{name}: no clip could be read: there is nothing to score")
        return loss_sum / num_labels

    def _not_finite(
        self,
        params: ModelParams,
        batch: Batch,
        members: Sequence[Utterance | None],
        name: str,
    ) -> FloatingPointError:
        """The error for a batch whose loss is not finite: scores each of its clips by itself."""

        def loss_of_row(row: Int[Array, ""], *params: Params, batch: Batch) -> Float[Array, ""]:
            alone = jax.tree.map(lambda x: jnp.broadcast_to(x[row], x.shape), batch)
            return self._loss(*params, alone)["loss_sum"]

        score = jax.jit(loss_of_row)
        found = [
            f"{utterance.row.id} ({utterance.row.audio})"
            for row, utterance in enumerate(members)
            if utterance is not None and not np.isfinite(score(np.int32(row), *params, batch=batch))
        ]
        count = sum(utterance is not None for utterance in members)
        return FloatingPointError(
            f"{name}: the loss of {len(found)} of {count} clips in a batch is not finite: "
            f"{', '.join(found[:5])}. If these are few, listen to them; if they are all, the "
            "projector or its towers are at fault"
        )

    def transcribe(
        self,
        params: ModelParams,
        batches: Batches,
        *,
        name: str,
        check: Callable[[], None] = _never,
    ) -> list[Transcript]:
        """Transcripts of every utterance, in the order of the batches; see `loss`."""
        transcripts = []
        for index, batch in self._read(batches, f"{name} transcripts", check):
            transcripts += self.transcribe_batch(params, batch, batches.members(index))
        return transcripts

    def transcribe_batch(
        self, params: ModelParams, batch: Batch, members: Sequence[Utterance | None]
    ) -> list[Transcript]:
        """Transcripts of a global batch.

        Args:
          params: the model's parameters.
          batch: the batch, on the devices.
          members: the utterance of each row; None for padding.
        """
        transcripts = []
        # Taken from the global batch: a host knows only which of its own clips it could read.
        decoded, is_heard = jax.device_get(self._decode(*params, batch))
        columns = (x.tolist() for x in (*decoded, is_heard))
        for utterance, ids, cut_by, heard in zip(members, *columns, strict=True):
            if utterance is not None:
                row, ids = utterance.row, ids if heard else []
                transcripts.append(
                    Transcript(
                        id=row.id,
                        reference=row.text,
                        hypothesis=self._prompt.decode(ids),
                        tokens=tuple(ids),
                        secs=row.duration,
                        is_bad=not heard,
                        cut_by=LIMITS[cut_by - 1] if cut_by else None,
                    )
                )
        return transcripts

    def check(self, batches: Batches, *, name: str, normalizer: NormalizerName) -> None:
        """Checks what can be known of a set before it is scored, and warns of what is doubtful.

        Args:
          batches: the set's batches.
          name: the set's name.
          normalizer: what will be done to its texts.

        Raises:
          ValueError: if its references have no word after normalisation.
        """
        references = [row.text for row in _defective(batches)]
        references += [utterance.row.text for utterance in batches.utterances]
        if found := check_references(name, references, self._normalizers[normalizer]):
            log.warning("%s", found)
        for text in _too_long(batches.utterances, self._decoding):
            log.warning("%s: %s", name, text)

    def __call__(
        self,
        params: ModelParams,
        batches: Batches,
        *,
        name: str,
        normalizer: NormalizerName,
        check: Callable[[], None] = _never,
    ) -> Scores:
        """Loss, transcripts and error rates of one epoch of `batches`.

        Args:
          params: the model's parameters.
          batches: the set's batches.
          name: the set's name.
          normalizer: what is done to texts before they are compared.
          check: called before every batch; may raise to interrupt.

        Raises:
          ValueError: if no clip can be read.
          FloatingPointError: if the loss is not finite; names the clips.
        """
        transcripts, unheard = self.transcribe(params, batches, name=name, check=check), []
        for row in _defective(batches):
            unheard.append(Transcript(row.id, row.text, "", (), None, is_bad=True, cut_by=None))
        scored = score_transcripts(name, transcripts + unheard, self._normalizers[normalizer])
        return Scores(
            loss=self.loss(params, batches, name=name, check=check),
            summary=summarize(scored),
            transcripts=scored,
            num_left_out=len(batches.left_out) - len(unheard),
        )

    def _read(
        self, batches: Batches, label: str, check: Callable[[], None]
    ) -> Iterator[tuple[int, Batch]]:
        with (
            contextlib.closing(BatchIterator(batches, num_threads=self._num_threads)) as iterator,
            progress_bar(log, label, total=len(batches), unit="batch", leave=False) as progress,
        ):
            for index in range(len(batches)):
                check()
                yield index, read_batch(iterator, batches, self._bad_rows)
                progress.update()
        self._bad_rows.share()


def _defective(batches: Batches) -> list[BadRow]:
    """The defective rows of a set that have a transcript: scores count them."""
    return [row for row in batches.left_out if row.reason.is_defect and row.text]


def _too_long(utterances: Utterances, decoding: DecodeConfig) -> Iterator[str]:
    """What to say of references that take more tokens than their transcripts may have."""
    num_labels, secs = utterances.num_labels, utterances.durations
    most, per_sec = decoding.max_new_tokens, decoding.tokens_per_sec
    num_frames = np.ceil(secs / FRAME_SECS - 1e-6).astype(np.int32)
    limits = np.asarray(token_limits(num_frames, decoding))
    for is_cut, limit, needed in (
        (num_labels > most, f"{option('max_new_tokens')} {most}", num_labels),
        (
            (num_labels > limits) & (limits < most),
            f"{option('tokens_per_sec')} {per_sec:g} and {TOKENS_OF_ANY_CLIP}",
            (num_labels - TOKENS_OF_ANY_CLIP) / secs,
        ),
    ):
        if num_cut := np.count_nonzero(is_cut):
            yield (
                f"{num_cut} of {len(num_labels)} references take more than {limit}, up to "
                f"{math.ceil(needed.max())}: their transcripts will be cut"
            )


def eval_step(
    projector_params: Params,
    encoder_params: Params,
    llm_params: Params,
    batch: Batch,
    *,
    model: SpeechLLM,
) -> dict[str, Float[Array, ""]]:
    """Summed loss and number of labels of one batch, without dropout."""
    objective = LLMObjective()
    total, _ = objective.summed_loss(model, projector_params, encoder_params, llm_params, batch)
    return {"loss_sum": total, "num_labels": objective.num_labels(batch)}
