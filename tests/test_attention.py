"""Attention against a softmax written out in numpy."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_projector.config import MeshConfig
from flax_projector.models.attention import attend, splash_attend
from flax_projector.models.cpu_attention import attend_by_head
from flax_projector.models.plain_attention import plain_attend
from flax_projector.sharding import batch_sharding, make_mesh, use_mesh
from tests.parity import assert_close, assert_relative_l2, relative_l2


@functools.partial(jax.jit, static_argnames="is_causal")
def jit_attend(q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
    """`attend`, which takes scaled queries."""
    return attend(q * q.shape[-1] ** -0.5, k, v, **kwargs)


BATCH, QUERIES, KEYS, HEAD_DIM = 2, 5, 7, 3


def reference(q, k, v, key_valid=None) -> np.ndarray:
    """One query head at a time, in f64."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = np.zeros(q.shape)
    for b, head in np.ndindex(*q.shape[:2]):
        scores = q[b, head] @ k[b, head // group].T / np.sqrt(q.shape[3])
        if key_valid is not None:
            scores = np.where(np.broadcast_to(key_valid, (len(q), *scores.shape))[b], scores, -1e30)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[b, head] = weights / weights.sum(axis=-1, keepdims=True) @ v[b, head // group]
    return out


def make_qkv(num_heads: int, num_kv_heads: int) -> list[np.ndarray]:
    rng = np.random.default_rng(num_heads)
    lengths = ((num_heads, QUERIES), (num_kv_heads, KEYS), (num_kv_heads, KEYS))
    return [rng.normal(size=(BATCH, *s, HEAD_DIM)).astype(np.float32) for s in lengths]


def make_mask(rows: int) -> np.ndarray:
    """A random mask in which every query sees the last key, and the first query no other."""
    mask = np.random.default_rng(rows).random((rows, QUERIES, KEYS)) < 0.5
    mask[:, 0] = False
    mask[..., -1] = True
    return mask


MASKS = {"all": None, "one for the batch": make_mask(1), "one per row": make_mask(BATCH)}


@pytest.mark.parity("softmax in numpy, f64")
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
    assert_close(out, expected, tolerance)


@pytest.mark.parity("softmax in numpy, f64")
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_long_sequences_equal_the_reference(is_causal) -> None:
    """More than one block of keys, the last not filled."""
    length = 701
    q, k, v = (np.asarray(x[:1]) for x in make_long_qkv(length, 2, 1, HEAD_DIM))
    out = jit_attend(q, k, v, is_causal=is_causal)
    mask = np.tril(np.ones((1, length, length), bool)) if is_causal else None
    assert_close(out, reference(q, k, v, mask), 1e-5)


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_masked_keys_leave_no_trace(value) -> None:
    q, k, v = map(jnp.asarray, make_qkv(6, 2))
    mask = jnp.asarray(MASKS["one for the batch"]).at[:, :, 2].set(False)
    changed = jit_attend(q, k.at[:, :, 2].set(value), v.at[:, :, 2].set(value), key_valid=mask)
    np.testing.assert_array_equal(changed, jit_attend(q, k, v, key_valid=mask))


def test_masked_keys_get_no_gradient() -> None:
    q, k, v = map(jnp.asarray, make_qkv(6, 2))
    mask = jnp.asarray(MASKS["one for the batch"]).at[:, :, 2].set(False)
    gradient = jax.grad(lambda k, v: attend(q, k, v, key_valid=mask).sum(), (0, 1))
    for grad in jax.jit(gradient)(k, v):
        assert not grad[:, :, 2].any()
        assert grad[:, :, -1].any()


@pytest.mark.parity("softmax in numpy, f64")
@pytest.mark.parametrize("num_queries", [1, QUERIES, KEYS])
def test_causal_queries_are_the_last_ones(num_queries) -> None:
    """The last query sees all keys, and each one before it one less."""
    q, k, v = make_qkv(6, 2)
    q = np.concatenate([q, q[:, :, ::-1]], axis=2)[:, :, :num_queries]
    mask = np.arange(KEYS) <= np.arange(KEYS - num_queries, KEYS)[:, None]
    out = jit_attend(*map(jnp.asarray, (q, k, v)), is_causal=True)
    assert_close(out, reference(q, k, v, mask[None]), 1e-5)


def make_long_qkv(
    num_keys: int, num_heads: int, num_kv_heads: int, head_dim: int, num_queries: int | None = None
) -> list[Any]:
    rng = np.random.default_rng(num_keys)
    num_queries = num_keys if num_queries is None else num_queries
    sizes = ((num_heads, num_queries), (num_kv_heads, num_keys), (num_kv_heads, num_keys))
    q, k, v = (rng.normal(size=(8, *size, head_dim)) for size in sizes)
    v *= (8 / head_dim) ** 0.5  # the gradient of a score is a difference of inner products of them
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v)]


def output_and_gradients(function: Any, qkv: list[Any]) -> Any:
    """Of sum(f(q, k, v) ** 2)."""

    def squares(q, k, v):
        out = function(q * q.shape[-1] ** -0.5, k, v)
        return jnp.sum(jnp.square(out)), out

    return jax.jit(jax.grad(squares, argnums=(0, 1, 2), has_aux=True))(*qkv)


@functools.cache
def plain_output_and_gradients(case: tuple[int, ...], is_causal: bool) -> Any:
    plain = functools.partial(plain_attend, is_causal=is_causal)
    return output_and_gradients(plain, make_long_qkv(*case))


KERNEL_CASES = {  # keys, query heads, key heads, head dim, queries if fewer
    "exact, heads as wide as the lanes": (128, 1, 1, 128),
    "one block, padded": (20, 6, 2, 10),
    "exact": (128, 2, 2, 16),
    "two blocks, padded": (150, 4, 1, 8),
    "fewer queries": (150, 4, 2, 8, 131),
    "fewer queries, wide heads": (150, 2, 1, 128, 21),
}
CASES = [
    pytest.param(case, id=name, marks=pytest.mark.xdist_group(f"attention, {name}"))
    for name, case in KERNEL_CASES.items()
]
KERNELS = {
    "TPU, interpreted": functools.partial(splash_attend, interpret=True),
    "CPU": attend_by_head,
}


@pytest.mark.consistency("ours in plain JAX")
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mesh_config", [None, MeshConfig(data=2, fsdp=2, tensor=2)])
def test_kernel_equals_the_plain_form(kernel, case, is_causal, mesh_config) -> None:
    """Outputs and gradients, alone and split over a mesh."""
    qkv, kernel = make_long_qkv(*case), functools.partial(kernel, is_causal=is_causal)
    expected = plain_output_and_gradients(case, is_causal)
    if mesh_config is None:
        got = output_and_gradients(kernel, qkv)
    else:
        mesh = make_mesh(mesh_config)
        qkv = [jax.device_put(x, batch_sharding(mesh)) for x in qkv]
        with use_mesh(mesh):
            got = output_and_gradients(kernel, qkv)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(ours, theirs, 1e-5)


@pytest.mark.consistency("ours in plain JAX")
@pytest.mark.parametrize(
    "kernel",
    [functools.partial(splash_attend, is_causal=False, interpret=True), attend],
    ids=["TPU, interpreted", "CPU"],
)
@pytest.mark.parametrize("num_keys", [130, 200])  # padded to whole blocks, and beyond them
@pytest.mark.parametrize("mesh_config", [None, MeshConfig(data=2, fsdp=2, tensor=2)])
def test_padding_keys_are_not_seen(kernel, num_keys, mesh_config) -> None:
    """Not even those that would take all attention: results and gradients are as without them."""
    q, k, v = make_long_qkv(256, 2, 2, 8)
    expected = output_and_gradients(plain_attend, [q, k[:, :, :num_keys], v[:, :, :num_keys]])
    k, v = (x.at[:, :, num_keys:].set(1e3) for x in (k, v))
    with contextlib.nullcontext() if mesh_config is None else use_mesh(make_mesh(mesh_config)):
        got = output_and_gradients(functools.partial(kernel, num_keys=num_keys), [q, k, v])
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(ours[:, :, : theirs.shape[2]], theirs, 1e-5)
        assert not ours[:, :, theirs.shape[2] :].any()


@pytest.mark.parity("softmax in numpy, f64")
def test_bf16_scores_and_softmax_are_f32() -> None:
    # Scores near 500 with differences near 1: rounding them to bf16 (spacing 2) picks other keys.
    q, k, v = make_qkv(6, 2)
    q, k = (5 + q / 3) * 8 * HEAD_DIM**-0.5, 5 + k / 50
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    out = jax.jit(attend)(q, k, v)
    assert out.dtype == jnp.bfloat16
    expected = reference(np.asarray(q, np.float64) * HEAD_DIM**0.5, k, v)
    assert_relative_l2(out, expected, 1e-2)

    scores = jnp.einsum("BHTd,BHCd->BHTC", q, jnp.repeat(k, 3, axis=1))
    rounded = jnp.einsum("BHTC,BHCd->BHTd", jax.nn.softmax(scores), jnp.repeat(v, 3, axis=1))
    assert scores.dtype == jnp.bfloat16
    assert relative_l2(rounded, expected) > 1e-1  # this test would notice
