"""Whether two checkpoints are the same model: names, dtypes, bytes, configs and outputs."""

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
from convert.checkpoint import Checkpoint, TensorInfo
from convert.hf_config import Json
from convert.models import PROJECTOR, ModelKind, config_text_of, detect
from convert.sources import Source
from convert.trees import read_tree
from flax_projector.config import ProjectorConfig
from flax_projector.projector import ResidualAudioProjector

_log = logging.getLogger(__name__)

MAX_OUTPUT_ERROR = 1e-5
"""Largest difference of the two frameworks' outputs that counts as equal, relative to their RMS;
rounding in f32 leaves about 2e-6."""


@dataclass(frozen=True)
class TensorPair:
    """One tensor in both checkpoints.

    Attributes:
      name: torch key without prefix.
      a: shape and dtype in the first; None if it is not there.
      b: in the second.
      is_same: equal in dtype, shape and every byte.
      max_abs_error: largest difference of two values; None if shapes differ, nan if a value is.
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
      tensors: every tensor of either.
      config: fields that differ and change the outputs: name -> (first, second).
      output_error: largest difference of PyTorch's output of the first and Flax's of the second,
        relative to their RMS; None if they were not run: they are no projectors, or shapes or
        configs differ.
    """

    kind: ModelKind
    tensors: tuple[TensorPair, ...]
    config: Mapping[str, tuple[Any, Any]]
    output_error: float | None

    @property
    def outputs_agree(self) -> bool:
        """Whether the frameworks' outputs differ by rounding at most, if they were run."""
        return self.output_error is None or self.output_error <= MAX_OUTPUT_ERROR

    @property
    def is_same(self) -> bool:
        """Whether both are the same model."""
        are_same = all(pair.is_same for pair in self.tensors)
        return are_same and not self.config and self.outputs_agree


def compare(a: Source, b: Source, given: Json) -> Comparison:
    """Compares two checkpoints of either side.

    Projectors of the same shapes and config are run too: the first in PyTorch and the second in
    Flax, both in f32 on the same random input.

    Args:
      a: the first.
      b: the second; one that has no config.json is taken to have the other's.
      given: fields of the config that neither says.

    Raises:
      ValueError: if one is no model that can be converted, they hold different models, or Flax
        parameters do not fit their own config.
    """
    kind, other_kind = detect(a), detect(b)
    if kind is not other_kind:
        raise ValueError(f"{a.path} is a {kind.name}, {b.path} a {other_kind.name}")
    a, b = (
        dataclasses.replace(one, config_text=one.config_text or other.config_text)
        for one, other in ((a, b), (b, a))
    )
    configs = [kind.parse_text(config_text_of(s, kind, given), str(s.path)) for s in (a, b)]
    one, two = (
        _torch_side(kind, source, config) for source, config in zip((a, b), configs, strict=True)
    )
    names = sorted(one.infos.keys() | two.infos.keys())
    with one.with_progress("comparing") as shown:
        tensors = tuple(_compare_tensor(name, shown, two) for name in names)
    same_shapes = all(pair.a and pair.b and pair.a.shape == pair.b.shape for pair in tensors)
    differences = _config_differences(*configs)
    is_run = kind is PROJECTOR and same_shapes and not differences
    error = _output_error(configs[0], one, two) if is_run else None
    return Comparison(kind, tensors, differences, error)


def _torch_side(kind: ModelKind, source: Source, config: Any) -> Checkpoint:
    """Tensors by torch key without prefix; what the table leaves out is left out."""
    if source.side == "flax":
        plan = engine.plan_to_torch(
            kind.table, source.checkpoint.infos, kind.leaves(config), prefix=""
        )
        return engine.as_torch(plan, source.checkpoint)
    read = source.checkpoint.read
    keys = set(engine.without_ignored(kind.table, source.checkpoint.infos))
    prefix = kind.table.prefix_of(keys)
    for tied in kind.table.tied:
        twin = prefix + tied.twin
        if {tied.key, twin} <= keys and engine.is_same(read(tied.key), read(twin)):
            keys.remove(tied.key)  # the other side need not have it
            _log.info("%s: left out %s, a copy of %s", source.path, tied.key, twin)
    return source.checkpoint.renamed({key.removeprefix(prefix): key for key in sorted(keys)})


def _compare_tensor(name: str, one: Checkpoint, two: Checkpoint) -> TensorPair:
    a, b = one.infos.get(name), two.infos.get(name)
    if a is None or b is None or a.shape != b.shape:
        return TensorPair(name, a, b, False, None)
    x, y = one.read(name), two.read(name)
    if engine.is_same(x, y):
        return TensorPair(name, a, b, True, 0.0)
    with np.errstate(invalid="ignore"):  # inf - inf
        error = np.abs(x.astype(np.float64) - y.astype(np.float64)).max()
    return TensorPair(name, a, b, False, float(error))


def _config_differences(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    if isinstance(a, ProjectorConfig):
        return a.differences(b)
    first, second = dataclasses.asdict(a), dataclasses.asdict(b)
    return {name: (x, second[name]) for name, x in first.items() if x != second[name]}


def _output_error(config: ProjectorConfig, one: Checkpoint, two: Checkpoint) -> float:
    """Largest difference of PyTorch's output of `one` and Flax's of `two`, relative to their RMS.

    The input is [2, 5k + 1, E], so that the tail is padded. Infinities and NaNs must be at the same
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
    import torch  # converting does not need it

    from convert.torch_projector import ResidualAudioProjector as TorchProjector

    with torch.no_grad():
        return TorchProjector.from_tensors(config, tensors)(torch.from_numpy(frames)).numpy()


def _run_flax(config: ProjectorConfig, tensors: Checkpoint, frames: np.ndarray) -> np.ndarray:
    source = tensors.cast(np.dtype(np.float32))
    plan = engine.plan_to_flax(PROJECTOR.table, source.infos, PROJECTOR.leaves(config))
    params = read_tree(engine.as_flax(plan, source))
    with jax.default_matmul_precision("highest"):
        y = ResidualAudioProjector(config).apply({"params": params}, jnp.asarray(frames))
    return np.asarray(y)
