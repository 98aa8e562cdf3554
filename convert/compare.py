"""Decides whether two checkpoints hold the same model: tensors, configs and outputs."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert import engine
from convert.bounds import check_sizes
from convert.checkpoint import Checkpoint, TensorInfo
from convert.errors import ConversionError
from convert.extras import import_torch
from convert.hf_config import Json
from convert.models import PROJECTOR, ModelKind, config_text_of, detect
from convert.round_trip import is_same
from convert.stored import StoredModel
from convert.trees import read_tree
from flax_projector.config import ProjectorConfig
from flax_projector.models.projector import ResidualAudioProjector

_log = logging.getLogger(__name__)

MAX_OUTPUT_ERROR = 1e-5
"""The largest difference between the two frameworks' outputs that counts as equal, relative to
their RMS; f32 rounding alone causes about 2e-6."""


@dataclass(frozen=True)
class TensorPair:
    """One tensor in both checkpoints.

    Attributes:
      name: torch key without prefix.
      a: shape and dtype in the first checkpoint; None if it is not there.
      b: shape and dtype in the second.
      is_same: whether dtype, shape and every byte are equal.
      max_abs_error: largest difference between two values; None if the shapes differ, nan if a
        value is nan.
    """

    name: str
    a: TensorInfo | None
    b: TensorInfo | None
    is_same: bool
    max_abs_error: float | None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
      kind: the model.
      tensors: every tensor of either checkpoint.
      config: fields that differ and change the outputs: name -> (first, second).
      output_error: largest difference between the output of the first in PyTorch and that of the
        second in Flax, relative to their RMS; None if they were not run, because they are not
        projectors, or their shapes or configs differ.
    """

    kind: ModelKind
    tensors: tuple[TensorPair, ...]
    config: Mapping[str, tuple[Any, Any]]
    output_error: float | None

    @property
    def outputs_agree(self) -> bool:
        """Whether the outputs differ by no more than rounding; True if they were not run."""
        return self.output_error is None or self.output_error <= MAX_OUTPUT_ERROR

    @property
    def is_same(self) -> bool:
        """Whether both hold the same model."""
        are_same = all(pair.is_same for pair in self.tensors)
        return are_same and not self.config and self.outputs_agree


def compare(a: StoredModel, b: StoredModel, given: Json) -> Comparison:
    """Compares two checkpoints.

    Projectors with the same shapes and config are run as well: the first in PyTorch and the second
    in Flax, both in f32 on the same random input.

    Args:
      a: the first.
      b: the second. If one of the two has no config.json, the other's is used for both.
      given: fields of the config that neither contains.

    Raises:
      ValueError: if they are different kinds of models, if neither fits its own config, if Flax
        parameters do not fit theirs, or if projectors have to be run without torch.
    """
    kind, other_kind = detect(a), detect(b)
    if kind is not other_kind:
        raise ValueError(f"{a.path} is a {kind.name}, but {b.path} is a {other_kind.name}")
    a, b = (
        dataclasses.replace(one, config_text=one.config_text or other.config_text)
        for one, other in ((a, b), (b, a))
    )
    configs = [kind.parse_text(config_text_of(s, kind, given), str(s.path)) for s in (a, b)]
    one, two = (
        _torch_side(kind, stored, config) for stored, config in zip((a, b), configs, strict=True)
    )
    misfits = [
        _misfit(kind, side, config) for side, config in zip((one, two), configs, strict=True)
    ]
    if misfits[0] and misfits[1]:  # if one does fit, the differences are what is to be shown
        raise misfits[0]
    names = sorted(one.infos.keys() | two.infos.keys())
    with one.with_progress("comparing") as shown:
        tensors = tuple(_compare_tensor(name, shown, two) for name in names)
    same_shapes = all(pair.a and pair.b and pair.a.shape == pair.b.shape for pair in tensors)
    differences = _config_differences(*configs)
    is_run = kind is PROJECTOR and same_shapes and not differences and not any(misfits)
    error = _output_error(configs[0], one, two) if is_run else None
    return Comparison(kind, tensors, differences, error)


def _torch_side(kind: ModelKind, stored: StoredModel, config: Any) -> Checkpoint:
    """Tensors by torch key without prefix, and without those that the table ignores."""
    infos, read = stored.checkpoint.infos, stored.checkpoint.read
    check_sizes(config, infos, str(stored.path))
    if stored.side == "flax":
        plan = engine.plan_to_torch(kind.table, infos, kind.leaves(config), prefix="")
        return engine.as_torch(plan, stored.checkpoint)
    keys = set(engine.without_ignored(kind.table, infos))
    prefix = kind.table.prefix_of(keys)
    for tied in kind.table.tied:
        twin = prefix + tied.twin
        if {tied.key, twin} <= keys and is_same(read(tied.key), read(twin)):
            keys.remove(tied.key)  # the other checkpoint may do without it
            _log.info("%s: left out %s, a copy of %s", stored.path, tied.key, twin)
    return stored.checkpoint.renamed({key.removeprefix(prefix): key for key in sorted(keys)})


def _misfit(kind: ModelKind, tensors: Checkpoint, config: Any) -> ConversionError | None:
    """Why the tensors are not those of a model with this config, whatever their dtypes."""
    try:
        infos = tensors.cast(np.dtype(np.float32)).infos
        engine.plan_to_flax(kind.table, infos, kind.leaves(config))
    except ConversionError as error:
        return error
    return None


def _compare_tensor(name: str, one: Checkpoint, two: Checkpoint) -> TensorPair:
    a, b = one.infos.get(name), two.infos.get(name)
    if a is None or b is None or a.shape != b.shape:
        return TensorPair(name, a, b, False, None)
    x, y = one.read(name), two.read(name)
    if is_same(x, y):
        return TensorPair(name, a, b, True, 0.0)
    wide = np.complex128 if "c" in (x.dtype.kind, y.dtype.kind) else np.float64
    with np.errstate(invalid="ignore"):  # inf - inf
        error = np.abs(x.astype(wide) - y.astype(wide)).max(initial=0)
    return TensorPair(name, a, b, False, float(error))


def _config_differences(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    if isinstance(a, ProjectorConfig):
        return a.differences(b)
    first, second = dataclasses.asdict(a), dataclasses.asdict(b)
    return {name: (x, second[name]) for name, x in first.items() if x != second[name]}


def _output_error(config: ProjectorConfig, one: Checkpoint, two: Checkpoint) -> float:
    """Largest difference between `one` run in PyTorch and `two` run in Flax, relative to their RMS.

    The input is [2, 5k + 1, E], so that the tail is padded. Infinities and NaNs must be in the same
    places.
    """
    e, k = config.encoder_dim, config.projector_pool_stride
    frames = np.random.default_rng(0).normal(size=(2, 5 * k + 1, e)).astype(np.float32)
    both = np.stack([_run_torch(config, one, frames), _run_flax(config, two, frames)])
    is_finite = np.isfinite(both).all(0)
    if not np.array_equal(*both[:, ~is_finite], equal_nan=True):
        return math.inf
    a, b = both[:, is_finite].astype(np.float64)
    error = np.abs(a - b).max(initial=0)
    return float(error / np.sqrt(np.mean([a**2, b**2]))) if error else 0.0


def _run_torch(config: ProjectorConfig, tensors: Checkpoint, frames: np.ndarray) -> np.ndarray:
    torch = import_torch("comparing the outputs of two projectors")

    from convert.torch_projector import ResidualAudioProjector as TorchProjector

    with torch.no_grad():
        return TorchProjector.from_tensors(config, tensors)(torch.from_numpy(frames)).numpy()


def _run_flax(config: ProjectorConfig, tensors: Checkpoint, frames: np.ndarray) -> np.ndarray:
    wide = tensors.cast(np.dtype(np.float32))
    plan = engine.plan_to_flax(PROJECTOR.table, wide.infos, PROJECTOR.leaves(config))
    params = read_tree(engine.as_flax(plan, wide))
    with jax.default_matmul_precision("highest"):
        y = ResidualAudioProjector(config).apply({"params": params}, jnp.asarray(frames))
    return np.asarray(y)
