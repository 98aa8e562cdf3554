"""Rotary positions of queries and keys."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flax_projector.config import Llama3RopeScaling, LlamaConfig
from flax_projector.models.attention import mesh_platform

Rotary = tuple[Float[Array, "#B 1 L d"], Float[Array, "#B 1 L d"]]
"""cos and sin of the rotary angles, f32, repeated for the two halves of a head."""


def rotary_angles(positions: Int[Array, "#B L"], config: LlamaConfig) -> Rotary:
    """cos and sin of the rotary angles at these positions."""
    halves = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32)
    inv_freq = config.rope_theta ** (-halves / config.head_dim)  # [d/2], radians per position
    if config.rope_scaling is not None:
        inv_freq = _scale_frequencies(inv_freq, config.rope_scaling)
    angles = positions[..., None].astype(jnp.float32) * inv_freq  # [B, L, d/2]
    angles = jnp.concatenate([angles, angles], axis=-1)[:, None]  # [B, 1, L, d]
    return jnp.cos(angles), jnp.sin(angles)


def _scale_frequencies(
    inv_freq: Float[Array, "half"], scaling: Llama3RopeScaling
) -> Float[Array, "half"]:
    """Divides low frequencies by the factor, keeps high ones, and blends those in between.

    Source: `_compute_llama3_parameters` (transformers).
    """
    waves = (
        scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
    )  # in the old context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((waves - low) / (high - low), 0, 1)
    return inv_freq * (kept + (1 - kept) / scaling.factor)


def rotate(
    x: Float[Array, "B X L d"],
    rotary: Rotary,
    is_rotated: Bool[Array, ""] | bool,
    *,
    scale: float = 1.0,
) -> Float[Array, "B X L d"]:
    """Turns queries or keys by the angles and scales them, in f32, and rounds once.

    Args:
      x: queries or keys; the halves of a head hold its pairs, as in HF's weights.
      rotary: the result of `rotary_angles`.
      is_rotated: False for layers without positions, where nothing is turned.
      scale: factor of the result.
    """
    cos, sin = rotary
    return _turn(x, jnp.where(is_rotated, cos, 1) * scale, jnp.where(is_rotated, sin, 0) * scale)


@jax.custom_vjp
def _turn(
    x: Float[Array, "B X L d"], cos: Float[Array, "#B 1 L d"], sin: Float[Array, "#B 1 L d"]
) -> Float[Array, "B X L d"]:
    return (x * cos + _quarter_turn(x) * sin).astype(x.dtype)


def _turn_forward(x: Array, cos: Array, sin: Array) -> tuple[Array, tuple[Array, Array]]:
    return _turn(x, cos, sin), (cos, sin)


def _turn_backward(angles: tuple[Array, Array], dy: Array) -> tuple[Array, None, None]:
    """Turns back. Autodiff would round a summand to bf16 where the turn is a product."""
    cos, sin = angles
    return _turn(dy, cos, -sin), None, None


_turn.defvjp(_turn_forward, _turn_backward)


def _quarter_turn(x: Float[Array, "B X L d"]) -> Float[Array, "B X L d"]:
    """(a, b) -> (-b, a) for the two halves of a head."""
    half = x.shape[-1] // 2
    if mesh_platform() != "tpu":
        return jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    # Halves of a head are narrower than a TPU's registers; moving them costs more than this
    # product, which is exact.
    turn = np.kron([[0, 1], [-1, 0]], np.eye(half)).astype(x.dtype)  # [d, d]
    precision = None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jnp.matmul(
        x,
        turn,
        precision=precision,
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )
