"""Attention behind one function, for the encoder, the decoder and cached decoding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attend(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B C K d"],
    v: Float[Array, "B C K d"],
    *,
    key_valid: Bool[Array, "#B T C"] | None = None,
) -> Float[Array, "B T H d"]:
    """Grouped-query softmax attention: scores and softmax in at least f32.

    Args:
      q: queries.
      k: keys; each of the K heads serves G = H / K query heads.
      v: values.
      key_valid: True where a query may see a key; None lets every query see all. Every query must
        see at least one key.

    Returns:
      [B, T, H, d] in the dtype of `v`.

    Source: the "eager" attention of transformers; scaled by d ** -0.5.
    """
    b, t, h, d = q.shape
    num_kv_heads = k.shape[2]
    q = q.reshape(b, t, num_kv_heads, h // num_kv_heads, d)  # [B, T, K, G, d]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("BTKGd,BCKd->BKGTC", q, k, preferred_element_type=wide) * d**-0.5
    if key_valid is not None:
        scores = jnp.where(key_valid[:, None, None], scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("BKGTC,BCKd->BTKGd", weights, v)
    return out.reshape(b, t, h, d)
