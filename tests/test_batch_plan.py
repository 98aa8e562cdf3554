"""Which utterances share a batch, an epoch of a mixture, and what no bucket holds."""

import dataclasses

import numpy as np
import pytest

from flax_projector.batch import Bucket
from flax_projector.chat.prompt import make_prompt
from flax_projector.config import DataConfig, PromptConfig
from flax_projector.data.audio import Problem
from flax_projector.data.batch_plan import (
    assign,
    batch_multiples,
    count_batches,
    epoch_members,
    epoch_plan,
    make_buckets,
)
from flax_projector.data.rows import ManifestRow, Rows
from flax_projector.data.utterances import prepare
from tests.clips import CONFIG, read_speech, tiny_prompt
from tests.tiny import make_tokenizer

pytestmark = pytest.mark.torch  # tests.tiny makes towers with it


@pytest.mark.parametrize("counts", [(0, 0, 1), (3, 5, 0), (8, 8, 8), (1, 0, 30), (40, 9, 3)])
@pytest.mark.parametrize("sizes", [(4, 4, 4), (12, 8, 4), (8, 4, 4)])
@pytest.mark.parametrize("seed", [None, 0])
def test_plan_pads_only_one_batch_and_moves_leftovers_up(counts, sizes, seed):
    assigned = np.repeat(np.arange(3), counts)
    rng = None if seed is None else np.random.default_rng(seed)
    plan = epoch_plan(np.arange(len(assigned)), assigned, sizes, rng)
    batches = [plan[number] for number in range(len(plan))]
    members = np.concatenate([batch for _, batch in batches])
    assert sorted(members[members >= 0]) == list(range(sum(counts)))
    padded = [(bucket, batch) for bucket, batch in batches if (batch < 0).any()]
    assert len(padded) <= 1
    for bucket, batch in padded:
        assert bucket == 2 and (batch >= 0).tolist() == sorted(batch >= 0, reverse=True)
    for bucket, batch in batches:
        assert len(batch) == sizes[bucket]
        assert all(assigned[i] <= bucket for i in batch if i >= 0)
    full = [sum(bucket == i for bucket, _ in batches) for i in range(3)]
    assert full[0] == counts[0] // sizes[0], "no batch is left unfilled for a longer bucket"
    assert len(plan) == sum(full) == count_batches(np.array(counts), sizes)


@pytest.mark.parametrize(
    ("bounds", "multiples"),
    [
        ((5.0, 10.0, 15.0), (3, 1, 1)),
        ((2.1, 2.5, 4.0), (1, 1, 1)),
        ((0.1, 0.3, 0.7, 2.1), (21, 7, 3, 1)),  # none of them is exact in binary
        ((3.0, 7.0), (2, 1)),
        ((30.0,), (1,)),
    ],
)
def test_batches_of_short_clips_hold_whole_multiples_that_last_no_longer(
    free_encoder, bounds, multiples
):
    config = DataConfig(bucket_secs=bounds)
    assert batch_multiples(config, 2) == multiples
    assert batch_multiples(dataclasses.replace(config, audio_tokens="window"), 2) == (1,)


@pytest.mark.parametrize(
    ("window", "pool_stride", "multiples"),
    # Beside 5, 10 and 15 s in the LLM, a clip costs 4.8, 9.6, 2.4 and 1.2 s in the encoder.
    [(30.0, 2, (2, 1, 1)), (30.0, 4, (1, 1, 1)), (15.0, 2, (2, 1, 1)), (15.0, 1, (2, 1, 1))],
)
def test_every_clip_costs_a_window_too(window, pool_stride, multiples):
    config = DataConfig(bucket_secs=(5.0, 10.0, 15.0), window_secs=window)
    assert batch_multiples(config, pool_stride) == multiples
    kept = dataclasses.replace(config, cache_features=True)
    assert batch_multiples(kept, pool_stride) == multiples, "keeping frames changes no batch"


@pytest.mark.parametrize("weight", [0.3, 0.5, 1.0, 1.7, 3.0])
def test_no_utterance_of_a_source_is_drawn_twice_more_than_another(weight):
    counts = np.zeros(11, int)
    for epoch in range(25):
        members = epoch_members(np.zeros(11, int), [weight], seed=5, epoch=epoch)
        assert len(members) == round(11 * weight)
        counts += np.bincount(members, minlength=11)
        assert np.ptp(counts) <= 1


def test_sources_are_drawn_from_independently():
    """Two sources of the same length: in no epoch are the places drawn from both the same."""
    sources = np.repeat([0, 1], 40)
    for epoch in range(4):
        members = epoch_members(sources, [0.5, 0.5], seed=5, epoch=epoch)
        first, second = members[:20], members[20:] - 40
        assert first.max() < 40 and second.min() >= 0
        assert set(first) != set(second)


@pytest.mark.parametrize(("case", "label"), [("keep", "Go LEFT"), ("lower", "go left")])
def test_the_case_of_labels_is_not_that_of_the_reference(case, label):
    prompt, rows = tiny_prompt(), [ManifestRow("0", "0.wav", "Go LEFT", 1.0)]
    (utterance,), _ = prepare([Rows.of(rows)], prompt, DataConfig(text_case=case))
    assert prompt.decode(utterance.target) == label
    assert utterance.row.text == "Go LEFT"


@pytest.mark.parametrize(
    ("duration", "max_frames"), [(0.5, 29), (0.55, 31), (0.551, 32), (1.9, 99), (1.96, 100)]
)
def test_a_clip_may_be_a_little_longer_than_stated(duration, max_frames):
    """By 0.05 s, 2.5 frames, and one more frame; 2 s are the window."""
    rows = [ManifestRow("0", "0.wav", "go", duration)]
    (utterance,), _ = prepare([Rows.of(rows)], tiny_prompt(), CONFIG)
    assert utterance.max_frames == max_frames


def test_clips_that_fill_the_window_have_one_bucket(tmp_path):
    prompt, rows = tiny_prompt(), read_speech(tmp_path, 13)
    config = dataclasses.replace(CONFIG, audio_tokens="window")
    utterances, _ = prepare([Rows.of(rows)], prompt, config)
    assert {u.max_frames for u in utterances} == {100}
    assert not assign(utterances, config).any()
    longest = max(len(u.target) for u in utterances)
    (bucket,) = make_buckets(utterances, prompt, config, 4)
    assert bucket == Bucket(100, bucket.merged_len, longest)
    assert 0 <= bucket.merged_len - prompt.merged_length(25, longest) < 8


@pytest.mark.parametrize("pool_stride", [2, 3, 4])
@pytest.mark.parametrize("system", ["", "as you were told", "listen well"])
def test_the_llm_computes_multiples_of_eight_positions_and_no_more_than_needed(
    tmp_path, pool_stride, system
):
    """Those before the audio are computed once, whatever their number."""
    prompt = make_prompt(make_tokenizer(), PromptConfig(system=system))
    utterances, _ = prepare([Rows.of(read_speech(tmp_path, 13))], prompt, CONFIG)
    assigned = assign(utterances, CONFIG)
    for number, bucket in enumerate(make_buckets(utterances, prompt, CONFIG, pool_stride)):
        computed = bucket.merged_len - len(prompt.before_audio)
        inside = [u for u, i in zip(utterances, assigned, strict=True) if i <= number]
        needed = max(
            prompt.merged_length(-(-u.max_frames // pool_stride), len(u.target)) for u in inside
        )
        assert computed % 8 == 0 and 0 <= bucket.merged_len - needed < 8
        assert bucket.text_len == max(len(u.target) for u in inside)
        frames = max(u.max_frames for u in inside)
        assert frames <= bucket.num_frames < frames + pool_stride


def test_what_no_bucket_holds_is_left_out_and_counted(tmp_path):
    prompt, rows = tiny_prompt(), read_speech(tmp_path, 13)
    short = DataConfig(window_secs=2.0, bucket_secs=(0.9,), max_text_tokens=12)
    kept, bad = prepare([Rows.of(rows)], prompt, short)
    assert 0 < len(kept) < 13 and len(kept) + len(bad) == 13
    assert {row.reason for row in bad} == {Problem.TOO_LONG, Problem.TOO_MANY_LABELS}
    details = {row.reason: row.detail for row in bad}
    assert "s; --data.bucket-secs ends at 0.9" in details[Problem.TOO_LONG]
    assert "labels; --data.max-text-tokens is 12" in details[Problem.TOO_MANY_LABELS]
    assert all(u.row.duration <= 0.9 and len(u.target) <= 12 for u in kept)
    message = (
        r"none of 13 .* its --data.bucket-secs 0.1, or have more .* --data.max-text-tokens 128"
    )
    with pytest.raises(ValueError, match=message):
        prepare([Rows.of(rows)], prompt, DataConfig(window_secs=2.0, bucket_secs=(0.1,)))
