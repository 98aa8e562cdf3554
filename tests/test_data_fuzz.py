"""Thousands of damaged manifests and sound files: each is an error, a bad row, or read rightly.

Every case is made from its number, so that a failure can be looked at alone.
"""

import gc
import io
import json
import os
import resource
import signal
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import soundfile

from flax_projector.data.audio import BadAudio, Problem, check_samples, load_audio, read_duration
from flax_projector.data.bad_rows import BadRowLog
from flax_projector.data.manifest import read_manifest
from flax_projector.data.sound import DURATION_TOLERANCE_SECS
from flax_projector.lengths import FRAME_SECS, SAMPLE_RATE, SAMPLES_PER_FRAME

pytestmark = pytest.mark.slow

NUM_MANIFESTS, NUM_SOUNDS = 1_500, 4_000
SECS = 0.4
MAX_SECS_PER_CASE = 10
MAX_MB_MORE = 600  # than before, at the peak of all cases


@contextmanager
def within_limits() -> Iterator[None]:
    """Fails if the block takes too long; a hang of one case does not stop the tests."""

    def stop(*_: object) -> None:
        pytest.fail(f"took more than {MAX_SECS_PER_CASE} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(MAX_SECS_PER_CASE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def nothing_left_over() -> Iterator[None]:
    """No open files, no threads, no memory."""

    def count() -> tuple[int, set[str]]:
        gc.collect()
        names = {thread.name for thread in threading.enumerate()}
        return len(os.listdir("/proc/self/fd")), names - {"fsspecIO", "tqdm_monitor"}

    before, peak = count(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    after = count()
    assert after == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1024 * MAX_MB_MORE


# --- manifests --------------------------------------------------------------------------------

VALUES = [
    "0.wav",
    "go on",
    "cafe\u0301",
    "",
    " ",
    "\t",
    "a\nb",
    "\u2028",
    "\ufeff",
    "\ud800",
    "\0",
    "x" * 5_000,
    "../0.wav",
    "/",
    ".",
    "memory://nothing/0.wav",
    "nothing://0.wav",
    "<|im_end|>",
    0,
    1,
    -1,
    0.4,
    400,
    1e308,
    -1e-300,
    10**400,
    2**63,
    float("nan"),
    float("inf"),
    True,
    False,
    None,
    [],
    [0.4],
    {},
    {"path": "0.wav"},
    [[[["0.wav"]]]],
    "0.4",
    "0,4",
    "1e5",
    "nan",
    "٣",
    "1_000",
    "0x10",
]
COLUMNS = ["audio", "path", "text", "id", "duration", "seconds", "offset", "other", "", "Audio "]


def pick(rng: np.random.Generator, options: Any) -> Any:
    return options[rng.integers(len(options))]


def damage(whole: bytes, rng: np.random.Generator) -> bytes:
    """Changes bytes: flips, cuts, insertions, repetitions, overwritten fields."""
    data, at = bytearray(whole), int(rng.integers(len(whole) + 1))
    match rng.integers(7):
        case 0:
            for _ in range(rng.integers(1, 4)):
                data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        case 1:
            data = data[:at]
        case 2:
            data[at:at] = rng.bytes(rng.integers(1, 9))
        case 3:
            data[at : at + int(rng.integers(1, 9))] = b""
        case 4:
            data[at : at + 4] = pick(rng, [b"\0\0\0\0", b"\xff\xff\xff\xff", rng.bytes(4)])
        case 5:
            data[at:at] = data[at : at + int(rng.integers(64))] * int(rng.integers(1, 4))
        case 6:
            data[at:at] = pick(rng, [b"\xef\xbb\xbf", b"\r", b"\n", b"\0", b"\t", b"\xed\xa0\x80"])
    return bytes(data)


def make_line(rng: np.random.Generator, columns: list[str] | None) -> bytes:
    """A row, which may be whole: of jsonl, or of tsv if there are columns."""
    row = {"audio": "0.wav", "text": "go", "duration": SECS}
    for _ in range(rng.integers(4)):
        row[pick(rng, COLUMNS)] = pick(rng, VALUES)
    for name in list(row):
        if rng.random() < 0.1:
            del row[name]
    if columns is not None:
        return "\t".join(str(row.get(c, "")) for c in columns).encode("utf-8", "surrogatepass")
    text = json.dumps(row, ensure_ascii=bool(rng.integers(2)))
    if rng.random() < 0.05:
        text = text.replace("0.4", pick(rng, [99_999 * "[", 999 * "[" + 999 * "]", 5_000 * "1"]))
    return text.encode("utf-8", "surrogatepass")


def make_manifest(number: int) -> tuple[str, bytes]:
    rng = np.random.default_rng((13, number))
    is_tsv = bool(rng.integers(2))
    columns = ["audio", "text", "id", "duration", "offset"]
    lines = [b"0.wav\tgo\tgood\t\t" if is_tsv else b'{"id":"good","audio":"0.wav","text":"go"}']
    lines += [make_line(rng, columns if is_tsv else None) for _ in range(rng.integers(1, 4))]
    if is_tsv:
        if rng.random() < 0.1:
            columns[rng.integers(5)] = pick(rng, COLUMNS)
        lines.insert(0, "\t".join(columns).encode())
    end = pick(rng, [b"\n", b"\n", b"\r\n", b"\r"])
    data = end.join(lines) + pick(rng, [b"", end])
    for _ in range(rng.integers(3)):
        data = damage(data, rng)
    return "a.tsv" if is_tsv else "a.jsonl", data


def test_manifests_are_errors_or_bad_rows_or_read_rightly(tmp_path, nothing_left_over):
    soundfile.write(tmp_path / "0.wav", np.full(round(SECS * SAMPLE_RATE), 0.1), SAMPLE_RATE)
    ends = Counter()
    for number in range(NUM_MANIFESTS):
        name, data = make_manifest(number)
        (tmp_path / name).write_bytes(data)
        with within_limits():
            try:
                rows, bad = read_manifest(tmp_path / name)
            except ValueError as error:
                assert str(error).startswith((f"manifest {tmp_path}", "nothing://")), number
                assert len(str(error)) < 3_000, number
                ends["error"] += 1
                continue
            for row in rows:
                assert row.text == unicodedata.normalize("NFC", row.text).strip() != "", number
                assert "\n" not in row.id or name == "a.jsonl", number
                f"{row.key}{row.audio}{row.text}".encode()
                assert FRAME_SECS <= row.duration <= SECS + 60, number
                assert row.offset is None or 0 <= row.offset < np.inf, number
                ends["row"] += 1
            assert len({row.key for row in rows}) == len(rows), number
            for row in bad:
                assert len(row.detail) < 3_000, number
                ends[row.reason.label] += 1
            log_file = tmp_path / "bad_rows.jsonl"
            BadRowLog(log_file, max_rate=1.0).start("x", bad, num_rows=len(rows) + len(bad))
            assert len(BadRowLog(log_file, max_rate=1.0).known("x")) == len({r.key for r in bad})
            log_file.unlink(missing_ok=True)
            assert set(os.listdir(tmp_path)) <= {"0.wav", "a.tsv", "a.jsonl"}, number
    assert min(ends["error"], ends["malformed"], ends["missing file"]) > 20, ends
    assert ends["row"] > NUM_MANIFESTS / 2, ends


# --- sound files ------------------------------------------------------------------------------

FORMATS: dict[str, Any] = {
    "wav": {"format": "WAV", "subtype": "PCM_16"},
    "float wav": {"format": "WAV", "subtype": "FLOAT"},
    "wavex": {"format": "WAVEX", "subtype": "PCM_24"},
    "flac": {"format": "FLAC", "subtype": "PCM_16"},
    "ogg": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "mp3": {"format": "MP3", "subtype": "MPEG_LAYER_III"},
    "aiff": {"format": "AIFF", "subtype": "PCM_16"},
    "au": {"format": "AU", "subtype": "PCM_16"},
}


def make_sound(kind: str, channels: int) -> bytes:
    rng, file = np.random.default_rng(channels), io.BytesIO()
    times = np.arange(round(SECS * SAMPLE_RATE)) / SAMPLE_RATE
    tone = 0.3 * np.sin(2 * np.pi * 440 * times)[:, None]
    soundfile.write(
        file, tone + rng.normal(0, 0.01, (len(times), channels)), SAMPLE_RATE, **FORMATS[kind]
    )
    return file.getvalue()


def damage_sound(data: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """What is done to a file, and the file."""
    how = pick(rng, ["anywhere", "header", "field", "cut", "junk in front", "zeros behind"])
    if how == "anywhere":
        return how, damage(data, rng)
    if how == "header":
        size = min(128, len(data))
        return how, damage(data[:size], rng) + data[size:]
    if how == "field":
        at, width = int(rng.integers(64)), int(pick(rng, [2, 4, 8]))
        field = pick(rng, [width * b"\0", width * b"\xff", rng.bytes(width)])
        return how, data[:at] + field + data[at + width :]
    if how == "cut":
        return how, data[: rng.integers(len(data))]
    if how == "junk in front":
        return how, rng.bytes(int(rng.integers(1, 64))) + data
    return how, data + int(rng.integers(1, 4_000)) * b"\0"


def test_sound_files_are_bad_clips_or_read_rightly(tmp_path, nothing_left_over):
    sounds = {(kind, n): make_sound(kind, n) for kind in FORMATS for n in (1, 2)}
    path, whole, ends = tmp_path / "clip", {}, Counter()
    for key, data in sounds.items():
        path.write_bytes(data)
        whole[key] = load_audio(path)
    for number in range(NUM_SOUNDS):
        rng = np.random.default_rng((17, number))
        kind, channels = key = pick(rng, list(sounds))
        how, data = damage_sound(sounds[key], rng)
        path.write_bytes(data)
        case, expected = f"case {number}: {kind} of {channels} channels, {how}", whole[key]
        with within_limits():
            try:
                samples, secs = load_audio(path), read_duration(path)
                check_samples(path, samples)
            except BadAudio as error:
                assert len(str(error)) < 1_000 and error.problem != Problem.UNREADABLE, case
                # libsndfile refuses Opus with anything behind it.
                assert how != "zeros behind" or kind == "opus", f"{case}: {error}"
                ends[error.problem.label] += 1
                continue
        assert samples.dtype == np.float32 and np.isfinite(samples).all(), case
        assert SAMPLES_PER_FRAME <= len(samples) < 120 * SAMPLE_RATE, case  # of a wrong rate
        assert abs(len(samples) / SAMPLE_RATE - secs) <= DURATION_TOLERANCE_SECS, case
        is_same = len(samples) == len(expected) and (samples == expected).all()
        if how == "zeros behind":
            assert is_same, case
        elif how == "cut":  # never more than what durations may be wrong by
            assert (len(expected) - len(samples)) / SAMPLE_RATE <= DURATION_TOLERANCE_SECS, case
        ends["same" if is_same else "other"] += 1
    assert os.listdir(tmp_path) == ["clip"]
    assert min(ends["same"], ends["other"], ends["undecodable"], ends["incomplete"]) > 100, ends
