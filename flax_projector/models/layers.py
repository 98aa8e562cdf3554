"""Layers that the projector and the two towers share."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def products_of(dtype: DTypeLike) -> AbstractContextManager[Any]:
    """Traced inside, products are as precise as this compute dtype on every platform.

    By default, a TPU multiplies f32 in bf16, and a GPU in TF32. A gradient must be taken inside as
    well: what is traced for the backward pass alone would have the default.
    """
    is_wide = jnp.finfo(dtype).bits >= 32
    return jax.default_matmul_precision("highest" if is_wide else None)


def exact_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The erf GELU of `torch.nn.GELU()`, computed in at least f32 and rounded once.

    Flax's default is the tanh approximation, which differs by 6e-4. Its exact form is `erfc` of -x,
    whose two branches cost a TPU a second pass over the input. This is torch's, `1 + erf(x)`: below
    -3 its results, themselves below 4e-3, lose digits, but no error is larger than torch's, 1e-6.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def _multiply(x: Float[Array, "*B D"], scale: Float[Array, "D"]) -> Float[Array, "*B D"]:
    return x * scale.astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm with Llama's rounding order.

    Normalises in f32, rounds to the compute dtype, then multiplies by the scale.
    `flax.linen.RMSNorm` multiplies in f32 and rounds last, which gives other results in bf16.

    Attributes:
      eps: added to the mean square.
      dtype: compute dtype.
      param_dtype: storage dtype.
      multiply: multiplies [..., D] by the scale [D]; `trained.scaled` for a scale that is trained.

    Source: `LlamaRMSNorm` (transformers). f64 inputs are normalised in f64.
    """

    eps: float
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    multiply: Callable[[Array, Array], Array] = _multiply

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """[..., D] in `dtype`; the mean square is taken in at least f32."""
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.eps)
        return self.multiply(normed.astype(self.dtype), jnp.asarray(scale))


def dense(
    module: nn.Module,
    features: int,
    axes: tuple[str, str],
    name: str,
    *,
    use_bias: bool = True,
    std: float = 0.02,
) -> nn.Dense:
    """A dense submodule [..., in] -> [..., features] with the dtypes of `module`.

    Its kernel [in, features] has the logical `axes` and starts as normal(0, std); its bias starts
    at zero.
    """
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        kernel_init=nn.with_logical_partitioning(nn.initializers.normal(std), axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
        name=name,
    )


class HeadProjection(nn.Module):
    """A dense layer into heads, [B, L, E] -> [B, H, L, d], with the parameters of `dense`.

    The bias is added to the heads. If the axes changed places after that, a TPU would copy the
    result, instead of writing the product as attention reads it.

    Attributes:
      num_heads: H.
      features: H * d.
      use_bias: False for a layer without bias.
      dtype: compute dtype.
      param_dtype: storage dtype.
    """

    num_heads: int
    features: int
    use_bias: bool
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B L E"]) -> Float[Array, "B H L d"]:
        """[B, H, L, d] in `dtype`."""
        b, length, e = x.shape
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed", "heads"))
        kernel = self.param("kernel", init, (e, self.features), self.param_dtype)
        y = x.astype(self.dtype) @ jnp.asarray(kernel, self.dtype)  # [B, L, H*d]
        heads = y.reshape(b, length, self.num_heads, -1).swapaxes(1, 2)
        if not self.use_bias:
            return heads
        init = nn.with_logical_partitioning(nn.initializers.zeros, ("heads",))
        bias = self.param("bias", init, (self.features,), self.param_dtype)
        return heads + jnp.asarray(bias, self.dtype).reshape(self.num_heads, 1, -1)
