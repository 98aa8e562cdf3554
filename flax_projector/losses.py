"""Next-token cross-entropy."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"], label_valid: Bool[Array, "B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of the negative log-likelihoods (nats) of the valid labels, and their number.

    The caller divides, so that a mean over devices, hosts or micro-batches weighs every token
    equally.
    """
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    label_logits = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    nll = jnp.where(label_valid, log_normaliser - label_logits, 0.0)
    return jnp.sum(nll), jnp.sum(label_valid, dtype=nll.dtype)
