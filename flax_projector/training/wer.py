"""Word error rate, after Whisper's text normalisation."""

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import jiwer
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from flax_projector.files import parse_json

# English and other European languages, Chinese and Korean lose nothing, Thai a sixth; scripts whose
# vowels are marks, such as Devanagari, almost half.
_MUCH = 0.25


def make_normalizer(encoder_folder: Path) -> EnglishTextNormalizer:
    """Whisper's English text normaliser, with the spellings from the encoder's folder, if any.

    Raises:
      ValueError: if the file with the spellings is damaged.
    """
    path, spellings = encoder_folder / "normalizer.json", {}
    if path.is_file():
        try:
            spellings = parse_json(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    return EnglishTextNormalizer(spellings)


def word_error_rate(
    references: list[str], hypotheses: list[str], normalize: Callable[[str], str]
) -> float:
    """Edits per reference word over all utterances together, after normalisation.

    References that the normaliser empties ("um") are left out, with their hypotheses.

    Raises:
      ValueError: if that leaves no reference.
    """
    pairs = [(normalize(r), normalize(h)) for r, h in zip(references, hypotheses, strict=True)]
    pairs = [(reference, hypothesis) for reference, hypothesis in pairs if reference]
    if not pairs:
        raise ValueError("no reference with a word in it: there is nothing to score")
    return jiwer.wer([r for r, _ in pairs], [h for _, h in pairs])


def find_loss(references: Sequence[str], normalize: Callable[[str], str]) -> str | None:
    """What the normaliser takes away from references that are not English, if that is much.

    Numbers become shorter ("twenty five" becomes "25"), so only words that are not ASCII count.

    Returns:
      One line for the log, or None.
    """
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
        f"Whisper's normaliser for English {what}: {example[:80]!r} becomes "
        f"{normalize(example)[:80]!r}. Word error rates ignore what it removes: they compare with "
        "no others in this language"
    )


def _length(text: str) -> int:
    """Number of letters, marks and digits."""
    return sum(unicodedata.category(c)[0] in "LMN" for c in text)
