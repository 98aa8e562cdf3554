"""What normalisers do to texts, and which sets they suit."""

import importlib.metadata
import json
import re
from pathlib import Path

import pytest

from flax_projector.training.normalizers import check_references, make_normalizers
from tests.scored import NORMALIZERS


@pytest.mark.parametrize(
    ("text", "english", "basic", "none"),
    [
        ("Turn the LIGHT on!", "turn the light on", "turn the light on", "Turn the LIGHT on!"),
        ("I'm twenty five", "i am 25", "i m twenty five", "I'm twenty five"),
        (" two\t\n words \u00a0", "2 words", "two words", "two words"),
        ("well um go [laughter]", "well go", "well um go", "well um go [laughter]"),
        ("Été, café", "ete cafe", "été café", "Été, café"),
        ("今天，天气", "今天 天气", "今天 天气", "今天，天气"),
        ("ete\u0301", "ete", "eté", "eté"),  # whatever form the source is in
        ("um", "", "um", "um"),
        ("?!", "", "", "?!"),
    ],
)
def test_texts_are_normalised_as_chosen(text, english, basic, none):
    for name, expected in zip(NORMALIZERS, (english, basic, none), strict=True):
        assert NORMALIZERS[name](text) == expected, name


def test_spellings_come_from_the_folder_and_are_part_of_the_version(tmp_path):
    versions = {NORMALIZERS["english"].version}
    for spellings in ({"colour": "color"}, {"colour": "color", "grey": "gray"}):
        (tmp_path / "normalizer.json").write_text(json.dumps(spellings))
        found = make_normalizers(tmp_path)
        assert found["english"]("the colour") == "the color"
        assert (found["basic"]("the colour"), found["none"]("colour")) == ("the colour", "colour")
        versions.add(found["english"].version)
    assert len(versions) == 3
    release = f"transformers {importlib.metadata.version('transformers')}"
    assert NORMALIZERS["english"].version == f"{release}, no spellings"
    assert (NORMALIZERS["basic"].version, NORMALIZERS["none"].version) == (release, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"is not JSON: "),
        (100_000 * "[", r"is not JSON: it is nested too deeply"),
        ("\ud800", r"is not JSON: "),
        ("[]", r"is no table of spellings: "),
        ('{"colour": 1}', r"is no table of spellings: "),
    ],
)
def test_damaged_spellings_are_an_error_that_names_the_file(tmp_path, text, message):
    (tmp_path / "normalizer.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=f"normalizer.json {message}"):
        make_normalizers(tmp_path)


@pytest.mark.parametrize("references", [[], [""], ["", "Um"]])
def test_a_set_without_a_word_is_an_error_that_names_it(references):
    with pytest.raises(ValueError, match=r"^dev: none of \d references has a word in it after"):
        check_references("dev", references, NORMALIZERS["english"])


HINDI, BURMESE = "मुझे हिन्दी में बात करना पसंद है", "မြန်မာစကား ပြောတတ်သည်"


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ([HINDI, "go"], r"removes 39% of the characters .*: 'मुझे .* becomes 'मझ ह नद म ब त"),
        ([BURMESE], r"removes \d\d% of the characters"),
        (["నేను ప్రతిరోజూ", "நான் தமிழ்"], r"removes \d\d% of the characters .*: 'నేను"),
        (["أُحِبُّ أَنْ أَتَعَلَّمَ"], r"removes 55%"),  # with vowels
        (["👍", "um", "go"], "empties 2 of 3 references: '👍' becomes ''"),
        (["[laughter]", "(noise)", "go"], "empties 2 of 3 references"),
        (["one two three four five"] * 9, None),  # 12345
        (["I'm twenty five, um, percent", "Turn the LIGHT on!"], None),
        (["J'ai été très étonné par l'été à Nîmes", "Größe und Äpfel"], None),
        (["Hôm nay thời tiết rất đẹp", "Σήμερα ο καιρός είναι καλός"], None),
        (["Сегодня очень хорошая погода", "今天天气很好", "오늘 날씨가 정말 좋네요"], None),
        (["אני אוהב ללמוד עברית", "أحب أن أتعلم اللغة العربية كل يوم"], None),
        (["turn the light on"] * 20 + [HINDI], None),  # a name or a loan word here and there
        (["", "go"], None),
    ],
)
def test_references_that_lose_much_in_normalisation_are_found(references, message):
    found = check_references("dev", references, NORMALIZERS["english"])
    assert (found is None) == (message is None)
    if message and found:
        assert re.search(f"^dev: the normaliser 'english' {message}", found)
        assert "compare with no others" in found


@pytest.mark.parametrize(("name", "loses"), [("basic", True), ("none", False)])
def test_other_normalisers_are_looked_at_too(name, loses):
    assert (check_references("dev", [HINDI], NORMALIZERS[name]) is not None) == loses


def test_without_a_folder_there_are_no_spellings():
    assert make_normalizers(Path("nowhere"))["english"]("colour") == "colour"
