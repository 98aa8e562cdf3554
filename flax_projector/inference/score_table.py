"""Scores as texts for a terminal of 80 columns."""

import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

from flax_projector.config import option
from flax_projector.logs import printable
from flax_projector.training.scores import (
    Edits,
    Headline,
    ScoredTranscript,
    Summary,
    counted,
)

WIDTH = 80
UNITS: dict[Headline, str] = {"wer": "word", "cer": "character"}


def score_table(
    title: str,
    transcripts: Sequence[ScoredTranscript],
    summary: Summary,
    *,
    worst: int,
    more: Iterable[str] = (),
) -> Iterator[str]:
    """The lines that show the scores of a set, its worst utterances first.

    Args:
      title: what the set is called.
      transcripts: all of the set.
      summary: what they come to.
      worst: how many utterances to show at most; those without an error are never shown.
      more: what else is known of the set.
    """
    used = counted(transcripts, bad_clips=summary.bad_clips)
    ordered = sorted(used, key=lambda t: (-t.edits.errors, t.edits.length, t.id))
    for transcript in [t for t in ordered if t.edits.errors][:worst]:
        yield from _utterance(transcript)
    yield from wrapped(f"{title}: {headline(summary)}", indent=2)
    yield f"  {'':10} {'total':>9} {'replaced':>9} {'deleted':>9} {'inserted':>9} {'rate':>8}"
    edits = {"word": summary.words, "character": summary.characters}
    first = UNITS[summary.headline]
    for unit in sorted(edits, key=lambda unit: unit != first):
        yield _row(f"{unit}s", edits[unit])
    for line in (normalizer_text(summary), *notes(summary), *more):
        yield from wrapped(f"  {line}", indent=4)


def headline(summary: Summary) -> str:
    """The rate of a set, and of how much."""
    of = f"{number_of(summary.num_utterances, 'utterance')}, {summary.secs / 3600:.2f} hours"
    return f"{summary.headline.upper()} {percent(summary.rate)} over {of}"


def normalizer_text(summary: Summary) -> str:
    """The normaliser, with its version."""
    version = f" ({summary.normalizer_version})" if summary.normalizer_version else ""
    return f"normaliser {summary.normalizer}{version}"


def notes(summary: Summary) -> list[str]:
    """What to know of a rate before it is believed."""
    counted_as = {"wrong": "counted as wrong", "exclude": "excluded"}[summary.bad_clips]
    found = [
        (summary.num_bad, "{} that could not be read, " + counted_as, "clip"),
        (summary.num_empty, "{} without a word after normalisation, not counted", "reference"),
        (summary.num_cut, f"{{}} cut: {summary.cut_text}", "hypothesis"),
    ]
    return [text.format(number_of(count, noun)) for count, text, noun in found if count]


def number_of(count: int, noun: str) -> str:
    """A number with its noun: "1 clip", "2 hypotheses"."""
    plural = noun.removesuffix("is") + "es" if noun.endswith("is") else f"{noun}s"
    return f"{count} {noun if count == 1 else plural}"


def percent(rate: float) -> str:
    """A rate in percent, with one digit after the point."""
    return f"{100 * rate:.1f}%"


def wrong(transcript: ScoredTranscript) -> str:
    """How much of an utterance is wrong, and whether there is a reason for it."""
    edits = transcript.edits
    reason = f", cut by {option(transcript.cut_by)}" if transcript.cut_by else ""
    if transcript.is_bad:
        reason = ", could not be read"
    unit = UNITS[transcript.headline]
    return f"{number_of(edits.errors, 'error')} in {number_of(edits.length, unit)}{reason}"


def texts(shown: Mapping[str, str]) -> Iterator[str]:
    """Lines for the texts of an utterance, which stand below one another.

    Args:
      shown: the texts, by what they are.
    """
    width = max(map(len, shown))
    for label, text in shown.items():
        yield from wrapped(f"  {label:{width}}  {printable(text)}", indent=width + 4)


def wrapped(text: str, *, indent: int) -> list[str]:
    """A text in lines of at most 80 columns.

    Args:
      text: one line.
      indent: columns at the beginning of the lines that follow the first.
    """
    is_wide = any(unicodedata.east_asian_width(char) in "WF" for char in text)
    return textwrap.wrap(
        text,
        (WIDTH + indent) // 2 if is_wide else WIDTH,  # most of its characters take two columns
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )


def _utterance(transcript: ScoredTranscript) -> Iterator[str]:
    yield from wrapped(f"{printable(transcript.id)}: {wrong(transcript)}", indent=2)
    yield from texts({"said": transcript.reference, "heard": transcript.hypothesis})


def _row(unit: str, edits: Edits) -> str:
    counts = (edits.length, edits.substitutions, edits.deletions, edits.insertions)
    numbers = " ".join(f"{count:>9,}" for count in counts)
    return f"  {unit:10} {numbers} {percent(edits.rate):>8}"
