"""Cross-entropy of labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flax_projector.losses import cross_entropy

pytestmark = pytest.mark.torch


def test_equals_torch_and_ignores_padding():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 5, 17)).astype(np.float32) * 4
    labels = rng.integers(0, 17, (3, 5))
    valid = rng.random((3, 5)) < 0.6
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[valid]), torch.from_numpy(labels[valid]), reduction="sum"
    )
    total, count = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(valid))
    assert float(count) == valid.sum()
    np.testing.assert_allclose(float(total), float(expected), rtol=1e-6)
    grads = jax.grad(lambda x: cross_entropy(x, jnp.asarray(labels), jnp.asarray(valid))[0])
    assert not np.any(np.asarray(grads(jnp.asarray(logits)))[~valid])


def test_padding_with_infinite_logits_does_not_matter():
    logits = jnp.full((1, 2, 3), jnp.inf).at[0, 0].set(jnp.zeros(3))
    total, count = cross_entropy(logits, jnp.zeros((1, 2), int), jnp.array([[True, False]]))
    np.testing.assert_allclose([float(total), float(count)], [np.log(3), 1], rtol=1e-6)
