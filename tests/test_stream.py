"""Reading block by block gives what reading at once gives."""

import numpy as np
import pytest
import soundfile

from flax_projector.data import sound
from flax_projector.data.audio import BadAudio, Problem, load_audio
from flax_projector.data.stream import stated_secs, stream_audio
from tests.test_sound import (
    encode,
    with_length,
    with_wav_size,
    without_length,
    without_tag,
)

RATE = 16_000


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Several blocks, as long files have them."""
    monkeypatch.setattr(sound, "_BLOCK_SECS", 1)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_the_samples_are_those_of_load_audio(tmp_path, suffix, channels, rate):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (3 * rate + 77, channels))
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, samples, rate)
    blocks = list(stream_audio(path))
    assert len(blocks) > 2
    atol = 1e-6 if suffix == "mp3" else 0  # its decoder rounds as its buffers lie in memory
    np.testing.assert_allclose(np.concatenate(blocks), load_audio(path), rtol=0, atol=atol)
    assert stated_secs(path) == pytest.approx(3.0, abs=0.2)


@pytest.mark.parametrize(
    "data",
    [
        without_length(encode("flac")),
        with_length(encode("flac"), 2**36 - 1),
        with_wav_size(0),
        with_wav_size(100),
        with_wav_size(0xFFFFFFFF),
        without_tag(encode("mp3")),
        encode("mp3") * 2,
        encode("ogg") * 2,
    ],
    ids=["no length", "other length", "size 0", "small", "pipe", "no tag", "twice", "chained"],
)
def test_a_header_that_is_wrong_does_not_matter(tmp_path, data):
    (tmp_path / "x.bin").write_bytes(data)
    found = np.concatenate(list(stream_audio(tmp_path / "x.bin")))
    np.testing.assert_allclose(found, load_audio(tmp_path / "x.bin"), rtol=0, atol=1e-6)
    assert len(found) >= 2 * RATE


@pytest.mark.parametrize("suffix", ["wav", "aiff", "flac", "ogg", "mp3"])
def test_a_file_whose_end_is_missing_is_an_error(tmp_path, suffix):
    data = encode(suffix)
    (tmp_path / "x.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadAudio) as caught:
        list(stream_audio(tmp_path / "x.bin"))
    with pytest.raises(BadAudio) as whole:
        load_audio(tmp_path / "x.bin")
    assert caught.value.problem == whole.value.problem


def test_samples_are_checked_when_they_are_reached(tmp_path):
    samples = np.zeros(5 * RATE)
    samples[4 * RATE] = np.nan
    soundfile.write(tmp_path / "x.wav", samples, RATE, subtype="FLOAT")
    blocks = stream_audio(tmp_path / "x.wav")
    assert len(next(blocks)) == RATE
    with pytest.raises(BadAudio, match="not finite"):
        list(blocks)


def test_channels_that_cancel_each_other_are_not_averaged(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 3 * RATE)
    soundfile.write(tmp_path / "x.wav", np.stack([samples, -samples], axis=1), RATE)
    assert np.concatenate(list(stream_audio(tmp_path / "x.wav"))).std() > 0.2


@pytest.mark.parametrize("num_samples", [0, 319])
def test_a_file_shorter_than_a_frame_is_an_error(tmp_path, num_samples):
    soundfile.write(tmp_path / "x.wav", np.zeros(num_samples), RATE)
    with pytest.raises(BadAudio) as caught:
        list(stream_audio(tmp_path / "x.wav"))
    assert caught.value.problem == Problem.TOO_SHORT


def test_nothing_is_decoded_in_advance(tmp_path, monkeypatch):
    """Neither of a file whose header is right, nor of one that has to be read to its end."""
    read = soundfile.SoundFile.read
    sizes = []

    def counted(self, frames, **options):
        sizes.append(frames)
        return read(self, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    for name, data in (("right", encode("wav")), ("wrong", without_length(encode("flac")))):
        (tmp_path / name).write_bytes(data)
        assert len(next(stream_audio(tmp_path / name))) == RATE
    assert sizes == [RATE, RATE]
