"""Sound files as inputs: clips that do not fit, and clips that can be read again."""

import dataclasses
import pickle
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from flax_projector.config import MeshConfig
from flax_projector.data.audio import Problem, Slice
from flax_projector.data.bad_rows import BadRow
from flax_projector.data.frames.keep import keep_frames
from flax_projector.data.frames.shards import Encoding
from flax_projector.data.inputs import Inputs, Waveforms, find_unreadable
from flax_projector.data.reader import BatchIterator
from flax_projector.data.rows import ManifestRow, Rows
from flax_projector.data.utterances import Utterance, Utterances, settle_lengths
from flax_projector.sharding import make_mesh
from tests.clips import CONFIG, assert_same_batch, break_clip, make_batches, read_speech

pytestmark = pytest.mark.torch  # tests.tiny makes towers with it


def try_again(utterances: Sequence[Utterance]) -> list[BadRow]:
    inputs = Waveforms(CONFIG.window_samples)
    return find_unreadable(utterances, inputs, num_threads=2, drop_doubtful=False)


def keep(folder: Path, utterances: Utterances, dtype: str = "float32") -> Inputs:
    """Frames that hold three samples each."""
    return keep_frames(
        folder,
        "train",
        utterances,
        lambda x: x.reshape(len(x), -1, 320)[..., :3].astype(dtype),  # pyright: ignore
        Encoding("tiny", 3, dtype, CONFIG.window_samples),
        mesh=make_mesh(MeshConfig()),
        batch_size=4,
        num_threads=2,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_carry_kept_frames_as_they_are_kept(tmp_path, dtype):
    """From the disk to the devices, by way of worker processes, too."""
    utterances = make_batches(rows := read_speech(tmp_path, 13)).utterances
    inputs = keep(tmp_path / "frames", utterances, dtype)
    batches = make_batches(rows, inputs=inputs)
    iterator = BatchIterator(batches, num_threads=1, num_workers=1)
    read = list(iterator)
    iterator.close()
    for index, (batch, _) in enumerate(read):
        assert_same_batch(batch, batches[index].batch)
        assert batch.frames.dtype == batches.to_global(batch).frames.dtype == jnp.dtype(dtype)
        for row, utterance in enumerate(batches.members(index)):
            if utterance is not None:
                frames = inputs.read(utterance).audio
                assert batch.frames[row, : len(frames)].tobytes() == frames.tobytes()


def test_clips_that_can_be_read_again_are_no_longer_bad(tmp_path):
    utterances = make_batches(read_speech(tmp_path, 13)).utterances
    paths = [str(u.row.audio) for u in utterances]
    for path in paths[:2]:
        break_clip(path, "nan")
    first, second = try_again(utterances)
    assert [first.key, second.key] == [u.row.key for u in utterances[:2]]
    assert first.reason == Problem.NOT_FINITE and f"{paths[0]} has samples" in first.detail
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, soundfile.info(paths[0]).frames)
    soundfile.write(paths[0], noise, 16_000)
    assert try_again(utterances) == [second]


def test_a_doubtful_clip_is_used_and_reported(tmp_path):
    rows = read_speech(tmp_path, 13)
    soundfile.write(str(rows[2].audio), np.zeros(round(rows[2].duration * 16_000)), 16_000)
    batches = make_batches(rows)
    found = [row for i in range(len(batches)) for row in batches[i].bad]
    assert [(row.id, row.reason) for row in found] == [("clip2", Problem.SILENT)]
    num_used = sum(np.count_nonzero(batches[i].batch.num_frames) for i in range(len(batches)))
    assert num_used == 13
    assert try_again(batches.utterances) == found


DOUBTFUL = {
    Problem.SILENT: lambda x: 0 * x,
    Problem.TOO_LOUD: lambda x: 30 * x,
    Problem.CLIPPED: lambda x: np.clip(20 * x, -1, 1),
}


@pytest.mark.parametrize("problem", DOUBTFUL)
@pytest.mark.parametrize("kept", [False, True], ids=["files", "kept frames"])
def test_a_doubtful_clip_can_be_dropped(tmp_path, problem, kept):
    """Then it leaves the same batches behind as one that cannot be read, and is listed."""
    batches = {}
    for name in ("doubtful", "nan"):
        rows = read_speech(tmp_path / name, 13, source="clips.jsonl")
        path = str(rows[2].audio)
        samples, rate = soundfile.read(path)
        changed = (
            DOUBTFUL[problem](samples) if name == "doubtful" else np.full(len(samples), np.nan)
        )
        soundfile.write(path, changed, rate, subtype="FLOAT")
        inputs = Waveforms(CONFIG.window_samples)
        if kept:
            inputs = keep(tmp_path / "frames", make_batches(rows).utterances)
        batches[name] = make_batches(rows, inputs=inputs, drop_doubtful=name == "doubtful")
    dropped = pickle.loads(pickle.dumps(batches["doubtful"]))  # as workers have it
    assert dropped.fingerprint == batches["nan"].fingerprint
    found = []
    for i in range(len(dropped)):
        assert_same_batch(dropped[i].batch, batches["nan"][i].batch)
        found += dropped[i].bad
    assert [(row.id, row.reason, row.is_used) for row in found] == [("clip2", problem, False)]
    assert not problem.is_defect


def test_a_clip_longer_than_the_window_is_never_cut(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.1, 0.1, 32_640)  # 2.04 s
    soundfile.write(tmp_path / "long.wav", samples, 16_000)
    url = (tmp_path / "long.wav").as_uri()  # its length is not looked up
    batch, bad = make_batches([ManifestRow("long", url, "go", 2.0)])[0]
    assert [(row.id, row.reason) for row in bad] == [("long", Problem.TOO_LONG)]
    assert "long.wav lasts 2.040 s; --data.window-secs is 2" in bad[0].detail
    assert not batch.samples.any() and not batch.label_valid.any()


@pytest.mark.parametrize(
    ("stated", "lasts", "limit", "window", "expected"),
    [
        (2.0, 2.03, 2.0, 2.0, 2.03),  # longer than the window: left out as too long
        (2.0, 1.97, 2.0, 2.0, 1.97),
        (1.96, 2.0, 2.0, 2.0, 2.0),
        (2.03, 1.99, 2.0, 2.0, 1.99),  # within the limit: used
        (2.03, 1.99, 2.0, 30.0, 1.99),
        (2.0, 2.03, 2.0, 30.0, 2.0),  # the window has room: used as it is
        (1.9, 1.93, 2.0, 2.0, 1.9),  # not near
        (2.06, 2.02, 2.0, 2.0, 2.06),
        (2.0, 3.0, 2.0, 2.0, 2.0),  # not as long as stated: a defect, found when it is read
        (2.0, None, 2.0, 2.0, 2.0),  # cannot be read: found then, too
    ],
)
@pytest.mark.parametrize("offset", [None, 0.3])
@pytest.mark.parametrize("is_part", [False, True])
def test_clips_near_the_limit_are_judged_by_their_true_lengths(
    tmp_path, stated, lasts, limit, window, expected, offset, is_part
):
    path = tmp_path / "clip.wav"
    if lasts is not None:
        soundfile.write(path, np.zeros(round(16_000 * (lasts + (offset or 0)))), 16_000)
    audio: str | Slice = str(path)
    if is_part:
        content = path.read_bytes() if lasts is not None else b"not audio"
        (tmp_path / "all.tar").write_bytes(b"before" + content + b"after")
        audio = Slice(str(tmp_path / "all.tar"), 6, len(content))
    row = ManifestRow("clip", audio, "go", stated, offset)
    (settled,) = settle_lengths(Rows.of([row]), limit_secs=limit, window_secs=window)
    assert settled == expected


def test_clips_at_urls_are_not_fetched_to_judge_their_lengths():
    parts = ["memory://no/clip.wav", Slice("memory://no/all.tar", 0, 9)]
    rows = [ManifestRow(str(audio), audio, "go", 2.0) for audio in parts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flax_projector.data.utterances.read_duration", lambda audio: pytest.fail())
        settled = settle_lengths(Rows.of(rows), limit_secs=2.0, window_secs=2.0)
    assert settled.tolist() == [2.0, 2.0]


def test_parts_of_a_file_are_batched_like_files(tmp_path):
    rows = read_speech(tmp_path, 13, source="clips.jsonl")
    contents = [Path(str(row.audio)).read_bytes() for row in rows]
    (tmp_path / "all.tar").write_bytes(b"".join(contents))
    starts = np.cumsum([0, *map(len, contents)]).tolist()
    parts = [
        dataclasses.replace(row, audio=Slice(str(tmp_path / "all.tar"), start, len(content)))
        for row, start, content in zip(rows, starts, contents, strict=False)
    ]
    expected, actual = make_batches(rows), pickle.loads(pickle.dumps(make_batches(parts)))
    for i in range(len(expected)):
        assert_same_batch(actual[i].batch, expected[i].batch)


def test_segments_are_batched_like_files(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.1, 0.1, 160_000).astype(np.float32)
    soundfile.write(tmp_path / "long.wav", samples, 16_000, subtype="FLOAT")
    rows = [
        ManifestRow(str(i), str(tmp_path / "long.wav"), "go", 0.5, offset=0.5 * i)
        for i in range(16)
    ]
    batches = make_batches(rows)
    read = np.concatenate([batches[i].batch.samples[:, :8000] for i in range(len(batches))])
    np.testing.assert_array_equal(read.ravel(), samples[:128_000])
