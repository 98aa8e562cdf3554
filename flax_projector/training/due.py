"""When a run logs, saves and evaluates."""

from dataclasses import dataclass

from flax_projector.config import TrainConfig


@dataclass(frozen=True)
class Due:
    """What is due after a given number of steps.

    Attributes:
      config: the run's config.
    """

    config: TrainConfig

    def log(self, step: int) -> bool:
        """Whether a line of metrics is due; no line spans the end of a warm start."""
        return step % self.config.log_every_steps == 0 or step == self.config.ctc.num_steps

    def save(self, step: int) -> bool:
        """Whether a checkpoint is due; a state that is evaluated is always saved first."""
        return step % self.config.save_every_steps == 0 or self.evaluate(step)

    def evaluate(self, step: int) -> bool:
        """Whether an evaluation is due: before the first step, after the last, and in between."""
        if step in (0, self.config.num_steps):
            return True
        every = self.config.eval_every_steps
        return every > 0 and step % every == 0 and step > self.config.ctc.num_steps
