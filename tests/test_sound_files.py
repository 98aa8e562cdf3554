"""Files of any length: their order, their errors, and what is written of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from flax_projector.inference.formats import render
from flax_projector.inference.sound_files import Heard, Segment, hear_files
from flax_projector.training.scores import Transcript
from tests.media import clips, encode, spoken

RATE = 16_000


def hear(pieces, bound, size):
    """Says how long each piece is."""
    assert 0 < len(pieces) <= size
    texts = [f" {len(piece.samples) / RATE:.2f}\n " for piece in pieces]
    assert all(float(text) <= bound for text in texts)
    return [Transcript("", "", text, (), None, is_bad=False, cut_by=None) for text in texts]


def heard_in(*paths: Path) -> list[Heard]:
    return list(hear_files(list(map(str, paths)), hear, bounds=(2.0, 4.0), sizes=(5, 3)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Long files and short ones, good ones and bad ones."""
    folder, speech = tmp_path_factory.mktemp("files"), clips(8)
    samples, _ = spoken(speech, pause_secs=1.0)
    soundfile.write(folder / "long.flac", samples, RATE)
    (folder / "long.m4a").write_bytes(encode(samples, RATE, "ipod"))
    for i in range(3):
        soundfile.write(folder / f"short{i}.wav", speech[i], RATE)
    soundfile.write(folder / "silence.wav", np.zeros(20 * RATE), RATE)
    soundfile.write(folder / "quiet.wav", np.zeros(RATE), RATE)
    late = np.concatenate([samples, np.full(RATE, np.nan)])
    soundfile.write(folder / "late.wav", late, RATE, subtype="FLOAT")
    return folder


def test_results_are_in_the_order_of_the_files_whatever_was_batched_together(folder):
    names = ["short2.wav", "long.flac", "late.wav", "short0.wav", "missing.wav", "long.m4a"]
    found = heard_in(*(folder / name for name in (*names, "silence.wav", "quiet.wav")))
    assert [Path(heard.path).name for heard in found] == [*names, "silence.wav", "quiet.wav"]
    short, flac, late, _, missing, m4a, silence, quiet = found
    assert short.segments == (Segment(0.0, short.secs, short.text, None),)
    assert f"{short.secs:.2f}" == short.text
    assert len(flac.segments) == len(m4a.segments) == 8
    for a, b in zip(flac.segments, m4a.segments, strict=True):
        assert a.start == pytest.approx(b.start, abs=0.2)
    assert flac.text == " ".join(segment.text for segment in flac.segments)
    assert flac.secs == soundfile.info(flac.path).duration
    for bad, message in {
        late: "late.wav has samples that are not finite",
        missing: "missing.wav does not exist",
        silence: "silence.wav: no speech was found in its 20.0 s",
        quiet: "quiet.wav: no speech was found in its 1.0 s",
    }.items():
        assert not bad.segments and str(bad.error).endswith(message)


def test_a_file_is_given_before_those_behind_it_are_read(folder):
    paths = [str(folder / "long.flac")] * 2 + [str(folder / "gone.wav")]
    results = hear_files(paths, hear, bounds=(4.0,), sizes=(1,))
    assert next(results).error is None
    soundfile.write(folder / "gone.wav", clips(1)[0], RATE)
    assert [heard.error for heard in results] == [None, None]
    (folder / "gone.wav").unlink()


HEARD = [
    Heard(
        "a\tb.wav",
        3725.5,
        (
            Segment(0.0, 1.0216, "one <b> & 1", None),
            Segment(3723.0004, 3725.5, "two", "max_repeats"),
        ),
    ),
    Heard("c\udcff.wav", 1.0, (Segment(0.0, 1.0, "", None),)),
]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("text", "a\\tb.wav\tone <b> & 1 two\nc\\udcff.wav\t\n"),
        (
            "srt",
            "1\n00:00:00,000 --> 00:00:01,022\none <b> & 1\n\n"
            "2\n01:02:03,000 --> 01:02:05,500\ntwo\n\n",
        ),
        (
            "vtt",
            "WEBVTT\n\n00:00:00.000 --> 00:00:01.022\none &lt;b&gt; &amp; 1\n\n"
            "01:02:03.000 --> 01:02:05.500\ntwo\n\nWEBVTT\n\n",
        ),
    ],
)
def test_formats(form, expected):
    assert "".join(render(form, HEARD)) == expected


@pytest.mark.parametrize("count", [0, 1, 2])
def test_json(count):
    files = HEARD[:count]
    text = "".join(render("json", files))
    records = json.loads(text.encode())
    assert records == [json.loads(line) for line in render("jsonl", files)]
    assert [record["audio"] for record in records] == [heard.path for heard in files]
    if files:
        assert records[0]["text"] == "one <b> & 1 two" and records[0]["secs"] == 3725.5
        assert records[0]["segments"][1] == {
            "start": 3723.0,
            "end": 3725.5,
            "text": "two",
            "cut_by": "max_repeats",
        }
