"""Scores of data sets."""

import dataclasses
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from flax_projector.commands.output import check_new
from flax_projector.commands.scores import Show, print_lines
from flax_projector.commands.use import Use
from flax_projector.config import NormalizerName

if TYPE_CHECKING:
    from flax_projector.storage import AnyPath


@dataclass(frozen=True, kw_only=True)
class Evaluate(Use, Show):
    """Prints the error rates and loss of each manifest or data set, after its worst transcripts."""

    sources: Positional[
        Annotated[
            tuple[str, ...],
            tyro.conf.arg(metavar="SOURCE ...", help_behavior_hint="(at least one)"),
        ]
    ]
    """.jsonl or .tsv manifests, or hf:NAME:SPLIT."""
    normalizer: Annotated[NormalizerName | None, tyro.conf.arg(metavar="english|basic|none")] = None
    """What is done to texts before errors are counted. If not given: what the run does, see
    --data.eval-normalizers."""
    silence: bool = False
    """Replace every clip by silence of its length, for what the LLM guesses without hearing."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Write every transcript with its errors to FOLDER/SET.jsonl, for `score` and `compare`."""
    json: bool = False
    """Print one JSON object per source instead."""

    def __call__(self) -> None:
        """Writes to standard output."""
        from flax_projector.data.sources import set_names
        from flax_projector.files import write_atomically
        from flax_projector.inference.score_table import number_of, score_table
        from flax_projector.training.score_files import to_lines
        from flax_projector.training.scores import summarize

        if not self.sources:
            raise ValueError("name at least one manifest or data set")
        suffix = "-silence" if self.silence else ""
        names = {f"{name}{suffix}": source for name, source in set_names(self.sources).items()}
        files = self._files(names)
        listener = self.listener()
        for name, source in names.items():
            scores = listener.evaluate(
                source, name=name, normalizer=self.normalizer, silence=self.silence
            )
            if name in files:
                write_atomically(files[name], to_lines(scores.transcripts))
            summary = summarize(scores.transcripts, bad_clips=self.bad_clips)
            if self.json:
                record = {"source": source, "loss": scores.loss, "wer": summary.wer}
                record |= {"cer": summary.cer, "num_cut": summary.num_cut}
                record |= {"num_left_out": scores.num_left_out}
                sys.stdout.write(json.dumps(record | dataclasses.asdict(summary)) + "\n")
                continue
            more = [f"loss {scores.loss:.3f} nats per token"]
            if scores.num_left_out:
                more.append(f"{number_of(scores.num_left_out, 'row')} left out")
            print_lines(score_table(name, scores.transcripts, summary, worst=self.worst, more=more))

    def _files(self, names: Iterable[str]) -> "dict[str, AnyPath]":
        """Where each set's transcripts are to be written; checked before anything slow."""
        from flax_projector.files import any_path

        if self.out is None:
            return {}
        files = {name: any_path(self.out) / f"{name}.jsonl" for name in names}
        check_new([*files.values()], self.out, way_out="folder")
        return files
