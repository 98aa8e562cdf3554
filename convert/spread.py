"""Loads a leaf in equal parts, one for each device, which the devices then exchange.

Every byte is read once, by one process, however many devices are to hold it: they are connected
better than hosts and files are.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Axes = tuple[str, ...]


def spread(
    like: jax.ShapeDtypeStruct, order: Sequence[int]
) -> tuple[jax.ShapeDtypeStruct, Callable[[jax.Array], jax.Array]]:
    """Plans how a leaf gets to where it belongs.

    Args:
      like: the leaf, with the sharding that it is to have.
      order: the leaf's dimensions, in the order in which they should rather be split.

    Returns:
      The leaf as it should be loaded: if any dimension can be divided among all devices, each has
      its own part, on CPUs as whole numbers of the same bits. And a function that turns it into
      `like`; every process must call it.
    """
    sharding = like.sharding
    ways = sharding.num_devices
    dim = next((dim for dim in order if like.shape[dim] % ways == 0), None)
    if ways == 1 or dim is None or not isinstance(sharding, NamedSharding):
        return like, lambda leaf: leaf
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh)
    specs = _stages(mesh, dim, _axes(sharding.spec, len(like.shape)))
    dtype = np.dtype(like.dtype)
    # CPUs exchange f32 instead of bf16, and do not bring back every bit of what is no number.
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    first = like.update(
        dtype=f"uint{8 * dtype.itemsize}" if is_cpu else dtype,
        sharding=NamedSharding(mesh, specs[0]),
    )
    return first, _exchange(sharding, specs[1:], dtype)


def _stages(mesh: Mesh, dim: int, wanted: Sequence[Axes]) -> tuple[PartitionSpec, ...]:
    """The shardings of a leaf, from one that splits a dimension among all devices to the wanted.

    From one to the next, only one collective is needed. For a single step of several, XLA gathers
    the whole leaf on every device.
    """
    used = tuple(axis for axes in wanted for axis in axes)
    unused = tuple(axis for axis in mesh.axis_names if axis not in used)
    split: list[Axes] = [()] * len(wanted)
    split[dim] = used + unused  # in this order, whoever exchanges a part has its neighbour
    stages = [list(split)]
    split[dim] = used
    stages.append(list(split))
    for other in reversed(range(len(wanted))):
        if other != dim and wanted[other]:
            split[dim] = tuple(axis for axis in split[dim] if axis not in wanted[other])
            split[other] = wanted[other]
            stages.append(list(split))
    return tuple(PartitionSpec(*(axes or None for axes in stage)) for stage in stages)


def _axes(spec: PartitionSpec, ndim: int) -> list[Axes]:
    """The mesh axes of every dimension."""
    parts = [*spec, *(None,) * (ndim - len(spec))]
    return [part if isinstance(part, tuple) else (part,) if part else () for part in parts]


@functools.lru_cache(maxsize=64)  # a new function would be compiled again
def _exchange(
    sharding: NamedSharding, specs: tuple[PartitionSpec, ...], dtype: np.dtype
) -> Callable[[jax.Array], jax.Array]:
    def exchange(leaf: jax.Array) -> jax.Array:
        for spec in specs:
            leaf = jax.lax.with_sharding_constraint(leaf, NamedSharding(sharding.mesh, spec))
        return jax.lax.bitcast_convert_type(leaf, dtype)

    return jax.jit(exchange, out_shardings=sharding)
