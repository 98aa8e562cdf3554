"""Batches in static shapes, against numpy by hand."""

import jax
import numpy as np
import pytest

from flax_projector.batch import (
    AUDIO_TOKEN,
    Batch,
    Bucket,
    TokenLayout,
    abstract_batch,
    empty_batch,
    to_global,
)
from flax_projector.config import MeshConfig
from flax_projector.lengths import num_encoder_frames
from flax_projector.sharding import batch_sharding, make_mesh

FILL = 60


@pytest.fixture
def batch() -> Batch:
    """A clip with three labels, a row of padding, and a clip with one label that fills its row."""
    batch = empty_batch(Bucket(6, 8, 3), 3, fill=FILL, audio_shape={"frames": (6, 2)})
    rows = {
        # the prompt [4, audio, audio, 7], the transcript [11, 12] and the end of turn, 2
        0: ([4, AUDIO_TOKEN, AUDIO_TOKEN, 7, 11, 12, FILL, FILL], 4, [3, 4, 5], [11, 12, 2], 3),
        2: ([4, 5, 6, AUDIO_TOKEN, 7, 8, 9, 7], 8, [7, 0, 0], [2, FILL, FILL], 1),
    }
    for row, (tokens, prompt_len, positions, labels, num_labels) in rows.items():
        layout = TokenLayout(
            tokens=np.array(tokens, np.int32),
            prompt_len=prompt_len,
            label_positions=np.array(positions, np.int32),
            labels=np.array(labels, np.int32),
            label_valid=np.arange(3) < num_labels,
        )
        num_frames = {0: 5, 2: 1}[row]
        batch.set_row(row, np.full((num_frames, 2), row + 1, np.float32), num_frames, layout)
    return jax.tree.map(jax.numpy.asarray, batch)


def test_rows_hold_what_was_put_into_them_and_padding_is_empty(batch):
    np.testing.assert_array_equal(batch.num_frames, [5, 0, 1])
    np.testing.assert_array_equal(batch.frames[..., 0], [[1] * 5 + [0], [0] * 6, [3] + [0] * 5])
    np.testing.assert_array_equal(batch.prompt_len, [4, 0, 8])
    np.testing.assert_array_equal(batch.tokens[1], [FILL] * 8)
    np.testing.assert_array_equal(batch.labels[0], [11, 12, 2])
    np.testing.assert_array_equal(batch.label_positions[0], [3, 4, 5])
    np.testing.assert_array_equal(
        batch.label_valid, [[True] * 3, [False] * 3, [True, False, False]]
    )


def test_tokens_that_the_llm_reads_are_counted_without_the_last_label(batch):
    np.testing.assert_array_equal(batch.num_tokens, [4 + 3 - 1, 0, 8 + 1 - 1])


def test_text_and_audio_are_told_apart_and_padding_is_neither(batch):
    text, audio = [np.asarray(x).astype(int) for x in (batch.is_text, batch.is_audio)]
    np.testing.assert_array_equal(
        text, [[1, 0, 0, 1, 1, 1, 0, 0], [0] * 8, [1, 1, 1, 0, 1, 1, 1, 1]]
    )
    np.testing.assert_array_equal(
        audio, [[0, 1, 1, 0, 0, 0, 0, 0], [0] * 8, [0, 0, 0, 1, 0, 0, 0, 0]]
    )


def test_valid_frames_are_the_first_of_the_clip(batch):
    expected = [[True] * 5 + [False], [False] * 6, [True] + [False] * 5]
    np.testing.assert_array_equal(batch.frame_valid, expected)
    np.testing.assert_array_equal(batch.num_samples, [5 * 320, 0, 320])


def test_in_a_whole_window_every_frame_is_valid_but_none_of_padding(batch):
    whole = batch.replace(whole_window=True)
    expected = np.tile([[True], [False], [True]], 6)
    np.testing.assert_array_equal(whole.frame_valid, expected)
    np.testing.assert_array_equal(whole.num_samples, batch.num_samples)  # of the clip


@pytest.mark.parametrize("num_samples", [0, 1, 320, 321, 5 * 320, 19 * 320])
def test_valid_frames_hold_at_least_one_sample_of_the_clip(num_samples):
    batch = empty_batch(Bucket(19, 4, 1), 2, fill=FILL, audio_shape={"samples": (19 * 320,)})
    batch.num_frames[:] = num_encoder_frames(num_samples), 19
    begins_within = 320 * np.arange(19) < num_samples
    np.testing.assert_array_equal(batch.frame_valid, [begins_within, [True] * 19])


@pytest.mark.parametrize(("num_rows", "count"), [(16, 2), (32, 4), (8, 1)])
def test_every_micro_batch_has_rows_of_every_device(num_rows, count):
    """And every row is in one of them."""
    sharding = batch_sharding(make_mesh(MeshConfig()))
    batch = empty_batch(Bucket(1, 1, 1), num_rows, fill=0, audio_shape={"samples": (2,)})
    batch.samples[:] = np.arange(num_rows)[:, None]
    batch.num_frames[:] = np.arange(num_rows)
    on_devices = to_global(batch, num_rows, sharding)
    device_of = {
        int(row): shard.device.id
        for shard in on_devices.num_frames.addressable_shards
        for row in np.asarray(shard.data)
    }
    parts = batch.split(count)
    assert parts.samples.shape == (count, num_rows // count, 2)
    assert parts.max_frames == batch.max_frames
    np.testing.assert_array_equal(parts.samples[..., 0], parts.num_frames)
    assert sorted(parts.num_frames.ravel()) == list(range(num_rows))
    for rows in parts.num_frames:
        devices = [device_of[row] for row in rows]
        assert sorted(devices) == sorted(list(range(8)) * (num_rows // count // 8))
        assert devices == sorted(devices), "rows would move to another device"


def test_the_abstract_batch_is_the_shape_of_the_global_one():
    sharding = batch_sharding(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    local = empty_batch(Bucket(3, 5, 2), 8, fill=0, audio_shape={"frames": (3, 4)})
    abstract, whole = abstract_batch(local, 8, sharding), to_global(local, 8, sharding)
    assert jax.tree.structure(abstract) == jax.tree.structure(whole)
    for shape, array in zip(jax.tree.leaves(abstract), jax.tree.leaves(whole), strict=True):
        assert (shape.shape, shape.dtype, shape.sharding) == (
            array.shape,
            array.dtype,
            array.sharding,
        )
