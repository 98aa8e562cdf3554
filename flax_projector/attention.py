"""Attention behind one function, for the encoder, the decoder and cached decoding.

Where a kernel of the platform computes it without ever holding the scores in memory, it is used:
splash attention on TPU, cuDNN's on GPU. The plain form is for masks that no kernel knows, and what
the kernels are tested against.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from flax_projector.sharding import BATCH_AXES, spec_that_divides

_KEY_BLOCK = 500  # keys whose weighted values are summed at once
_LANES = 128  # of a TPU's vector unit: lengths are padded to a multiple
_BLOCKS = (512, 384, 256, _LANES)  # queries and keys of one step of the kernel, best first


def attend(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B C K d"],
    v: Float[Array, "B C K d"],
    *,
    is_causal: bool = False,
    key_valid: Bool[Array, "#B T C"] | None = None,
) -> Float[Array, "B T H d"]:
    """Grouped-query softmax attention: scores and softmax in at least f32.

    Args:
      q: queries.
      k: keys; each of the K heads serves G = H / K query heads.
      v: values.
      is_causal: query t sees keys 0 to t; T and C are equal then.
      key_valid: True where a query may see a key, for masks of any other form; every query must see
        at least one key. No kernel takes it.

    Returns:
      [B, T, H, d] in the dtype of `v`.

    Source: the "eager" attention of transformers; scaled by d ** -0.5.
    """
    platform = _platform()
    if key_valid is None and platform == "tpu":
        return splash_attend(q, k, v, is_causal=is_causal)
    if key_valid is None and platform in ("gpu", "cuda") and _cudnn_takes(q):
        return _cudnn_attend(q, k, v, is_causal=is_causal)
    if key_valid is None and platform == "cpu":
        return attend_by_head(q, k, v, is_causal=is_causal)
    return plain_attend(q, k, v, is_causal=is_causal, key_valid=key_valid)


def _platform() -> str:
    """Of the mesh, which may be another than this process's when one compiles ahead of time."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def _cudnn_takes(q: Float[Array, "B T H d"]) -> bool:
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def _cudnn_attend(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    *,
    is_causal: bool,
) -> Float[Array, "B T H d"]:
    """`attend` of equal lengths by the GPU kernel, which wants an even length."""
    b, t, _, _ = q.shape
    odd = t % 2
    lengths = jnp.full(b, t, jnp.int32) if odd and not is_causal else None
    q, k, v = (jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v))
    out: Any = jax.nn.dot_product_attention(
        *(q, k, v),
        is_causal=is_causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return out[:, :t]


def causal_mask(length: int) -> Bool[Array, "1 L L"]:
    """True where key position <= query position."""
    return jnp.tril(jnp.ones((1, length, length), bool))


def plain_attend(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B C K d"],
    v: Float[Array, "B C K d"],
    *,
    is_causal: bool = False,
    key_valid: Bool[Array, "#B T C"] | None = None,
) -> Float[Array, "B T H d"]:
    """`attend` written out, all heads at once; holds the scores [B, K, G*T, C]."""
    grouped = _group_heads(q, k, v)
    if is_causal:
        key_valid = causal_mask(q.shape[1])
    if key_valid is not None:
        num_groups = q.shape[2] // k.shape[2]
        key_valid = jnp.tile(key_valid, (1, num_groups, 1))[:, None]  # [B, 1, G*T, C]
    return _ungroup_heads(_attend_matrices(*grouped, key_valid), q.shape)


def attend_by_head(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B C K d"],
    v: Float[Array, "B C K d"],
    *,
    is_causal: bool,
) -> Float[Array, "B T H d"]:
    """`attend` for CPUs: one key head after the other, whose scores stay in the cache.

    For an encoder twice as fast as all heads at once.
    """
    return _on_each_device(functools.partial(_local_attend_by_head, is_causal=is_causal))(q, k, v)


def _local_attend_by_head(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B C K d"],
    v: Float[Array, "B C K d"],
    *,
    is_causal: bool,
) -> Float[Array, "B T H d"]:
    num_groups = q.shape[2] // k.shape[2]
    key_valid = jnp.tile(causal_mask(q.shape[1])[0], (num_groups, 1)) if is_causal else None

    @functools.partial(jax.checkpoint, prevent_cse=False)  # the backward pass computes scores again
    def attend_head(qkv: tuple[Array, Array, Array]) -> Float[Array, "GT d"]:
        return _attend_matrices(*qkv, key_valid)

    heads = [x.reshape(-1, *x.shape[2:]) for x in _group_heads(q, k, v)]  # [B*K, G*T | C, d]
    return _ungroup_heads(jax.lax.map(attend_head, tuple(heads)), q.shape)


def _group_heads(
    q: Float[Array, "B T H d"], k: Float[Array, "B C K d"], v: Float[Array, "B C K d"]
) -> tuple[Float[Array, "B K GT d"], Float[Array, "B K C d"], Float[Array, "B K C d"]]:
    """Heads first, and the G query heads of a key head one below the other."""
    b, t, _, d = q.shape
    num_kv_heads = k.shape[2]
    q = q.reshape(b, t, num_kv_heads, -1, d).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, d]
    return q.reshape(b, num_kv_heads, -1, d), k.swapaxes(1, 2), v.swapaxes(1, 2)


def _ungroup_heads(
    out: Float[Array, "*BK GT d"], shape: tuple[int, ...]
) -> Float[Array, "B T H d"]:
    b, t, h, d = shape
    return out.reshape(b, h, t, d).swapaxes(1, 2)


def _attend_matrices(
    q: Float[Array, "*X GT d"],
    k: Float[Array, "*X C d"],
    v: Float[Array, "*X C d"],
    key_valid: Bool[Array, "*#X GT C"] | None,
) -> Float[Array, "*X GT d"]:
    """Softmax attention of each matrix of queries.

    Keys go by blocks, since one sum over the 1500 of an encoder would lose digits. What they weigh
    is normalised after the product, which is the smaller array, and in f32.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    blocks = [slice(start, start + _KEY_BLOCK) for start in range(0, k.shape[-2], _KEY_BLOCK)]

    def score(block: slice) -> Float[Array, "*X GT c"]:
        keys = k[..., block, :].swapaxes(-2, -1)  # [*X, d, c]
        products = jnp.matmul(q, keys, preferred_element_type=wide) * q.shape[-1] ** -0.5
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


def _on_each_device(function: Any) -> Any:
    """A function of q, k and v for the rows and heads that a device holds.

    For what XLA cannot split by itself: a kernel, or a loop over rows and heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function

    def split(q: Array, k: Array, v: Array) -> Array:
        spec = PartitionSpec(BATCH_AXES, None, "tensor", None)
        spec = spec_that_divides(spec, k.shape, mesh, "attention")
        return jax.shard_map(function, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(
            q, k, v
        )

    return split


def splash_attend(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    *,
    is_causal: bool,
    interpret: bool = False,
) -> Float[Array, "B T H d"]:
    """`attend` of equal lengths by the TPU kernel, for each device on its rows and heads.

    Args:
      q: queries.
      k: keys.
      v: values.
      is_causal: as for `attend`.
      interpret: run the kernel's steps in XLA, on any platform, to test them.
    """
    kernel = functools.partial(_splash_local, is_causal=is_causal, interpret=interpret)
    return _on_each_device(kernel)(q, k, v)


def _splash_local(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    *,
    is_causal: bool,
    interpret: bool,
) -> Float[Array, "B T H d"]:
    _, t, h, d = q.shape
    padded_t = -(-t // _LANES) * _LANES
    block = next(block for block in _BLOCKS if padded_t % block == 0)
    make_mask = splash.CausalMask if is_causal else splash.FullMask
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([make_mask((padded_t, padded_t))] * h),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segments = None
    if not is_causal and padded_t != t:  # keys of padding; the causal mask hides them by itself
        is_padding = (jnp.arange(padded_t) >= t).astype(jnp.int32)
        segments = splash.SegmentIds(is_padding, is_padding)

    def heads_first(x: Float[Array, "B T X d"]) -> Float[Array, "B X P d"]:
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padded_t - t), (0, 0)))

    q, k, v = heads_first(q * d**-0.5), heads_first(k), heads_first(v)
    out: Any = jax.vmap(functools.partial(kernel, segment_ids=segments))(q, k, v)
    return out[:, :, :t].swapaxes(1, 2)
