"""The word error rate against hand counts."""

import json
from typing import Any

import pytest

from flax_projector.training.wer import make_normalizer, word_error_rate


@pytest.fixture
def normalize(tmp_path) -> Any:
    (tmp_path / "normalizer.json").write_text(json.dumps({"colour": "color"}))
    return make_normalizer(tmp_path)


@pytest.mark.parametrize(
    ("references", "hypotheses", "expected"),
    [
        (["turn the light on"], ["turn the light on"], 0),
        (["turn the light on"], ["turn a light on"], 1 / 4),  # substitution
        (["turn the light on"], ["turn the light back on"], 1 / 4),  # insertion
        (["turn the light on"], ["turn light on"], 1 / 4),  # deletion
        (["turn the light on"], [""], 1),
        (["go"], ["stop right there"], 3),  # one substitution, two insertions
        (["one two go", "stop"], ["one two go", "left"], 1 / 3),  # "one two" becomes "12"
        (["turn the light on", "go"], ["turn the light on", "stop"], 1 / 5),  # not a mean of 0, 1
        (["Turn the LIGHT on!"], ["turn, the light on"], 0),
        (["the colour"], ["the color"], 0),
        (["I'm twenty five"], ["i am 25"], 0),
        (["well um go"], ["well go"], 0),  # fillers
        (["go [laughter]"], ["go"], 0),
        (["", "go"], ["noise", "go"], 0),  # no word to compare with
    ],
)
def test_word_error_rate_equals_a_hand_count(normalize, references, hypotheses, expected) -> None:
    assert word_error_rate(references, hypotheses, normalize) == pytest.approx(expected)


def test_spellings_come_from_the_folder(tmp_path) -> None:
    assert word_error_rate(["colour"], ["color"], make_normalizer(tmp_path)) == 1


@pytest.mark.parametrize("references", [[], [""], ["", "Um"]])
def test_references_without_a_word_are_an_error(normalize, references) -> None:
    with pytest.raises(ValueError, match="no reference with a word"):
        word_error_rate(references, references, normalize)


def test_every_reference_needs_a_hypothesis(normalize) -> None:
    with pytest.raises(ValueError, match="shorter"):
        word_error_rate(["go", "stop"], ["go"], normalize)
