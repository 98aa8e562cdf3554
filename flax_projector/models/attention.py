"""One attention function for the encoder, the decoder and cached decoding.

Where the platform has a kernel that never holds the scores in memory, that kernel is used: splash
attention on TPU, cuDNN's on GPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Bool, Float

from flax_projector.models.cpu_attention import attend_by_head
from flax_projector.models.plain_attention import plain_attend
from flax_projector.sharding import on_each_device

ATTENTION = "attention"
"""The name, for policies of `jax.checkpoint`, of a kernel's output and its log-sum-exp: all that
the backward pass needs beside queries, keys and values."""

_LANES = 128  # in a TPU's vector unit: lengths are padded to a multiple of this
_BLOCKS = (512, 384, 256, _LANES)  # queries and keys per step of the kernel, best first


def kernel_length(length: int) -> int:
    """The length to which the platform's kernel would pad queries and keys.

    Who pads once, before all layers, and tells `attend` the `num_keys` in front of the padding,
    saves a TPU four passes over its memory in each layer.
    """
    return _padded(length) if mesh_platform() == "tpu" else length


def _padded(length: int) -> int:
    return -(-length // _LANES) * _LANES


def attend(
    q: Float[Array, "B H Q d"],
    k: Float[Array, "B K C d"],
    v: Float[Array, "B K C d"],
    *,
    is_causal: bool = False,
    num_keys: int | None = None,
    key_valid: Bool[Array, "#B Q C"] | None = None,
) -> Float[Array, "B H Q d"]:
    """Grouped-query softmax attention, with scores and softmax in at least f32.

    Args:
      q: queries, multiplied by d ** -0.5.
      k: keys; each of the K heads serves G = H / K query heads.
      v: values.
      is_causal: the last query sees all keys, and each one before it one less.
      num_keys: the keys from here on are padding, which no query sees; None if there is none.
      key_valid: any other mask, which no kernel supports: True where a query may see a key. Every
        query must see at least one key.

    Returns:
      [B, H, Q, d] in the dtype of `v`.

    Source: the "eager" attention of transformers, which scales the scores. Who scales the queries
    where they are computed rounds them once, and saves a pass over them.
    """
    platform = mesh_platform()
    if key_valid is None and platform == "tpu":
        return splash_attend(q, k, v, is_causal=is_causal, num_keys=num_keys)
    k, v = k[:, :, :num_keys], v[:, :, :num_keys]
    if key_valid is None and platform in ("gpu", "cuda") and _cudnn_takes(q):
        return _cudnn_attend(q, k, v, is_causal=is_causal)
    if key_valid is None and platform == "cpu":
        return attend_by_head(q, k, v, is_causal=is_causal)
    return plain_attend(q, k, v, is_causal=is_causal, key_valid=key_valid)


def mesh_platform() -> str:
    """The mesh's platform, which differs from this process's when compiling ahead of time."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def _cudnn_takes(q: Float[Array, "B Q H d"]) -> bool:
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def _cudnn_attend(
    q: Float[Array, "B H Q d"],
    k: Float[Array, "B K C d"],
    v: Float[Array, "B K C d"],
    *,
    is_causal: bool,
) -> Float[Array, "B H Q d"]:
    """`attend` with the GPU kernel, which has heads last and needs even lengths.

    Its causal mask needs as many queries: zeros stand in for those of the first keys.
    """
    b, num_queries, num_keys = q.shape[0], q.shape[2], k.shape[2]
    before = num_keys - num_queries if is_causal else 0
    query_lengths = key_lengths = None
    if not is_causal and (num_queries % 2 or num_keys % 2):
        query_lengths, key_lengths = (
            jnp.full(b, length, jnp.int32) for length in (num_queries, num_keys)
        )

    def heads_last(x: Float[Array, "B X Q d"], before: int = 0) -> Float[Array, "B C X d"]:
        odd = (before + x.shape[2]) % 2
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (before, odd), (0, 0), (0, 0)))

    out: Any = jax.nn.dot_product_attention(
        heads_last(q, before),
        heads_last(k),
        heads_last(v),
        scale=1.0,
        is_causal=is_causal,
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_lengths,
        implementation="cudnn",
    )
    return out[:, before : before + num_queries].swapaxes(1, 2)


def splash_attend(
    q: Float[Array, "B H Q d"],
    k: Float[Array, "B K C d"],
    v: Float[Array, "B K C d"],
    *,
    is_causal: bool,
    num_keys: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B H Q d"]:
    """`attend` with the TPU kernel: each device computes its own rows and heads.

    Args:
      q: queries.
      k: keys.
      v: values.
      is_causal: as for `attend`.
      num_keys: as for `attend`.
      interpret: runs the kernel step by step in XLA, so that any platform can test it.
    """
    kernel = functools.partial(
        _splash_local, is_causal=is_causal, num_keys=num_keys, interpret=interpret
    )
    return on_each_device(kernel)(q, k, v)


def _splash_local(
    q: Float[Array, "B H Q d"],
    k: Float[Array, "B K C d"],
    v: Float[Array, "B K C d"],
    *,
    is_causal: bool,
    num_keys: int | None,
    interpret: bool,
) -> Float[Array, "B H Q d"]:
    _, num_heads, num_queries, d = q.shape
    num_keys = k.shape[2] if num_keys is None else num_keys
    # Narrow heads would leave lanes empty in memory and in the products: positions fill them.
    is_narrow = d % _LANES != 0
    layout = splash.QKVLayout.SEQ_MINOR if is_narrow else splash.QKVLayout.HEAD_DIM_MINOR
    padded_queries, padded_keys = (_padded(x.shape[2]) for x in (q, k))
    block_q, block_kv = (
        next(block for block in _BLOCKS if length % block == 0)
        for length in (padded_queries, padded_keys)
    )
    if is_causal and not is_narrow and num_queries <= _BLOCKS[0]:
        block_q = padded_queries = num_queries  # a single block may have any size
    shape = (padded_queries, padded_keys)
    offset = num_keys - num_queries  # of the causal mask, which hides padding keys as well
    mask = splash.CausalMask(shape, offset) if is_causal else splash.FullMask(shape)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * num_heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv if is_causal else padded_keys,  # nothing to skip: few, long steps
            block_kv_compute=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            use_fused_bwd_kernel=True,  # computes the scores once for all three gradients
            q_layout=layout,
            k_layout=layout,
            v_layout=layout,
        ),
        residual_checkpoint_name=ATTENTION,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segments = None
    if not is_causal and padded_keys != num_keys:
        is_padding = (jnp.arange(padded_keys) >= num_keys).astype(jnp.int32)
        segments = splash.SegmentIds(q=jnp.zeros(padded_queries, jnp.int32), kv=is_padding)

    def pad(x: Float[Array, "B X Q d"], length: int) -> Float[Array, "B X P d"]:
        return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))

    q, k, v = pad(q, padded_queries), pad(k, padded_keys), pad(v, padded_keys)
    out: Any = jax.vmap(functools.partial(kernel, segment_ids=segments))(q, k, v)
    return out[:, :, :num_queries]
