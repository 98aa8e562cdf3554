"""The device mesh, the table of logical axes, and the shardings that result from them."""

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from flax_projector.config import MeshConfig

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

LOGICAL_RULES: Rules = (
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


def _with(rules: Rules, **changes: str | tuple[str, ...] | None) -> Rules:
    return tuple((name, changes.get(name, axes)) for name, axes in rules)


# A frozen encoder is small, and most of its work is in the frames: every device has all of it, and
# a share of the rows. Otherwise weights, or sums of products, would cross between the devices in
# every layer, and once more for each part of the rows.
ENCODER_RULES = _with(LOGICAL_RULES, batch=AXES, embed=None, heads=None, mlp=None)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices.

    On several slices, which only a slow network connects, `fsdp` and `tensor` stay inside a slice:
    nothing but gradients and metrics crosses between them. A slice of GPUs is a machine.

    Raises:
      ValueError: if the product of the axes is not the number of devices, or a slice does not hold
        whole replicas.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    fixed = math.prod(size for size in sizes if size != -1)
    found = f"{len(devices)} device{'s' * (len(devices) != 1)}"
    given = f"--mesh.data {config.data} --mesh.fsdp {config.fsdp} --mesh.tensor {config.tensor}"
    if sizes.count(-1) > 1:
        raise ValueError(f"{given}: only one of them may be -1")
    if -1 in sizes:
        if len(devices) % fixed:
            raise ValueError(
                f"{given} does not fit {found}: {fixed}, the product "
                "of those that are not -1, must divide it"
            )
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"{given} does not fit {found}: their product is {fixed}. "
            "With -1, one of them takes what the others leave"
        )
    axis_types = (AxisType.Auto,) * 3  # linen's constraints need Auto; the default is Explicit
    slices = Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(slices) == 1:
        return jax.make_mesh(sizes, AXES, axis_types=axis_types, devices=devices)
    data, fsdp, tensor = sizes
    if len(set(slices.values())) > 1:
        found = ", ".join(f"{size} in slice {index}" for index, size in sorted(slices.items()))
        raise ValueError(f"all slices must have equally many devices; there are {found}")
    size = len(devices) // len(slices)
    if size % (fsdp * tensor):
        raise ValueError(
            f"{given} does not fit {len(slices)} slices of {size} devices: --mesh.fsdp and "
            f"--mesh.tensor stay inside a slice, so their product, {fsdp * tensor}, must divide "
            f"{size}. --mesh.data -1 takes what they leave"
        )
    hybrid = create_hybrid_device_mesh(
        (data // len(slices), fsdp, tensor),
        (len(slices), 1, 1),
        devices,
        allow_split_physical_axes=True,
    )
    return Mesh(hybrid, AXES, axis_types=axis_types)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Maps the modules' logical axis names to axes of `mesh`; trace functions inside the block."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_RULES):
        yield


@contextlib.contextmanager
def encoder_rules(num_rows: int) -> Iterator[None]:
    """Maps the logical axis names of an encoder, inside a block of `use_mesh`.

    The rows are split over all devices, or like a batch if there are not enough of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows_divide = mesh.empty or num_rows % mesh.size == 0
    rules = ENCODER_RULES if rows_divide else _with(ENCODER_RULES, batch=BATCH_AXES)
    with nn.logical_axis_rules(rules):
        yield


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits axis 0 over all devices that hold a share of the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def spread_sharding(mesh: Mesh) -> NamedSharding:
    """Splits axis 0 over all devices, so that no two processes have the same rows."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def num_batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Number of parts that `batch_sharding` splits axis 0 into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def spec_that_divides(
    spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, name: str
) -> PartitionSpec:
    """Drops mesh axes from dimensions that they do not divide (3 kv heads over 2 devices).

    Args:
      spec: the mesh axes of each dimension.
      shape: the sizes of the dimensions.
      mesh: the mesh that the axes belong to.
      name: name of what is sharded, for the log.
    """
    parts = []
    for dim, axes in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec)), strict=True):
        names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
        ways = math.prod(mesh.shape[axis] for axis in names)
        if dim % ways:
            if dim > 1:  # nobody expects a single row to be split
                log.info("%s: size %d stays whole, since %d does not divide it", name, dim, ways)
            axes = None
        parts.append(axes)
    return PartitionSpec(*parts)


def strip_axes(boxed: Any) -> Any:
    """Removes the axis names from a parameter tree.

    `flax.linen.unbox` would also constrain every leaf, even those that do not divide evenly.
    """
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.value, boxed, is_leaf=is_box)


def abstract_params(
    module: nn.Module,
    inputs: jax.ShapeDtypeStruct,
    mesh: Mesh | None,
    rules: Rules = LOGICAL_RULES,
) -> Any:
    """Shapes, dtypes and shardings of a module's parameters, without computing any.

    Args:
      module: a linen module whose parameters carry logical axis names.
      inputs: shape and dtype of a valid input.
      mesh: the mesh that the parameters will be on; None leaves out the shardings.
      rules: the mesh axes of the logical names.

    Returns:
      Nested dict of ShapeDtypeStructs, sharded by `rules`.
    """
    boxed = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), inputs)["params"]
    if mesh is None:
        return strip_axes(boxed)
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), rules)

    def place(path, leaf, spec):
        spec = spec_that_divides(spec, leaf.shape, mesh, jax.tree_util.keystr(path))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, strip_axes(boxed), specs)


def on_each_device(attend: Any) -> Any:
    """Wraps attention so that every device computes it for its own rows and heads.

    Needed for what XLA cannot split by itself: a kernel, or a loop over rows and heads.

    Args:
      attend: a function of queries, keys and values, each [batch, heads, length, head dim].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend

    def split(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        spec: Any = nn.logical_to_mesh_axes(("batch", "heads", None, None))
        spec = spec_that_divides(spec, k.shape, mesh, "attention")
        return jax.shard_map(attend, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)

    return split


def by_rows(function: Any) -> Any:
    """Wraps a function so that every device computes it for its own rows of the batch.

    Needed for what XLA does not split by itself: a `top_k` would gather all rows on every device.

    Args:
      function: a function of arrays whose axis 0 is the batch, of trees of them, and of scalars.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function

    def split(*args: Any) -> Any:
        leaves = [jax.tree.leaves(arg)[0] for arg in args]  # a tree has one kind of them
        rows = next(len(leaf) for leaf in leaves if leaf.ndim)
        batch = spec_that_divides(PartitionSpec(BATCH_AXES), (rows,), mesh, "rows")
        specs: Any = tuple(batch if leaf.ndim else PartitionSpec() for leaf in leaves)
        return jax.shard_map(function, in_specs=specs, out_specs=batch, check_vma=False)(*args)

    return split


def split_rows(rows: Any, count: int) -> Any:
    """[B, ...] -> [count, B / count, ...]: parts with rows from every device, so no row moves.

    Args:
      rows: a NumPy or JAX array.
      count: number of parts.
    """
    return rows.reshape(-1, count, *rows.shape[1:]).swapaxes(0, 1)


def map_parts(function: Any, rows: jax.Array, most: int | None) -> jax.Array:
    """Applies a function to parts of the rows, one after the other.

    Args:
      function: takes rows [b, ...], and returns as many.
      rows: split over the devices as the "batch" of the current rules.
      most: rows of a device in a part, at most; None for a single part. See `split_rows`.
    """
    if most is None:
        return function(rows)
    mesh = jax.sharding.get_abstract_mesh()
    spec: Any = nn.logical_to_mesh_axes(("batch",))
    num_shards = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in spec[0])
    num_local = len(rows) // num_shards
    count = next(n for n in range(1, num_local + 1) if num_local % n == 0 and num_local <= n * most)
    if count == 1:
        return function(rows)
    results = jax.lax.map(function, split_rows(rows, count)).swapaxes(0, 1)
    return results.reshape(-1, *results.shape[2:])


def padded_batch_size(mesh: Mesh, batch_size: int, accumulation_steps: int = 1) -> int:
    """Rows of a global batch, padded to divide evenly into micro-batches and over the mesh."""
    ways = accumulation_steps * num_batch_shards(mesh)
    num_rows = -(-batch_size // ways) * ways
    if num_rows != batch_size:
        log.warning(
            "a batch of %d over %d devices in %d parts carries %d rows of padding: "
            "a multiple of %d has none",
            batch_size,
            ways // accumulation_steps,
            accumulation_steps,
            num_rows - batch_size,
            ways,
        )
    return num_rows


def local_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
    """The row numbers of a global batch that this process must provide, ascending."""
    return rows_of_process(batch_sharding(mesh), num_rows)


def rows_of_process(sharding: NamedSharding, num_rows: int) -> np.ndarray:
    """The row numbers of a global array that are on devices of this process, ascending."""
    slices = sharding.addressable_devices_indices_map((num_rows,)).values()
    rows = np.arange(num_rows)
    return np.unique(np.concatenate([rows[index] for index in slices if index is not None]))
