"""Scores a projector on held-out sets: loss, transcripts and word error rate."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from flax_projector.batch import Batch
from flax_projector.chat.prompt import Prompt
from flax_projector.data.bad_rows import BadRowLog
from flax_projector.data.batches import Batches
from flax_projector.data.reader import BatchIterator, read_batch
from flax_projector.data.utterances import Utterance
from flax_projector.logs import progress_bar
from flax_projector.models.decode import greedy_decode
from flax_projector.models.speech_llm import Params, SpeechLLM
from flax_projector.sharding import replicated
from flax_projector.training.objectives import LLMObjective
from flax_projector.training.wer import find_loss, word_error_rate

log = logging.getLogger(__name__)

ModelParams = tuple[Params, Params, Params]  # projector, encoder, LLM


@dataclass(frozen=True)
class Transcript:
    """What was said and what was heard; the latter is empty if the clip could not be read."""

    id: str
    reference: str
    hypothesis: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Scores:
    """The scores of one set of utterances.

    Attributes:
      loss: nats per label, over the clips that could be read.
      wer: edits per reference word, after Whisper's normalisation. A defective clip that has a
        transcript counts as if nothing was heard, so that it never improves the rate.
      transcripts: one per utterance, in the order of the batches, then those of defective rows.
      num_unheard: how many of these have a clip that could not be read.
      num_left_out: rows that are not scored: they have no transcript or exceed the run's limits.
    """

    loss: float
    wer: float
    transcripts: tuple[Transcript, ...]
    num_unheard: int
    num_left_out: int


def _never() -> None:
    """The default `check`, which never interrupts."""


class Evaluator:
    """Compiled evaluation of one model; every utterance of a set is scored exactly once."""

    def __init__(
        self,
        model: SpeechLLM,
        prompt: Prompt,
        normalize: Callable[[str], str],
        *,
        mesh: Mesh,
        max_new_tokens: int,
        num_threads: int,
        bad_rows: BadRowLog,
    ):
        """Compiles nothing yet: that happens on first use, once for every bucket.

        Args:
          model: the modules.
          prompt: the chat prompt, with the LLM's tokenizer.
          normalize: normalises texts for word error rates.
          mesh: the mesh that the parameters are on.
          max_new_tokens: maximum number of tokens decoded per utterance.
          num_threads: number of threads that read audio.
          bad_rows: receives clips that cannot be read.
        """
        self._bad_rows = bad_rows
        self._normalized: set[str] = set()
        self._prompt, self._normalize, self._num_threads = prompt, normalize, num_threads
        greedy = functools.partial(
            greedy_decode,
            model=model,
            max_new_tokens=max_new_tokens,
            end_of_turn=prompt.end_of_turn,
        )

        def decode(
            projector_params: Params, encoder_params: Params, llm_params: Params, batch: Batch
        ) -> tuple[Bool[Array, "B"], Int[Array, "B T"]]:
            is_heard = batch.num_frames > 0
            return is_heard, greedy(projector_params, encoder_params, llm_params, batch)

        # Replicated results are addressable by every process.
        everywhere = replicated(mesh)
        self._decode = jax.jit(decode, out_shardings=everywhere)
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
        """Greedy transcripts of every utterance, in the order of the batches; see `loss`."""
        transcripts = []
        for index, batch in self._read(batches, f"{name} transcripts", check):
            # Taken from the global batch: a host knows only which of its own clips it could read.
            is_heard, rows = jax.device_get(self._decode(*params, batch))
            members = batches.members(index)
            for utterance, ids, heard in zip(members, rows.tolist(), is_heard, strict=True):
                if utterance is not None:
                    row, text = utterance.row, self._prompt.decode(ids) if heard else ""
                    tokens = tuple(ids) if heard else ()
                    transcripts.append(Transcript(row.id, row.text, text, tokens))
        return transcripts

    def __call__(
        self,
        params: ModelParams,
        batches: Batches,
        *,
        name: str,
        check: Callable[[], None] = _never,
    ) -> Scores:
        """Loss, transcripts and word error rate of one epoch of `batches`; see `loss`."""
        transcripts = self.transcribe(params, batches, name=name, check=check)
        unheard = [row for row in batches.left_out if row.reason.is_defect and row.text]
        transcripts += [Transcript(row.id, row.text, "", ()) for row in unheard]
        references = [t.reference for t in transcripts]
        if name not in self._normalized:  # a run scores its sets again and again
            self._normalized.add(name)
            if found := find_loss(references, self._normalize):
                log.warning("%s: %s", name, found)
        wer = word_error_rate(references, [t.hypothesis for t in transcripts], self._normalize)
        return Scores(
            loss=self.loss(params, batches, name=name, check=check),
            wer=wer,
            transcripts=tuple(transcripts),
            num_unheard=sum(not t.tokens for t in transcripts),
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
