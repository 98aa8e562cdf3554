"""Attention against a softmax written out in numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_projector.attention import attend

jit_attend: Any = jax.jit(attend)

BATCH, QUERIES, KEYS, HEAD_DIM = 2, 5, 7, 3


def reference(q, k, v, key_valid=None) -> np.ndarray:
    """One query head at a time, in f64."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    out = np.zeros(q.shape)
    for b, head in np.ndindex(q.shape[0], q.shape[2]):
        scores = q[b, :, head] @ k[b, :, head // group].T / np.sqrt(q.shape[3])
        if key_valid is not None:
            scores = np.where(np.broadcast_to(key_valid, (len(q), *scores.shape))[b], scores, -1e30)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[b, :, head] = weights / weights.sum(axis=-1, keepdims=True) @ v[b, :, head // group]
    return out


def make_qkv(num_heads: int, num_kv_heads: int) -> list[np.ndarray]:
    rng = np.random.default_rng(num_heads)
    lengths = ((QUERIES, num_heads), (KEYS, num_kv_heads), (KEYS, num_kv_heads))
    return [rng.normal(size=(BATCH, *s, HEAD_DIM)).astype(np.float32) for s in lengths]


def make_mask(rows: int) -> np.ndarray:
    """A random mask in which every query sees the last key, and the first query no other."""
    mask = np.random.default_rng(rows).random((rows, QUERIES, KEYS)) < 0.5
    mask[:, 0] = False
    mask[..., -1] = True
    return mask


MASKS = {"all": None, "one for the batch": make_mask(1), "one per row": make_mask(BATCH)}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (6, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_output_is_softmax_attention(num_heads, num_kv_heads, mask, dtype, tolerance) -> None:
    qkv = make_qkv(num_heads, num_kv_heads)
    with jax.enable_x64(dtype == np.float64):
        q, k, v = (jnp.asarray(x, dtype) for x in qkv)
        out = jit_attend(q, k, v, key_valid=None if mask is None else jnp.asarray(mask))
    assert out.dtype == dtype
    expected = reference(*qkv, key_valid=mask)
    np.testing.assert_allclose(np.asarray(out), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_masked_keys_leave_no_trace(value) -> None:
    q, k, v = map(jnp.asarray, make_qkv(6, 2))
    mask = jnp.asarray(MASKS["one for the batch"]).at[:, :, 2].set(False)
    changed = jit_attend(q, k.at[:, 2].set(value), v.at[:, 2].set(value), key_valid=mask)
    np.testing.assert_array_equal(changed, jit_attend(q, k, v, key_valid=mask))


def test_masked_keys_get_no_gradient() -> None:
    q, k, v = map(jnp.asarray, make_qkv(6, 2))
    mask = jnp.asarray(MASKS["one for the batch"]).at[:, :, 2].set(False)
    gradient = jax.grad(lambda k, v: attend(q, k, v, key_valid=mask).sum(), (0, 1))
    for grad in jax.jit(gradient)(k, v):
        assert not grad[:, 2].any()
        assert grad[:, -1].any()


def relative_rms(got, expected) -> float:
    got = np.asarray(got).astype(np.float64)
    return np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))


def test_bf16_scores_and_softmax_are_f32() -> None:
    # Scores near 500 with differences near 1: rounding them to bf16 (spacing 2) picks other keys.
    q, k, v = make_qkv(6, 2)
    q, k = (5 + q / 3) * 8, 5 + k / 50
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    out = jit_attend(q, k, v)
    assert out.dtype == jnp.bfloat16
    expected = reference(q, k, v)
    assert relative_rms(out, expected) < 1e-2

    scores = jnp.einsum("BTHd,BCHd->BHTC", q, jnp.repeat(k, 3, axis=2)) * HEAD_DIM**-0.5
    rounded = jnp.einsum("BHTC,BCHd->BTHd", jax.nn.softmax(scores), jnp.repeat(v, 3, axis=2))
    assert scores.dtype == jnp.bfloat16
    assert relative_rms(rounded, expected) > 1e-1  # this test would notice
