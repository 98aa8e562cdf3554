"""Decoding: any format, rate, channel count and place -> 16 kHz mono, or a named problem."""

import re
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile

from flax_projector.data.audio import (
    BadAudio,
    Problem,
    check_samples,
    load_audio,
    read_duration,
)

FORMATS = ["wav", "flac", "ogg", "mp3"]


def tone(rate: int, secs: float = 1.0, hz: float = 440) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(round(secs * rate)) / rate)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("suffix", FORMATS)
def test_any_rate_and_channels_become_16_khz_mono(tmp_path, rate, channels, suffix):
    sound = tone(rate)
    stereo = np.stack([sound, 0 * sound] if channels == 2 else [sound], axis=1)
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, stereo, rate)
    samples = load_audio(path)
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert abs(len(samples) - 16_000) <= 1
    assert read_duration(path) == pytest.approx(1.0, abs=1e-3)
    spectrum = np.abs(np.fft.rfft(samples[:16_000]))
    assert np.argmax(spectrum) == 440
    assert spectrum.max() / 8_000 == pytest.approx(0.5 / channels, rel=0.05)  # the mean of both


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_segment_is_that_part_of_the_file(tmp_path, rate, suffix):
    path = tmp_path / f"long.{suffix}"
    soundfile.write(path, np.concatenate([tone(rate, hz=hz) for hz in (300, 600, 900)]), rate)
    segment = load_audio(path, offset=1.0, duration=1.0)
    assert abs(len(segment) - 16_000) <= 1
    whole = load_audio(path)[16_000:32_000]
    # Away from the edges, which the resampler and the lossy codecs smear.
    np.testing.assert_allclose(segment[2000:14_000], whole[2000:14_000], atol=0.02)


def test_only_the_segment_is_decoded(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "long.wav", tone(16_000, 60), 16_000)
    read, asked = soundfile.SoundFile.read, []

    def count(self, frames=-1, **kwargs):
        asked.append(frames)
        return read(self, frames, **kwargs)

    monkeypatch.setattr(soundfile.SoundFile, "read", count)
    assert len(load_audio(tmp_path / "long.wav", offset=30.0, duration=2.0)) == 32_000
    with pytest.raises(BadAudio):
        load_audio(tmp_path / "long.wav", duration=2.0)
    assert asked == [32_000]


@pytest.mark.parametrize("duration", [0.5, 0.46, 0.54])
def test_a_rounded_duration_cuts_nothing(tmp_path, duration):
    soundfile.write(tmp_path / "x.wav", tone(16_000, 1.5), 16_000)
    assert len(load_audio(tmp_path / "x.wav", offset=1.0, duration=duration)) == 8_000
    assert len(load_audio(tmp_path / "x.wav", duration=1.0 + duration)) == 24_000


@pytest.mark.parametrize("offset", [None, 0.25])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_url_gives_the_samples_of_the_file(tmp_path, suffix, offset):
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, tone(16_000), 16_000)
    url = f"memory://clips/{path.name}"
    fsspec.filesystem("memory").pipe_file(f"/clips/{path.name}", path.read_bytes())
    np.testing.assert_array_equal(load_audio(url, offset=offset), load_audio(path, offset=offset))
    assert read_duration(url) == read_duration(path)


@pytest.mark.parametrize(
    ("samples", "kwargs", "problem", "message"),
    [
        (None, {}, Problem.MISSING_FILE, "x.wav does not exist"),
        (b"not audio", {}, Problem.UNDECODABLE, "x.wav is not a readable audio file"),
        (b"", {}, Problem.UNDECODABLE, "x.wav is (empty|not a readable audio file)"),
        (np.zeros(0), {}, Problem.TOO_SHORT, "has 0 samples"),
        (np.zeros(319), {}, Problem.TOO_SHORT, "319 samples at 16 kHz; an encoder frame takes 320"),
        (
            np.zeros(16_000),
            {"duration": 0.9},
            Problem.WRONG_DURATION,
            "lasts 1.00 s, not 0.90 s as stated",
        ),
        (
            np.zeros(16_000),
            {"duration": 1.1},
            Problem.WRONG_DURATION,
            "lasts 1.00 s, not 1.10 s as stated",
        ),
        (np.zeros(16_000), {"offset": 0.5, "duration": 1.0}, Problem.WRONG_DURATION, "from 0.5 s"),
        (
            np.zeros(16_000),
            {"offset": 7.0, "duration": 1.0},
            Problem.WRONG_DURATION,
            "lasts 0.00 s",
        ),
    ],
)
@pytest.mark.parametrize("folder", ["local", "memory://bad"])
def test_what_is_wrong_with_a_clip_has_a_name(tmp_path, samples, kwargs, problem, message, folder):
    path = tmp_path / "x.wav"
    if isinstance(samples, bytes):
        path.write_bytes(samples)
    elif samples is not None:
        soundfile.write(path, samples, 16_000, subtype="FLOAT")
    audio: str | Path = path
    if folder != "local":
        audio = f"{folder}/x.wav"
        fs = fsspec.filesystem("memory")
        if samples is None:
            fs.rm("/bad", recursive=True) if fs.exists("/bad") else None
        else:
            fs.pipe_file("/bad/x.wav", path.read_bytes())
    with pytest.raises(BadAudio, match=message) as caught:
        load_audio(audio, **kwargs)
    assert caught.value.problem == problem


def test_a_file_that_ends_before_its_header_says_is_not_used(tmp_path):
    soundfile.write(tmp_path / "x.flac", np.random.default_rng(0).uniform(-1, 1, 64_000), 16_000)
    whole = (tmp_path / "x.flac").read_bytes()
    (tmp_path / "x.flac").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadAudio) as caught:
        load_audio(tmp_path / "x.flac")
    assert caught.value.problem in (Problem.WRONG_DURATION, Problem.UNDECODABLE)


@pytest.mark.parametrize("gain", [-0.999, -0.97])
@pytest.mark.parametrize("loudest", [0, 1])
def test_of_channels_that_cancel_each_other_the_loudest_is_taken(tmp_path, gain, loudest):
    left = tone(16_000)
    channels = np.stack([left, gain * left], axis=1)[:, :: 1 - 2 * loudest]
    soundfile.write(tmp_path / "x.wav", channels, 16_000, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "x.wav"), left, atol=1e-6)


@pytest.mark.parametrize(
    ("others", "expected"),
    [([0], 1 / 2), ([0] * 7, 1 / 8), ([1], 1), ([-0.5], 1 / 4)],
)
def test_other_channels_are_averaged(tmp_path, others, expected):
    left = tone(16_000)
    channels = np.stack([left, *(gain * left for gain in others)], axis=1)
    soundfile.write(tmp_path / "x.wav", channels, 16_000, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "x.wav"), expected * left, atol=1e-6)


@pytest.mark.parametrize(
    ("samples", "problem", "message"),
    [
        (np.zeros(16_000), Problem.SILENT, "x.wav is silent"),
        (np.full(16_000, 0.3), Problem.SILENT, "is silent"),  # an offset of the recorder
        (2e-5 * tone(16_000), Problem.SILENT, "is silent: its level is"),
        (6 * tone(16_000), Problem.TOO_LOUD, "has a sample of 3; full scale is 1"),
        (np.clip(4 * tone(16_000), -1, 1), Problem.CLIPPED, "clipped: 6.% of its samples"),
        (tone(16_000), None, ""),
        (1e-3 * tone(16_000), None, ""),  # 66 dB below full scale
        (1.9 * tone(16_000), None, ""),
    ],
)
def test_what_may_be_no_speech_is_doubtful(samples, problem, message):
    doubt = check_samples("x.wav", samples.astype(np.float32))
    assert (doubt and doubt.problem) == problem
    if doubt:
        assert re.search(message, str(doubt))


@pytest.mark.parametrize(
    ("value", "problem", "message"),
    [
        (np.nan, Problem.NOT_FINITE, "x.wav has samples that are not finite"),
        (np.inf, Problem.NOT_FINITE, "x.wav has samples that are not finite"),
        (-np.inf, Problem.NOT_FINITE, "x.wav has samples that are not finite"),
        (16_269.0, Problem.IMPOSSIBLE, r"x.wav has a sample of .*; full scale is 1"),
        (-1e19, Problem.IMPOSSIBLE, r"x.wav has a sample of .*e[+]1.; full scale is 1"),
    ],
)
@pytest.mark.parametrize("rate", [16_000, 48_000])
@pytest.mark.parametrize("channels", [(1,), (1, 0), (0, 1), (1, -1), (1, 1, 1)])
def test_what_is_no_speech_cannot_be_used(tmp_path, value, problem, message, rate, channels):
    mono = tone(rate)
    mono[5000:5100] = value
    with np.errstate(invalid="ignore"):  # 0 * inf
        samples = mono[:, None] * channels
    soundfile.write(tmp_path / "x.wav", samples, rate, subtype="FLOAT")
    with pytest.raises(BadAudio, match=message) as caught:
        check_samples("x.wav", load_audio(tmp_path / "x.wav"))
    assert caught.value.problem == problem


def test_a_clip_that_cannot_be_fetched_does_not_end_the_run():
    class Broken:
        def file(self):
            return ""

        def fetch(self):
            raise RuntimeError("503")

        def stamp(self):
            return []

    with pytest.raises(BadAudio, match="RuntimeError: 503") as caught:
        load_audio(Broken())
    assert caught.value.problem == Problem.UNREADABLE
