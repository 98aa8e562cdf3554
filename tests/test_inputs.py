"""Sound files as inputs: clips that do not fit, and clips that can be read again."""

import numpy as np
import pytest
import soundfile

from flax_projector.data.audio import Problem
from flax_projector.data.inputs import Waveforms, find_unreadable
from flax_projector.data.manifest import ManifestRow
from tests.clips import CONFIG, break_clip, make_batches, read_speech

pytestmark = pytest.mark.torch  # tests.tiny makes towers with it


def test_clips_that_can_be_read_again_are_no_longer_bad(tmp_path):
    utterances = make_batches(read_speech(tmp_path, 13)).utterances
    paths = [str(u.row.audio) for u in utterances]
    for path in paths[:2]:
        break_clip(path, "nan")
    inputs = Waveforms(CONFIG.window_samples)
    first, second = find_unreadable(utterances, inputs, num_threads=2)
    assert [first.key, second.key] == [u.row.key for u in utterances[:2]]
    assert first.reason == Problem.NOT_FINITE and f"{paths[0]} has samples" in first.detail
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, soundfile.info(paths[0]).frames)
    soundfile.write(paths[0], noise, 16_000)
    assert find_unreadable(utterances, inputs, num_threads=2) == [second]


def test_a_doubtful_clip_is_used_and_reported(tmp_path):
    rows = read_speech(tmp_path, 13)
    soundfile.write(str(rows[2].audio), np.zeros(round(rows[2].duration * 16_000)), 16_000)
    batches = make_batches(rows)
    found = [row for i in range(len(batches)) for row in batches[i].bad]
    assert [(row.id, row.reason) for row in found] == [("clip2", Problem.SILENT)]
    num_used = sum(np.count_nonzero(batches[i].batch.num_frames) for i in range(len(batches)))
    assert num_used == 13
    inputs = Waveforms(CONFIG.window_samples)
    assert find_unreadable(batches.utterances, inputs, num_threads=2) == found


def test_a_clip_longer_than_the_window_is_never_cut(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.1, 0.1, 32_640)  # 2.04 s
    soundfile.write(tmp_path / "long.wav", samples, 16_000)
    batch, bad = make_batches([ManifestRow("long", str(tmp_path / "long.wav"), "go", 2.0)])[0]
    assert [(row.id, row.reason) for row in bad] == [("long", Problem.WRONG_DURATION)]
    assert "long.wav lasts 2.04 s, more than its bucket holds" in bad[0].detail
    assert not batch.samples.any() and not batch.label_valid.any()


def test_segments_are_batched_like_files(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.1, 0.1, 160_000).astype(np.float32)
    soundfile.write(tmp_path / "long.wav", samples, 16_000, subtype="FLOAT")
    rows = [
        ManifestRow(str(i), str(tmp_path / "long.wav"), "go", 0.5, offset=0.5 * i)
        for i in range(16)
    ]
    batches = make_batches(rows)
    read = np.concatenate([batches[i].batch.samples[:, :8000] for i in range(2)])
    np.testing.assert_array_equal(read.ravel(), samples[:128_000])
