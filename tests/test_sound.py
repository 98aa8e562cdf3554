"""Sound files whose headers are missing or wrong: their real length, or an error; never a part."""

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from flax_projector.data.audio import BadAudio, Problem, load_audio, read_duration

RATE = 16_000
FAULTS = os.environ.get("FLAX_PROJECTOR_FAULTS")  # a folder of files that other programs wrote


def make_speech() -> np.ndarray:
    """A quiet second and a loud one, so that a variable bit rate varies: f32[2 * RATE]."""
    rng = np.random.default_rng(0)
    return np.concatenate([scale * rng.uniform(-1, 1, RATE) for scale in (1e-4, 0.5)])


def encode(suffix: str, subtype: str | None = None, endian: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, make_speech(), RATE, format=suffix, subtype=subtype, endian=endian)
    return file.getvalue()


def with_wav_size(size: int, *, behind: bytes = b"", endian: str = "LITTLE") -> bytes:
    """A wav file whose header states another size of its samples."""
    data = encode("wav", endian=endian)
    at = data.index(b"data") + 4
    order = "big" if endian == "BIG" else "little"
    return data[:at] + size.to_bytes(4, order) + data[at + 4 :] + behind


def without_length(flac: bytes) -> bytes:
    """What a FLAC encoder writes to a pipe: the header states no number of samples and no hash."""
    data = bytearray(flac)
    data[21] &= 0xF0
    data[22:42] = bytes(20)
    return bytes(data)


def with_length(flac: bytes, num_samples: int) -> bytes:
    """A FLAC file that states another number of samples, in 36 bits."""
    data = bytearray(flac)
    data[21] = data[21] & 0xF0 | num_samples >> 32
    data[22:26] = (num_samples & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(data)


def with_frames(mp3: bytes, num_frames: int) -> bytes:
    """An mp3 file whose tag states another number of frames."""
    at = re.search(rb"Xing|Info", mp3).end() + 4  # type: ignore[union-attr]
    return mp3[:at] + num_frames.to_bytes(4, "big") + mp3[at + 4 :]


def without_tag(mp3: bytes) -> bytes:
    """An mp3 file without its first frame, which states the length."""
    return mp3[mp3.index(mp3[:2], 4) :]


MP3_DELAY = 0.13  # seconds that an encoder adds, which the tag says to drop; and the tag's frame


@pytest.mark.parametrize(
    ("make", "secs", "tolerance"),
    [
        (lambda: without_length(encode("flac")), 2, 0),
        (lambda: with_length(encode("flac"), 2**36 - 1), 2, 0),
        (lambda: without_tag(encode("mp3")), 2, MP3_DELAY),
        (lambda: with_frames(encode("mp3"), 2**31 - 1), 2, MP3_DELAY),
        (lambda: encode("mp3") * 2, 4, 2 * MP3_DELAY),
        (lambda: encode("mp3") + without_tag(encode("mp3")), 4, 2 * MP3_DELAY),
        (lambda: without_tag(encode("mp3")) + encode("mp3"), 4, 2 * MP3_DELAY),
        (lambda: encode("ogg") * 2, 4, 0),
        (lambda: encode("ogg", "OPUS") * 3, 6, 0),
        (lambda: with_wav_size(0), 2, 0),
        (lambda: with_wav_size(100), 2, 0),  # a recorder that did not live to correct it
        (lambda: with_wav_size(0xFFFFFFFF), 2, 0),
        (lambda: with_wav_size(0x80000000), 2, 0),
        (lambda: with_wav_size(0x7FFFF000), 2, 0),
        (lambda: with_wav_size(100, endian="BIG"), 2, 0),
        # These are right.
        (lambda: with_wav_size(4 * RATE, behind=b"LIST" + bytes([4, 0, 0, 0]) + b"INFO"), 2, 0),
        (lambda: with_wav_size(4 * RATE, behind=bytes(20_000)), 2, 0),
        (lambda: encode("wav", endian="BIG"), 2, 0),
        (lambda: encode("rf64"), 2, 0),
        (lambda: encode("mp3") + b"TAG" + 125 * b" ", 2, 0),
        (lambda: encode("ogg") + bytes(500), 2, 0),
    ],
)
@pytest.mark.parametrize("is_stored", [False, True])
def test_the_length_of_a_file_is_that_of_its_samples(tmp_path, make, secs, tolerance, is_stored):
    path = tmp_path / "x.bin"
    content = make()
    path.write_bytes(content)

    class Stored:
        def file(self) -> str:
            return ""

        def fetch(self) -> bytes:
            return content

        def stamp(self) -> list[int | str]:
            return []

    audio = Stored() if is_stored else path
    samples = load_audio(audio)
    assert 0 <= len(samples) / RATE - secs <= tolerance
    assert read_duration(audio) == len(samples) / RATE
    blocks = samples[: len(samples) // 80 * 80].reshape(-1, 80)
    loud = np.sqrt(np.mean(blocks**2, axis=1)) > 0.1
    assert np.sum(loud) * 80 / RATE == pytest.approx(secs / 2, abs=0.02)
    segment = load_audio(audio, offset=secs - 0.75, duration=0.5)
    assert len(segment) == RATE // 2
    start = round((secs - 0.75) * RATE)
    np.testing.assert_allclose(segment, samples[start : start + RATE // 2], atol=0.01)
    with pytest.raises(BadAudio, match="as stated: correct the duration"):
        load_audio(audio, duration=1.0)


@pytest.mark.parametrize("rate", [0.5, 0.9])
@pytest.mark.parametrize(
    "suffix", ["wav", "rifx", "wavex", "rf64", "aiff", "au", "w64", "flac", "ogg", "opus", "mp3"]
)
def test_a_file_whose_end_is_missing_is_not_used(tmp_path, suffix, rate):
    path = tmp_path / "x.bin"
    unusual = {"opus": ("ogg", "OPUS"), "rifx": ("wav", None, "BIG")}
    data = encode(*unusual.get(suffix, (suffix,)))
    path.write_bytes(data[: round(rate * len(data))])
    with pytest.raises(BadAudio) as caught:
        load_audio(path)
    expected = Problem.UNDECODABLE if suffix == "flac" else Problem.INCOMPLETE
    assert caught.value.problem == expected
    if expected == Problem.INCOMPLETE:
        assert f"{path}: its end is missing: it " in str(caught.value)


@pytest.mark.parametrize("suffix", ["wav", "ogg"])
def test_a_segment_before_the_missing_end_is_used(tmp_path, suffix):
    path, data = tmp_path / "x.bin", encode(suffix)
    path.write_bytes(data[: round(0.9 * len(data))])
    assert len(load_audio(path, offset=0.5, duration=0.5)) == RATE // 2
    with pytest.raises(BadAudio, match="its end is missing"):
        load_audio(path, offset=1.5, duration=0.5)


@pytest.mark.parametrize("rate", [1, 999, 2_000_000])
def test_a_file_of_an_impossible_rate_is_not_used(tmp_path, rate):
    soundfile.write(tmp_path / "x.wav", make_speech(), rate)
    with pytest.raises(BadAudio, match=rf"x\.wav: {rate} Hz is no sample rate") as caught:
        load_audio(tmp_path / "x.wav")
    assert caught.value.problem == Problem.UNDECODABLE


def test_a_path_that_is_not_utf8_is_read(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.wav")
    soundfile.write(tmp_path / "x.wav", make_speech(), RATE)
    os.rename(tmp_path / "x.wav", path)
    assert len(load_audio(path)) == 2 * RATE
    with pytest.raises(BadAudio, match="does not exist"):
        load_audio(path + "x")


def test_a_file_that_lost_a_byte_is_used(tmp_path):
    (tmp_path / "x.wav").write_bytes(encode("wav")[:-1])
    assert len(load_audio(tmp_path / "x.wav")) == 2 * RATE - 1


@pytest.mark.parametrize(
    ("name", "secs"),
    [
        ("pipe_unknown_length.flac", 2.784),
        ("size_zero_riffok.wav", 2.784),
        ("twice.mp3", 2 * 2.784 + 0.26),
        ("mp3_truncated.mp3", None),
        ("truncated_half.wav", None),
    ],
)
def test_files_of_other_programs(name, secs):
    if not FAULTS:
        pytest.skip("FLAX_PROJECTOR_FAULTS does not name the folder of such files")
    path = Path(FAULTS) / name
    if secs is None:
        with pytest.raises(BadAudio, match="its end is missing"):
            load_audio(path)
    else:
        assert len(load_audio(path)) / RATE == pytest.approx(secs, abs=0.01)
