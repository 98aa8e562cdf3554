"""The device mesh, the table of logical axes, and the shardings that follow from both."""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from flax_projector.config import MeshConfig

log = logging.getLogger(__name__)

BATCH_AXES = ("data", "fsdp")

LOGICAL_RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", BATCH_AXES),
    ("embed", "fsdp"),
    ("heads", "tensor"),  # H*d and K*d columns of the attention projections
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("frames", None),  # k*E inputs of the projector
    ("norm", None),
    ("layers", None),
    ("kernel", None),
    ("mel", None),
    ("conv_in", None),
    ("positions", None),
)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices.

    Raises:
      ValueError: if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        fixed = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor} does not fit "
            f"{len(devices)} devices: the product must be the number of devices; set one axis to -1"
        )
    axis_types = (AxisType.Auto,) * 3  # linen's constraints need it; the default is Explicit
    return jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=axis_types, devices=devices)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Within it, the modules' logical axis names mean axes of `mesh`; tracing must happen here."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_RULES):
        yield


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits axis 0 over every device that holds a share of the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def num_batch_shards(mesh: Mesh) -> int:
    """Ways in which `batch_sharding` splits axis 0."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def spec_that_divides(
    spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, name: str
) -> PartitionSpec:
    """Drops mesh axes from dimensions that they do not divide (3 kv heads over 2 devices).

    Args:
      spec: mesh axes of each dimension.
      shape: sizes of the dimensions.
      mesh: whose axes they are.
      name: what is sharded, for the log.
    """
    parts = []
    for dim, axes in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec)), strict=True):
        names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
        ways = math.prod(mesh.shape[axis] for axis in names)
        if dim % ways:
            log.info("%s: dimension %d is replicated, %d does not divide it", name, dim, ways)
            axes = None
        parts.append(axes)
    return PartitionSpec(*parts)


def strip_axes(boxed: Any) -> Any:
    """A parameter tree without its axis names.

    `flax.linen.unbox` would also constrain every leaf, evenly divisible or not.
    """
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.value, boxed, is_leaf=is_box)


def abstract_params(module: nn.Module, inputs: jax.ShapeDtypeStruct, mesh: Mesh | None) -> Any:
    """Shapes, dtypes and shardings of a module's parameters, without computing any.

    Args:
      module: a linen module whose parameters carry logical axis names.
      inputs: shape and dtype of an input it takes.
      mesh: where the parameters will live; None leaves the shardings out.

    Returns:
      Nested dict of ShapeDtypeStructs, sharded by LOGICAL_RULES.
    """
    boxed = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), inputs)["params"]
    if mesh is None:
        return strip_axes(boxed)
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), LOGICAL_RULES)

    def place(path, leaf, spec):
        spec = spec_that_divides(spec, leaf.shape, mesh, jax.tree_util.keystr(path))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, strip_axes(boxed), specs)


def padded_batch_size(mesh: Mesh, batch_size: int, accumulation_steps: int = 1) -> int:
    """Rows of a global batch once it is padded to divide over the mesh, and there into parts."""
    ways = accumulation_steps * num_batch_shards(mesh)
    num_rows = -(-batch_size // ways) * ways
    if num_rows != batch_size:
        log.warning(
            "a batch of %d over %d devices in %d parts carries %d rows of padding: "
            "a multiple of %d has none",
            *(batch_size, ways // accumulation_steps, accumulation_steps),
            *(num_rows - batch_size, ways),
        )
    return num_rows


def local_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
    """The rows of a global batch that this process must provide, ascending."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((num_rows,)).values()
    rows = np.arange(num_rows)
    return np.unique(np.concatenate([rows[index] for index in slices if index is not None]))
