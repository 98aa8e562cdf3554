"""Error rates: the edits of each utterance, and their sums over a set."""

import dataclasses
import functools
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import jiwer

from flax_projector.config import LIMITS, BadClipsName, LimitName, NormalizerName, option
from flax_projector.training.normalizers import Normalizer

Headline = Literal["wer", "cer"]
"""Which error rate a set is judged by: that of words, or that of characters."""

# Of languages that put no spaces between words, by the first word of the characters' names.
_WITHOUT_SPACES = {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"}


@dataclass(frozen=True)
class Edits:
    """How a hypothesis differs from its reference, in words or in characters.

    Attributes:
      length: of the reference.
      substitutions: number of them that were heard as others.
      deletions: number of them that were not heard.
      insertions: number of those that were heard and not said.
    """

    length: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @property
    def errors(self) -> int:
        """Number of edits of all kinds."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Edits per word or character of the reference."""
        return self.errors / self.length

    def __add__(self, other: "Edits") -> "Edits":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Edits(*(a + b for a, b in pairs))


@dataclass(frozen=True)
class Transcript:
    """What was said and what was heard.

    Attributes:
      id: the utterance's.
      reference: what was said.
      hypothesis: what was heard; empty if the clip could not be read.
      tokens: the generated ids.
      secs: length of the clip; None if it is not known.
      is_bad: whether the clip could not be read.
      cut_by: the limit that ended the hypothesis before the end of its turn; None if none did.
    """

    id: str
    reference: str
    hypothesis: str
    tokens: tuple[int, ...]
    secs: float | None
    is_bad: bool
    cut_by: LimitName | None

    @property
    def is_cut(self) -> bool:
        """Whether a limit ended the hypothesis."""
        return self.cut_by is not None


@dataclass(frozen=True)
class ScoredTranscript(Transcript):
    """A transcript with its edits; all that is known of the set is in each of them.

    Attributes:
      normalized_reference: what of the reference is compared.
      normalized_hypothesis: what of the hypothesis is compared.
      words: the edits in words.
      characters: the edits in characters; spaces are characters, unless the headline is "cer".
      set: the set's name.
      headline: the rate that the set is judged by.
      normalizer: name of the normaliser.
      normalizer_version: see `Normalizer`.
    """

    normalized_reference: str
    normalized_hypothesis: str
    words: Edits
    characters: Edits
    set: str
    headline: Headline
    normalizer: NormalizerName
    normalizer_version: str

    @property
    def edits(self) -> Edits:
        """Those of the headline."""
        return self.words if self.headline == "wer" else self.characters

    @property
    def is_empty(self) -> bool:
        """Whether the reference has no word to compare with: then it is in no rate."""
        return not self.normalized_reference


def score_transcripts(
    name: str, transcripts: Sequence[Transcript], normalize: Normalizer
) -> tuple[ScoredTranscript, ...]:
    """Counts the edits of a set's transcripts.

    Args:
      name: the set's name.
      transcripts: all of its transcripts.
      normalize: what is done to both texts before they are compared.
    """
    headline = _headline([t.reference for t in transcripts])
    pairs = [(normalize(t.reference), normalize(t.hypothesis)) for t in transcripts]
    return tuple(
        ScoredTranscript(
            **vars(transcript),
            normalized_reference=reference,
            normalized_hypothesis=hypothesis,
            words=words,
            characters=characters,
            set=name,
            headline=headline,
            normalizer=normalize.name,
            normalizer_version=normalize.version,
        )
        for transcript, (reference, hypothesis), (words, characters) in zip(
            transcripts, pairs, count_edits(pairs, headline), strict=True
        )
    )


def _headline(references: Iterable[str]) -> Headline:
    """ "cer" for languages without spaces between words, in which there are no words to count."""
    letters = [char for text in references for char in text if char.isalpha()]
    return "cer" if sum(map(_is_without_spaces, letters)) > len(letters) / 2 else "wer"


@functools.cache
def _is_without_spaces(char: str) -> bool:
    return unicodedata.name(char, "").split(" ")[0] in _WITHOUT_SPACES


def count_edits(pairs: Sequence[tuple[str, str]], headline: Headline) -> list[tuple[Edits, Edits]]:
    """Edits in words and in characters of (reference, hypothesis), which are normalised."""
    if not pairs:
        return []
    references, hypotheses = (list(side) for side in zip(*pairs, strict=True))
    words = jiwer.process_words(references, hypotheses)
    if headline == "cer":  # where somebody puts spaces in such a language says nothing
        references = [text.replace(" ", "") for text in references]
        hypotheses = [text.replace(" ", "") for text in hypotheses]
    characters = jiwer.process_characters(references, hypotheses)
    return list(zip(_edits(words), _edits(characters), strict=True))


def _edits(output: jiwer.WordOutput | jiwer.CharacterOutput) -> list[Edits]:
    """The edits of each utterance."""
    found = []
    for reference, chunks in zip(output.references, output.alignments, strict=True):
        counts = {"equal": 0, "substitute": 0, "delete": 0, "insert": 0}
        for chunk in chunks:
            said = chunk.ref_end_idx - chunk.ref_start_idx
            counts[chunk.type] += said or chunk.hyp_end_idx - chunk.hyp_start_idx
        edits = (counts[kind] for kind in ("substitute", "delete", "insert"))
        found.append(Edits(len(reference), *edits))
    return found


@dataclass(frozen=True)
class Summary:
    """What the transcripts of a set come to.

    Attributes:
      set: the set's name.
      headline: the rate that the set is judged by.
      normalizer: name of the normaliser.
      normalizer_version: see `Normalizer`.
      bad_clips: whether clips that could not be read count as wrong, or not at all.
      num_utterances: how many transcripts are in the rates.
      num_bad: how many clips could not be read.
      num_empty: how many references have no word after normalisation; they are in no rate.
      cut_by: how many hypotheses each limit cut.
      secs: length of the clips in the rates, as far as it is known.
      words: the edits of all utterances together, in words.
      characters: the same in characters.
    """

    set: str
    headline: Headline
    normalizer: NormalizerName
    normalizer_version: str
    bad_clips: BadClipsName
    num_utterances: int
    num_bad: int
    num_empty: int
    cut_by: dict[LimitName, int]
    secs: float
    words: Edits
    characters: Edits

    @property
    def num_cut(self) -> int:
        """How many hypotheses were cut."""
        return sum(self.cut_by.values())

    @property
    def cut_text(self) -> str:
        """How many were cut by which limit, as in "2 by --max-new-tokens"; empty if none was."""
        found = [(count, name) for name, count in self.cut_by.items() if count]
        return ", ".join(f"{count} by {option(name)}" for count, name in found)

    @property
    def wer(self) -> float:
        """Edits per word of the references."""
        return self.words.rate

    @property
    def cer(self) -> float:
        """Edits per character of the references."""
        return self.characters.rate

    @property
    def rate(self) -> float:
        """The headline."""
        return self.wer if self.headline == "wer" else self.cer


def counted(
    transcripts: Sequence[ScoredTranscript], *, bad_clips: BadClipsName = "wrong"
) -> list[ScoredTranscript]:
    """The transcripts that error rates are made of.

    References that the normaliser empties ("um") are left out, with their hypotheses.

    Args:
      transcripts: all of a set.
      bad_clips: whether clips that could not be read are among them.
    """
    return [t for t in transcripts if not t.is_empty and not (t.is_bad and bad_clips == "exclude")]


def summarize(
    transcripts: Sequence[ScoredTranscript], *, bad_clips: BadClipsName = "wrong"
) -> Summary:
    """Sums up the transcripts of a set.

    Args:
      transcripts: at least one, all of the same set.
      bad_clips: what is done with clips that could not be read. A clip that counts as wrong has all
        of its words deleted, so that it never improves a rate.

    Raises:
      ValueError: if no transcript is left.
    """
    first, used = transcripts[0], counted(transcripts, bad_clips=bad_clips)
    if not used:
        raise ValueError(
            f"{first.set}: no clip could be read whose reference has a word in it: there is "
            "nothing to score"
        )
    return Summary(
        set=first.set,
        headline=first.headline,
        normalizer=first.normalizer,
        normalizer_version=first.normalizer_version,
        bad_clips=bad_clips,
        num_utterances=len(used),
        num_bad=sum(t.is_bad for t in transcripts),
        num_empty=sum(t.is_empty for t in transcripts),
        cut_by={name: sum(t.cut_by == name for t in transcripts) for name in LIMITS},
        secs=sum(t.secs or 0.0 for t in used),
        words=sum((t.words for t in used), Edits()),
        characters=sum((t.characters for t in used), Edits()),
    )
