"""The folder of a run: where its files are, and which run it belongs to."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from flax_projector.config import TrainConfig, changes, from_json, to_json
from flax_projector.file_types import recognise
from flax_projector.files import check_orbax_path, local_path, write_atomically

_log = logging.getLogger(__name__)

STATE = "state"
"""The checkpoint item that holds the trained state: params, optimizer and step."""


@dataclass(frozen=True)
class RunFolder:
    """Every path of a run, in one place.

    Attributes:
      path: the folder itself.
    """

    path: Path

    @classmethod
    def of(cls, config: TrainConfig) -> "RunFolder":
        """The run folder that a config names.

        Raises:
          ValueError: if it is not a local path, or one that checkpoints cannot be written to.
        """
        try:
            path = local_path(config.out)
            check_orbax_path(path, is_new=True)
        except ValueError as error:
            raise ValueError(f"--out: {error}") from error
        return cls(path)

    @property
    def config(self) -> Path:
        """The run's `TrainConfig`."""
        return self.path / "config.json"

    @property
    def prompt(self) -> Path:
        """The run's prompt, as text and as token ids."""
        return self.path / "prompt.json"

    @property
    def checkpoints(self) -> Path:
        """Orbax checkpoints, one folder per saved step."""
        return self.path / "checkpoints"

    @property
    def projector(self) -> Path:
        """The projector after the last step, as a Flax folder; every finished run has one."""
        return self.path / "projector"

    @property
    def best(self) -> Path:
        """The projector with the lowest word error rate so far, as a Flax folder."""
        return self.path / "best"

    @property
    def best_scores(self) -> Path:
        """Step, word error rate and loss of `best`."""
        return self.path / "best.json"

    @property
    def metrics(self) -> Path:
        """The metrics, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder with TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def wandb_id(self) -> Path:
        """File with the run's Weights & Biases id."""
        return self.path / "wandb_id"

    @property
    def profile(self) -> Path:
        """Folder with profiler traces."""
        return self.path / "profile"

    @property
    def bad_rows(self) -> Path:
        """The rows that cannot be used, and why."""
        return self.path / "bad_rows.jsonl"

    @property
    def data_cache(self) -> Path:
        """Folder for streamed rows and durations, unless `data.cache_dir` names another."""
        return self.path / "data"

    def features(self, name: str) -> Path:
        """Folder with the kept encoder frames of a set."""
        return self.path / "features" / name

    def transcripts(self, name: str, step: int) -> Path:
        """All transcripts from one evaluation of a set."""
        return self.path / "transcripts" / f"{name}-{step:06d}.jsonl"

    def steps(self) -> dict[int, Path]:
        """The saved checkpoints, by step."""
        found = {path: re.fullmatch(r"\d+", path.name) for path in self.checkpoints.glob("*")}
        return {int(match[0]): path for path, match in found.items() if match and path.is_dir()}

    def read_config(self) -> TrainConfig:
        """The config that the run was started with.

        Raises:
          ValueError: if there is no config, or it is not that of a training run.
        """
        if not self.config.is_file():
            raise ValueError(f"{self.path} is not the folder of a run: no {self.config.name}")
        try:
            return from_json(self.config.read_text("utf-8"))
        except ValueError as error:
            kind = recognise(self.config) or f"is not the config of a training run: {error}"
            raise ValueError(f"{self.config} {kind}") from error

    def read_prompt(self) -> str | None:
        """What `claim` saved of the prompt; None if the folder holds no run.

        Raises:
          ValueError: if it holds a run without a prompt.
        """
        if not self.config.is_file():
            return None
        if not self.prompt.is_file():
            raise ValueError(
                f"{self.prompt} is missing: the run was begun by an earlier version, which did not "
                "keep its prompt. Use that version, or start another run"
            )
        return self.prompt.read_text("utf-8")

    def check(self, config: TrainConfig) -> None:
        """Checks that the folder holds either no run or this one.

        Raises:
          ValueError: if it holds a run with another config, or any run if `config.resume` is off.
        """
        if not self.config.is_file():
            return
        if not config.resume:
            raise ValueError(f"{self.path} holds a run: choose another --out, or pass --resume")
        refused, allowed = changes(self.read_config(), config)
        if refused:
            listed = "\n  ".join(refused)
            raise ValueError(
                f"{self.path} holds a run with another config:\n  {listed}\n"
                "Choose another --out, or take these changes back."
            )
        for change in allowed:
            _log.info("the run continues with %s", change)

    def claim(self, config: TrainConfig, prompt: str) -> None:
        """Saves config and prompt unless there is a config; then the folder is this run's."""
        if not self.config.is_file():
            write_atomically(self.prompt, prompt)
            write_atomically(self.config, to_json(config))
