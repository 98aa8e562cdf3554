"""Rotary positions: how they are rounded, and that every platform turns alike."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_projector.config import LlamaConfig
from flax_projector.models import rotary
from tests.models import random_floats
from tests.parity import assert_relative_l2, relative_l2

CONFIG = LlamaConfig(
    vocab_size=5,
    hidden_size=16,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=12,
)
SCALE = CONFIG.head_dim**-0.5


def turn(x: Any, *, is_rotated: bool = True, scale: float = SCALE) -> Any:
    angles = rotary.rotary_angles(jnp.arange(7)[None], CONFIG)
    return rotary.rotate(x, angles, is_rotated, scale=scale)


@pytest.mark.consistency("ours by moving halves")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_product_turns_exactly(dtype, monkeypatch) -> None:
    """Outputs and gradients of the form for TPUs."""
    x, dy = (jnp.asarray(a, dtype) for a in random_floats(2, 3, 2, 7, CONFIG.head_dim))
    (moved, pull_moved) = jax.vjp(turn, x)
    monkeypatch.setattr(rotary, "mesh_platform", lambda: "tpu")
    (multiplied, pull_multiplied) = jax.vjp(turn, x)
    np.testing.assert_array_equal(moved, multiplied)
    np.testing.assert_array_equal(pull_moved(dy)[0], pull_multiplied(dy)[0])


@pytest.mark.consistency("JAX's own derivative")
def test_gradient_turns_back(monkeypatch) -> None:
    x, dy = (jnp.asarray(a) for a in random_floats(2, 3, 2, 7, CONFIG.head_dim))
    ours = jax.vjp(turn, x)[1](dy)[0]
    plain = lambda x, cos, sin: x * cos + rotary._quarter_turn(x) * sin  # noqa: E731
    monkeypatch.setattr(rotary, "_turn", plain)
    theirs = jax.vjp(turn, x)[1](dy)[0]
    assert_relative_l2(ours, theirs, 1e-6)


@pytest.mark.consistency("ours in f32")
@pytest.mark.parametrize("is_rotated", [True, False])
def test_queries_are_rounded_once(is_rotated) -> None:
    """Turned and scaled in f32: a bf16 query is as near to f32 as bf16 can be."""
    x = jnp.asarray(random_floats(3, 2, 7, CONFIG.head_dim), jnp.bfloat16)
    exact = turn(x.astype(jnp.float32), is_rotated=is_rotated)
    once = relative_l2(exact.astype(jnp.bfloat16), exact)
    assert_relative_l2(turn(x, is_rotated=is_rotated), exact, 1.01 * once)
    twice = turn(x, is_rotated=is_rotated, scale=1.0) * SCALE
    assert relative_l2(twice, exact) > 1.2 * once or not is_rotated
