"""The linen projector inside Flax NNX, through `flax.nnx.bridge.ToNNX`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge

from convert.trees import flatten
from flax_projector.config import MeshConfig, ProjectorConfig
from flax_projector.models.projector import ResidualAudioProjector
from flax_projector.sharding import make_mesh, replicated, strip_axes, use_mesh
from tests.parity import assert_close

pytestmark = pytest.mark.xdist_group("test_nnx_bridge")

CONFIG = ProjectorConfig(
    7, 13, projector_pool_stride=3, projector_hidden_dim=29, projector_dropout=0.3
)
FRAMES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 11, 7)), jnp.float32)


@pytest.fixture(scope="module")
def projector():
    """An NNX module around a linen one, and the linen module's own parameters in it."""
    linen = ResidualAudioProjector(CONFIG)
    params = strip_axes(jax.jit(linen.init)(jax.random.key(3), FRAMES)["params"])
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with use_mesh(mesh):  # NNX places what it creates
        module = bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(FRAMES)
        state = nnx.state(module, nnx.Param)
        nnx.replace_by_pure_dict(state, jax.device_put(params, replicated(mesh)))
        nnx.update(module, state)
        yield module, params


def test_nnx_computes_what_linen_computes(projector) -> None:
    module, params = projector
    expected = ResidualAudioProjector(CONFIG).apply({"params": params}, FRAMES)
    np.testing.assert_array_equal(np.asarray(module(FRAMES)), np.asarray(expected))


@pytest.mark.consistency("linen")
def test_nnx_gradients_are_those_of_linen(projector) -> None:
    module, params = projector

    def loss(params):
        return jnp.sum(jnp.asarray(ResidualAudioProjector(CONFIG).apply(params, FRAMES)) ** 3)

    expected = jax.grad(loss)({"params": params})["params"]
    grads = flatten(nnx.to_pure_dict(nnx.grad(lambda m: jnp.sum(m(FRAMES) ** 3))(module)))
    assert grads.keys() == flatten(expected).keys()
    for name, leaf in flatten(expected).items():
        assert_close(grads[name], leaf, 1e-6, name)


def test_nnx_drops_with_its_own_rngs(projector) -> None:
    module, _ = projector
    y = [
        np.asarray(module(FRAMES, deterministic=False, rngs=nnx.Rngs(dropout=seed)))
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(y[0], y[1])
    assert (y[0] != y[2]).any() and (y[0] == 0).any()
