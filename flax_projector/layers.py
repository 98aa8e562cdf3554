"""Layers that the projector and both towers share."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def exact_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The erf GELU of `torch.nn.GELU()`, evaluated in at least f32 and rounded once.

    Flax's default is the tanh approximation, which differs by 6e-4.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jax.nn.gelu(wide, approximate=False).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm with Llama's rounding order.

    Normalises in f32, rounds to the compute dtype, then multiplies by the scale.
    `flax.linen.RMSNorm` multiplies in f32 and rounds last: another function in bf16.

    Source: `LlamaRMSNorm` (transformers). Wider inputs (f64) are normalised in their own dtype.
    """

    eps: float
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """[..., D] in `dtype`; the mean square is taken in at least f32."""
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.eps)
        return jnp.asarray(scale, self.dtype) * normed.astype(self.dtype)


def dense(
    module: nn.Module,
    features: int,
    axes: tuple[str, str],
    name: str,
    *,
    use_bias: bool = True,
    std: float = 0.02,
) -> nn.Dense:
    """A submodule [..., in] -> [..., features] with the dtypes of `module`.

    Kernel [in, features] with logical `axes`, drawn from normal(0, std); bias zero.
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
