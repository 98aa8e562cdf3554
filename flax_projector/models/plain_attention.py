"""Attention written out: for masks that no kernel supports, and as a reference for the kernels."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_KEY_BLOCK = 500  # keys whose weighted values are summed at once


def causal_mask(num_queries: int, num_keys: int | None = None) -> Bool[Array, "1 Q C"]:
    """True where a query may see a key: the last query sees all, each one before it one less.

    Args:
      num_queries: Q.
      num_keys: C; None stands for as many as there are queries.
    """
    num_keys = num_queries if num_keys is None else num_keys
    return jnp.tril(jnp.ones((1, num_queries, num_keys), bool), num_keys - num_queries)


def plain_attend(
    q: Float[Array, "B H Q d"],
    k: Float[Array, "B K C d"],
    v: Float[Array, "B K C d"],
    *,
    is_causal: bool = False,
    key_valid: Bool[Array, "#B Q C"] | None = None,
) -> Float[Array, "B H Q d"]:
    """`attention.attend` for all heads at once; holds the scores [B, K, G*Q, C] in memory."""
    if is_causal:
        key_valid = causal_mask(q.shape[2], k.shape[2])
    if key_valid is not None:
        num_groups = q.shape[1] // k.shape[1]
        key_valid = jnp.tile(key_valid, (1, num_groups, 1))[:, None]  # [B, 1, G*Q, C]
    b, num_kv_heads, _, d = k.shape
    grouped = q.reshape(b, num_kv_heads, -1, d)  # [B, K, G*Q, d]
    return attend_matrices(grouped, k, v, key_valid).reshape(q.shape)


def attend_matrices(
    q: Float[Array, "*batch GQ d"],
    k: Float[Array, "*batch C d"],
    v: Float[Array, "*batch C d"],
    key_valid: Bool[Array, "*#batch GQ C"] | None,
) -> Float[Array, "*batch GQ d"]:
    """Softmax attention for each matrix of queries, in at least f32.

    Keys are processed in blocks: a single sum over an encoder's 1500 keys would lose digits. The
    weighted sum is normalised rather than the weights, since it is the smaller array.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    blocks = [slice(start, start + _KEY_BLOCK) for start in range(0, k.shape[-2], _KEY_BLOCK)]

    def score(block: slice) -> Float[Array, "*batch GQ c"]:
        keys = k[..., block, :].swapaxes(-2, -1)  # [*batch, d, c]
        products = jnp.matmul(q, keys, preferred_element_type=wide)
        if key_valid is None:
            return products
        return jnp.where(key_valid[..., block], products, jnp.finfo(wide).min)

    scores = [score(block) for block in blocks]
    highest = functools.reduce(jnp.maximum, [jnp.max(x, axis=-1, keepdims=True) for x in scores])
    weights = [jnp.exp(x - jax.lax.stop_gradient(highest)) for x in scores]
    out = sum(
        jnp.matmul(w.astype(v.dtype), v[..., block, :], preferred_element_type=wide)
        for w, block in zip(weights, blocks, strict=True)
    )
    total = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
    return jnp.asarray(out / total).astype(v.dtype)
