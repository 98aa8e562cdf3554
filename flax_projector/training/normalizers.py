"""What is done to references and hypotheses before they are compared."""

import functools
import hashlib
import importlib.metadata
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.models.whisper.english_normalizer import (
    BasicTextNormalizer,
    EnglishTextNormalizer,
)

from flax_projector.config import NormalizerName
from flax_projector.files import parse_json

# English and other European languages, Chinese and Korean lose nothing, Thai a sixth; scripts whose
# vowels are marks, such as Devanagari, almost half.
_MUCH = 0.25


@dataclass(frozen=True)
class Normalizer:
    """One of Whisper's text normalisers, or none.

    Attributes:
      name: which one.
      version: of what its results depend on; empty if there is none.
      change: what it does to a text.
    """

    name: NormalizerName
    version: str
    change: Callable[[str], str]

    def __call__(self, text: str) -> str:
        """The normalised text: words with single spaces between them."""
        return " ".join(self.change(text).split())


def make_normalizers(encoder_folder: Path) -> dict[NormalizerName, Normalizer]:
    """All normalisers, by name; the English one with the spellings from the encoder's folder.

    Raises:
      ValueError: if the file with the spellings is damaged.
    """
    spellings = _read_spellings(encoder_folder / "normalizer.json")
    version = f"transformers {importlib.metadata.version('transformers')}"
    digest = hashlib.sha256(json.dumps(spellings, sort_keys=True).encode()).hexdigest()[:8]
    with_spellings = f"{version}, {f'spellings {digest}' if spellings else 'no spellings'}"
    found = (
        Normalizer("english", with_spellings, EnglishTextNormalizer(dict(spellings))),
        Normalizer("basic", version, BasicTextNormalizer()),
        # Labels are in this form: references in another one could not be heard right.
        Normalizer("none", "", functools.partial(unicodedata.normalize, "NFC")),
    )
    return {normalizer.name: normalizer for normalizer in found}


def _read_spellings(path: Path) -> Mapping[str, str]:
    """American spellings by British ones; none if there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = parse_json(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(word, str) for word in found.values()):
        raise ValueError(f"{path} is no table of spellings: expected an object of words by words")
    return found


def check_references(name: str, references: Sequence[str], normalize: Normalizer) -> str | None:
    """Finds out whether a set can be scored with a normaliser.

    Args:
      name: the set's name.
      references: its transcripts.
      normalize: the normaliser.

    Returns:
      What it takes away from references that are not English, if that is much: one line for the
      log. Numbers become shorter ("twenty five" becomes "25"), so only words that are not ASCII
      count.

    Raises:
      ValueError: if it leaves no word of any reference.
    """
    # Found quickly where there is one; an evaluation normalises all of them anyway.
    if not any(normalize(text) for text in references):
        shown = f", such as {references[0][:80]!r}" if references else ""
        raise ValueError(
            f"{name}: none of {len(references)} references has a word in it after normalisation by "
            f"{normalize.name!r}{shown}: there is nothing to score. The normaliser 'none' removes "
            "nothing"
        )
    emptied = [text for text in references if text.strip() and not normalize(text)]
    words = {word for text in references for word in text.split() if not word.isascii()}
    lost = {word: _length(word) - _length(normalize(word)) for word in words}
    losses = [sum(lost.get(word, 0) for word in text.split()) for text in references]
    share = sum(losses) / max(sum(map(_length, references)), 1)
    if len(emptied) > len(references) / 2:
        what, example = f"empties {len(emptied)} of {len(references)} references", emptied[0]
    elif share > _MUCH:
        what = f"removes {share:.0%} of the characters of the references"
        example = references[losses.index(max(losses))]
    else:
        return None
    return (
        f"{name}: the normaliser {normalize.name!r} {what}: {example[:80]!r} becomes "
        f"{normalize(example)[:80]!r}. Error rates ignore what it removes: they compare with no "
        "others in this language. The normaliser 'none' removes nothing"
    )


def _length(text: str) -> int:
    """Number of letters, marks and digits."""
    return sum(unicodedata.category(c)[0] in "LMN" for c in text)
