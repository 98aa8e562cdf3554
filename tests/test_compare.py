"""Two results on one set, compared; and how scores look on a terminal."""

import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from flax_projector import __main__ as program
from flax_projector.inference.compare import bootstrap, compare
from flax_projector.inference.score_table import number_of
from tests.scored import scored, write_scores

SAID = "turn the light on"
LONG = " ".join(["seventeen loud kettles by the door"] * 6)


def columns(line: str) -> int:
    """How many columns of a terminal a line takes."""
    return sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in line)


@pytest.fixture
def show(capsys, monkeypatch, tmp_path):
    """What a command prints about files in the present folder, by lines."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> list[str]:
        program.cli([*args])
        return capsys.readouterr().out.splitlines()

    return run


def test_the_table_of_a_file_is_printed_again_worst_first(show, tmp_path):
    pairs = {
        "a": (SAID, "turn the light on"),
        "b": (SAID, "turn a light"),
        "c": ("go", "no"),
        "d": (SAID, ""),
        "e": ("um", "well"),
        "f": (LONG, LONG.replace("door", "doors", 3)),
    }
    write_scores(tmp_path / "dev.jsonl", scored(pairs, bad=["d"], cut={"c": "max_repeats"}))
    lines = show("score", "dev.jsonl")
    found = [line.split(":")[0] for line in lines if re.match(r"\w+: \d errors? in", line)]
    assert found == ["d", "f", "b", "c"]  # by errors, then by their share
    assert "d: 4 errors in 4 words, could not be read" in lines
    assert "c: 1 error in 1 word, cut by --max-repeats" in lines
    assert lines[lines.index("c: 1 error in 1 word, cut by --max-repeats") + 1 :][:2] == [
        "  said   go",
        "  heard  no",
    ]
    at = lines.index("dev: WER 20.4% over 5 utterances, 2.50 hours")
    assert lines[at + 1].split() == ["total", "replaced", "deleted", "inserted", "rate"]
    assert lines[at + 2].split() == ["words", "49", "5", "5", "0", "20.4%"]
    assert lines[at + 3].split()[0] == "characters"
    told = " ".join(" ".join(lines[at + 4 :]).split())
    assert re.match(r"normaliser english \(transformers [\d.]+, no spellings\) ", told)
    assert "1 clip that could not be read, counted as wrong" in told
    assert "1 reference without a word after normalisation, not counted" in told
    assert "1 hypothesis cut: 1 by --max-repeats" in told
    assert max(map(columns, lines)) <= 80

    excluded = show("score", "dev.jsonl", "--bad-clips", "exclude", "--worst", "1")
    assert [line for line in excluded if re.match(r"\w+: \d error", line)] == [
        "f: 3 errors in 36 words"
    ]
    assert "dev: WER 13.3% over 4 utterances, 2.00 hours" in excluded
    assert "  1 clip that could not be read, excluded" in excluded


def test_several_files_are_told_apart_by_their_paths(show, tmp_path):
    for folder in ("a", "b"):
        write_scores(tmp_path / folder / "dev.jsonl", scored({"x": ("go", "go")}))
    lines = [line for line in show("score", "a/dev.jsonl", "b/dev.jsonl") if "WER" in line]
    assert lines == [f"{x}/dev.jsonl, dev: WER 0.0% over 1 utterance, 0.50 hours" for x in "ab"]


def test_texts_of_any_script_and_length_fit_the_terminal(show, tmp_path):
    texts = {"long": (LONG, LONG + " no"), "\x1b[31mred": ("go", "\x1b[2Jno\nno")}
    texts |= {"one": ("x" * 300, "y" * 300), "今": ("今天" * 60, "今" * 70)}
    write_scores(tmp_path / "a.jsonl", scored(texts))
    write_scores(tmp_path / "b.jsonl", scored({id: (said, "") for id, (said, _) in texts.items()}))
    for lines in (show("score", "a.jsonl"), show("compare", "a.jsonl", "b.jsonl")):
        assert max(map(columns, lines)) <= 80
        assert not [line for line in lines if "\x1b" in line]


def test_characters_come_first_where_they_are_the_headline(show, tmp_path):
    write_scores(tmp_path / "zh.jsonl", scored({"a": ("今天天气", "今天 天汽")}, name="zh"))
    lines = show("score", "zh.jsonl")
    assert "zh: CER 25.0% over 1 utterance, 0.50 hours" in lines
    rows = [line.split()[0] for line in lines if re.match(r"  (words|characters) ", line)]
    assert rows == ["characters", "words"] and lines[0] == "a: 1 error in 4 characters"


def test_an_exact_interval_is_found():
    """One of four utterances has one error more: its number in a resample is binomial."""
    low, high = bootstrap(np.array([0, 0, 1, 0]), np.array([2, 2, 2, 2]))
    assert (low, high) == (0.0, 3 / 8)  # P(none) = 32%, P(more than 3) = 0.4%, P(3 or more) = 5%
    assert bootstrap(np.array([2, 2]), np.array([4, 4])) == (0.5, 0.5)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(100):
        lengths = rng.integers(1, 20, 50)
        differences = rng.binomial(lengths, 0.3) - rng.binomial(lengths, 0.2)
        low, high = bootstrap(differences, lengths)
        covered += low <= 0.1 <= high
    assert 90 <= covered <= 99


def test_memory_does_not_grow_with_the_set(monkeypatch):
    """Resamples of a large set are drawn in parts, with the same result."""
    differences, lengths = np.arange(50) % 3 - 1, np.arange(50) + 1
    whole = bootstrap(differences, lengths)
    monkeypatch.setattr("flax_projector.inference.compare._MAX_DRAWS", 1300)
    assert bootstrap(differences, lengths) == whole == bootstrap(differences, lengths)


def test_a_comparison_tells_the_difference_and_what_changed_most(show, tmp_path):
    a = {f"{i}": (SAID, "turn the lamp on") for i in range(30)} | {"x": (SAID, SAID)}
    b = {f"{i}": (SAID, SAID) for i in range(30)} | {"x": (SAID, "no")}
    write_scores(tmp_path / "a.jsonl", scored(a))
    write_scores(tmp_path / "b.jsonl", scored(dict(reversed(b.items()))))
    lines = show("compare", "a.jsonl", "b.jsonl", "--worst", "2")
    assert lines[:4] == [
        "x: 0 errors in A, 4 in B, of 4 words (+4)",
        f"  said  {SAID}",
        f"  A     {SAID}",
        "  B     no",
    ]
    assert lines[4] == "0: 1 error in A, 0 in B, of 4 words (-1)"
    assert "A  a.jsonl" in lines and "B  b.jsonl" in lines
    told = " ".join(" ".join(lines).split())
    assert "dev: WER 24.2% over 31 utterances" in told and "dev: WER 3.2% over 31" in told
    assert "B - A: -20.97 points of WER, 95% interval -25.00 to " in told
    assert "(10,000 resamples of 31 utterances)" in told
    assert "fewer errors in B: 30 utterances; in A: 1; as many in both: 0" in told
    assert lines[-1] == "  B is better: the interval lies below 0"
    assert max(map(columns, lines)) <= 80
    assert show("compare", "b.jsonl", "a.jsonl")[-1] == "  A is better: the interval lies above 0"
    few = write_scores(tmp_path / "few.jsonl", scored({"x": (SAID, SAID)}))
    assert show("compare", few, few)[-1] == "  too few utterances to tell which is better"
    same = show("compare", "a.jsonl", "a.jsonl")
    assert same[-1] == "  no difference is shown: the interval contains 0"
    assert "B - A: +0.00 points of WER, 95% interval +0.00 to +0.00" in " ".join(same)


@pytest.mark.parametrize(
    ("bad_clips", "pairs", "rates"), [("wrong", 3, (2 / 6, 4 / 6)), ("exclude", 1, (0, 1))]
)
def test_clips_that_one_side_could_not_read_are_excluded_on_both(bad_clips, pairs, rates):
    a = scored({"0": ("go up", ""), "1": ("go up", "go up"), "2": ("go up", "go up")}, bad=["0"])
    b = scored({"0": ("go up", "go up"), "1": ("go up", ""), "2": ("go up", "no")}, bad=["1"])
    found = compare(a, b, bad_clips=bad_clips)
    assert (len(found.pairs), found.a.rate, found.b.rate) == (pairs, *rates)
    assert found.difference == pytest.approx(rates[1] - rates[0])


ONE = {"a": (SAID, SAID), "b": ("go", "go")}


def damaged(line: str, **fields) -> str:
    record = json.loads(line) | fields
    return json.dumps({name: value for name, value in record.items() if value is not ...}) + "\n"


FILES = {
    "no such file": (None, r"x\.jsonl does not exist"),
    "a folder": (Path.mkdir, r"x\.jsonl is a folder: name a file in it"),
    "no bytes": ("", r"x\.jsonl is empty: such files are written by training"),
    "not text": (b"\xff\n", r"x\.jsonl is not text in UTF-8"),
    "cut short": (lambda a, b: a + b[:50], r"x\.jsonl, line 2 is not JSON: "),
    "nested": (lambda a, _: a + 100_000 * "[", r"line 2 is not JSON: it is nested too deeply"),
    "a list": (lambda a, _: a + "[]\n", r"line 2: expected an object, got \[\]"),
    "a manifest": (
        '{"audio": "a.wav", "text": "go"}\n',
        r"line 1: has no id, reference, .*, normalizer_version: such files are written by",
    ),
    "earlier transcripts": (
        '{"id": "a", "reference": "go", "hypothesis": "go", "tokens": [1]}\n',
        r"line 1: has no secs, is_bad, ",
    ),
    "other types": (
        lambda a, _: damaged(a, id=1, secs=-1, is_bad=0, tokens=[True], headline="ser"),
        r"line 1: id is 1, tokens is \[True\], secs is -1, is_bad is 0, headline is 'ser', which",
    ),
    "no number": (lambda a, _: damaged(a, secs=float("nan")), r"line 1: secs is nan"),
    "half an edit": (lambda a, _: damaged(a, words={"length": 4}), r"line 1: has no substitutions"),
    "edited": (
        lambda a, b: a + damaged(b, normalized_hypothesis="no"),
        r"x\.jsonl is damaged: the edits of 'b' are not those of its normalised texts",
    ),
    "the same twice": (lambda a, _: a + a, r"x\.jsonl has 2 utterances with the id 'a'"),
    "two sets": (
        lambda a, b: a + damaged(b, set="test"),
        r"holds more than one set: set is 'dev' and 'test'. Name a file for each",
    ),
}


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("command", ["score", "compare"])
def test_a_file_that_holds_no_scores_is_one_line(what, command, tmp_path):
    """Which names the file and the line."""
    make, message = FILES[what]
    good, path = write_scores(tmp_path / "good.jsonl", scored(ONE)), tmp_path / "x.jsonl"
    lines = Path(good).read_text("utf-8").splitlines(keepends=True)
    if isinstance(make, str | bytes):
        path.write_bytes(make.encode() if isinstance(make, str) else make)
    elif make is Path.mkdir:
        path.mkdir()
    elif make:
        path.write_text(make(*lines), "utf-8")
    files = [str(path)] if command == "score" else [good, str(path)]
    with pytest.raises(SystemExit) as error:
        program.cli([command, *files])
    text = str(error.value.code)
    assert re.search(f"^error: .*{message}", text) and "\n" not in text, text


PAIRS = {
    "other ids": (
        scored({"a": (SAID, SAID), "c": ("go", "go")}),
        r"1 of 2 utterances of A are not in B, such as 'b'; 1 of 2 utterances of B are not in A, "
        r"such as 'c': compare results on the same set",
    ),
    "fewer ids": (scored({"a": (SAID, SAID)}), r"1 of 2 utterances of A are not in B, such as 'b'"),
    "other references": (
        scored({"a": (SAID, SAID), "b": ("stop", "go")}),
        r"the reference of 'b' is 'go' in A and 'stop' in B: compare results on the same set",
    ),
    "another normaliser": (
        scored(ONE, normalizer="basic"),
        r"A was normalised by 'english', B by 'basic': evaluate one of them again, with --normaliz",
    ),
}


@pytest.mark.parametrize("what", PAIRS)
def test_results_that_do_not_pair_are_one_line(what, tmp_path):
    transcripts, message = PAIRS[what]
    a = write_scores(tmp_path / "a.jsonl", scored(ONE))
    b = write_scores(tmp_path / "b.jsonl", transcripts)
    with pytest.raises(SystemExit, match=f"^error: {message}") as error:
        program.cli(["compare", a, b])
    assert "\n" not in str(error.value.code)


def test_nothing_to_compare_or_to_score_is_one_line(tmp_path):
    bad = write_scores(tmp_path / "a.jsonl", scored(ONE, bad=["a", "b"]))
    with pytest.raises(SystemExit, match=r"^error: no clip could be read on both sides: "):
        program.cli(["compare", bad, bad, "--bad-clips", "exclude"])
    with pytest.raises(SystemExit, match=r"^error: dev: no clip could be read whose reference "):
        program.cli(["score", bad, "--bad-clips", "exclude"])


def test_numbers_have_their_nouns():
    nouns = [number_of(count, noun) for noun in ("clip", "hypothesis") for count in (1, 2)]
    assert nouns == ["1 clip", "2 clips", "1 hypothesis", "2 hypotheses"]
