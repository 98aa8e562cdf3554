"""The log of training steps: metrics, rates and the progress bar."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from flax_projector.data.bad_rows import BadRowLog
from flax_projector.data.batches import Batches
from flax_projector.logs import at_step, progress_bar
from flax_projector.training.metrics import MetricsWriter
from flax_projector.training.start_up import StartUp
from flax_projector.training.throughput import FlopCounter, summarize

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Totals:
    """Sums over the steps of a run, those of earlier starts included; a checkpoint keeps them.

    Steps that a kill has lost are not in it: they are done again.

    Attributes:
      audio_secs: seconds of speech that the run has been trained on.
      step_secs: seconds that the steps took.
    """

    audio_secs: float = 0.0
    step_secs: float = 0.0


class StepLog:
    """Collects the metrics of steps on the devices, and writes a line when one is due.

    Fetching a metric waits for its step, so metrics are fetched only when a line is written: until
    then the devices run ahead.

    Attributes:
      totals: sums over the steps that have been written.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        batches: Batches,
        bad_rows: BadRowLog,
        *,
        first_step: int,
        num_steps: int,
        totals: Totals,
        began: float,
        start_up: StartUp,
        schedule: optax.Schedule,
        count_flops: FlopCounter,
        num_compiled: Callable[[], int],
    ):
        """Starts the clock and the progress bar.

        Args:
          writer: receives the lines.
          batches: the training batches.
          bad_rows: rows that cannot be used; whatever is found is shared at every line.
          first_step: number of steps done before this start.
          num_steps: number of steps in the whole run.
          totals: those of earlier starts.
          began: when the run began, by `time.time()`.
          start_up: times this start; the first step ends it.
          schedule: the learning rate schedule.
          count_flops: counts the FLOPs of the run's model.
          num_compiled: returns the number of programs compiled so far.
        """
        self.totals, self._began, self._start_up = totals, began, start_up
        self._start_secs: dict[str, float] | None = None
        self._writer, self._batches, self._schedule = writer, batches, schedule
        self._bad_rows, self._step = bad_rows, first_step
        self._count_flops, self._num_compiled = count_flops, num_compiled
        self._pending: list[Mapping[str, Any]] = []
        self._progress = progress_bar(
            log, "train", initial=first_step, total=num_steps, unit="step"
        )
        self._restart_clock()

    def close(self) -> None:
        """Closes the progress bar."""
        self._progress.close()

    def _restart_clock(self) -> None:
        self._since, self._waited_secs = time.monotonic(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time in its block as waiting for data."""
        start = time.monotonic()
        yield
        self._waited_secs += time.monotonic() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time in its block out of the rates; every step must have been flushed.

        Logs afterwards how many programs have been compiled, since the block may compile some.
        """
        yield
        log.info("%d programs compiled so far", self._num_compiled())
        self._restart_clock()

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of the next step, which may still be computing."""
        if self._start_secs is None:
            jax.block_until_ready(metrics)
            self._start_secs = self._start_up.finish()
        self._pending.append(metrics)
        self._step += 1
        at_step(self._step)
        self._progress.update()

    def flush(self, step: int) -> None:
        """Writes a line about the steps since the last line, up to `step`, if there are any.

        All processes must call it.

        Raises:
          ValueError: if too many rows cannot be used.
          FloatingPointError: if a metric is not finite; names it, the step and its utterances.
        """
        if not self._pending:
            return
        measured = jax.device_get(self._pending)
        for index, metrics in enumerate(measured, step - len(measured)):
            ids = [u.row.id for u in self._batches.members(index) if u is not None]
            require_finite(metrics, step=index + 1, utterance_ids=ids)
        secs = time.monotonic() - self._since
        scalars = summarize(
            measured,
            secs=secs,
            wait_secs=self._waited_secs,
            count_flops=self._count_flops,
            devices=self._batches.mesh.devices.flatten().tolist(),
        )
        audio_secs = self.totals.audio_secs + scalars.pop("audio_secs")
        self.totals = Totals(audio_secs, self.totals.step_secs + secs)
        scalars["audio_hours"] = audio_secs / 3600
        scalars["learning_rate"] = float(np.asarray(self._schedule(step - 1)))
        scalars["num_compiled"] = self._num_compiled()
        # At most 1, even if the clock of the host on which the run began is ahead of this one's.
        run_secs = max(time.time() - self._began, self.totals.step_secs)
        scalars["goodput"] = self.totals.step_secs / run_secs
        self._writer.write(step, scalars | (self._start_secs or {}))
        self._start_secs = {}
        self._progress.set_postfix(progress_postfix(scalars))
        self._pending = []
        self._bad_rows.share()
        self._restart_clock()


def require_finite(
    scalars: Mapping[str, float | np.ndarray], *, step: int, utterance_ids: list[str]
) -> None:
    """Raises FloatingPointError, naming metric, step and utterances, unless all are finite."""
    for name, value in scalars.items():
        if not np.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value} at step {step}; utterances of the batch: {utterance_ids}. "
                "Lower the learning rate, or look at these clips."
            )


def progress_postfix(scalars: Mapping[str, float]) -> dict[str, str]:
    """What the progress bar shows next to the steps."""
    losses = {name: f"{scalars[name]:.3f}" for name in ("loss", "ctc_loss") if name in scalars}
    postfix = {
        **losses,
        "lr": f"{scalars['learning_rate']:.1e}",
        "audio": f"{scalars['audio_hours']:.2f}h",
        "speed": f"{scalars['audio_secs_per_sec']:.0f}s/s",
        "step": f"{scalars['step_secs']:.2f}s",
        "wait": f"{scalars['data_wait_rate']:.0%}",
    }
    return postfix | ({"mfu": f"{scalars['mfu']:.0%}"} if "mfu" in scalars else {})
