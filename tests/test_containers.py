"""What libsndfile does not read: m4a, webm, videos; in manifests as in `transcribe`."""

import io

import numpy as np
import pytest

from flax_projector.data.audio import BadAudio, Problem, load_audio, read_duration
from flax_projector.data.containers import BadSound, open_container
from flax_projector.data.stream import stated_secs, stream_audio
from tests.media import CODECS, encode, mute_video, tone

RATE = 16_000
READERS = (load_audio, lambda path: np.concatenate(list(stream_audio(path))))


@pytest.mark.parametrize("rate", [16_000, 48_000])
@pytest.mark.parametrize("form", CODECS)
def test_other_formats_are_read_as_sound(tmp_path, form, rate):
    data = encode(tone(2.0, rate), rate, form, channels=2, has_video=form in ("mp4", "mpegts"))
    (tmp_path / "x.bin").write_bytes(data)
    whole, stream = (read(tmp_path / "x.bin") for read in READERS)
    np.testing.assert_array_equal(whole, stream)
    assert len(whole) / RATE == pytest.approx(2.0, abs=0.13)  # the encoder's delay
    spectrum = np.abs(np.fft.rfft(whole[RATE // 2 : RATE // 2 + RATE]))
    assert spectrum.argmax() == 440
    assert 0.25 < np.abs(whole[RATE // 2 : RATE]).max() < 0.35  # channels are averaged
    assert read_duration(tmp_path / "x.bin") == pytest.approx(len(whole) / RATE, abs=1e-4)
    assert stated_secs(tmp_path / "x.bin") in (None, pytest.approx(2.0, abs=0.13))
    segment = load_audio(tmp_path / "x.bin", offset=0.5, duration=0.5)
    assert len(segment) == RATE // 2


@pytest.mark.parametrize("rate", [0.5, 0.8])
@pytest.mark.parametrize("form", sorted(CODECS.keys() - {"asf", "avi", "mpegts"}))
def test_a_file_whose_end_is_missing_is_not_used(tmp_path, form, rate):
    """Of the formats that state a length, or whose last part cannot be decoded then."""
    data = encode(tone(3.0, 16_000), 16_000, form)
    (tmp_path / "x.bin").write_bytes(data[: round(rate * len(data))])
    for read in READERS:
        with pytest.raises(BadAudio, match=r"x\.bin") as caught:
            read(tmp_path / "x.bin")
        assert caught.value.problem in (Problem.INCOMPLETE, Problem.UNDECODABLE)
        if form in ("webm", "matroska"):  # the length is in front of the samples
            assert caught.value.problem == Problem.INCOMPLETE


@pytest.mark.parametrize("form", ["mp4", "matroska", "avi", "mpegts"])
def test_a_video_may_be_longer_than_its_sound(tmp_path, form):
    (tmp_path / "x.bin").write_bytes(encode(tone(1.0, RATE), RATE, form, has_video=True))
    for read in READERS:
        assert len(read(tmp_path / "x.bin")) / RATE == pytest.approx(1.0, abs=0.13)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello there\n" * 100, "x is not a readable audio file: Format not recognised"),
        (b"", "x is empty: copy or download it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "x is a pointer of Git LFS"),
        (np.random.default_rng(0).bytes(50_000), "x is not a readable audio file"),
        # What names other files, which must not be opened.
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hostname\n", "not a readable"),
        (b"ffconcat version 1.0\nfile /etc/hostname\n", "not a readable"),
        (mute_video(), "x: it has no sound"),
    ],
    ids=["text", "empty", "pointer", "noise", "playlist", "list of files", "video"],
)
def test_what_is_no_sound_is_one_clear_error(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    for read in (*READERS, read_duration, stated_secs):
        with pytest.raises(BadAudio, match=message) as caught:
            read(tmp_path / "x")
        assert caught.value.problem == Problem.UNDECODABLE and "\n" not in str(caught.value)


def test_a_folder_is_one_clear_error(tmp_path):
    for read in (*READERS, read_duration, stated_secs):
        with pytest.raises(BadAudio, match="is a folder: name the files in it"):
            read(tmp_path)


def test_a_damaged_part_is_an_error(tmp_path):
    data = bytearray(encode(tone(3.0, 16_000), 16_000, "ipod"))
    data[len(data) // 3 : len(data) // 3 + 300] = np.random.default_rng(0).bytes(300)
    with (
        open_container(io.BytesIO(bytes(data))) as container,
        pytest.raises(BadSound, match="a part of it cannot be decoded"),
    ):
        list(container.blocks)
