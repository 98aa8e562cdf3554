"""Scored transcripts that no model made."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from flax_projector.config import LimitName, NormalizerName
from flax_projector.training.evaluate import Scores
from flax_projector.training.normalizers import make_normalizers
from flax_projector.training.score_files import to_lines
from flax_projector.training.scores import (
    Edits,
    ScoredTranscript,
    Summary,
    Transcript,
    score_transcripts,
)

NORMALIZERS = make_normalizers(Path("no folder"))


def transcript(id: str, said: str, heard: str = "", **more) -> Transcript:
    """A transcript of a clip of half an hour."""
    fields = {"tokens": (1,), "secs": 1800.0, "is_bad": False, "cut_by": None}
    return Transcript(id, said, heard, **fields | more)


def scored(
    pairs: Mapping[str, tuple[str, str]],
    *,
    name: str = "dev",
    bad: Sequence[str] = (),
    cut: Mapping[str, LimitName] | None = None,
    normalizer: NormalizerName = "english",
) -> list[ScoredTranscript]:
    """Scored transcripts: (said, heard) by id; those that are bad, and what cut others, by id."""
    cut = cut or {}
    transcripts = [
        transcript(id, *texts, is_bad=id in bad, cut_by=cut.get(id)) for id, texts in pairs.items()
    ]
    return list(score_transcripts(name, transcripts, NORMALIZERS[normalizer]))


def write_scores(path: Path, transcripts: Sequence[ScoredTranscript]) -> str:
    """The path of a file with them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_lines(transcripts), "utf-8")
    return str(path)


def scores_of(wer: float, loss: float, transcripts: Sequence[ScoredTranscript] = ()) -> Scores:
    """Scores with a word error rate in whole thousandths."""
    words = Edits(1000, substitutions=round(1000 * wer))
    summary = Summary(
        set="dev",
        headline="wer",
        normalizer="english",
        normalizer_version="",
        bad_clips="wrong",
        num_utterances=len(transcripts),
        num_bad=0,
        num_empty=0,
        cut_by={},
        secs=0.0,
        words=words,
        characters=Edits(10_000, deletions=round(1000 * wer)),
    )
    return Scores(loss, summary, tuple(transcripts), num_left_out=0)
