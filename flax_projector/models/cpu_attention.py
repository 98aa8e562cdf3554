"""Faster attention for CPUs: it computes the same as `plain_attention.plain_attend`."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_projector.models.plain_attention import attend_matrices, causal_mask
from flax_projector.sharding import on_each_device


def attend_by_head(
    q: Float[Array, "B H Q d"],
    k: Float[Array, "B K C d"],
    v: Float[Array, "B K C d"],
    *,
    is_causal: bool,
) -> Float[Array, "B H Q d"]:
    """Computes one kv head after the other, so that its scores stay in the processor's cache.

    For an encoder, this is twice as fast as computing all heads at once.
    """
    return on_each_device(functools.partial(_local_attend_by_head, is_causal=is_causal))(q, k, v)


def _local_attend_by_head(
    q: Float[Array, "B H Q d"],
    k: Float[Array, "B K C d"],
    v: Float[Array, "B K C d"],
    *,
    is_causal: bool,
) -> Float[Array, "B H Q d"]:
    num_groups = q.shape[1] // k.shape[1]
    key_valid = None
    if is_causal:
        key_valid = jnp.tile(causal_mask(q.shape[2], k.shape[2])[0], (num_groups, 1))

    @functools.partial(jax.checkpoint, prevent_cse=False)  # the backward pass recomputes the scores
    def attend_head(qkv: tuple[Array, Array, Array]) -> Float[Array, "GQ d"]:
        return attend_matrices(*qkv, key_valid)

    num_heads = k.shape[0] * k.shape[1]
    heads = tuple(x.reshape(num_heads, -1, x.shape[-1]) for x in (q, k, v))  # [B*K, G*Q | C, d]
    return jax.lax.map(attend_head, heads).reshape(q.shape)
