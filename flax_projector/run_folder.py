"""The folder of a run: where its files are, and which run it belongs to."""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flax_projector.config import TrainConfig, changes, from_json, option, to_json
from flax_projector.file_types import recognise
from flax_projector.files import (
    check_orbax_path,
    local_path,
    lock_file,
    parse_json,
    reading,
    write_atomically,
)

_log = logging.getLogger(__name__)

STATE = "state"
"""The checkpoint item that holds the trained state: params, optimizer and step."""


@dataclass(frozen=True)
class Origin:
    """What a run began with, apart from its options.

    Attributes:
      directory: where it was started: relative paths in its config begin there. Empty if it is not
        known.
      contents: digests of what options name by paths, by the options' names.
    """

    directory: str = ""
    contents: Mapping[str, str] = field(default_factory=dict)


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
    def origin(self) -> Path:
        """The run's `Origin`."""
        return self.path / "origin.json"

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
          ValueError: if it holds a run without a prompt, or that is damaged.
        """
        if not self.config.is_file():
            return None
        if not self.prompt.is_file():
            raise ValueError(
                f"{self.prompt} is missing: the run was begun by an earlier version, which did not "
                "keep its prompt. Use that version, or start another run"
            )
        with reading(self.prompt, way_out="restore it from a copy, or start another run"):
            text = self.prompt.read_text("utf-8")
            parse_json(text)["date"]
        return text

    def read_origin(self) -> Origin:
        """What `claim` saved of the run's origin; an empty one if it was an earlier version's.

        Raises:
          ValueError: if it cannot be read.
        """
        if not self.origin.is_file():
            return Origin()
        with reading(self.origin, way_out="remove it, and give the run's paths as options"):
            origin = Origin(**json.loads(self.origin.read_text("utf-8")))
            if not (isinstance(origin.directory, str) and isinstance(origin.contents, dict)):
                raise TypeError("expected a directory and digests by option")
            return origin

    def find(self, name: str) -> str:
        """The present path of something that the run's config names.

        Relative paths begin in the directory in which the run was started. If the run folder has
        moved, what it names is looked for at the same place relative to it, then where it was.

        Args:
          name: a path, or a hub id.

        Returns:
          An existing path, or else `name`.
        """
        started_in = self.read_origin().directory or os.getcwd()
        named = os.path.join(started_in, os.path.expanduser(name))
        out = os.path.join(started_in, os.path.expanduser(self.read_config().out))
        moved_along = [
            os.path.join(folder, os.path.relpath(named, out))
            for folder in (os.path.abspath(self.path), os.path.realpath(self.path))
        ]
        candidates = [os.path.normpath(path) for path in (*moved_along, named)]
        return next((path for path in candidates if os.path.exists(path)), name)

    @contextlib.contextmanager
    def lock(self, process_index: int = 0) -> Iterator[None]:
        """Keeps other programs from training in the folder until the block ends.

        Args:
          process_index: of this process; only the first one of a program holds the lock.

        Raises:
          ValueError: if another program does.
          OSError: if the folder cannot be written to.
        """
        with contextlib.ExitStack() as stack:
            try:
                if process_index == 0:
                    stack.enter_context(lock_file(self.path / "lock"))
            except BlockingIOError as error:
                raise ValueError(
                    f"--out: {self.path} is in use by {error}: wait until it has ended, or choose "
                    "another folder"
                ) from error
            except OSError as error:
                raise OSError(f"--out: {error}") from error
            yield

    def check(self, config: TrainConfig) -> frozenset[str]:
        """Checks that the folder holds either no run or this one.

        Returns:
          The options that name what the run learns from by another path than at its beginning. It
          must be the same: see `check_contents`.

        Raises:
          ValueError: if it holds a run with another config, or any run if `config.resume` is off.
        """
        if not self.config.is_file():
            return frozenset()
        if not config.resume:
            raise ValueError(f"{self.path} holds a run: choose another --out, or pass --resume")
        found = changes(self.read_config(), config)
        if found.refused:
            listed = "\n  ".join(found.refused.values())
            raise ValueError(
                f"{self.path} holds a run with another config:\n  {listed}\n"
                "Choose another --out, or take these changes back."
            )
        for change in (found.allowed | found.moved).values():
            _log.info("the run continues with %s", change)
        return frozenset(found.moved)

    def other_contents(self, contents: Mapping[str, str]) -> list[str]:
        """The options whose contents have other digests than those that the run began with."""
        before = self.read_origin().contents
        return [name for name, digest in contents.items() if before.get(name, digest) != digest]

    def check_contents(self, contents: Mapping[str, str]) -> None:
        """Checks what options name by paths, once it is known.

        Args:
          contents: digests by the options' names, as in `Origin`.

        Raises:
          ValueError: naming the options, if the run began with other contents.
        """
        if wrong := self.other_contents(contents):
            saved = self.read_config()
            names = " and ".join(f"{option(name)} {getattr(saved, name)}" for name in wrong)
            raise ValueError(
                f"{self.path} holds a run that began with other contents of {names}: give it those "
                "of that time, under any path, or choose another --out"
            )

    def claim(self, config: TrainConfig, prompt: str, contents: Mapping[str, str]) -> None:
        """Saves what the run begins with unless there is a config: then the folder is its own.

        To be called when no user input can fail any more.
        """
        if not self.config.is_file():
            origin = Origin(os.getcwd(), contents)
            write_atomically(self.prompt, prompt)
            write_atomically(self.origin, json.dumps(asdict(origin), indent=2) + "\n")
            write_atomically(self.config, to_json(config))
