"""A conversion that has been planned: which torch tensors belong to which Flax leaf."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from convert.checkpoint import TensorInfo
from convert.rules import Rule


class ShapeDtype(Protocol):
    """`TensorInfo`, `jax.ShapeDtypeStruct` or an array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


@dataclass(frozen=True)
class LeafPlan:
    """One Flax leaf and the torch tensors that hold the same elements.

    Attributes:
      path: flax path.
      info: shape and dtype of the leaf.
      keys: torch keys, with prefix, in layer order.
      rule: the row of the table that connects them.
    """

    path: str
    info: TensorInfo
    keys: tuple[str, ...]
    rule: Rule

    @property
    def tensor_info(self) -> TensorInfo:
        """Shape and dtype of each of the torch tensors."""
        return TensorInfo(self.rule.tensor_shape(self.info.shape), self.info.dtype)

    @property
    def order(self) -> list[int]:
        """The leaf's dimensions from the slowest to the fastest in the torch files.

        A part that is cut along the first of them lies there in one piece.
        """
        tensor = [*range(len(self.info.shape))][self.rule.is_stacked :]
        axes = self.rule.transform.axes or range(len(tensor))
        dims = [dim for _, dim in sorted(zip(axes, tensor, strict=True))]
        return [0, *dims] if self.rule.is_stacked else dims


@dataclass(frozen=True)
class Plan:
    """A conversion that has no problems; the same plan serves both directions.

    Attributes:
      leaves: sorted by path; together they use every torch key and every Flax leaf exactly once.
      copies: (key, twin) of torch tensors that must be equal, since only the twin has a leaf.
    """

    leaves: tuple[LeafPlan, ...]
    copies: tuple[tuple[str, str], ...] = ()

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """The torch side, without copies: key -> shape and dtype."""
        return {key: leaf.tensor_info for leaf in self.leaves for key in leaf.keys}

    @property
    def params(self) -> dict[str, TensorInfo]:
        """The Flax side: path -> shape and dtype."""
        return {leaf.path: leaf.info for leaf in self.leaves}


def by_key(leaves: Iterable[LeafPlan]) -> dict[str, LeafPlan]:
    """The leaf that each torch key belongs to."""
    return {key: leaf for leaf in leaves for key in leaf.keys}
