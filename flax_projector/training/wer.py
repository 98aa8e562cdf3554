"""Word error rate, after Whisper's text normalisation."""

import json
from collections.abc import Callable
from pathlib import Path

import jiwer
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer


def make_normalizer(encoder_folder: Path) -> EnglishTextNormalizer:
    """Whisper's English text normaliser, with the spellings from the encoder's folder, if any."""
    path = encoder_folder / "normalizer.json"
    spellings = json.loads(path.read_text()) if path.is_file() else {}
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
