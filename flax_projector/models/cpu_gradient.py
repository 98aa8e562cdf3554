"""A faster gradient of trained kernels on CPUs.

The gradient is x' dy, where ' is the transpose. JAX computes it as (dy' x)', which takes XLA up to
twice as long on a CPU.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def _product(
    x: Float[Array, "*batch inputs"], kernel: Float[Array, "inputs outputs"]
) -> Float[Array, "*batch outputs"]:
    return jnp.matmul(x, kernel)


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel), (x, kernel)


def _product_backward(
    saved: tuple[Array, Array], dy: Float[Array, "*batch outputs"]
) -> tuple[Float[Array, "*batch inputs"], Float[Array, "inputs outputs"]]:
    x, kernel = saved
    rows = [a.reshape(-1, a.shape[-1]) for a in (x, dy)]
    return jnp.matmul(dy, kernel.T), jnp.matmul(rows[0].T, rows[1])


_product.defvjp(_product_forward, _product_backward)


def trained_dot_general(
    x: Float[Array, "*batch inputs"],
    kernel: Float[Array, "inputs outputs"],
    *_args: object,
    **_kwargs: object,
) -> Float[Array, "*batch outputs"]:
    """`jax.lax.dot_general` as `flax.linen.Dense` calls it, for kernels that are trained.

    Not for frozen kernels: they need no gradient, but this would keep x in memory for it.
    Forward-mode differentiation (`jax.jvp`) is not supported.
    """
    return _product(x, kernel)
