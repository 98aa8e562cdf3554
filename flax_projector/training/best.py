"""The projector with the lowest error rate so far."""

import json
import logging
import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass

import jax
import numpy as np

from flax_projector import hosts
from flax_projector.files import reading, write_atomically
from flax_projector.models.speech_llm import Params
from flax_projector.run_folder import RunFolder
from flax_projector.storage import AnyPath, in_bucket
from flax_projector.storage.bucket import filesystem
from flax_projector.training.evaluate import Scores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Record:
    step: int | None = None
    error_rate: float = math.inf
    loss: float = math.inf


def best_folder(run: RunFolder, step: int) -> AnyPath:
    """Where the best projector is kept, if it is that of a step.

    On a disk, the folder is replaced in one step. In a bucket, each new best projector has a folder
    of its own, which `best_scores` names as soon as it is complete.
    """
    return run.path / f"best-{step:06d}" if in_bucket(run.path) else run.best


def find_best(run: RunFolder) -> AnyPath | None:
    """The best projector of a run so far; None if there is none.

    Raises:
      ValueError: if its scores cannot be read.
    """
    step = _read_record(run).step
    if step is None and in_bucket(run.path):
        return None
    folder = best_folder(run, step or 0)
    return folder if folder.is_dir() else None


def _read_record(run: RunFolder) -> _Record:
    if not run.best_scores.is_file():
        return _Record()
    with reading(run.best_scores, way_out="remove it, and the next evaluation is the best so far"):
        return _Record(**json.loads(run.best_scores.read_text("utf-8")))


def _drop_others(run: RunFolder, step: int) -> None:
    """Removes the projectors that are no longer the best, if each has a folder of its own."""
    if in_bucket(run.path):
        for other in run.path.glob("best-*"):
            if other != best_folder(run, step):
                filesystem().rm(str(other), recursive=True)


class Best:
    """Keeps the projector with the lowest error rate and, among equals, the lowest loss.

    The rate is that of words, or of characters for sets in languages without spaces.
    """

    def __init__(self, folder: RunFolder, write: Callable[[AnyPath, Params], None]):
        """Continues from the best scores of earlier starts of the run.

        Args:
          folder: the run's folder.
          write: writes parameters as a Flax folder; every process calls it.
        """
        self._folder, self._write = folder, write
        found = _read_record(folder) if jax.process_index() == 0 else _Record()
        # What decides whether all processes write together is one process's view of the file.
        self._record = _Record(**json.loads(hosts.broadcast("best", json.dumps(asdict(found)))))

    def offer(self, step: int, scores: Collection[Scores], params: Params) -> None:
        """Keeps a projector if its mean scores are better than the best so far.

        Args:
          step: the projector's step; the untrained projector of step 0 is never kept.
          scores: the scores on every evaluation set.
          params: the projector's parameters.
        """
        if not scores or not step:
            return
        rate = float(np.mean([score.summary.rate for score in scores]))
        loss = float(np.mean([score.loss for score in scores]))
        if (rate, loss) >= (self._record.error_rate, self._record.loss):
            return
        self._record = _Record(step, rate, loss)
        self._write(best_folder(self._folder, step), params)
        if jax.process_index() == 0:
            write_atomically(self._folder.best_scores, json.dumps(asdict(self._record)) + "\n")
            _drop_others(self._folder, step)

    def report(self, last_step: int) -> None:
        """Logs at the end of a run which step was the best, if it was not the last one."""
        if self._record.step is not None and self._record.step != last_step:
            log.info(
                "step %d had the lowest error rate, %.1f%%: its projector is in %s",
                self._record.step,
                100 * self._record.error_rate,
                best_folder(self._folder, self._record.step),
            )
