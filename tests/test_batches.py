"""The batches of a set by number: whole epochs, mixtures, shapes, and shares of processes."""

import dataclasses
import pickle
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np
import pytest

from flax_projector.batch import AUDIO_TOKEN
from flax_projector.data import batches as code
from flax_projector.data.audio import load_audio
from flax_projector.data.batches import Batches
from flax_projector.data.rows import ManifestRow
from tests.clips import CONFIG, assert_same_batch, make_batches, read_speech

pytestmark = pytest.mark.torch  # tests.tiny makes towers with it


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Sequence[ManifestRow]:
    """13 clips, which do not divide into batches of 8."""
    return read_speech(tmp_path_factory.mktemp("speech"), 13)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Sequence[ManifestRow]:
    """Sources a, b and c with 13, 6 and 3 clips."""
    folder = tmp_path_factory.mktemp("mixture")
    counts = {"a": 13, "b": 6, "c": 3}
    return [row for s, n in counts.items() for row in read_speech(folder / s, n, source=s)]


WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}


def seen(batches: Batches, first: int = 0, last: int | None = None) -> list[tuple[str, str]]:
    """Source and id of the utterances in the order of the batches."""
    numbers = range(first, len(batches) if last is None else last)
    return [(u.row.source, u.row.id) for i in numbers for u in batches.members(i) if u]


@pytest.mark.parametrize("shuffle_seed", [None, 3])
@pytest.mark.parametrize("batch_size", [8, 16])
def test_every_utterance_is_seen_once_an_epoch(rows, shuffle_seed, batch_size):
    batches = make_batches(rows, shuffle_seed=shuffle_seed, batch_size=batch_size)
    assert sorted(id for _, id in seen(batches)) == sorted(f"clip{i}" for i in range(13))


def test_epochs_differ_and_are_the_same_for_everyone(rows):
    batches, again = (make_batches(rows, shuffle_seed=1, num_batches=40) for _ in range(2))
    epoch = len(make_batches(rows, shuffle_seed=1))
    order = [[u and u.row.id for u in batches.members(i)] for i in range(2 * epoch)]
    assert order == [[u and u.row.id for u in again.members(i)] for i in range(2 * epoch)]
    assert order[:epoch] != order[epoch:]


def test_batches_hold_the_clips_and_mark_what_is_real(rows):
    batches = make_batches(rows)
    for index in range(len(batches)):
        batch, bad = batches[index]
        assert not bad
        assert batch.samples.shape == (8, 320 * batches.bucket(index).num_frames)
        frame_valid = np.asarray(batch.frame_valid)
        for row, utterance in enumerate(batches.members(index)):
            if utterance is None:
                assert not frame_valid[row].any() and not batch.label_valid[row].any()
                assert batch.num_frames[row] == batch.prompt_len[row] == 0
                continue
            samples = load_audio(utterance.row.audio)
            np.testing.assert_array_equal(batch.samples[row, : len(samples)], samples)
            assert not batch.samples[row, len(samples) :].any()
            num_frames = -(-len(samples) // 320)
            assert frame_valid[row].sum() == batch.num_frames[row] == num_frames
            assert (batch.tokens[row] == AUDIO_TOKEN).sum() == -(-num_frames // 4)
            assert batch.label_valid[row].sum() == len(utterance.target)


def test_clips_may_fill_the_window_and_keep_their_length(rows):
    """The silence after a clip becomes audio tokens; how long the clip is stays known."""
    batches = make_batches(rows, config=dataclasses.replace(CONFIG, audio_tokens="window"))
    plain, num_filled = make_batches(rows), 0
    num_frames = {}
    for index in range(len(plain)):
        for utterance, count in zip(
            plain.members(index), plain[index].batch.num_frames, strict=True
        ):
            num_frames[utterance and utterance.row.id] = count
    for index in range(len(batches)):
        batch = batches[index].batch
        for row, utterance in enumerate(batches.members(index)):
            is_filled = utterance is not None
            num_filled += is_filled
            assert batch.num_frames[row] == num_frames[utterance and utterance.row.id]
            assert np.asarray(batch.frame_valid)[row].sum() == 100 * is_filled
            assert (batch.tokens[row] == AUDIO_TOKEN).sum() == 25 * is_filled
    assert num_filled == 13 and len(batches.abstract_batches()) == 1


def test_number_of_shapes_is_at_most_the_number_of_buckets(rows):
    batches = make_batches(rows, shuffle_seed=0, num_batches=50)
    shapes = set()
    for i in range(len(batches)):
        leaves, static = jax.tree.flatten(batches[i].batch)
        shapes.add((static, *(leaf.shape for leaf in leaves)))
    assert 1 < len(shapes) <= len(CONFIG.bucket_secs)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_every_batch_has_a_shape_that_was_announced(mixture, weights):
    batches = make_batches(mixture, shuffle_seed=0, weights=weights, num_batches=30)
    abstract = dict(batches.abstract_batches())
    used = {batches.bucket(i) for i in range(30)}
    assert len(used) > 1 and used <= abstract.keys()
    for i in range(6):
        batch = batches.to_global(batches[i].batch)
        describe = lambda x: (x.shape, x.dtype, x.sharding)  # noqa: E731
        assert jax.tree.map(describe, batch) == jax.tree.map(describe, abstract[batches.bucket(i)])


def test_batches_pickle_without_their_devices(rows):
    batches = make_batches(rows, shuffle_seed=0)
    copy = pickle.loads(pickle.dumps(batches))
    assert not hasattr(copy, "mesh") and copy.fingerprint == batches.fingerprint
    assert_same_batch(copy[0].batch, batches[0].batch)


@pytest.mark.parametrize("num_processes", [2, 4])
@pytest.mark.parametrize("shuffle_seed", [None, 1])
def test_processes_share_an_epoch_without_gap_or_overlap(
    rows, monkeypatch, num_processes, shuffle_seed
):
    whole = make_batches(rows, shuffle_seed=shuffle_seed)
    parts = []
    for process in range(num_processes):
        ours = np.arange(8).reshape(num_processes, -1)[process]
        monkeypatch.setattr(code, "local_rows", lambda mesh, num_rows, ours=ours: ours)
        parts.append(make_batches(rows, shuffle_seed=shuffle_seed))
    for index in range(len(whole)):
        batches = [part[index].batch for part in parts]
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
        assert_same_batch(joined, whole[index].batch)


def test_a_weight_is_how_often_an_epoch_holds_each_utterance(mixture):
    batches = make_batches(mixture, shuffle_seed=4, weights=WEIGHTS, num_batches=100)
    length = -(-(13 + 2 * 6 + 2) // 8)  # round(0.5 * 3) = 2 of c
    for epoch in range(6):
        counts = Counter(seen(batches, epoch * length, (epoch + 1) * length))
        assert [counts["a", f"clip{i}"] for i in range(13)] == [1] * 13
        assert [counts["b", f"clip{i}"] for i in range(6)] == [2] * 6
        assert sum(counts["c", f"clip{i}"] for i in range(3)) == 2
    counts = Counter(seen(batches, 0, 6 * length))
    assert [counts["c", f"clip{i}"] for i in range(3)] == [4] * 3  # 6 epochs x 2 draws over 3


def test_mixtures_are_the_same_for_everyone_and_differ_between_epochs(mixture):
    options = {"weights": WEIGHTS, "num_batches": 20}
    first, again = (make_batches(mixture, shuffle_seed=4, **options) for _ in range(2))
    assert seen(first) == seen(again)
    assert seen(first, 0, 4) != seen(first, 4, 8)
    assert seen(first) != seen(make_batches(mixture, shuffle_seed=5, **options))
    even = make_batches(mixture, shuffle_seed=4, weights=dict.fromkeys("abc", 1.0))
    assert seen(even) == seen(make_batches(mixture, shuffle_seed=4))


SHORT_FIRST = dataclasses.replace(CONFIG, bucket_secs=(0.5, 1.0, 2.0))
"""Batches of 4, 2 and 1 times the batch size, with an encoder that costs nothing."""


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batches_of_short_clips_hold_more_of_them(free_encoder, mixture, batch_size):
    batches = make_batches(mixture, shuffle_seed=2, config=SHORT_FIRST, batch_size=batch_size)
    announced, full, padded = dict(batches.abstract_batches()), Counter(), []
    for index in range(len(batches)):
        bucket, batch = batches.bucket(index), batches[index].batch
        utterances = [u for u in batches.members(index) if u]
        if len(utterances) == batch_size * bucket.multiple:
            full[bucket.multiple] += 1
        else:
            padded.append(bucket.multiple)
        assert len(batches.members(index)) == len(batch.tokens) == 8 * bucket.multiple
        assert all(u.row.duration <= 2.0 / bucket.multiple for u in utterances)
        assert batches.to_global(batch).tokens.shape == announced[bucket].tokens.shape
    assert full[2] and full[1] and padded in ([], [1])
    assert sorted(seen(batches)) == sorted((row.source, row.id) for row in mixture)


def test_buckets_of_the_same_lengths_are_not_mixed_up(free_encoder, rows):
    """No clip is between 0.7 and 1.4 s long: the second bucket holds what the first leaves over."""
    short = [row for row in rows if row.duration <= 0.7] * 4
    short = [dataclasses.replace(row, id=f"{i}") for i, row in enumerate(short)]
    config = dataclasses.replace(CONFIG, bucket_secs=(0.7, 1.4))
    batches = make_batches(short, config=config, batch_size=5)
    used = {batches.bucket(i) for i in range(len(batches))}
    assert sorted(bucket.multiple for bucket in used) == [1, 2]
    first, second = (dataclasses.replace(bucket, multiple=1) for bucket in used)
    assert first == second
    shapes = {bucket.multiple: len(batch.tokens) for bucket, batch in batches.abstract_batches()}
    assert shapes == {1: 8, 2: 16}


@pytest.mark.parametrize("config", [CONFIG, SHORT_FIRST], ids=["2, 1, 1", "4, 2, 1"])
def test_epochs_of_a_mixture_hold_what_its_weights_say_however_many_batches_they_take(
    free_encoder, mixture, config
):
    """With halves of sources, epochs differ in how many clips of each length they hold."""
    weights = {"a": 0.5, "b": 1.5, "c": 1.0}
    num_batches = 150
    options = {"shuffle_seed": 6, "weights": weights, "num_batches": num_batches, "batch_size": 1}
    batches = make_batches(mixture, config=config, **options)
    lengths, epoch, drawn = [0], Counter(), Counter()
    for index in range(num_batches):
        epoch.update(seen(batches, index, index + 1))
        lengths[-1] += 1
        if epoch.total() == 6 + 9 + 3:  # round(0.5 * 13) of a
            assert [sum(epoch[s, f"clip{i}"] for i in range(13)) for s in "abc"] == [6, 9, 3]
            drawn += epoch
            lengths, epoch = [*lengths, 0], Counter()
        assert epoch.total() < 18, "a batch belongs to one epoch"
    assert len(lengths) > 8 and len(set(lengths[:-1])) > 1
    for source, count in {"a": 13, "b": 6, "c": 3}.items():
        times = [drawn[source, f"clip{i}"] for i in range(count)]
        assert max(times) - min(times) <= 1
    again = make_batches(mixture, config=config, **options)  # from the middle, as a resumed run
    assert seen(again, 97, num_batches) == seen(batches, 97, num_batches)


def test_weights_without_a_shuffle_are_an_error(rows):
    with pytest.raises(ValueError, match="need a shuffle_seed"):
        make_batches(rows, weights={"a": 2.0})


def test_global_batch_is_split_over_the_devices(rows):
    batches = make_batches(rows)
    batch = batches.to_global(batches[0].batch)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(batch)} == {8}
    assert batch.tokens.addressable_shards[0].data.shape[0] == 1
    assert_same_batch(batch, batches[0].batch)


def test_a_batch_that_does_not_divide_over_the_devices_is_padded(rows, caplog):
    batches = make_batches(rows, batch_size=6)
    assert "a multiple of 8 has none" in caplog.text
    assert len(batches) == 3
    for index in range(len(batches)):
        members = batches.members(index)
        assert len(members) == 8 and members[6:] == [None, None]
        assert not batches[index].batch.label_valid[6:].any()
    assert sorted(id for _, id in seen(batches)) == sorted(f"clip{i}" for i in range(13))
