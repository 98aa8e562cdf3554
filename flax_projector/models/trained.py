"""Products with trained parameters, whose gradients leave the backward pass in at least f32.

A parameter is passed in the dtype that it is stored in, and is cast inside. That differs from
casting it first in two ways:

- Its gradient is a sum over all rows of a batch. JAX would sum in the compute dtype. In bf16, every
  device would round its part, and the parts would be added in bf16: the more devices or the fewer
  micro-batches, the less of an f32 master's precision would be left. A matrix unit sums in f32
  anyway, so an f32 result costs it nothing.
- A kernel's gradient is x' dy, where ' is the transpose. JAX computes it as (dy' x)', which takes
  XLA up to twice as long on a CPU.

Not for frozen parameters: they need no gradient, but x would be kept in memory for it.
Forward-mode differentiation (`jax.jvp`) is not supported.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def _at_least_f32(*arrays: Array) -> Any:
    return jnp.result_type(jnp.float32, *arrays)


def _rows(x: Float[Array, "*batch features"]) -> Float[Array, "rows features"]:
    return x.reshape(-1, x.shape[-1])


@jax.custom_vjp
def affine(
    x: Float[Array, "*batch inputs"],
    kernel: Float[Array, "inputs outputs"],
    bias: Float[Array, "outputs"],
) -> Float[Array, "*batch outputs"]:
    """x @ kernel + bias, in the dtype of x."""
    return jnp.matmul(x, kernel.astype(x.dtype)) + bias.astype(x.dtype)


def _affine_forward(x: Array, kernel: Array, bias: Array) -> tuple[Array, tuple[Array, ...]]:
    return affine(x, kernel, bias), (x, kernel, bias)


def _affine_backward(
    saved: tuple[Array, ...], dy: Float[Array, "*batch outputs"]
) -> tuple[Array, Array, Array]:
    x, kernel, bias = saved
    rows, wide = _rows(dy), _at_least_f32(kernel, dy)
    dx = jnp.matmul(dy, kernel.T.astype(dy.dtype))
    d_kernel = jnp.matmul(_rows(x).T, rows, preferred_element_type=wide)
    d_bias = jnp.sum(rows, axis=0, dtype=wide)
    return dx, d_kernel.astype(kernel.dtype), d_bias.astype(bias.dtype)


affine.defvjp(_affine_forward, _affine_backward)


@jax.custom_vjp
def scaled(
    x: Float[Array, "*batch features"], scale: Float[Array, "features"]
) -> Float[Array, "*batch features"]:
    """x * scale, in the dtype of x."""
    return x * scale.astype(x.dtype)


def _scaled_forward(x: Array, scale: Array) -> tuple[Array, tuple[Array, Array]]:
    return scaled(x, scale), (x, scale)


def _scaled_backward(
    saved: tuple[Array, Array], dy: Float[Array, "*batch features"]
) -> tuple[Array, Array]:
    x, scale = saved
    wide = _at_least_f32(scale, dy)
    d_scale = jnp.sum(_rows(x).astype(wide) * _rows(dy).astype(wide), axis=0)
    return dy * scale.astype(dy.dtype), d_scale.astype(scale.dtype)


scaled.defvjp(_scaled_forward, _scaled_backward)


class TrainedDense(nn.Module):
    """`layers.dense` for trained parameters: the same parameters, but an `affine` product.

    Attributes:
      features: number of outputs.
      axes: logical axes of the kernel [in, features].
      std: standard deviation that the kernel starts with; the bias starts at zero.
      dtype: compute dtype.
      param_dtype: storage dtype.
    """

    features: int
    axes: tuple[str, str]
    std: float
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        """[..., in] -> [..., features] in `dtype`."""
        kernel_init = nn.with_logical_partitioning(nn.initializers.normal(self.std), self.axes)
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", bias_init, (self.features,), self.param_dtype)
        return affine(x.astype(self.dtype), jnp.asarray(kernel), jnp.asarray(bias))
