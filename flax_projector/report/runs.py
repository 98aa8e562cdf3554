"""What a folder holds that a page can show."""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from flax_projector.config import TrainConfig
from flax_projector.data.audio import Problem
from flax_projector.files import any_path, parse_json
from flax_projector.report.curves import Curve, read_curves
from flax_projector.report.lengths import check_histogram
from flax_projector.run_folder import RunFolder
from flax_projector.storage import AnyPath
from flax_projector.training.score_files import read_scores
from flax_projector.training.scores import ScoredTranscript

_MAX_BAD_ROWS = 100  # on the page


@dataclass(frozen=True)
class Evaluation:
    """The newest evaluation of a set.

    Attributes:
      transcripts: of every utterance.
      step: of the projector; None if it is not known.
      loss: nats per label; None if it is not known.
    """

    transcripts: Sequence[ScoredTranscript]
    step: int | None = None
    loss: float | None = None


@dataclass(frozen=True)
class BadRowCounts:
    """The rows of a run that were left out, or used although they are doubtful.

    Attributes:
      counts: how many, by set, reason, and whether they were used.
      first: some of them, as the run lists them.
    """

    counts: Mapping[tuple[str, str, bool], int] = field(default_factory=dict)
    first: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Run:
    """A run, or the scores of one; whatever is missing is empty.

    Attributes:
      name: what it is called beside others.
      folder: where it is.
      config: its options, as they are in its config.json.
      settings: the same as a `TrainConfig`; None if it is of another version, or there is none.
      curves: its metrics by name.
      evaluations: the newest of each set, by the set's name.
      lengths: a histogram of each set; see `lengths.histogram`.
      bad_rows: rows that were left out.
      best_step: step of the best projector.
      problems: what is wrong with the folder, one line each.
    """

    name: str
    folder: RunFolder
    config: Mapping[str, Any] = field(default_factory=dict)
    settings: TrainConfig | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)
    lengths: Mapping[str, Any] = field(default_factory=dict)
    bad_rows: BadRowCounts = BadRowCounts()
    best_step: int | None = None
    problems: Sequence[str] = ()

    @property
    def step(self) -> int | None:
        """The last step that has been logged."""
        steps = [int(curve.steps[-1]) for curve in self.curves.values()]
        return max(steps, default=None)

    @property
    def num_steps(self) -> int | None:
        """How many steps the run is to take, if its config says so."""
        found = self.config.get("num_steps")
        return found if type(found) is int else None

    @property
    def is_finished(self) -> bool:
        """Whether the run has taken all of its steps."""
        return self.step is not None and self.step == self.num_steps


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Reads folders of runs, or of scores that `evaluate --out` wrote.

    Raises:
      ValueError: if one is neither, or is named twice.
    """
    if not paths:
        raise ValueError("name at least one folder of a run")
    folders = [_folder(path) for path in paths]
    if twice := [str(folder) for folder, count in Counter(folders).items() if count > 1]:
        raise ValueError(f"{twice[0]} is named more than once")
    return [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _folder(path: str) -> AnyPath:
    folder = any_path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{path} is a file: name the folder of a run")
    raise ValueError(f"{path} does not exist")


def _names(folders: Sequence[AnyPath]) -> list[str]:
    """As much of the end of each path as tells it from the others."""
    parts = [PurePath(str(folder.absolute())).parts for folder in folders]
    length = 1
    while len({path[-length:] for path in parts}) < len(parts):
        length += 1
    return ["/".join(path[-length:]) for path in parts]


def read_run(folder: AnyPath, name: str) -> Run:
    """Reads a folder.

    Raises:
      ValueError: if it is neither that of a run nor of scores.
    """
    run = RunFolder(folder)
    if run.metrics.is_file() or run.prompt.is_file():
        return _read_run(run, name)
    problems: list[str] = []
    evaluations = {}
    for file in sorted(folder.glob("*.jsonl")):
        if transcripts := _read_scores(file, problems):
            evaluations[transcripts[0].set] = Evaluation(transcripts)
    if evaluations:
        return Run(name, run, evaluations=evaluations, problems=problems)
    if problems:
        raise ValueError(problems[0])
    if run.config.is_file() or any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds a model, and nothing that was measured: run `python -m "
            f"flax_projector evaluate {folder} SET --out SCORES`, and then `python -m "
            "flax_projector report SCORES`"
        )
    raise ValueError(
        f"{folder} is neither the folder of a run, which has a {run.metrics.name}, nor one of "
        "scores that `evaluate --out` wrote"
    )


def _read_run(folder: RunFolder, name: str) -> Run:
    problems: list[str] = []
    config = _read_json(folder.config, problems)
    try:
        settings = folder.read_config()
    except ValueError:  # of another version: it can be shown all the same
        settings = None
    curves, damaged = {}, []
    if folder.metrics.is_file():
        curves, damaged = read_curves(folder.metrics.read_bytes())
    if damaged:
        lines = "line is" if len(damaged) == 1 else "lines are"
        problems.append(
            f"{folder.metrics}: {len(damaged)} {lines} damaged, and left out, from line "
            f"{damaged[0]} on"
        )
    return Run(
        name,
        folder,
        config,
        settings,
        curves,
        dict(_evaluations(folder, curves, problems)),
        _read_lengths(folder.lengths, problems),
        _read_bad_rows(folder.bad_rows, problems),
        _read_best(folder.best_scores, problems),
        problems,
    )


def _evaluations(
    folder: RunFolder, curves: Mapping[str, Curve], problems: list[str]
) -> Iterator[tuple[str, Evaluation]]:
    for name, curve in sorted(curves.items()):
        if not (match := re.fullmatch(r"eval/(.+)/wer", name)):
            continue
        set_name, step = match[1], int(curve.steps[-1])
        loss = curves.get(f"eval/{set_name}/loss")
        transcripts = _read_scores(folder.transcripts(set_name, step), problems)
        if transcripts:
            yield set_name, Evaluation(transcripts, step, loss.last if loss else None)


def _read_scores(path: AnyPath, problems: list[str]) -> list[ScoredTranscript]:
    try:
        return read_scores(str(path))
    except (OSError, ValueError) as error:
        problems.append(str(error))
        return []


@contextlib.contextmanager
def _leaving_out(path: AnyPath, problems: list[str]) -> Iterator[None]:
    """Notes an error in the block, which reads a file that training wrote, as one of the file."""
    try:
        yield
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        problems.append(f"{path} is damaged, and left out ({reason})")


def _read_json(path: AnyPath, problems: list[str]) -> dict[str, Any]:
    """An object; an empty one if the file is missing or damaged."""
    found = {}
    if path.is_file():
        with _leaving_out(path, problems):
            found = parse_json(path.read_text("utf-8"))
            if not isinstance(found, dict):
                raise TypeError("expected an object")
            return found
    return {}


def _read_best(path: AnyPath, problems: list[str]) -> int | None:
    step = _read_json(path, problems).get("step")
    return step if type(step) is int else None


def _read_lengths(path: AnyPath, problems: list[str]) -> dict[str, dict[str, Any]]:
    found = _read_json(path, problems)
    with _leaving_out(path, problems):
        for lengths in found.values():
            check_histogram(lengths)
        return found
    return {}


def _read_bad_rows(path: AnyPath, problems: list[str]) -> BadRowCounts:
    if not path.is_file():
        return BadRowCounts()
    counts: Counter[tuple[str, str, bool]] = Counter()
    first = []
    with _leaving_out(path, problems):
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            shown = {name: str(row[name]) for name in ("set", "id", "detail")}
            shown["reason"] = Problem[row["reason"].upper()].label
            counts[shown["set"], shown["reason"], bool(row["is_used"])] += 1
            if len(first) < _MAX_BAD_ROWS:
                first.append(shown)
        return BadRowCounts(counts, first)
    return BadRowCounts()
