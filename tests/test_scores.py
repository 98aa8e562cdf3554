"""Error rates against hand counts."""

import dataclasses

import pytest

from flax_projector.training.scores import (
    Edits,
    ScoredTranscript,
    Summary,
    counted,
    score_transcripts,
    summarize,
)
from tests.scored import NORMALIZERS, scored, transcript


def pairs_of(references, hypotheses):
    return {str(i): pair for i, pair in enumerate(zip(references, hypotheses, strict=True))}


@pytest.mark.parametrize(
    ("references", "hypotheses", "expected"),
    [
        (["turn the light on"], ["turn the light on"], Edits(4)),
        (["turn the light on"], ["turn a light on"], Edits(4, substitutions=1)),
        (["turn the light on"], ["turn the light back on"], Edits(4, insertions=1)),
        (["turn the light on"], ["turn light on"], Edits(4, deletions=1)),
        (["turn the light on"], [""], Edits(4, deletions=4)),
        (["go"], ["stop right there"], Edits(1, substitutions=1, insertions=2)),
        (["one two go", "stop"], ["one two go", "left"], Edits(3, substitutions=1)),  # "12 go"
        (["turn the light on", "go"], ["turn the light on", "stop"], Edits(5, substitutions=1)),
        (["Turn the LIGHT on!"], ["turn, the light on"], Edits(4)),
        (["I'm twenty five"], ["i am 25"], Edits(3)),
        (["well um go"], ["well go"], Edits(2)),  # fillers
        (["go [laughter]"], ["go"], Edits(1)),
        (["", "go"], ["noise", "go"], Edits(1)),  # no word to compare with
        (["um", "go left now"], ["stop", "left now go"], Edits(3, deletions=1, insertions=1)),
    ],
)
def test_word_errors_equal_a_hand_count(references, hypotheses, expected):
    summary = summarize(scored(pairs_of(references, hypotheses)))
    assert (summary.headline, summary.words) == ("wer", expected)
    assert summary.rate == summary.wer == expected.errors / expected.length


@pytest.mark.parametrize(
    ("said", "heard", "headline", "expected"),
    [
        ("go left", "go lift", "wer", Edits(7, substitutions=1)),  # the space counts
        ("go left", "goleft", "wer", Edits(7, deletions=1)),
        ("오늘 날씨", "오늘날씨", "wer", Edits(5, deletions=1)),  # Korean has spaces
        ("今天天气很好", "今天天汽好", "cer", Edits(6, substitutions=1, deletions=1)),
        ("今天，天气很好", "今天天气 很好", "cer", Edits(6)),  # spaces do not count
        ("きょうはいい天気", "きょうはいい天気です", "cer", Edits(8, insertions=2)),
        ("สวัสดี", "", "cer", Edits(6, deletions=6)),
        ("我用 iPhone 打", "我用 iPhone", "wer", Edits(11, deletions=2)),  # most letters are Latin
    ],
)
def test_character_errors_equal_a_hand_count(said, heard, headline, expected):
    summary = summarize(scored({"a": (said, heard)}, normalizer="none" if "ส" in said else "basic"))
    assert (summary.headline, summary.characters) == (headline, expected)
    assert summary.cer == expected.rate and (summary.rate == summary.cer) == (headline == "cer")


def test_the_headline_is_that_of_most_letters_of_the_set():
    for chinese, headline in ((1, "wer"), (9, "cer")):
        pairs = pairs_of(["go left"] + ["今天"] * chinese, ["go"] * (1 + chinese))
        assert {t.headline for t in scored(pairs)} == {headline}


def test_everything_that_was_known_of_an_utterance_is_kept():
    heard = transcript("a", "Go!", "go", tokens=(3, 1), secs=None, cut_by="max_repeats")
    (found,) = score_transcripts("dev", [heard], NORMALIZERS["basic"])
    assert found == ScoredTranscript(
        **dataclasses.asdict(heard),
        normalized_reference="go",
        normalized_hypothesis="go",
        words=Edits(1),
        characters=Edits(2),
        set="dev",
        headline="wer",
        normalizer="basic",
        normalizer_version=NORMALIZERS["basic"].version,
    )


@pytest.mark.parametrize(
    ("bad_clips", "num_utterances", "words"),
    [("wrong", 3, Edits(5, deletions=2, insertions=1)), ("exclude", 2, Edits(3, insertions=1))],
)
def test_clips_that_could_not_be_read_count_as_wrong_or_not_at_all(
    bad_clips, num_utterances, words
):
    pairs = {
        "a": ("go left", "go left"),
        "b": ("stop it", ""),
        "c": ("go", "go go"),
        "d": ("", "x"),
    }
    transcripts = scored(pairs, bad=["b"], cut={"c": "max_repeats"})
    summary = summarize(transcripts, bad_clips=bad_clips)
    assert summary == Summary(
        set="dev",
        headline="wer",
        normalizer="english",
        normalizer_version=NORMALIZERS["english"].version,
        bad_clips=bad_clips,
        num_utterances=num_utterances,
        num_bad=1,
        num_empty=1,
        cut_by={"max_new_tokens": 0, "tokens_per_sec": 0, "max_repeats": 1},
        secs=1800.0 * num_utterances,
        words=words,
        characters=summary.characters,
    )
    assert len(counted(transcripts, bad_clips=bad_clips)) == num_utterances


@pytest.mark.parametrize("said", ["um", "go"])
def test_a_set_of_which_nothing_is_left_is_an_error_that_names_it(said):
    with pytest.raises(ValueError, match=r"^dev: no clip could be read whose reference has a word"):
        summarize(scored({"a": (said, "")}, bad=["a"]), bad_clips="exclude")
