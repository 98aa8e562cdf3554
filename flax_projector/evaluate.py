"""Scores of a projector on held-out utterances: loss, transcripts, word error rate."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from flax_projector.bad_rows import BadRowLog
from flax_projector.data import BatchIterator, BatchSource, take_problems, to_global
from flax_projector.decode import greedy_decode, word_error_rate
from flax_projector.prompt import Prompt
from flax_projector.sharding import replicated
from flax_projector.speech_llm import Params, SpeechLLM
from flax_projector.train_step import Batch, eval_step

ModelParams = tuple[Params, Params, Params]  # projector, encoder, LLM


@dataclass(frozen=True)
class Transcript:
    """What was said and what was understood: nothing, of a clip that could not be read."""

    id: str
    reference: str
    hypothesis: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Scores:
    """Of one set of utterances.

    Attributes:
      loss: nats per label, of the clips that could be read.
      wer: edits per reference word, after Whisper's normalisation. A defective clip that has a
        transcript counts as one of which nothing was understood: it never improves the rate.
      transcripts: one per utterance, in the order of the batches, then the defective clips.
      num_unheard: defective clips among them.
      num_left_out: rows that are not scored: without a transcript, or beyond the run's limits.
    """

    loss: float
    wer: float
    transcripts: tuple[Transcript, ...]
    num_unheard: int
    num_left_out: int


def _never() -> None:
    """Interrupts nothing."""


class Evaluator:
    """Compiled evaluation of one model; every utterance of a source is scored exactly once."""

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
        """Compiles lazily, once for every bucket; `bad_rows` gets clips that cannot be read."""
        self._bad_rows = bad_rows
        self._prompt, self._normalize, self._num_threads = prompt, normalize, num_threads
        greedy = functools.partial(
            greedy_decode,
            model=model,
            max_new_tokens=max_new_tokens,
            end_of_turn=prompt.end_of_turn,
        )

        def decode(
            projector_params: Params, encoder_params: Params, llm_params: Params, batch: Batch
        ):
            is_heard = batch["frame_valid"].any(axis=1)  # [B]
            return is_heard, greedy(projector_params, encoder_params, llm_params, batch)

        # Replicated results are addressable by every process.
        everywhere = replicated(mesh)
        self._decode = jax.jit(decode, out_shardings=everywhere)
        self._loss = jax.jit(functools.partial(eval_step, model=model), out_shardings=everywhere)

    def loss(
        self,
        params: ModelParams,
        source: BatchSource,
        *,
        name: str,
        check: Callable[[], None] = _never,
    ) -> float:
        """Nats per label over one epoch of `source`.

        Args:
          params: of the model.
          source: utterances.
          name: for the progress bar.
          check: called before every batch; it may raise to interrupt.

        Raises:
          ValueError: if no clip can be read.
        """
        loss_sum = num_labels = 0.0  # of clips that cannot be read, no label counts
        for _, batch in self._batches(source, f"{name} loss", check):
            sums = jax.device_get(self._loss(*params, batch))
            loss_sum += float(sums["loss_sum"])
            num_labels += float(sums["num_labels"])
        if not num_labels:
            raise ValueError(f"{name}: no clip could be read: there is nothing to score")
        return loss_sum / num_labels

    def transcribe(
        self,
        params: ModelParams,
        source: BatchSource,
        *,
        name: str,
        check: Callable[[], None] = _never,
    ) -> list[Transcript]:
        """Greedy transcripts of every utterance of `source`, in the order of its batches."""
        transcripts = []
        for index, batch in self._batches(source, f"{name} transcripts", check):
            # Asked of the global batch: a host knows the problems of its own rows only.
            is_heard, rows = jax.device_get(self._decode(*params, batch))
            for utterance, ids, heard in zip(
                source.members(index), rows.tolist(), is_heard, strict=True
            ):
                if utterance is not None:
                    row, text = utterance.row, self._prompt.decode(ids) if heard else ""
                    tokens = tuple(ids) if heard else ()
                    transcripts.append(Transcript(row.id, row.text, text, tokens))
        return transcripts

    def __call__(
        self,
        params: ModelParams,
        source: BatchSource,
        *,
        name: str,
        check: Callable[[], None] = _never,
    ) -> Scores:
        """Loss, transcripts and word error rate of one epoch of `source`."""
        transcripts = self.transcribe(params, source, name=name, check=check)
        unheard = [row for row in source.left_out if row.reason.is_defect and row.text]
        transcripts += [Transcript(row.id, row.text, "", ()) for row in unheard]
        wer = word_error_rate(
            [t.reference for t in transcripts],
            [t.hypothesis for t in transcripts],
            self._normalize,
        )
        return Scores(
            loss=self.loss(params, source, name=name, check=check),
            wer=wer,
            transcripts=tuple(transcripts),
            num_unheard=sum(not t.tokens for t in transcripts),
            num_left_out=len(source.left_out) - len(unheard),
        )

    def _batches(
        self, source: BatchSource, name: str, check: Callable[[], None]
    ) -> Iterator[tuple[int, Batch]]:
        quiet = jax.process_index() > 0
        with contextlib.closing(BatchIterator(source, num_threads=self._num_threads)) as iterator:
            for index in tqdm(range(len(source)), name, unit="batch", leave=False, disable=quiet):
                check()
                batch = take_problems(next(iterator), source, index, self._bad_rows)
                yield index, to_global(batch, source)
