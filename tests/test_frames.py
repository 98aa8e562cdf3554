"""Kept encoder frames: which are computed when, who shares them, and what a kill leaves."""

import dataclasses
import os
import pickle
import tracemalloc
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from flax_projector.batch import Bucket, empty_batch
from flax_projector.data.audio import BadAudio, Problem
from flax_projector.data.frames import shards
from flax_projector.data.frames.store import FrameStore
from flax_projector.data.utterances import Utterance
from flax_projector.files import any_path
from flax_projector.sharding import spread_sharding
from tests.bucket import BUCKET
from tests.frames import (
    BATCH,
    DIM,
    ENCODING,
    MESH,
    Encoder,
    calls,
    change_row,
    keep,
    make_utterances,
    write_other,
)
from tests.tiny_model import make_model, make_params


def assert_same(store: FrameStore, expected: FrameStore, utterances: list[Utterance]) -> None:
    for utterance in utterances:
        frames, count, _ = store.read(utterance)
        expected_frames = expected.read(utterance).audio
        assert frames.shape == (count, DIM) and frames.any()
        np.testing.assert_array_equal(frames, expected_frames, err_msg=utterance.row.id)


def files(root: Path, suffix: str) -> list[Path]:
    return sorted(root.glob(f"*/*{suffix}"))


@pytest.fixture(params=["disk", "bucket"])
def root(request, tmp_path):
    """A folder for stores."""
    if request.param == "disk":
        return tmp_path / "frames"
    request.getfixturevalue("bucket_server")
    return any_path(f"gs://{BUCKET}/frames/{tmp_path.parent.name}-{tmp_path.name}")


def test_frames_are_kept_without_padding_and_computed_once(root, tmp_path):
    utterances = make_utterances(tmp_path, 10)
    store = keep(root, utterances)
    for i, utterance in enumerate(utterances):
        samples, _ = soundfile.read(str(utterance.row.audio), dtype="float32")
        expected = samples.reshape(-1, 320)[:, :DIM].copy()
        expected[:, 0] += i % BATCH
        for reader in (store, pickle.loads(pickle.dumps(store))):
            frames, count, _ = reader.read(utterance)
            assert count == 4 + i
            np.testing.assert_array_equal(frames, expected)
    again = keep(root, utterances, Encoder(killed_at=0))
    assert_same(again, store, utterances)


@pytest.mark.parametrize("killed_at", [1, 4, 6])
def test_a_killed_start_continues_and_ends_with_the_same_frames(tmp_path, monkeypatch, killed_at):
    monkeypatch.setattr(shards, "_MAX_BYTES", 80 * DIM * 4)  # about two batches
    utterances, root = make_utterances(tmp_path, 26), tmp_path / "frames"
    whole = keep(tmp_path / "whole", utterances)
    for at in (killed_at, 0):
        with pytest.raises(KeyboardInterrupt):
            keep(root, utterances, Encoder(at))
    assert len(files(root, ".npz")) == len(files(root, ".frames"))
    num_saved = sum(len(np.load(path)["num_frames"]) for path in files(root, ".npz"))
    # Its last batch was in flight, and the one before may be in a shard that was not full.
    assert num_saved % BATCH == 0 and 0 <= (killed_at - 1) * BATCH - num_saved <= 2 * BATCH
    (store,) = root.iterdir()
    (store / f"{'0' * 32}.frames").write_bytes(b"what a killed process leaves")
    encoder = Encoder()
    kept = keep(root, utterances, encoder)
    assert encoder.calls == 7 - num_saved // BATCH
    assert_same(kept, whole, utterances)


def test_files_of_killed_processes_are_removed_when_nobody_writes_to_them(tmp_path):
    utterances, root = make_utterances(tmp_path, 2), tmp_path / "frames"
    keep(root, utterances)
    (store,) = root.iterdir()
    kept = set(store.iterdir())
    old = [store / "old.frames", store / "old.shared"]
    for path in (*old, *kept):
        path.touch()
        os.utime(path, (0, 0))
    new = [store / "new.frames", store / "new.shared"]
    for path in new:
        path.touch()
    keep(root, utterances, Encoder(killed_at=0))
    assert set(store.iterdir()) == {*kept, *new}


def test_abandoned_files_are_told_from_shards(root, tmp_path, monkeypatch):
    utterances = make_utterances(tmp_path, 2)
    keep(root, utterances)
    (store,) = root.iterdir()
    for name in ("left.frames", "left.shared"):
        (store / name).write_bytes(b"x")
    keep(root, utterances, Encoder(killed_at=0))
    assert len(list(store.iterdir())) == 5
    monkeypatch.setattr(shards, "_ABANDONED_SECS", -60)
    keep(root, utterances, Encoder(killed_at=0))
    assert sorted(path.suffix for path in store.iterdir()) == [".frames", ".json", ".npz"]


def test_runs_that_keep_the_same_clips_at_the_same_time_do_no_harm(tmp_path):
    utterances, root = make_utterances(tmp_path, 10), tmp_path / "frames"
    encoder, others = Encoder(), []

    def slowly(samples: jax.Array) -> jax.Array:
        if encoder.calls == 1:
            others.append(keep(root, utterances))
        return encoder(samples)

    whole = keep(tmp_path / "whole", utterances)
    for store in (keep(root, utterances, slowly), *others):
        assert_same(store, whole, utterances)
    assert_same(keep(root, utterances, Encoder(killed_at=0)), whole, utterances)


DAMAGE = {
    "short frames": (".frames", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "no frames": (".frames", lambda path: path.unlink()),
    "empty index": (".npz", lambda path: path.write_bytes(b"")),
    "no index": (".npz", lambda path: path.write_text("{}")),
    "half an index": (".npz", lambda path: path.write_bytes(path.read_bytes()[:300])),
    "other arrays": (".npz", lambda path: np.savez(path, keys=np.zeros(3))),
    "a changed byte": (
        ".npz",
        lambda path: path.write_bytes(path.read_bytes()[:140] + b"?" + path.read_bytes()[141:]),
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_clips_of_a_damaged_shard_are_computed_again(tmp_path, monkeypatch, caplog, case):
    monkeypatch.setattr(shards, "_MAX_BYTES", 1)  # a shard for each batch
    utterances, root = make_utterances(tmp_path, 12), tmp_path / "frames"
    keep(root, utterances)
    whole = keep(tmp_path / "whole", utterances)
    suffix, damage = DAMAGE[case]
    path = files(root, suffix)[1]
    damage(path)
    encoder = Encoder()
    assert_same(keep(root, utterances, encoder), whole, utterances)
    assert encoder.calls == 1
    assert caplog.text.count(f"{path} is damaged (") == caplog.text.count("is damaged") == 1
    assert calls(root, utterances) == 0


@pytest.mark.parametrize(
    "changed",
    [
        {"encoder": "other weights"},
        {"dtype": "bfloat16"},
        {"window_samples": 12_800},
        {"whole_window": True},
    ],
    ids=str,
)
def test_frames_of_another_encoder_are_not_used(tmp_path, changed):
    utterances, root = make_utterances(tmp_path, 6), tmp_path / "frames"
    other = dataclasses.replace(ENCODING, **changed)
    assert calls(root, utterances) == 2
    assert calls(root, utterances, other) == 2
    assert calls(root, utterances) == calls(root, utterances, other) == 0
    assert len(list(root.iterdir())) == 2


def test_a_store_says_what_it_holds(tmp_path):
    keep(tmp_path / "frames", make_utterances(tmp_path, 1))
    (path,) = (tmp_path / "frames").glob("*/encoding.json")
    assert '"encoder": "weights"' in path.read_text() and '"dtype": "float32"' in path.read_text()


def test_two_runs_share_the_clips_that_both_have(tmp_path):
    """Whatever their manifests and the rows' ids."""
    utterances, root = make_utterances(tmp_path, 12), tmp_path / "frames"
    keep(root, utterances[:8])
    of_other = [
        change_row(u, id=f"x{i}", source="other.jsonl", text="stop")
        for i, u in enumerate(reversed(utterances))
    ]
    encoder = Encoder()
    store = keep(root, of_other, encoder)
    assert encoder.calls == 1
    expected = keep(tmp_path / "whole", utterances)
    for utterance, other in zip(reversed(utterances), of_other, strict=True):
        # The row of the batch is in the first component.
        found, wanted = store.read(other).audio, expected.read(utterance).audio
        np.testing.assert_array_equal(found[:, 1:], wanted[:, 1:])
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(store.read(of_other[0]).audio, store.read(of_other[1]).audio)


def test_rows_that_share_a_clip_share_its_frames(tmp_path):
    utterances, root = make_utterances(tmp_path, 4), tmp_path / "frames"
    again = [change_row(u, id=f"{u.row.id} again", text="stop") for u in utterances]
    mixed = [u for pair in zip(utterances, again, strict=True) for u in pair]
    encoder = Encoder()
    store = keep(root, mixed, encoder)
    assert encoder.calls == 1
    assert_same(store, keep(tmp_path / "whole", utterances), utterances)
    for utterance, other in zip(utterances, again, strict=True):
        found = [store.read(u).audio for u in (utterance, other)]
        np.testing.assert_array_equal(found[0], found[1])


def test_only_what_changed_is_computed_again(tmp_path):
    utterances, root = make_utterances(tmp_path, 12), tmp_path / "frames"
    keep(root, utterances[:9])
    write_other(str(utterances[1].row.audio))
    encoder = Encoder()
    store = keep(root, utterances, encoder)
    assert encoder.calls == 1  # clips 1, 9, 10, 11
    assert np.all(store.read(utterances[1]).audio[:, 1:] == 0.25)


def test_frames_of_the_whole_window(tmp_path, monkeypatch):
    """And a start that was killed continues as well."""
    monkeypatch.setattr(shards, "_MAX_BYTES", 1)
    whole_window = dataclasses.replace(ENCODING, whole_window=True)
    utterances, root = make_utterances(tmp_path, 10), tmp_path / "frames"
    Path(str(utterances[2].row.audio)).unlink()
    with pytest.raises(KeyboardInterrupt):
        keep(root, utterances, Encoder(killed_at=2), whole_window)
    store = keep(root, utterances, Encoder(), whole_window)
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


def test_a_doubtful_clip_is_kept_with_its_doubt(tmp_path):
    utterances, root = make_utterances(tmp_path, 3), tmp_path / "frames"
    path = str(utterances[1].row.audio)
    soundfile.write(path, np.zeros(soundfile.info(path).frames), 16_000)
    keep(root, utterances)
    store = keep(root, utterances, Encoder(killed_at=0))  # computes nothing again
    clips = [store.read(utterance) for utterance in utterances]
    assert [clip.doubt and clip.doubt.problem for clip in clips] == [None, Problem.SILENT, None]
    assert clips[1].num_frames == 5 and len(clips[1].audio) == 5


def test_a_clip_that_can_be_read_by_now_is_computed(root, tmp_path):
    utterances = make_utterances(tmp_path, 3)
    whole = keep(tmp_path / "whole", utterances)
    fs, folder = fsspec.filesystem("memory"), f"{tmp_path.name}-{type(root).__name__}"
    remote = [change_row(u, audio=f"memory://{folder}/{u.row.id}") for u in utterances]
    store = keep(root, remote)
    with pytest.raises(BadAudio, match=f"memory://{folder}/clip1 does not exist") as caught:
        store.read(remote[1])
    assert caught.value.problem == Problem.MISSING_FILE
    keep(root, remote, Encoder(killed_at=0))  # nothing to encode
    for utterance in utterances:
        content = Path(str(utterance.row.audio)).read_bytes()
        fs.pipe_file(f"/{folder}/{utterance.row.id}", content)
    assert_same(keep(root, remote), whole, remote)
    keep(root, remote, Encoder(killed_at=0))


def test_frames_are_kept_as_they_were_computed(tmp_path):
    """In bfloat16 too: neither rounded nor widened."""
    encoding = dataclasses.replace(ENCODING, dtype="bfloat16")
    utterances, root = make_utterances(tmp_path, 5), tmp_path / "frames"
    store = keep(root, utterances, Encoder(dtype="bfloat16"), encoding)
    exact = keep(tmp_path / "exact", utterances)
    for utterance in utterances:
        frames = store.read(utterance).audio
        assert frames.dtype == jnp.bfloat16
        expected = exact.read(utterance).audio.astype(jnp.bfloat16)
        np.testing.assert_array_equal(frames, expected)
    halved = sum(path.stat().st_size for path in files(root, ".frames"))
    assert 2 * halved == sum(p.stat().st_size for p in files(tmp_path / "exact", ".frames"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_projector_hears_kept_frames_as_those_of_an_encoder_in_the_step(tmp_path, dtype):
    """Bit for bit, by way of the arrays in which batches carry them."""
    model = make_model(dtype=jnp.dtype(dtype))
    projector_params, encoder_params, _ = make_params()
    encoder_params = jax.tree.map(lambda x: x.astype(dtype), encoder_params)
    utterances, root = make_utterances(tmp_path, BATCH), tmp_path / "frames"
    encode, seen = jax.jit(model.encode, out_shardings=spread_sharding(MESH)), []

    def watched(samples: jax.Array) -> jax.Array:
        seen.append(encode(encoder_params, samples))
        return seen[-1]

    dim = model.encoder.config.d_model
    encoding = dataclasses.replace(ENCODING, dtype=dtype, encoder_dim=dim)
    store = keep(root, utterances, watched, encoding)
    bucket, num_frames = Bucket(20, 30, 5), np.zeros(BATCH, int)
    audio = {"audio_shape": {"frames": store.shape(bucket)}, "audio_dtype": store.dtype}
    rows = empty_batch(bucket, BATCH, fill=0, **audio).frames
    for row, utterance in enumerate(utterances):
        frames, num_frames[row], _ = store.read(utterance)
        rows[row, : len(frames)] = frames
    valid = np.arange(20) < num_frames[:, None]
    embed = jax.jit(model.embed_audio)
    expected = embed(projector_params, np.asarray(seen[0]), valid)
    heard = embed(projector_params, rows, valid)
    assert heard.dtype == jnp.dtype(dtype) and np.asarray(heard).any()
    assert np.asarray(heard).tobytes() == np.asarray(expected).tobytes()


def test_frames_that_vanish_later_are_an_error_that_names_them(tmp_path):
    utterances, root = make_utterances(tmp_path, 3), tmp_path / "frames"
    store = keep(root, utterances)
    (path,) = files(root, ".frames")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(OSError, match=f"{path} has become shorter: start the same command again"):
        store.read(utterances[2])


def test_python_keeps_nothing_of_each_clip(tmp_path, monkeypatch):
    """Neither what is computed nor what is known stays in memory as objects."""
    dim, rows = 5_000, make_utterances(tmp_path, 64)
    encoding = dataclasses.replace(ENCODING, encoder_dim=dim)
    monkeypatch.setattr(shards, "_MAX_BYTES", 2**20)

    def encode(samples: jax.Array) -> jax.Array:
        return jnp.ones((BATCH, 20, dim), device=samples.sharding)  # 1.6 MB

    keep(tmp_path / "first", rows[:1])
    peaks = []
    for count in (16, 64):
        tracemalloc.start()
        keep(tmp_path / str(count), rows[:count], encode, encoding)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
