"""Next-token cross-entropy, and CTC."""

import jax
import jax.numpy as jnp
import optax
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


def ctc(
    logits: Float[Array, "B A C"],
    audio_valid: Bool[Array, "B A"],
    labels: Int[Array, "B T"],
    label_valid: Bool[Array, "B T"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of the CTC losses (nats) of a batch, and the number of labels that they spell.

    Rows with more labels than audio tokens cannot be spelt: they count for neither.

    Args:
      logits: class 0 is the blank.
      audio_valid: True for audio tokens of real audio, which come first.
      labels: classes from 1.
      label_valid: True for labels, which come first.

    Source: Graves et al. 2006, by `optax.ctc_loss`.
    """
    labels = jnp.where(label_valid, labels, 0)
    repeats = jnp.sum(label_valid[:, 1:] & (labels[:, 1:] == labels[:, :-1]), axis=1)
    num_labels = jnp.sum(label_valid, axis=1)  # [B]; equal neighbours need a blank between them
    fits = (num_labels + repeats <= jnp.sum(audio_valid, axis=1)) & (num_labels > 0)
    losses = optax.ctc_loss(
        logits.astype(jnp.float32), 1.0 - audio_valid, labels, 1.0 - label_valid
    )
    return jnp.sum(jnp.where(fits, losses, 0)), jnp.sum(
        jnp.where(fits, num_labels, 0), dtype=losses.dtype
    )
