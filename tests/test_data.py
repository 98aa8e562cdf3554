"""Manifests, audio, buckets and batches."""

import json

import numpy as np
import pytest
import soundfile

from flax_projector.config import DataConfig, MeshConfig, PromptConfig
from flax_projector.data import (
    BatchSource,
    Waveforms,
    epoch_plan,
    load_audio,
    make_iterator,
    prepare,
    read_manifest,
    to_global,
)
from flax_projector.prompt import AUDIO_TOKEN, make_prompt
from flax_projector.sharding import make_mesh
from tests.tiny import make_speech, make_tokenizer

pytestmark = pytest.mark.torch  # tests.tiny makes towers with it

CONFIG = DataConfig(window_secs=2.0, bucket_secs=(0.7, 1.1, 2.0), max_text_tokens=20)


@pytest.fixture
def source(tmp_path):
    """Makes sources over 13 clips: they do not divide into batches of 8."""
    prompt = make_prompt(make_tokenizer(), PromptConfig())
    utterances = prepare(read_manifest(make_speech(tmp_path, 13)), prompt, CONFIG)

    def make(**kwargs) -> BatchSource:
        return BatchSource(
            utterances,
            inputs=Waveforms(CONFIG.window_samples),
            prompt=prompt,
            config=CONFIG,
            pool_stride=4,
            mesh=make_mesh(MeshConfig()),
            **{"batch_size": 8, **kwargs},
        )

    return make


@pytest.mark.parametrize("shuffle_seed", [None, 3])
@pytest.mark.parametrize("batch_size", [8, 16])
def test_every_utterance_is_seen_once_an_epoch(source, shuffle_seed, batch_size):
    batches = source(shuffle_seed=shuffle_seed, batch_size=batch_size)
    ids = [u.row.id for i in range(len(batches)) for u in batches.members(i) if u]
    assert sorted(ids) == sorted(f"clip{i}" for i in range(13))


@pytest.mark.parametrize("sizes", [(0, 0, 1), (3, 5, 0), (8, 8, 8), (1, 0, 30), (17, 2, 3)])
@pytest.mark.parametrize("seed", [None, 0])
def test_plan_pads_only_one_batch_and_moves_leftovers_up(sizes, seed):
    assigned = np.repeat(np.arange(3), sizes)
    rng = None if seed is None else np.random.default_rng(seed)
    plan = epoch_plan(assigned, 3, 4, rng)
    members = np.concatenate([batch for _, batch in plan])
    assert sorted(members[members >= 0]) == list(range(sum(sizes)))
    assert sum((batch < 0).any() for _, batch in plan) <= 1
    assert len(plan) == -(-sum(sizes) // 4)
    for bucket, batch in plan:
        assert all(assigned[i] <= bucket for i in batch if i >= 0)


def test_epochs_differ_and_are_the_same_for_everyone(source):
    batches, again = (source(shuffle_seed=1, num_batches=40) for _ in range(2))
    epoch = len(source(shuffle_seed=1))
    order = [[u and u.row.id for u in batches.members(i)] for i in range(2 * epoch)]
    assert order == [[u and u.row.id for u in again.members(i)] for i in range(2 * epoch)]
    assert order[:epoch] != order[epoch:]


def test_batches_hold_the_clips_and_mark_what_is_real(source):
    batches = source()
    for index in range(len(batches)):
        batch = batches[index]
        for row, utterance in enumerate(batches.members(index)):
            if utterance is None:
                assert not batch["frame_valid"][row].any()
                assert not batch["label_valid"][row].any()
                assert batch["prompt_len"][row] == 0
                continue
            samples = load_audio(utterance.row.audio)
            np.testing.assert_array_equal(batch["samples"][row, : len(samples)], samples)
            assert not batch["samples"][row, len(samples) :].any()
            num_frames = -(-len(samples) // 320)
            assert batch["frame_valid"][row].sum() == num_frames
            assert (batch["tokens"][row] == AUDIO_TOKEN).sum() == -(-num_frames // 4)
            assert batch["label_valid"][row].sum() == len(utterance.target)


def test_number_of_shapes_is_at_most_the_number_of_buckets(source):
    batches = source(shuffle_seed=0, num_batches=50)
    shapes = {
        tuple(sorted((k, v.shape) for k, v in batches[i].items())) for i in range(len(batches))
    }
    assert 1 < len(shapes) <= len(CONFIG.bucket_secs)


def test_iterator_resumes_where_it_stood(source):
    batches = source(shuffle_seed=0, num_batches=6)
    whole = [batch["tokens"] for batch in make_iterator(batches, 2)]
    first = make_iterator(batches, 2)
    for _ in range(2):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    resumed = make_iterator(batches, 2)
    resumed.set_state(state)
    rest = [batch["tokens"] for batch in resumed]
    assert len(whole) == 6 and len(rest) == 4
    for expected, actual in zip(whole[2:], rest, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_global_batch_is_split_over_the_devices(source):
    batches = source()
    arrays = to_global(batches[0], batches)
    assert {len(a.sharding.device_set) for a in arrays.values()} == {8}
    assert arrays["tokens"].addressable_shards[0].data.shape[0] == 1
    np.testing.assert_array_equal(np.asarray(arrays["tokens"]), batches[0]["tokens"])


def test_a_batch_that_does_not_divide_over_the_devices_is_padded(source, caplog):
    batches = source(batch_size=6)
    assert "a multiple of 8 has none" in caplog.text
    assert len(batches) == 3
    ids = []
    for index in range(len(batches)):
        members = batches.members(index)
        assert len(members) == 8 and members[6:] == [None, None]
        assert not batches[index]["label_valid"][6:].any()
        ids += [u.row.id for u in members if u]
    assert sorted(ids) == sorted(f"clip{i}" for i in range(13))


def test_what_no_bucket_holds_is_left_out_and_counted(tmp_path, caplog):
    prompt = make_prompt(make_tokenizer(), PromptConfig())
    rows = read_manifest(make_speech(tmp_path, 13))
    short = DataConfig(window_secs=2.0, bucket_secs=(0.9,), max_text_tokens=12)
    kept = prepare(rows, prompt, short)
    assert 0 < len(kept) < 13
    assert f"{13 - len(kept)} of 13 utterances are left out" in caplog.text
    with pytest.raises(ValueError, match="none of 13 utterances fits"):
        prepare(rows, prompt, DataConfig(window_secs=2.0, bucket_secs=(0.1,)))


def test_a_clip_longer_than_its_manifest_says_is_an_error(tmp_path, source):
    manifest = tmp_path / "wrong.jsonl"
    soundfile.write(tmp_path / "long.wav", np.zeros(32_000), 16_000)
    manifest.write_text('{"audio": "long.wav", "text": "go", "duration": 0.5}\n')
    prompt = make_prompt(make_tokenizer(), PromptConfig())
    batches = BatchSource(
        prepare(read_manifest(manifest), prompt, CONFIG),
        inputs=Waveforms(CONFIG.window_samples),
        prompt=prompt,
        config=CONFIG,
        pool_stride=4,
        mesh=make_mesh(MeshConfig()),
        batch_size=8,
    )
    with pytest.raises(ValueError, match=r"long.wav lasts 2.00 s, its manifest says 0.5 s"):
        batches[0]


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_any_rate_and_channels_become_16_khz_mono(tmp_path, rate, channels, suffix):
    seconds = np.arange(rate) / rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * seconds)
    silence = np.zeros_like(tone)
    stereo = np.stack([tone, silence] if channels == 2 else [tone], axis=1)
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, stereo, rate)
    samples = load_audio(path)
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert abs(len(samples) - 16_000) <= 1
    spectrum = np.abs(np.fft.rfft(samples[:16_000]))
    assert np.argmax(spectrum) == 440
    peak = 0.5 / channels
    assert np.abs(samples[2_000:-2_000]).max() == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "{\n", r"a.jsonl:1: not JSON"),
        ("a.jsonl", "[1]\n", "need an object"),
        ("a.jsonl", '{"audio": "0.wav"}\n', "row 1: needs a non-empty 'audio' and 'text'"),
        ("a.jsonl", '{"audio": "0.wav", "text": " "}\n', "needs a non-empty"),
        ("a.jsonl", '{"audio": "no.wav", "text": "x"}\n', r"no.wav does not exist"),
        ("a.jsonl", '{"audio": "bad.wav", "text": "x"}\n', "not a readable audio file"),
        ("a.jsonl", '{"audio": "0.wav", "text": "x"}\n' * 2, "'0' occurs twice"),
        ("a.jsonl", "", "has no rows"),
        ("a.txt", "", "must end in .jsonl or .tsv"),
    ],
)
def test_bad_manifests_name_the_place(tmp_path, name, text, message):
    make_speech(tmp_path, 1)
    (tmp_path / "bad.wav").write_bytes(b"not audio")
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / name)


def test_tsv_and_jsonl_give_the_same_rows(tmp_path):
    jsonl = read_manifest(make_speech(tmp_path, 3))
    lines = ["path\tseconds\ttext\tid"]
    lines += [f"{r.audio.name}\t{r.duration}\t{r.text}\t{r.id}" for r in jsonl]
    (tmp_path / "rows.tsv").write_text("\n".join(lines) + "\n")
    assert read_manifest(tmp_path / "rows.tsv") == jsonl


@pytest.mark.parametrize("samples", [np.zeros(0), np.array([0.0, np.nan])])
def test_empty_or_non_finite_audio_is_an_error(tmp_path, samples):
    soundfile.write(tmp_path / "x.wav", samples, 16_000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"x.wav is empty or has samples that are not finite"):
        load_audio(tmp_path / "x.wav")
