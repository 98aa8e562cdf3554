"""What a mapping consists of: names, and transforms that move elements and change none."""

import fnmatch
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_NUMBER = r"(0|[1-9]\d*)"  # no leading zeros: "01" would not come back as it was


@dataclass(frozen=True)
class Transform:
    """A permutation of axes, from torch to Flax. It is a bijection, so no value is lost.

    Attributes:
      name: for messages.
      axes: Flax axis j is torch axis axes[j]; None leaves any tensor as it is.
    """

    name: str
    axes: tuple[int, ...] | None = None

    def forward(self, tensor: np.ndarray) -> np.ndarray:
        """Torch layout to Flax layout (a view)."""
        return tensor.transpose(self._forward_axes(tensor.ndim))

    def inverse(self, leaf: np.ndarray) -> np.ndarray:
        """Flax layout to torch layout (a view)."""
        return leaf.transpose(self._inverse_axes(leaf.ndim))

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of `forward` of a tensor of this shape."""
        return tuple(shape[axis] for axis in self._forward_axes(len(shape)))

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of `inverse` of a leaf of this shape."""
        return tuple(shape[axis] for axis in self._inverse_axes(len(shape)))

    def _forward_axes(self, ndim: int) -> tuple[int, ...]:
        axes = tuple(range(ndim)) if self.axes is None else self.axes
        if len(axes) != ndim:
            raise ValueError(f"{self.name} moves {len(axes)} axes, the tensor has {ndim}")
        return axes

    def _inverse_axes(self, ndim: int) -> tuple[int, ...]:
        axes = self._forward_axes(ndim)
        return tuple(axes.index(axis) for axis in range(ndim))


IDENTITY = Transform("identity")


def permute(*axes: int) -> Transform:
    """The transform whose Flax axis j is torch axis axes[j]."""
    if sorted(axes) != list(range(len(axes))):
        raise ValueError(f"permute{axes} is not a permutation of 0..{len(axes) - 1}")
    return Transform(f"permute{axes}", axes)


def transpose() -> Transform:
    """The linear layer's [out, in] <-> [in, out]."""
    return Transform("transpose", (1, 0))


@dataclass(frozen=True)
class Rule:
    """One row of a table: a torch tensor and the Flax leaf that holds the same elements.

    Attributes:
      torch: template of the torch key.
      flax: template of the flax path. With "{i}" in both templates every layer has its own leaf;
        with "{i}" in `torch` only, the layers are stacked on axis 0 of one leaf.
      transform: applied to each tensor, before stacking.
      at_root: whether the key has no prefix, even if the others have one.
      hint: the fields of the config that determine its shape, for messages.
    """

    torch: str
    flax: str
    transform: Transform
    at_root: bool = False
    hint: str = ""

    def __post_init__(self) -> None:
        if self.torch.count("{i}") > 1 or self.flax.count("{i}") > self.torch.count("{i}"):
            raise ValueError(
                f"rule {self.torch!r} -> {self.flax!r}: expected at most one {{i}} in each "
                "template, and none on the Flax side alone"
            )

    @property
    def is_stacked(self) -> bool:
        """Whether the leaf holds all layers, along its axis 0."""
        return "{i}" in self.torch and "{i}" not in self.flax

    def torch_keys(self, path: str, shape: tuple[int, ...]) -> tuple[str, ...] | None:
        """The keys whose tensors make up the leaf at `path`, without prefix and in layer order.

        Args:
          path: flax path of the leaf.
          shape: of the leaf; that of a stacked leaf begins with the number of layers.

        Returns:
          None if the rule is not for this path.
        """
        layer = _match(self.flax, path)
        if layer is None:
            return None
        layers = range(shape[0]) if self.is_stacked else (layer,)
        return tuple(self.torch.replace("{i}", str(i)) for i in layers)

    def tensor_shape(self, leaf_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each of the torch tensors that make up a leaf of this shape."""
        return self.transform.inverse_shape(leaf_shape[1:] if self.is_stacked else leaf_shape)

    def layer_of(self, key: str) -> str | None:
        """The layer number in a torch key without prefix: "" if there is none, None if no match."""
        return _match(self.torch, key)


def _match(template: str, name: str) -> str | None:
    """The number in place of "{i}" ("" without one); None unless the whole name matches."""
    found = _pattern(template).fullmatch(name)
    return None if found is None else "".join(found.groups())


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(re.escape("{i}"), _NUMBER))


@dataclass(frozen=True)
class Tied:
    """A torch key that may be a copy of another tensor, if the model has no leaf for it.

    Attributes:
      key: of the copy, without any prefix in the checkpoint.
      twin: key of the tensor that it must equal byte for byte, to which the prefix is added.
    """

    key: str
    twin: str


@dataclass(frozen=True)
class Ignore:
    """Torch keys that are left out on purpose.

    Attributes:
      pattern: matches whole keys with their prefix; "*" matches anything.
      reason: why nothing is lost.
    """

    pattern: str
    reason: str

    def matches(self, key: str) -> bool:
        """Whether the key is left out."""
        return fnmatch.fnmatchcase(key, self.pattern)


@dataclass(frozen=True)
class Table:
    """The mapping of one model.

    Attributes:
      name: of the model, for messages.
      prefixes: that torch keys may have; the first one is written.
      rules: one row per kind of tensor.
      ignore: keys that are left out, with the reason.
      tied: keys that may be copies of another tensor.
    """

    name: str
    prefixes: tuple[str, ...]
    rules: tuple[Rule, ...]
    ignore: tuple[Ignore, ...] = ()
    tied: tuple[Tied, ...] = ()

    def prefix_of(self, keys: Iterable[str]) -> str:
        """The prefix with which most of these torch keys are known; the first one if none is."""
        keys = list(keys)
        return max(self.prefixes, key=lambda prefix: self.num_known(keys, prefix))

    def num_known(self, keys: Iterable[str], prefix: str) -> int:
        """How many of these torch keys have a row, if this is the prefix of the model."""
        bare = [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]
        rules = [rule for rule in self.rules if not rule.at_root]
        return sum(any(rule.layer_of(key) is not None for rule in rules) for key in bare)
