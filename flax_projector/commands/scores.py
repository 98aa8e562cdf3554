"""Scores as tables, and the difference between two."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.conf import Positional

from flax_projector.config import BadClipsName
from flax_projector.logs import printable


@dataclass(frozen=True, kw_only=True)
class Show:
    """What the commands take that show scores."""

    bad_clips: BadClipsName = "wrong"
    """What is done with clips that could not be read: they count as wrong, or are excluded."""
    worst: Annotated[int, tyro.conf.arg(metavar="N")] = 10
    """How many utterances to show at most, worst first."""

    def __post_init__(self) -> None:
        if self.worst < 0:
            raise ValueError(f"--worst {self.worst}: must be at least 0")


@dataclass(frozen=True, kw_only=True)
class Score(Show):
    """Prints the error rates of files that an evaluation wrote, after their worst transcripts."""

    files: Positional[
        Annotated[
            tuple[str, ...], tyro.conf.arg(metavar="FILE ...", help_behavior_hint="(at least one)")
        ]
    ]
    """RUN/transcripts/SET-STEP.jsonl, or what `evaluate --out` wrote."""

    def __call__(self) -> None:
        """Writes to standard output."""
        from flax_projector.inference.score_table import score_table
        from flax_projector.training.score_files import read_scores
        from flax_projector.training.scores import summarize

        if not self.files:
            raise ValueError("name at least one file")
        for path, transcripts in [(path, read_scores(path)) for path in self.files]:
            summary = summarize(transcripts, bad_clips=self.bad_clips)
            title = summary.set if len(self.files) == 1 else f"{path}, {summary.set}"
            print_lines(score_table(printable(title), transcripts, summary, worst=self.worst))


@dataclass(frozen=True, kw_only=True)
class Compare(Show):
    """Prints the difference between two files that evaluations of one set wrote.

    With its 95% interval by a bootstrap over utterances, after the utterances that changed most.
    """

    a: Positional[Annotated[str, tyro.conf.arg(metavar="A")]]
    """A file as `score` takes it."""
    b: Positional[Annotated[str, tyro.conf.arg(metavar="B")]]
    """Another one, of the same set: the difference is B - A."""

    def __call__(self) -> None:
        """Writes to standard output."""
        from flax_projector.inference.compare import compare, comparison_table
        from flax_projector.training.score_files import read_scores

        found = compare(read_scores(self.a), read_scores(self.b), bad_clips=self.bad_clips)
        print_lines(comparison_table((self.a, self.b), found, worst=self.worst))


def print_lines(lines: Iterable[str]) -> None:
    """Writes lines to standard output."""
    sys.stdout.writelines(f"{line}\n" for line in lines)
