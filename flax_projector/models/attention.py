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

_LANES = 128  # in a TPU's vector unit: lengths are padded to a multiple of this
_BLOCKS = (512, 384, 256, _LANES)  # queries and keys per step of the kernel, best first


def kernel_length(length: int) -> int:
    """The length to which the platform's kernel would pad queries and keys.

    Who pads once, before all layers, and tells `attend` the `num_keys` in front of the padding,
    saves a TPU four passes over its memory in each layer.
    """
    return -(-length // _LANES) * _LANES if _platform() == "tpu" else length


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
      q: queries.
      k: keys; each of the K heads serves G = H / K query heads.
      v: values.
      is_causal: query i sees keys 0 to i; Q and C must be equal.
      num_keys: the keys from here on are padding, which no query sees; None if there is none. Not
        together with `is_causal`.
      key_valid: any other mask, which no kernel supports: True where a query may see a key. Every
        query must see at least one key.

    Returns:
      [B, H, Q, d] in the dtype of `v`.

    Source: the "eager" attention of transformers; scores are scaled by d ** -0.5.
    """
    platform = _platform()
    if key_valid is None and platform == "tpu":
        return splash_attend(q, k, v, is_causal=is_causal, num_keys=num_keys)
    k, v = k[:, :, :num_keys], v[:, :, :num_keys]
    if key_valid is None and platform in ("gpu", "cuda") and _cudnn_takes(q):
        return _cudnn_attend(q, k, v, is_causal=is_causal)
    if key_valid is None and platform == "cpu":
        return attend_by_head(q, k, v, is_causal=is_causal)
    return plain_attend(q, k, v, is_causal=is_causal, key_valid=key_valid)


def _platform() -> str:
    """The mesh's platform, which differs from this process's when compiling ahead of time."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def _cudnn_takes(q: Float[Array, "B Q H d"]) -> bool:
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def _cudnn_attend(
    q: Float[Array, "B H Q d"],
    k: Float[Array, "B K Q d"],
    v: Float[Array, "B K Q d"],
    *,
    is_causal: bool,
) -> Float[Array, "B H Q d"]:
    """`attend` for Q = C with the GPU kernel, which needs an even length and has heads last."""
    b, _, length, _ = q.shape
    odd = length % 2
    lengths = jnp.full(b, length, jnp.int32) if odd and not is_causal else None
    q, k, v = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v))
    out: Any = jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=is_causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return out[:, :length].swapaxes(1, 2)


def splash_attend(
    q: Float[Array, "B H Q d"],
    k: Float[Array, "B K Q d"],
    v: Float[Array, "B K Q d"],
    *,
    is_causal: bool,
    num_keys: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B H Q d"]:
    """`attend` for Q = C with the TPU kernel: each device computes its own rows and heads.

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
    k: Float[Array, "B K Q d"],
    v: Float[Array, "B K Q d"],
    *,
    is_causal: bool,
    num_keys: int | None,
    interpret: bool,
) -> Float[Array, "B H Q d"]:
    _, h, length, d = q.shape
    padded = -(-length // _LANES) * _LANES
    num_keys = length if num_keys is None else num_keys
    block = next(block for block in _BLOCKS if padded % block == 0)
    # Narrow heads would leave lanes empty in memory and in the products: positions fill them.
    is_narrow = d % _LANES != 0
    layout = splash.QKVLayout.SEQ_MINOR if is_narrow else splash.QKVLayout.HEAD_DIM_MINOR
    make_mask = splash.CausalMask if is_causal else splash.FullMask
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([make_mask((padded, padded))] * h),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block if is_causal else padded,  # nothing to skip: few, long steps
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
            q_layout=layout,
            k_layout=layout,
            v_layout=layout,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segments = None
    if not is_causal and padded != num_keys:  # hides padding keys, as the causal mask does
        is_padding = (jnp.arange(padded) >= num_keys).astype(jnp.int32)
        segments = splash.SegmentIds(q=jnp.zeros(padded, jnp.int32), kv=is_padding)
    padding = ((0, 0), (0, 0), (0, padded - length), (0, 0))
    q, k, v = (jnp.pad(x, padding) for x in (q * d**-0.5, k, v))
    out: Any = jax.vmap(functools.partial(kernel, segment_ids=segments))(q, k, v)
    return out[:, :, :length]
