"""The evaluations of a run: score and record every held-out set, keep the best projector."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flax_projector.config import NormalizerName
from flax_projector.data.batches import Batches
from flax_projector.models.speech_llm import Params
from flax_projector.training.best import Best
from flax_projector.training.evaluate import Evaluator
from flax_projector.training.metrics import MetricsWriter


@dataclass(frozen=True)
class HeldOut:
    """The held-out sets, which are checked at once, and what is done with their scores.

    Attributes:
      evaluator: evaluates the run's model.
      sets: each set's batches, by the set's name.
      normalizers: each set's normaliser, likewise.
      frozen: parameters of the encoder and the LLM.
      writer: records the scores.
      best: keeps the best projector.
      report: called when an evaluation has been recorded.
    """

    evaluator: Evaluator
    sets: Mapping[str, Batches]
    normalizers: Mapping[str, NormalizerName]
    frozen: tuple[Params, Params]
    writer: MetricsWriter
    best: Best
    report: Callable[[], None]

    def __post_init__(self) -> None:
        for name, batches in self.sets.items():
            self.evaluator.check(batches, name=name, normalizer=self.normalizers[name])

    def evaluate(self, step: int, params: Params, *, check: Callable[[], None]) -> None:
        """Scores a projector on every set.

        Args:
          step: the projector's step.
          params: the projector's parameters.
          check: called before every batch; may raise to interrupt.
        """
        found = []
        for name, batches in self.sets.items():
            scores = self.evaluator(
                (params, *self.frozen),
                batches,
                name=name,
                normalizer=self.normalizers[name],
                check=check,
            )
            self.writer.write_scores(step, name, scores)
            found.append(scores)
        self.writer.publish()
        self.best.offer(step, found, params)
        self.report()
