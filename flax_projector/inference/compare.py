"""Compares the scores of two projectors on one set, utterance by utterance."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from flax_projector.config import BadClipsName
from flax_projector.inference.score_table import (
    UNITS,
    headline,
    normalizer_text,
    notes,
    number_of,
    texts,
    wrapped,
)
from flax_projector.logs import printable
from flax_projector.training.scores import ScoredTranscript, Summary, summarize

_NUM_RESAMPLES = 10_000
_MIN_UTTERANCES = 10  # of fewer, resamples are too much alike
_MAX_DRAWS = 2_000_000  # at a time, so that memory does not grow with the set


@dataclass(frozen=True)
class Comparison:
    """The difference between two results on one set.

    Attributes:
      pairs: the utterances that are compared, as A and as B heard them.
      a: the scores of A on these.
      b: the scores of B on these.
      difference: rate of B minus rate of A.
      low: lower end of the difference's 95% interval.
      high: upper end of the interval.
    """

    pairs: Sequence[tuple[ScoredTranscript, ScoredTranscript]]
    a: Summary
    b: Summary
    difference: float
    low: float
    high: float


def compare(
    a: Sequence[ScoredTranscript], b: Sequence[ScoredTranscript], *, bad_clips: BadClipsName
) -> Comparison:
    """Compares two results on the same utterances.

    The interval is that of a paired bootstrap over utterances: sets of as many utterances are drawn
    from the set, with replacement, and A and B are compared on each of them.

    Args:
      a: all transcripts of one file.
      b: all of the other.
      bad_clips: what is done with clips that could not be read. Those to be excluded are excluded
        on both sides, even if only one could not read them.

    Raises:
      ValueError: if they are not of the same utterances, or were normalised in different ways.
    """
    pairs = _pair(a, b)
    if bad_clips == "exclude":
        pairs = [(x, y) for x, y in pairs if not (x.is_bad or y.is_bad)]
    if not pairs:
        raise ValueError("no clip could be read on both sides: there is nothing to compare")
    sides = [list(side) for side in zip(*pairs, strict=True)]
    of_a, of_b = (summarize(side, bad_clips=bad_clips) for side in sides)
    used = [(x, y) for x, y in pairs if not x.is_empty]
    errors = np.array([[x.edits.errors, y.edits.errors] for x, y in used])
    lengths = np.array([x.edits.length for x, _ in used])
    low, high = bootstrap(errors[:, 1] - errors[:, 0], lengths)
    return Comparison(used, of_a, of_b, of_b.rate - of_a.rate, low, high)


def bootstrap(
    differences: np.ndarray, lengths: np.ndarray, *, seed: int = 0
) -> tuple[float, float]:
    """The 95% interval of a difference of error rates, over 10,000 resamples of utterances.

    Args:
      differences: i64[N], errors of B minus errors of A, by utterance.
      lengths: i64[N], words or characters of the references; none is 0.
      seed: of the resamples.

    Returns:
      The 2.5th and the 97.5th percentile.
    """
    rng, count = np.random.default_rng(seed), len(lengths)
    size = max(1, _MAX_DRAWS // count)
    rates = []
    for start in range(0, _NUM_RESAMPLES, size):
        drawn = rng.integers(count, size=(min(size, _NUM_RESAMPLES - start), count), dtype=np.int32)
        rates.append(differences[drawn].sum(axis=1) / lengths[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(rates), [2.5, 97.5])
    return float(low), float(high)


def _pair(
    a: Sequence[ScoredTranscript], b: Sequence[ScoredTranscript]
) -> list[tuple[ScoredTranscript, ScoredTranscript]]:
    """The transcripts of the same utterances, in the order of A."""
    if (x := a[0].normalizer) != (y := b[0].normalizer):
        raise ValueError(
            f"A was normalised by {x!r}, B by {y!r}: evaluate one of them again, with --normalizer"
        )
    of_b = {t.id: t for t in b}
    only_a = [t.id for t in a if t.id not in of_b]
    only_b = sorted(of_b.keys() - {t.id for t in a})
    if only_a or only_b:
        shown = [
            f"{len(only)} of {len(side)} utterances of {name} are not in {other}, such as "
            f"{only[0]!r}"
            for only, side, name, other in ((only_a, a, "A", "B"), (only_b, b, "B", "A"))
            if only
        ]
        raise ValueError(f"{'; '.join(shown)}: compare results on the same set")
    pairs = [(t, of_b[t.id]) for t in a]
    for x, y in pairs:
        for name in ("reference", "normalized_reference"):
            said = getattr(x, name), getattr(y, name)
            if said[0] != said[1]:
                raise ValueError(
                    f"the {name.replace('_', ' ')} of {x.id!r} is {said[0][:60]!r} in A and "
                    f"{said[1][:60]!r} in B: compare results on the same set, normalised alike"
                )
    return pairs


def comparison_table(paths: tuple[str, str], found: Comparison, *, worst: int) -> Iterator[str]:
    """The lines that show a comparison, the utterances that changed most first.

    Args:
      paths: of A and of B.
      found: the comparison.
      worst: how many utterances to show at most; those whose errors did not change are never shown.
    """
    changed = [(y.edits.errors - x.edits.errors, x, y) for x, y in found.pairs]
    changed.sort(key=lambda change: (-abs(change[0]), change[1].edits.length, change[1].id))
    for change, x, y in [change for change in changed if change[0]][:worst]:
        edits = f"{number_of(x.edits.errors, 'error')} in A, {y.edits.errors} in B"
        of = number_of(x.edits.length, UNITS[x.headline])
        yield from wrapped(f"{printable(x.id)}: {edits}, of {of} ({change:+})", indent=2)
        yield from texts({"said": x.reference, "A": x.hypothesis, "B": y.hypothesis})
    for name, path, side in zip("AB", paths, (found.a, found.b), strict=True):
        yield from wrapped(f"{name}  {printable(path)}", indent=3)
        for line in (f"{side.set}: {headline(side)}", *notes(side), normalizer_text(side)):
            yield from wrapped(f"   {line}", indent=5)
    rate = found.a.headline.upper()
    low, high = (f"{100 * end:+.2f}" for end in (found.low, found.high))
    yield from wrapped(
        f"B - A: {100 * found.difference:+.2f} points of {rate}, 95% interval {low} to {high} "
        f"({_NUM_RESAMPLES:,} resamples of {number_of(len(found.pairs), 'utterance')})",
        indent=2,
    )
    better = [sum(sign * change > 0 for change, _, _ in changed) for sign in (-1, 1)]
    same = len(changed) - sum(better)
    yield from wrapped(
        f"  fewer errors in B: {number_of(better[0], 'utterance')}; in A: {better[1]}; as many in "
        f"both: {same}",
        indent=2,
    )
    yield f"  {_verdict(found)}"


def _verdict(found: Comparison) -> str:
    if len(found.pairs) < _MIN_UTTERANCES:
        return "too few utterances to tell which is better"
    if found.low > 0:
        return "A is better: the interval lies above 0"
    if found.high < 0:
        return "B is better: the interval lies below 0"
    return "no difference is shown: the interval contains 0"
