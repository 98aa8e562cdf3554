"""Scores of a projector on held-out utterances: loss, transcripts, word error rate."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from flax_projector.data import BatchSource, make_iterator, to_global
from flax_projector.decode import greedy_decode, word_error_rate
from flax_projector.prompt import Prompt
from flax_projector.sharding import replicated
from flax_projector.speech_llm import Params, SpeechLLM
from flax_projector.train_step import Batch, eval_step

ModelParams = tuple[Params, Params, Params]  # projector, encoder, LLM


@dataclass(frozen=True)
class Transcript:
    """What was said and what was understood."""

    id: str
    reference: str
    hypothesis: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Scores:
    """Of one set of utterances.

    Attributes:
      loss: nats per label.
      wer: edits per reference word, after Whisper's normalisation.
      transcripts: one per utterance, in the order of the batches.
    """

    loss: float
    wer: float
    transcripts: tuple[Transcript, ...]


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
    ):
        """Compiles lazily, once for every bucket."""
        self._prompt, self._normalize, self._num_threads = prompt, normalize, num_threads
        decode = functools.partial(
            greedy_decode,
            model=model,
            max_new_tokens=max_new_tokens,
            end_of_turn=prompt.end_of_turn,
        )
        # Replicated results are addressable by every process.
        everywhere = replicated(mesh)
        self._decode = jax.jit(decode, out_shardings=everywhere)
        self._loss = jax.jit(functools.partial(eval_step, model=model), out_shardings=everywhere)

    def loss(self, params: ModelParams, source: BatchSource, *, name: str) -> float:
        """Nats per label over one epoch of `source`; `name` labels the progress bar."""
        loss_sum = num_labels = 0.0
        for _, batch in self._batches(source, f"{name} loss"):
            sums = jax.device_get(self._loss(*params, batch))
            loss_sum += float(sums["loss_sum"])
            num_labels += float(sums["num_labels"])
        return loss_sum / num_labels

    def transcribe(
        self, params: ModelParams, source: BatchSource, *, name: str
    ) -> list[Transcript]:
        """Greedy transcripts of every utterance of `source`, in the order of its batches."""
        transcripts = []
        for index, batch in self._batches(source, f"{name} transcripts"):
            rows = np.asarray(self._decode(*params, batch))
            for utterance, ids in zip(source.members(index), rows.tolist(), strict=True):
                if utterance is not None:
                    row, heard = utterance.row, self._prompt.decode(ids)
                    transcripts.append(Transcript(row.id, row.text, heard, tuple(ids)))
        return transcripts

    def __call__(self, params: ModelParams, source: BatchSource, *, name: str) -> Scores:
        """Loss, transcripts and word error rate of one epoch of `source`."""
        transcripts = self.transcribe(params, source, name=name)
        wer = word_error_rate(
            [t.reference for t in transcripts],
            [t.hypothesis for t in transcripts],
            self._normalize,
        )
        return Scores(self.loss(params, source, name=name), wer, tuple(transcripts))

    def _batches(self, source: BatchSource, name: str) -> Iterator[tuple[int, Batch]]:
        iterator = make_iterator(source, self._num_threads)
        quiet = jax.process_index() > 0
        for index in tqdm(range(len(source)), name, unit="batch", leave=False, disable=quiet):
            yield index, to_global(next(iterator), source)
