"""Layers that the projector and both towers share."""

from collections.abc import Callable
from typing import Any

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


@jax.custom_vjp
def _product(x: Float[Array, "*B I"], kernel: Float[Array, "I O"]) -> Float[Array, "*B O"]:
    return jnp.matmul(x, kernel)


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel), (x, kernel)


def _product_backward(
    saved: tuple[Array, Array], dy: Float[Array, "*B O"]
) -> tuple[Float[Array, "*B I"], Float[Array, "I O"]]:
    x, kernel = saved
    rows = [a.reshape(-1, a.shape[-1]) for a in (x, dy)]
    return jnp.matmul(dy, kernel.T), jnp.matmul(rows[0].T, rows[1])


_product.defvjp(_product_forward, _product_backward)


def trained_dot_general(
    x: Float[Array, "*B I"], kernel: Float[Array, "I O"], *_args: object, **_kwargs: object
) -> Float[Array, "*B O"]:
    """`jax.lax.dot_general` as `flax.linen.Dense` calls it, for kernels that are trained.

    The gradient of the kernel is x' dy. JAX takes it as (dy' x)', which XLA on a CPU computes up to
    twice as slowly. A frozen kernel needs none, and would only keep x for nothing. Forward-mode
    differentiation (`jax.jvp`) is not defined.
    """
    return _product(x, kernel)


def dense(
    module: nn.Module,
    features: int,
    axes: tuple[str, str],
    name: str,
    *,
    use_bias: bool = True,
    std: float = 0.02,
    dot_general: Callable[..., Any] = jax.lax.dot_general,
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
        dot_general=dot_general,
        name=name,
    )
