"""Kept encoder frames: which are computed when, and what a start that was killed leaves."""

import dataclasses
import json
import os
import pickle
import shutil
import tracemalloc
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile

from flax_projector.data import features
from flax_projector.data.audio import BadAudio, Problem
from flax_projector.data.batch_plan import Utterance
from flax_projector.data.features import FeatureStore, keep_features
from flax_projector.data.manifest import ManifestRow

WINDOW, BATCH, DIM = 6_400, 4, 3  # 20 frames


def make_utterances(folder: Path, count: int) -> list[Utterance]:
    """Clips of 4 to 19 frames of noise."""
    folder.mkdir(exist_ok=True)
    utterances = []
    for i in range(count):
        num_frames = 4 + i % 16
        samples = np.random.default_rng(i).uniform(-0.5, 0.5, 320 * num_frames)
        soundfile.write(folder / f"{i}.wav", samples, 16_000)
        row = ManifestRow(f"clip{i}", str(folder / f"{i}.wav"), "go", num_frames / 50)
        utterances.append(Utterance(row, 20, (1,)))
    return utterances


class Encoder:
    """Frames [B, S, E] that tell clip, time and row; it ends as a killed process at some call."""

    def __init__(self, killed_at: int | None = None):
        self.calls, self._killed_at = 0, killed_at

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        if self.calls == self._killed_at:
            raise KeyboardInterrupt
        self.calls += 1
        frames = samples.reshape(BATCH, -1, 320)[..., :DIM].copy()  # [B, S, E]
        frames[..., 0] += np.arange(BATCH)[:, None]
        return frames


def keep(folder: Path, utterances: list[Utterance], encode, encoder_name: str = "tiny", **options):
    return keep_features(
        folder,
        utterances,
        encode,
        window_samples=WINDOW,
        batch_size=BATCH,
        encoder_dim=DIM,
        encoder_name=encoder_name,
        **options,
    )


def assert_same(store: FeatureStore, expected: FeatureStore, utterances: list[Utterance]) -> None:
    for utterance in utterances:
        frames, count, _ = store.read(utterance)
        expected_frames = expected.read(utterance).audio
        assert frames.shape == (count, DIM) and frames.any()
        np.testing.assert_array_equal(frames, expected_frames, err_msg=utterance.row.id)


def test_frames_are_kept_without_padding_and_computed_once(tmp_path):
    utterances = make_utterances(tmp_path, 10)
    store = keep(tmp_path / "kept", utterances, Encoder())
    for i, utterance in enumerate(utterances):
        samples, _ = soundfile.read(str(utterance.row.audio), dtype="float32")
        expected = samples.reshape(-1, 320)[:, :DIM].copy()
        expected[:, 0] += i % BATCH
        for reader in (store, pickle.loads(pickle.dumps(store))):
            frames, count, _ = reader.read(utterance)
            assert count == 4 + i and isinstance(frames, np.memmap)
            np.testing.assert_array_equal(frames, expected)
    again = keep(tmp_path / "kept", utterances, Encoder(killed_at=0))
    assert_same(again, store, utterances)


@pytest.mark.parametrize("killed_at", [1, 4, 6])
def test_a_killed_start_continues_and_ends_with_the_same_bytes(tmp_path, monkeypatch, killed_at):
    monkeypatch.setattr(features, "_SAVE_EVERY_CLIPS", 2 * BATCH)
    utterances, folder = make_utterances(tmp_path, 26), tmp_path / "kept"
    whole = keep(tmp_path / "whole", utterances, Encoder())
    for calls in (killed_at, 0):
        with pytest.raises(KeyboardInterrupt):
            keep(folder, utterances, Encoder(calls))
    num_saved = len((folder / "index.jsonl").read_text().splitlines()) - 1
    assert num_saved == killed_at // 2 * 2 * BATCH
    with (folder / "index.jsonl").open("a") as file:
        file.write('["\\tclip')  # a line that was not written whole
    encoder = Encoder()
    store = keep(folder, utterances, encoder)
    assert encoder.calls == 7 - num_saved // BATCH
    assert_same(store, whole, utterances)
    for name in ("index.jsonl", "frames.f32"):
        expected = (tmp_path / "whole" / name).read_bytes()
        assert (folder / name).read_bytes() == expected


def test_files_that_do_not_fit_are_as_if_absent(tmp_path):
    utterances, folder = make_utterances(tmp_path, 5), tmp_path / "kept"
    whole = keep(tmp_path / "whole", utterances, Encoder())
    for name, content in [("index.jsonl", b'{"enc'), ("index.jsonl", b""), ("frames.f32", b"xyz")]:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        (folder / name).write_bytes(content)
        encoder = Encoder()
        assert_same(keep(folder, utterances, encoder), whole, utterances)
        assert encoder.calls == 2


def test_only_what_changed_is_computed_again(tmp_path):
    utterances, folder = make_utterances(tmp_path, 12), tmp_path / "kept"
    keep(folder, utterances[:9], Encoder())
    changed = str(utterances[1].row.audio)
    before = os.path.getsize(changed)
    soundfile.write(changed, np.full(5 * 320, 0.25), 16_000)
    assert os.path.getsize(changed) == before
    os.utime(changed, (0, 0))
    encoder = Encoder()
    store = keep(folder, utterances, encoder)
    assert encoder.calls == 2  # the first batch for clip 1, the last for clips 9 to 11
    assert_same(store, keep(tmp_path / "whole", utterances, Encoder()), utterances)
    encoder = Encoder()
    keep(folder, utterances, encoder, encoder_name="another")
    assert encoder.calls == 3
    records = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    assert records[0] == {"encoder": f"another, {WINDOW} samples", "encoder_dim": DIM}
    assert len(records) == 13


def test_frames_of_the_whole_window_are_kept_apart_from_those_of_the_clip(tmp_path, monkeypatch):
    """And a start that was killed continues as well."""
    monkeypatch.setattr(features, "_SAVE_EVERY_CLIPS", BATCH)
    utterances, folder = make_utterances(tmp_path, 10), tmp_path / "kept"
    Path(str(utterances[2].row.audio)).unlink()
    keep(folder, utterances, Encoder())
    with pytest.raises(KeyboardInterrupt):
        keep(folder, utterances, Encoder(killed_at=2), whole_window=True)
    encoder = Encoder()
    store = keep(folder, utterances, encoder, whole_window=True)
    assert encoder.calls == 1
    for i, utterance in enumerate(utterances):
        for reader in (store, pickle.loads(pickle.dumps(store))):
            if i == 2:
                with pytest.raises(BadAudio, match="does not exist"):
                    reader.read(utterance)
                continue
            frames, count, _ = reader.read(utterance)
            assert frames.shape == (20, DIM) and count == 4 + i
            expected = np.zeros((20, DIM))
            expected[:, 0] = i % BATCH  # what the encoder makes of silence
            samples, _ = soundfile.read(str(utterance.row.audio), dtype="float32")
            expected[:count] += samples.reshape(-1, 320)[:, :DIM]
            np.testing.assert_allclose(frames, expected, rtol=1e-6)
    encoder = Encoder()
    keep(folder, utterances, encoder)
    assert encoder.calls == 3, "frames of the window were taken for those of clips"


def test_a_doubtful_clip_is_kept_with_its_doubt(tmp_path):
    utterances = make_utterances(tmp_path, 3)
    path = str(utterances[1].row.audio)
    soundfile.write(path, np.zeros(soundfile.info(path).frames), 16_000)
    keep(tmp_path / "kept", utterances, Encoder())
    store = keep(tmp_path / "kept", utterances, Encoder(killed_at=0))  # computes nothing again
    clips = [store.read(utterance) for utterance in utterances]
    assert [clip.doubt and clip.doubt.problem for clip in clips] == [None, Problem.SILENT, None]
    assert clips[1].num_frames == 5 and len(clips[1].audio) == 5


def test_a_clip_that_can_be_read_by_now_is_computed(tmp_path):
    utterances = make_utterances(tmp_path, 3)
    whole = keep(tmp_path / "whole", utterances, Encoder())
    fs = fsspec.filesystem("memory")
    remote = [
        dataclasses.replace(u, row=dataclasses.replace(u.row, audio=f"memory://kept/{u.row.id}"))
        for u in utterances
    ]
    nothing_to_encode = Encoder(killed_at=0)
    store = keep(tmp_path / "kept", remote, nothing_to_encode)
    with pytest.raises(BadAudio, match="memory://kept/clip1 does not exist") as caught:
        store.read(remote[1])
    assert caught.value.problem == Problem.MISSING_FILE
    for utterance in utterances:
        fs.pipe_file(f"/kept/{utterance.row.id}", Path(str(utterance.row.audio)).read_bytes())
    assert_same(keep(tmp_path / "kept", remote, Encoder()), whole, remote)


def test_memory_does_not_grow_with_the_set(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_SAVE_EVERY_CLIPS", 2 * BATCH)
    dim = 5_000

    def encode(samples: np.ndarray) -> np.ndarray:
        return np.ones((BATCH, 20, dim), np.float32)  # 1.6 MB

    peaks = []
    for count in (8, 64):
        utterances = make_utterances(tmp_path, count)
        tracemalloc.start()
        keep_features(
            tmp_path / str(count),
            utterances,
            encode,  # pyright: ignore[reportArgumentType]
            window_samples=WINDOW,
            batch_size=BATCH,
            encoder_dim=dim,
            encoder_name="wide",
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
