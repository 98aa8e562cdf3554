"""The whole model: what is spliced where, and what each row hears."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_projector.batch import AUDIO_TOKEN
from flax_projector.config import MeshConfig
from flax_projector.models import speech_llm
from flax_projector.models.llama import abstract_decoder
from flax_projector.models.speech_llm import encode_prefix
from flax_projector.sharding import make_mesh, use_mesh
from flax_projector.training.objectives import LLMObjective
from flax_projector.training.state import shardings_of
from tests.parity import assert_relative_l2
from tests.tiny_model import (
    FRAMES,
    LLAMA,
    PREFIX,
    SAMPLES,
    make_batch,
    make_model,
    make_params,
    rows_of,
)

pytestmark = pytest.mark.xdist_group("test_speech_llm")


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def params():
    return make_params()


def test_only_the_trained_part_is_stored_in_f32():
    model = make_model(dtype=jnp.bfloat16, remat="layers")
    bf16, f32 = jnp.bfloat16, jnp.float32
    assert (model.encoder.dtype, model.encoder.param_dtype) == (bf16, bf16)
    assert (model.projector.dtype, model.projector.param_dtype) == (bf16, f32)
    assert (model.llm.dtype, model.llm.param_dtype, model.llm.remat) == (bf16, bf16, "layers")


def summed_loss(projector_params, frozen, batch, *, model) -> Any:
    return LLMObjective().summed_loss(model, projector_params, *frozen, batch=batch)[0]


@pytest.fixture(scope="module")
def loss_of(model, params):
    """Batch -> summed loss, compiled."""
    loss: Any = jax.jit(functools.partial(summed_loss, model=model))
    return lambda batch: float(loss(params[0], params[1:], batch))


def loss_and_gradients(model, params, batch) -> Any:
    loss = functools.partial(summed_loss, model=model)
    return jax.jit(jax.value_and_grad(loss))(params[0], params[1:], batch)


@pytest.fixture(scope="module")
def batch_with_padding():
    """Eight rows; the sixth is padding, which has no prefix."""
    batch = make_batch(8)
    batch.tokens[5], batch.label_valid[5], batch.label_positions[5] = 60, False, 0
    return batch


@pytest.fixture(scope="module")
def without_prefix(model, params, batch_with_padding):
    return loss_and_gradients(model, params, batch_with_padding)


@pytest.mark.consistency("ours with the prefix in every row")
@pytest.mark.parametrize("mesh_config", [MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_a_shared_prefix_changes_neither_loss_nor_gradients(
    model, params, batch_with_padding, without_prefix, mesh_config
):
    mesh = make_mesh(mesh_config)
    with use_mesh(mesh):
        prefix = encode_prefix(model, params[2], PREFIX, mesh)
        with_prefix = dataclasses.replace(model, prefix=prefix)
        got = loss_and_gradients(with_prefix, params, batch_with_padding)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(without_prefix), strict=True):
        assert_relative_l2(a, b, 1e-5)


def test_every_host_gets_the_whole_prefix(model, params, monkeypatch):
    """Also where the devices of a host hold only some of the heads."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = shardings_of(abstract_decoder(LLAMA, mesh=mesh))
    fetched = []
    monkeypatch.setattr(speech_llm.jax, "device_get", fetched.append)
    with use_mesh(mesh):
        encode_prefix(model, jax.device_put(params[2], shardings), PREFIX, mesh)
    leaves = jax.tree.leaves(fetched)
    assert leaves and all(leaf.is_fully_replicated for leaf in leaves)


def test_without_tokens_there_is_no_prefix(model, params):
    assert encode_prefix(model, params[2], (), make_mesh(MeshConfig())) is None


def test_merge_puts_audio_tokens_in_order(model, params):
    tokens = [[5, AUDIO_TOKEN, AUDIO_TOKEN, 7], [AUDIO_TOKEN, 6, 5, 5]]
    batch = dataclasses.replace(make_batch(2), tokens=jnp.array(tokens))
    audio = jnp.arange(2 * 3 * 20, dtype=jnp.float32).reshape(2, 3, 20)
    merged = model.merge(params[2], batch, audio)
    embedding = params[2]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(merged[0, 1:3], audio[0, :2])
    np.testing.assert_array_equal(merged[1, 0], audio[1, 0])
    np.testing.assert_array_equal(merged[0, 3], embedding[7])
    np.testing.assert_array_equal(merged[1, 1:], embedding[jnp.array([6, 5, 5])])


def test_sound_after_the_clip_does_not_reach_the_llm(loss_of):
    """Frames beyond `num_frames` are zeroed; audio tokens beyond the clip are not spliced in."""
    batch = make_batch(8)
    noise = np.random.default_rng(1).standard_normal(batch.frames.shape).astype(np.float32)
    is_clip = np.asarray(batch.frame_valid)[..., None]
    after = dataclasses.replace(batch, frames=np.where(is_clip, batch.frames, noise))
    within = dataclasses.replace(batch, frames=np.where(is_clip, noise, batch.frames))
    assert loss_of(after) == loss_of(batch)
    assert loss_of(within) != loss_of(batch)


def test_clips_are_heard_in_the_whole_window_however_short_their_arrays(loss_of):
    batch, length = make_batch(8, audio="samples"), 320 * FRAMES
    whole = dataclasses.replace(batch, samples=batch.samples.copy())
    whole.samples[:, length:] = 0.0
    cut = dataclasses.replace(batch, samples=batch.samples[:, :length])
    in_window = dataclasses.replace(cut, window_samples=SAMPLES)
    np.testing.assert_array_equal(in_window.windows, whole.samples)
    assert loss_of(in_window) == loss_of(whole) != loss_of(cut)


def test_each_row_hears_its_own_audio(loss_of):
    """The encoder and the splice of one row do not leak into another."""
    batch = make_batch(8, audio="samples")
    changed = dataclasses.replace(batch, samples=batch.samples.copy())
    changed.samples[3] *= -0.5

    def row_losses(batch):
        return [loss_of(rows_of(batch, slice(i, i + 1))) for i in range(8)]

    whole, rows = ([f(b) for b in (batch, changed)] for f in (loss_of, row_losses))
    np.testing.assert_allclose([sum(r) for r in rows], whole, rtol=1e-5)
    differs = [a != b for a, b in zip(*rows, strict=True)]
    assert differs == [i == 3 for i in range(8)]
