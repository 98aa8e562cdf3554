"""Where the files of a run are, and which run they belong to."""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flax_projector.config import TrainConfig, changes, from_json, option, to_json
from flax_projector.file_types import recognise
from flax_projector.files import (
    any_path,
    check_orbax_path,
    parse_json,
    reading,
    write_atomically,
)
from flax_projector.storage import AnyPath, in_bucket, users_cache

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
      began: when the run began, by `time.time()`.
    """

    directory: str = ""
    contents: Mapping[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.time)


@dataclass(frozen=True)
class RunFolder:
    """Every path of a run, in one place.

    Attributes:
      path: the folder itself, on a disk or in a bucket.
    """

    path: AnyPath

    @classmethod
    def of(cls, config: TrainConfig) -> "RunFolder":
        """The run folder that a config names.

        Raises:
          ValueError: if checkpoints cannot be written to it.
          OSError: if it is in a bucket that cannot be used.
        """
        try:
            path = any_path(config.out)
            check_orbax_path(path, is_new=True)
        except (OSError, ValueError) as error:
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"--out: {error}") from error
        return cls(path)

    @property
    def on_disk(self) -> Path:
        """The folder itself; for a run in a bucket, a folder of this machine for what needs one."""
        if isinstance(self.path, Path):
            return self.path
        digest = hashlib.sha256(str(self.path).encode()).hexdigest()[:8]
        return users_cache() / f"{self.path.name}-{digest}"

    @property
    def config(self) -> AnyPath:
        """The run's `TrainConfig`."""
        return self.path / "config.json"

    @property
    def prompt(self) -> AnyPath:
        """The run's prompt, as text and as token ids."""
        return self.path / "prompt.json"

    @property
    def origin(self) -> AnyPath:
        """The run's `Origin`."""
        return self.path / "origin.json"

    @property
    def handed_over(self) -> AnyPath:
        """What the run has to go on with, if another program has begun it: its `HandedOver`."""
        return self.path / "handed_over.json"

    @property
    def owner(self) -> AnyPath:
        """The `Owner` of the folder."""
        return self.path / "owner.json"

    @property
    def checkpoints(self) -> AnyPath:
        """Orbax checkpoints, one folder per saved step."""
        return self.path / "checkpoints"

    @property
    def projector(self) -> AnyPath:
        """The projector after the last step, as a Flax folder; every finished run has one."""
        return self.path / "projector"

    @property
    def best(self) -> AnyPath:
        """The projector with the lowest error rate so far; see `best_folder` for buckets."""
        return self.path / "best"

    @property
    def best_scores(self) -> AnyPath:
        """Step, word error rate and loss of the best projector so far."""
        return self.path / "best.json"

    @property
    def metrics(self) -> AnyPath:
        """The metrics, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> AnyPath:
        """Folder with TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def wandb_id(self) -> AnyPath:
        """File with the run's Weights & Biases id."""
        return self.path / "wandb_id"

    @property
    def profile(self) -> AnyPath:
        """Folder with profiler traces."""
        return self.path / "profile"

    @property
    def bad_rows(self) -> AnyPath:
        """The rows that cannot be used, and why."""
        return self.path / "bad_rows.jsonl"

    @property
    def lengths(self) -> AnyPath:
        """How long the utterances of each set are, for the report."""
        return self.path / "lengths.json"

    @property
    def report(self) -> AnyPath:
        """The run as a page to look at."""
        return self.path / "report.html"

    @property
    def data_cache(self) -> Path:
        """Folder for streamed rows and durations, unless `data.cache_dir` names another."""
        return self.on_disk / "data"

    @property
    def compile_cache(self) -> AnyPath:
        """Folder for compiled programs, if the run is one of several hosts."""
        return self.path / "compile_cache"

    def transcripts(self, name: str, step: int) -> AnyPath:
        """All transcripts from one evaluation of a set."""
        return self.path / "transcripts" / f"{name}-{step:06d}.jsonl"

    def steps(self) -> dict[int, AnyPath]:
        """The saved checkpoints, by step."""
        found = {path: re.fullmatch(r"\d+", path.name) for path in self.checkpoints.glob("*")}
        return {int(match[0]): path for path, match in found.items() if match and _is_whole(path)}

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
        """What `claim` saved of the run's origin; an empty one, of now, if it saved none.

        Raises:
          ValueError: if it cannot be read.
        """
        if not self.origin.is_file():
            return Origin()
        with reading(self.origin, way_out="remove it, and give the run's paths as options"):
            origin = Origin(**json.loads(self.origin.read_text("utf-8")))
            types = (type(origin.directory), type(origin.contents), type(origin.began))
            if types != (str, dict, float):
                raise TypeError("expected a directory, digests by option and a time")
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
        if in_bucket(self.path):  # nothing has moved along with it
            found = os.path.join(started_in, os.path.expanduser(name))
            return found if os.path.exists(found) else name
        named = os.path.join(started_in, os.path.expanduser(name))
        out = os.path.join(started_in, os.path.expanduser(self.read_config().out))
        moved_along = [
            os.path.join(folder, os.path.relpath(named, out))
            for folder in (os.path.abspath(self.path), os.path.realpath(self.path))
        ]
        candidates = [os.path.normpath(path) for path in (*moved_along, named)]
        return next((path for path in candidates if os.path.exists(path)), name)

    def check(self, config: TrainConfig) -> frozenset[str]:
        """Checks that the folder holds either no run or this one.

        Returns:
          The options that name what the run learns from by another path than at its beginning. It
          must be the same: see `check_contents`.

        Raises:
          ValueError: if it holds a run with another config, or any run if `config.resume` is off.
        """
        has_config = self.config.is_file()
        if not config.resume and (has_config or self.handed_over.is_file()):
            raise ValueError(f"{self.path} holds a run: choose another --out, or pass --resume")
        if not has_config:
            return frozenset()
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

    def claim(
        self, config: TrainConfig, prompt: str, contents: Mapping[str, str], began: float
    ) -> None:
        """Saves what the run begins with unless there is a config: then the folder is its own.

        To be called when no user input can fail any more.
        """
        if not self.config.is_file():
            origin = Origin(os.getcwd(), contents, began)
            write_atomically(self.prompt, prompt)
            write_atomically(self.origin, json.dumps(asdict(origin), indent=2) + "\n")
            write_atomically(self.config, to_json(config))


def find_from_projector(projector: AnyPath, name: str) -> str:
    """The present path of something that the config.json of a projector names.

    Args:
      projector: the run of the projector, a folder in it, or any other folder.
      name: a path, or a hub id; may be empty.

    Returns:
      An existing path, or else `name`.
    """
    for folder in (projector, projector.parent):
        run = RunFolder(folder)
        if name and run.checkpoints.exists() and run.config.is_file():
            return run.find(name)
    return name


def _is_whole(step: AnyPath) -> bool:
    """Whether Orbax has finished a checkpoint.

    On a disk, its folder gets its name when it is complete. In a bucket, a file is written last.
    """
    return (step / "commit_success.txt").exists() if in_bucket(step) else step.is_dir()
