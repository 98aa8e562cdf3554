"""Cross-entropy of labels, and CTC."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flax_projector.training.losses import can_spell, cross_entropy, ctc
from tests.parity import assert_relative_l2

pytestmark = pytest.mark.torch


@pytest.mark.parity("PyTorch")
def test_cross_entropy_equals_torch_and_ignores_padding():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 5, 17)).astype(np.float32) * 4
    labels = rng.integers(0, 17, (3, 5))
    valid = rng.random((3, 5)) < 0.6
    torch_logits = torch.from_numpy(logits[valid]).requires_grad_()
    expected = torch.nn.functional.cross_entropy(
        torch_logits, torch.from_numpy(labels[valid]), reduction="sum"
    )
    expected.backward()
    args = [jnp.asarray(x) for x in (logits, labels, valid)]
    total, grads = jax.jit(jax.value_and_grad(cross_entropy))(*args)
    assert_relative_l2(total, expected, 1e-6, what="sum")
    assert_relative_l2(np.asarray(grads)[valid], torch_logits.grad, 1e-5, what="gradient")
    assert not np.asarray(grads)[~valid].any()


def test_padding_with_infinite_logits_does_not_matter():
    logits = jnp.full((1, 2, 3), jnp.inf).at[0, 0].set(jnp.zeros(3))
    total = jax.jit(cross_entropy)(logits, jnp.zeros((1, 2), int), jnp.array([[True, False]]))
    np.testing.assert_allclose(float(total), np.log(3), rtol=1e-6)


@pytest.mark.parity("PyTorch")
def test_ctc_equals_torch_and_leaves_out_what_cannot_be_spelt():
    rng = np.random.default_rng(0)
    num_audio, num_labels = np.array([9, 6, 4, 5, 7]), np.array([4, 3, 3, 0, 7])
    logits = rng.standard_normal((5, 9, 11)).astype(np.float32) * 3
    labels = rng.integers(1, 11, (5, 7))
    labels[0, :3] = 7  # equal neighbours: a blank must stand between them
    labels[2, :3] = 5  # needs 3 + 2 audio tokens and has 4
    labels[4] = [1, 2, 3, 4, 5, 6, 7]
    audio_valid = np.arange(9) < num_audio[:, None]
    label_valid = np.arange(7) < num_labels[:, None]
    spelt = [0, 1, 4]
    torch_logits = torch.from_numpy(logits[spelt]).requires_grad_()
    expected = torch.nn.functional.ctc_loss(
        torch_logits.log_softmax(-1).transpose(0, 1),
        torch.from_numpy(labels[spelt]),
        torch.from_numpy(num_audio[spelt]),
        torch.from_numpy(num_labels[spelt]),
        reduction="sum",
    )
    expected.backward()
    args = [jnp.asarray(x) for x in (audio_valid, labels, label_valid)]
    total, grads = jax.jit(jax.value_and_grad(ctc))(jnp.asarray(logits), *args)
    assert np.flatnonzero(jax.jit(can_spell)(*args)).tolist() == spelt
    assert_relative_l2(total, expected, 1e-5, what="sum")
    assert_relative_l2(np.asarray(grads)[spelt], torch_logits.grad, 1e-5, what="gradient")
    assert not np.asarray(grads)[[2, 3]].any()
    assert not np.asarray(grads)[~audio_valid].any()
