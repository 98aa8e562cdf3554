"""The word error rate against hand counts."""

import json
import re
from typing import Any

import pytest

from flax_projector.training.wer import find_loss, make_normalizer, word_error_rate


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


@pytest.mark.parametrize("text", ["{", 100_000 * "[", "\ud800"])
def test_damaged_spellings_are_an_error_that_names_the_file(tmp_path, text) -> None:
    (tmp_path / "normalizer.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"normalizer.json is not JSON: "):
        make_normalizer(tmp_path)


@pytest.mark.parametrize("references", [[], [""], ["", "Um"]])
def test_references_without_a_word_are_an_error(normalize, references) -> None:
    with pytest.raises(ValueError, match="no reference with a word"):
        word_error_rate(references, references, normalize)


def test_every_reference_needs_a_hypothesis(normalize) -> None:
    with pytest.raises(ValueError, match="shorter"):
        word_error_rate(["go", "stop"], ["go"], normalize)


HINDI, BURMESE = "मुझे हिन्दी में बात करना पसंद है", "မြန်မာစကား ပြောတတ်သည်"


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ([HINDI, "go"], r"removes 39% of the characters .*: 'मुझे .* becomes 'मझ ह नद म ब त"),
        ([BURMESE], r"removes \d\d% of the characters"),
        (["నేను ప్రతిరోజూ", "நான் தமிழ்"], r"removes \d\d% of the characters .*: 'నేను"),
        (["أُحِبُّ أَنْ أَتَعَلَّمَ"], r"removes 55%"),  # with vowels
        (["👍", "um", "go"], "empties 2 of 3 references: '👍' becomes ''"),
        (["[laughter]", "(noise)"], "empties 2 of 2 references"),
        (["one two three four five"] * 9, None),  # 12345
        (["I'm twenty five, um, percent", "Turn the LIGHT on!"], None),
        (["J'ai été très étonné par l'été à Nîmes", "Größe und Äpfel"], None),
        (["Hôm nay thời tiết rất đẹp", "Σήμερα ο καιρός είναι καλός"], None),
        (["Сегодня очень хорошая погода", "今天天气很好", "오늘 날씨가 정말 좋네요"], None),
        (["אני אוהב ללמוד עברית", "أحب أن أتعلم اللغة العربية كل يوم"], None),
        (["turn the light on"] * 20 + [HINDI], None),  # a name or a loan word here and there
        (["", "go"], None),
        ([], None),
    ],
)
def test_references_that_lose_much_in_normalisation_are_found(normalize, references, message):
    found = find_loss(references, normalize)
    assert (found is None) == (message is None)
    if message and found:
        assert re.search(message, found) and "compare with no others" in found
