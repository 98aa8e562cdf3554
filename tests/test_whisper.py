"""Whisper's front half against transformers."""

import copy
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder as TorchEncoder
from transformers.models.whisper.modeling_whisper import _compute_mask_indices

from convert.models import WHISPER_ENCODER
from flax_projector.config import SpecAugmentConfig
from flax_projector.data.audio import load_audio
from flax_projector.data.manifest import read_manifest
from flax_projector.lengths import SAMPLE_RATE
from flax_projector.models import attention, whisper
from flax_projector.models.whisper import (
    EncoderLayer,
    WhisperEncoder,
    log_mel,
    mask_time,
)
from tests.models import load_on_one_device
from tests.parity import assert_close, assert_relative_l2, assert_within
from tests.tiny import randomize

pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("test_whisper")]

SPEECH = Path(__file__).parents[1] / "examples/demo/speech/heldout_seen_voices.jsonl"


def make_waveforms(num_samples: int) -> dict[str, np.ndarray]:
    """What a microphone gives, from nothing to too much."""
    rng = np.random.default_rng(num_samples)
    seconds = np.arange(num_samples) / SAMPLE_RATE
    click = np.zeros(num_samples)
    click[12_345:12_349] = (0.9, -1, 0.7, -0.2)
    fade = np.exp(-2 * seconds)  # ends in padding
    waveforms = {
        "noise": 0.2 * rng.standard_normal(num_samples),
        "silence": np.zeros(num_samples),
        "clipped sine": np.clip(3 * np.sin(2 * np.pi * 440.5 * seconds), -1, 1),
        "click": click,
        "faint fading chirp": 1e-3 * fade * np.sin(2 * np.pi * 300 * seconds**2),
    }
    return {name: samples.astype(np.float32) for name, samples in waveforms.items()}


jit_log_mel: Any = jax.jit(log_mel, static_argnums=1)


@pytest.mark.parity("transformers")
@pytest.mark.parametrize("num_mel_bins", [80, 128])
@pytest.mark.parametrize("window_secs", [6, 30])
def test_log_mel_equals_the_feature_extractor(num_mel_bins, window_secs) -> None:
    extractor = WhisperFeatureExtractor(feature_size=num_mel_bins, chunk_length=window_secs)
    waveforms = make_waveforms(window_secs * SAMPLE_RATE)
    expected = extractor(list(waveforms.values()), sampling_rate=SAMPLE_RATE, return_tensors="np")
    mel = jit_log_mel(np.stack(list(waveforms.values())), num_mel_bins)
    assert mel.shape == (len(waveforms), num_mel_bins, 100 * window_secs)
    for name, got, features in zip(waveforms, mel, expected["input_features"], strict=True):
        assert_within(got, features, 1e-4, name)


@pytest.mark.parity("transformers")
@pytest.mark.parametrize("num_mel_bins", [80, 128])
def test_log_mel_of_speech_equals_the_feature_extractor(num_mel_bins) -> None:
    """Clips as long as they happen to be, and one padded to the window."""
    extractor = WhisperFeatureExtractor(feature_size=num_mel_bins)
    rows, _ = read_manifest(SPEECH)
    clips = [load_audio(row.audio) for row in rows[:4]]
    assert any(len(clip) % 160 for clip in clips)
    for clip, padding in [(clips[0], "max_length"), *((clip, "do_not_pad") for clip in clips)]:
        features = extractor(
            clip, sampling_rate=SAMPLE_RATE, padding=padding, return_tensors="np"
        ).input_features
        if padding == "max_length":
            clip = np.pad(clip, (0, 30 * SAMPLE_RATE - len(clip)))
        assert_within(jit_log_mel(clip[None], num_mel_bins), features, 1e-4)


@pytest.mark.parity("transformers")
@pytest.mark.parametrize("num_samples", [201, 12_345, 16_001, 479_997])
def test_log_mel_of_an_odd_length_equals_the_feature_extractor(num_samples) -> None:
    extractor = WhisperFeatureExtractor(feature_size=80)
    samples = 0.2 * np.random.default_rng(0).standard_normal(num_samples).astype(np.float32)
    features = extractor(
        samples, sampling_rate=SAMPLE_RATE, padding="do_not_pad", return_tensors="np"
    ).input_features
    assert_within(jit_log_mel(samples[None], 80), features, 1e-4)


@pytest.mark.parametrize("num_samples", [201, 320, 12_345, 16_000])
def test_windows_are_the_samples_bit_for_bit(num_samples) -> None:
    samples = np.random.default_rng(0).standard_normal((2, num_samples + 400)).astype(np.float32)
    count = num_samples // 160
    every = np.lib.stride_tricks.sliding_window_view(samples, 400, axis=1)
    expected = every[:, : 160 * count : 160]
    np.testing.assert_array_equal(whisper._windows(jnp.asarray(samples), count), expected)


@pytest.mark.parametrize("num_samples", [0, 160, 200])
def test_log_mel_of_less_than_half_a_window_is_an_error(num_samples) -> None:
    with pytest.raises(ValueError, match=rf"{num_samples} samples: need more than 200"):
        log_mel(jnp.zeros((1, num_samples)), 80)


MEL_BINS, POSITIONS, NUM_LAYERS = 13, 19, 3


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Any:
    """A tiny Whisper with every parameter random, and its encoder in Flax, from its folder."""
    config = WhisperConfig(
        num_mel_bins=MEL_BINS,
        d_model=22,
        encoder_layers=NUM_LAYERS,
        encoder_attention_heads=2,
        encoder_ffn_dim=35,
        max_source_positions=POSITIONS,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=12,
        vocab_size=50,
        pad_token_id=0,
    )
    config._attn_implementation = "eager"
    model = randomize(WhisperModel(config), seed=0).eval()
    folder = tmp_path_factory.mktemp("whisper")
    model.save_pretrained(folder)
    flax_config, params = load_on_one_device(WHISPER_ENCODER, folder)
    return SimpleNamespace(torch=model.get_encoder(), config=flax_config, params=params)


def random_mel(batch: int, frames: int = 2 * POSITIONS) -> np.ndarray:
    rng = np.random.default_rng(frames)
    return rng.normal(size=(batch, MEL_BINS, frames)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def run(module: Any, params: dict, *inputs: Any) -> Any:
    return module.apply({"params": params}, *inputs)


def encode(pair, mel: np.ndarray, dtype: Any = jnp.float32) -> Any:
    return run(WhisperEncoder(pair.config, dtype), pair.params, mel)


@torch.no_grad()
def torch_encode(encoder: torch.nn.Module, mel: np.ndarray) -> torch.Tensor:
    return encoder(torch.from_numpy(mel)).last_hidden_state


@pytest.mark.parity("transformers")
@pytest.mark.parametrize("batch", [1, 3])
def test_encoder_equals_transformers(pair, batch) -> None:
    mel = random_mel(batch)
    assert_close(encode(pair, mel), torch_encode(pair.torch, mel), 1e-4)


@pytest.mark.parity("transformers")
def test_encoder_equals_transformers_with_the_kernel_of_a_tpu(pair, monkeypatch) -> None:
    """It pads the 19 frames to 128, which must not be heard."""
    kernel = functools.partial(attention.splash_attend, interpret=True)
    monkeypatch.setattr(attention, "splash_attend", kernel)
    monkeypatch.setattr(attention, "mesh_platform", lambda: "tpu")
    mel = random_mel(2)
    frames: Any = jax.jit(WhisperEncoder(pair.config).apply)({"params": pair.params}, mel)
    assert_close(frames, torch_encode(pair.torch, mel), 1e-4)


@pytest.mark.parity("transformers")
@pytest.mark.parametrize("positions", [1, 7])
def test_shorter_window_uses_the_first_positions(pair, positions) -> None:
    config = copy.deepcopy(pair.torch.config)
    config.max_source_positions = positions
    encoder = TorchEncoder(config).eval()
    weights = pair.torch.state_dict()
    weights["embed_positions.weight"] = weights["embed_positions.weight"][:positions]
    encoder.load_state_dict(weights)
    mel = random_mel(2, 2 * positions)
    assert_close(encode(pair, mel), torch_encode(encoder, mel), 1e-4)


@pytest.mark.parity("transformers")
@pytest.mark.parametrize("scale", [1, 0.01])  # the smaller, the more the norms' epsilon shows
@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_layer_equals_transformers(pair, layer, scale) -> None:
    rng = np.random.default_rng(layer)
    x = rng.normal(scale=scale, size=(2, 11, 22)).astype(np.float32)
    params = jax.tree.map(lambda leaf: leaf[layer], pair.params["layers"])
    module = EncoderLayer(pair.config, jnp.float32, jnp.float32)
    y, _ = run(module, params, x)
    expected = pair.torch.layers[layer](torch.from_numpy(x), None)
    assert_close(y, expected, 1e-5)


@pytest.mark.consistency("ours in f32")
def test_bf16_encoder_is_near_f32(pair) -> None:
    mel = random_mel(3)
    y = encode(pair, mel, jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    assert_relative_l2(y, encode(pair, mel), 1e-2)


@pytest.mark.parametrize(
    "shape",
    [(1, 80, 2 * POSITIONS), (1, MEL_BINS, 2 * POSITIONS + 2), (1, MEL_BINS, 9)],
    ids=["mel bins", "too long", "odd"],
)
def test_mel_that_does_not_fit_is_an_error(pair, shape) -> None:
    with pytest.raises(ValueError, match=rf"{shape[1]}, {shape[2]}\): need \[B, 13, F\].* 38"):
        encode(pair, np.zeros(shape, np.float32))


@functools.partial(jax.jit, static_argnums=2)
def run_mask(mel: Any, num_samples: Any, config: SpecAugmentConfig, seed: int) -> Any:
    return mask_time(mel, num_samples, config, jax.random.key(seed))


def masked_frames(mel: Any, config: SpecAugmentConfig, num_samples: Any, seed: int) -> np.ndarray:
    masked = run_mask(mel, num_samples.astype(np.int32), config, seed)
    is_zero = np.asarray(masked) == 0
    np.testing.assert_array_equal(is_zero.all(axis=1), is_zero.any(axis=1))  # all bins or none
    np.testing.assert_array_equal(np.asarray(masked)[~is_zero], mel[~is_zero])
    return is_zero.all(axis=1)  # [B, F]


def test_time_masks_are_whole_stretches_of_the_clip() -> None:
    config = SpecAugmentConfig(mask_time_prob=0.05, mask_time_length=10, mask_time_min_masks=2)
    mel = np.ones((4, 3, 600), np.float32)
    num_samples = 160 * np.array([600, 301, 40, 5])
    is_masked = masked_frames(mel, config, num_samples, seed=0)
    for row, num_frames in zip(is_masked, num_samples // 160, strict=True):
        assert not row[num_frames:].any()
        edges = np.flatnonzero(np.diff(np.pad(row.astype(int), 1)))
        assert all(stop - start >= 10 for start, stop in edges.reshape(-1, 2))
    assert 10 < is_masked[2].sum() <= 20  # two at least, which may overlap
    assert not is_masked[3].any()  # shorter than a mask


def test_time_masks_cover_what_transformers_masks() -> None:
    """Means over many clips; overlaps make both a little less than the probability."""
    config = SpecAugmentConfig(mask_time_prob=0.2, mask_time_length=10, mask_time_min_masks=2)
    mel = np.ones((500, 1, 300), np.float32)
    ours = masked_frames(mel, config, np.full(500, 160 * 300), seed=1).mean()
    np.random.seed(0)  # noqa: NPY002 - theirs draws from the global state
    theirs = _compute_mask_indices((500, 300), 0.2, 10, min_masks=2).mean()
    assert abs(ours - theirs) < 0.005
