"""How a leaf gets to all devices that are to hold it, if each is first given its own part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from convert.checkpoint import TensorInfo
from convert.plan import LeafPlan
from convert.rules import IDENTITY, Rule, permute, transpose
from convert.spread import spread
from flax_projector.config import MeshConfig
from flax_projector.sharding import make_mesh

SPECS = [PartitionSpec(), PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "tensor")]
MESHES = [
    MeshConfig(8),
    MeshConfig(1, 8),
    MeshConfig(2, 2, 2),
    MeshConfig(2, 4),
    MeshConfig(4, 1, 2),
]
SHAPE = (8, 128, 256)


@pytest.mark.parametrize("dim", range(3))
@pytest.mark.parametrize("config", MESHES, ids=lambda c: f"{c.data}x{c.fsdp}x{c.tensor}")
def test_no_device_holds_more_than_it_is_to(config, dim):
    """A step of the exchange holds what it begins with and what it makes, never the whole leaf."""
    mesh = make_mesh(config)
    whole = np.random.default_rng(0).normal(size=SHAPE).astype(np.float16)
    for spec in SPECS:
        like = jax.ShapeDtypeStruct(SHAPE, jnp.float16, sharding=NamedSharding(mesh, spec))
        first, exchange = spread(like, [dim])
        parts = jax.device_put(whole.view(np.uint16), first.sharding)
        assert {shard.data.size for shard in parts.addressable_shards} == {whole.size // 8}
        leaf = exchange(parts)
        assert (leaf.sharding, leaf.dtype) == (like.sharding, like.dtype)
        np.testing.assert_array_equal(leaf, whole)
        memory = exchange.lower(first).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 2.1 * memory.output_size_in_bytes


def test_what_the_devices_do_not_divide_is_loaded_where_it_belongs():
    mesh = make_mesh(MeshConfig(4, 1, 2))
    sharding = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    like = jax.ShapeDtypeStruct((7, 6, 5), jnp.float32, sharding=sharding)
    assert spread(like, [0, 2, 1])[0] is like
    alone = NamedSharding(make_mesh(MeshConfig(), jax.devices()[:1]), PartitionSpec())
    like = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=alone)
    assert spread(like, [0, 1])[0] is like


@pytest.mark.parametrize(
    ("rule", "shape", "order"),
    [
        (Rule("a", "a", IDENTITY), (4, 6), [0, 1]),
        (Rule("a", "a", transpose()), (4, 6), [1, 0]),
        (Rule("a", "a", permute(2, 1, 0)), (4, 6, 5), [2, 1, 0]),
        (Rule("a.{i}", "a", transpose()), (3, 4, 6), [0, 2, 1]),
        (Rule("a.{i}", "a", IDENTITY), (3, 4), [0, 1]),
    ],
)
def test_a_leaf_is_split_where_its_parts_lie_together_in_the_file(rule, shape, order):
    leaf = LeafPlan("a", TensorInfo(shape, np.dtype(np.float32)), ("a",), rule)
    assert leaf.order == order
