"""Next-token cross-entropy and CTC."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"], label_valid: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Sum of the negative log-likelihoods (nats) of the valid labels.

    The caller divides, so that a mean over devices, hosts or micro-batches gives every token the
    same weight.
    """
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    label_logits = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(label_valid, log_normaliser - label_logits, 0.0))


def can_spell(
    audio_valid: Bool[Array, "B A"], labels: Int[Array, "B T"], label_valid: Bool[Array, "B T"]
) -> Bool[Array, "B"]:
    """True for rows that have labels, and enough audio tokens for CTC to spell them."""
    are_equal = label_valid[:, 1:] & (labels[:, 1:] == labels[:, :-1])
    # Two equal labels in a row need a blank between them.
    needed = jnp.sum(label_valid, axis=1) + jnp.sum(are_equal, axis=1)
    return (needed <= jnp.sum(audio_valid, axis=1)) & label_valid[:, 0]


def ctc(
    logits: Float[Array, "B A Z"],
    audio_valid: Bool[Array, "B A"],
    labels: Int[Array, "B T"],
    label_valid: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """Sum of the CTC losses (nats) of the rows that `can_spell` their labels.

    Args:
      logits: class 0 is the blank.
      audio_valid: True for audio tokens of the clip, which come first.
      labels: classes from 1.
      label_valid: True for labels, False for the padding after them.

    Source: Graves et al. 2006, computed by `optax.ctc_loss`.
    """
    # It picks log-probabilities by products with one-hot vectors, which a TPU would round to bf16.
    with jax.default_matmul_precision("highest"):
        losses = optax.ctc_loss(
            logits.astype(jnp.float32),
            1.0 - audio_valid,
            jnp.where(label_valid, labels, 0),
            1.0 - label_valid,
        )
    return jnp.sum(jnp.where(can_spell(audio_valid, labels, label_valid), losses, 0))
