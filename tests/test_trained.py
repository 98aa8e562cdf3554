"""Products with trained parameters: their values, and gradients that are summed in f32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from convert.trees import flatten
from flax_projector.models.layers import RMSNorm, dense
from flax_projector.models.trained import TrainedDense, affine, scaled
from flax_projector.sharding import strip_axes
from tests.parity import assert_relative_l2

ROWS, INPUTS, OUTPUTS = (3, 41), 7, 11
DTYPES = [  # of the computation, of storage; the largest relative error of a gradient
    (jnp.bfloat16, jnp.float32, 1e-6),
    (jnp.float16, jnp.float32, 1e-6),
    (jnp.bfloat16, jnp.bfloat16, 2**-8),
    (jnp.float32, jnp.float32, 1e-6),
    (jnp.float32, jnp.float64, 1e-6),
    (jnp.float64, jnp.float64, 1e-14),
]
SHAPES = {affine: [(INPUTS, OUTPUTS), (OUTPUTS,)], scaled: [(INPUTS,)]}  # of the parameters


def draw(shape: tuple[int, ...], dtype: jnp.dtype, seed: int) -> jax.Array:
    """Random numbers that are not centred, so that sums over rows grow."""
    return jnp.asarray(np.random.default_rng(seed).normal(0.5, 1, shape), dtype)


@pytest.mark.consistency("the same in f64")
@pytest.mark.parametrize("function", SHAPES)
@pytest.mark.parametrize(("dtype", "param_dtype", "tolerance"), DTYPES)
def test_gradients_lose_nothing_but_the_rounding_of_their_storage(
    function, dtype, param_dtype, tolerance
):
    with jax.enable_x64(True):
        x = draw((*ROWS, INPUTS), dtype, seed=0)
        params = [draw(shape, param_dtype, seed=1) for shape in SHAPES[function]]
        y, backward = jax.vjp(function, x, *params)
        assert y.dtype == dtype
        dy = draw(y.shape, dtype, seed=2)
        gradients = backward(dy)
        assert [g.dtype for g in gradients] == [dtype, *(p.dtype for p in params)]
        # What they are multiplied by is rounded to the compute dtype.
        wide = [p.astype(dtype).astype(jnp.float64) for p in params]
        expected = jax.vjp(function, x.astype(jnp.float64), *wide)[1](dy.astype(jnp.float64))
    for got, want in zip(gradients[1:], expected[1:], strict=True):
        assert_relative_l2(np.asarray(got, np.float64), want, tolerance)


class Untrained(nn.Module):
    """The layers of a frozen tower."""

    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = dense(self, OUTPUTS, ("embed", "mlp"), "fc", std=0.3)(x)
        return RMSNorm(1e-6, self.dtype, self.param_dtype, name="norm")(x)


class Trained(Untrained):
    """The same with trained parameters."""

    @nn.compact
    def __call__(self, x):
        dtypes = (self.dtype, self.param_dtype)
        x = TrainedDense(OUTPUTS, ("embed", "mlp"), 0.3, *dtypes, name="fc")(x)
        return RMSNorm(1e-6, *dtypes, multiply=scaled, name="norm")(x)


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_trained_layers_begin_and_compute_as_frozen_ones_bit_for_bit(dtype, param_dtype):
    x = draw((*ROWS, INPUTS), dtype, seed=0)
    results = []
    for module in (Untrained(dtype, param_dtype), Trained(dtype, param_dtype)):
        boxed = jax.jit(module.init)(jax.random.key(5), x)["params"]
        leaves = flatten(strip_axes(boxed))
        y = jax.jit(module.apply)({"params": strip_axes(boxed)}, x)
        results.append((nn.get_partition_spec(boxed), leaves, np.asarray(y)))
    (axes, leaves, y), (trained_axes, trained_leaves, trained_y) = results
    assert trained_axes == axes
    assert {n: (x.dtype, x.tobytes()) for n, x in trained_leaves.items()} == {
        n: (x.dtype, x.tobytes()) for n, x in leaves.items()
    }
    np.testing.assert_array_equal(trained_y, y)
