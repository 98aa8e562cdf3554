"""The projector with the lowest word error rate so far."""

import json
import logging
import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np

from flax_projector.files import reading, write_atomically
from flax_projector.models.speech_llm import Params
from flax_projector.run_folder import RunFolder
from flax_projector.training.evaluate import Scores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Record:
    step: int | None = None
    wer: float = math.inf
    loss: float = math.inf


class Best:
    """Keeps the projector with the lowest word error rate and, among equals, the lowest loss."""

    def __init__(self, folder: RunFolder, write: Callable[[Path, Params], None]):
        """Continues from the best scores of earlier starts of the run.

        Args:
          folder: the run's folder.
          write: writes parameters as a Flax folder; every process calls it.
        """
        self._folder, self._write, self._record = folder, write, _Record()
        if folder.best_scores.is_file():
            way_out = "remove it, and the next evaluation is the best so far"
            with reading(folder.best_scores, way_out=way_out):
                self._record = _Record(**json.loads(folder.best_scores.read_text("utf-8")))

    def offer(self, step: int, scores: Collection[Scores], params: Params) -> None:
        """Keeps a projector if its mean scores are better than the best so far.

        Args:
          step: the projector's step; the untrained projector of step 0 is never kept.
          scores: the scores on every evaluation set.
          params: the projector's parameters.
        """
        if not scores or not step:
            return
        wer = float(np.mean([score.wer for score in scores]))
        loss = float(np.mean([score.loss for score in scores]))
        if (wer, loss) >= (self._record.wer, self._record.loss):
            return
        self._record = _Record(step, wer, loss)
        self._write(self._folder.best, params)
        if jax.process_index() == 0:
            write_atomically(self._folder.best_scores, json.dumps(asdict(self._record)) + "\n")

    def report(self, last_step: int) -> None:
        """Logs at the end of a run which step was the best, if it was not the last one."""
        if self._record.step not in (None, last_step):
            log.info(
                "step %d had the lowest word error rate, %.1f%%: its projector is in %s",
                self._record.step,
                100 * self._record.wer,
                self._folder.best,
            )
