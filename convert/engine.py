"""One engine for both directions: plan on names, shapes and dtypes alone, then stream."""

import dataclasses
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from convert.errors import Problem, raise_any
from convert.rules import DTYPES, Ignore, Rule, Table, TensorInfo

_log = logging.getLogger(__name__)

Read = Callable[[str], np.ndarray]
"""Gives the tensor of a torch key, or the leaf of a flax path."""


class ShapeDtype(Protocol):
    """`TensorInfo`, `jax.ShapeDtypeStruct` or an array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


@dataclass(frozen=True)
class LeafPlan:
    """Where one Flax leaf comes from, or goes to.

    Attributes:
      path: flax path.
      info: shape and dtype of the leaf.
      keys: torch keys, with prefix, in layer order.
      rule: the row of the table that says so.
    """

    path: str
    info: TensorInfo
    keys: tuple[str, ...]
    rule: Rule

    @property
    def tensor_info(self) -> TensorInfo:
        """Shape and dtype of each of the torch tensors."""
        return TensorInfo(self.rule.tensor_shape(self.info.shape), self.info.dtype)


@dataclass(frozen=True)
class Plan:
    """A conversion without problems; the same object serves both directions.

    Attributes:
      leaves: sorted by path; together they use every torch key and every Flax leaf once.
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

    @property
    def nbytes(self) -> int:
        """Size of all leaves, in bytes."""
        return sum(leaf.info.nbytes for leaf in self.leaves)


def plan_to_flax(
    table: Table, source: Mapping[str, TensorInfo], target: Mapping[str, ShapeDtype]
) -> Plan:
    """Plans the conversion of a torch checkpoint.

    Args:
      table: the model's mapping.
      source: every tensor of the checkpoint, by torch key.
      target: every leaf of the model, by flax path. Its dtypes do not matter: the source's stay.

    Raises:
      ConversionError: unless every source key and every target leaf is used exactly once, or
        ignored by the table with a reason.
    """
    prefix = table.prefix_of(source)
    leaves, problems = _expand(table, prefix, target)
    owner = {key: leaf for leaf in leaves for key in leaf.keys}
    copies = {
        tied.key: prefix + tied.twin
        for tied in table.tied
        if tied.key in source and tied.key not in owner
    }
    spare = _drop_ignored(table, [key for key in source if key not in owner and key not in copies])
    used = {key: info for key, info in source.items() if key in owner}

    problems += _differences({key: leaf.tensor_info for key, leaf in owner.items()}, used, owner)
    problems += [_unexpected(table, prefix, key, source[key]) for key in spare]
    problems += _gaps(table, prefix, source)
    problems += _unsupported_dtypes(used)
    problems += [problem for leaf in leaves for problem in _mixed_dtypes(leaf, used)]
    raise_any(f"{table.name}: the checkpoint does not fit the config", problems)

    leaves = (_with_dtype(leaf, source[leaf.keys[0]].dtype) for leaf in leaves)
    return Plan(tuple(leaves), tuple(copies.items()))


def plan_to_torch(
    table: Table,
    source: Mapping[str, TensorInfo],
    target: Mapping[str, ShapeDtype],
    *,
    prefix: str | None = None,
) -> Plan:
    """Plans the conversion of Flax parameters.

    Args:
      table: the model's mapping.
      source: every leaf of the checkpoint, by flax path.
      target: every leaf of the model, by flax path. Its dtypes do not matter: the source's stay.
      prefix: of the torch keys; None writes the table's first.

    Raises:
      ConversionError: unless the source has exactly the leaves of the target, each with a rule.
    """
    prefix = table.prefixes[0] if prefix is None else prefix
    leaves, problems = _expand(table, prefix, target)
    known = {path: info for path, info in source.items() if path in target}
    problems += _differences(target, known, {leaf.path: leaf for leaf in leaves})
    problems += [
        Problem("unexpected", path, f"{list(source[path].shape)} has no place in the model")
        for path in source.keys() - target.keys()
    ]
    problems += _unsupported_dtypes(known)
    raise_any(f"{table.name}: the parameters do not fit the config", problems)
    return Plan(tuple(_with_dtype(leaf, source[leaf.path].dtype) for leaf in leaves))


def to_flax(plan: Plan, read: Read) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (flax path, leaf), one leaf at a time; holds one leaf and one tensor.

    Args:
      plan: what to convert.
      read: gives the tensor of a torch key, as the plan's headers promised it.

    Raises:
      ConversionError: if a tensor that the model ties to another differs from it.
    """
    raise_any(
        "tied tensors differ",
        [
            Problem("tied", key, f"differs from {twin}; set tie_word_embeddings to false")
            for key, twin in plan.copies
            if not _is_same(read(key), read(twin))
        ],
    )
    for leaf in plan.leaves:
        out = np.empty(leaf.info.shape, leaf.info.dtype)
        slots = out if leaf.rule.is_stacked else out[None]
        for slot, key in zip(slots, leaf.keys, strict=True):
            np.copyto(slot, leaf.rule.transform.forward(read(key)), casting="no")
        yield leaf.path, out


def to_torch(plan: Plan, read: Read) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (torch key, contiguous tensor): the rows of `to_flax` backwards.

    Args:
      plan: what to convert.
      read: gives the leaf of a flax path, as the plan's headers promised it.
    """
    for leaf in plan.leaves:
        array = read(leaf.path)
        parts = array if leaf.rule.is_stacked else array[None]
        for key, part in zip(leaf.keys, parts, strict=True):
            yield key, np.ascontiguousarray(leaf.rule.transform.inverse(part))


def check_round_trip(
    infos: Mapping[str, TensorInfo], read: Read, returned: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Checks that what was converted and converted back is what it was, byte for byte.

    Args:
      infos: shapes and dtypes before, by torch key or flax path.
      read: gives what it was before.
      returned: what came back. It proves that nothing was lost, not that every tensor found its
        place: that is proved by comparing forward passes.

    Raises:
      ConversionError: naming every tensor that is missing, new or different.
    """
    problems = []
    missing = dict(infos)
    for name, array in returned:
        before = missing.pop(name, None)
        if before is None:
            problems.append(Problem("new", name, "was not there before"))
        elif (array.shape, array.dtype) != before:
            change = f"{before.dtype}{list(before.shape)} -> {array.dtype}{list(array.shape)}"
            problems.append(Problem("header", name, change))
        elif not _is_same(array, read(name)):
            problems.append(Problem("bytes", name, "other values came back"))
    problems += [Problem("missing", name, "did not come back") for name in missing]
    raise_any("the round trip changed the checkpoint: do not use the result", problems)


def _expand(
    table: Table, prefix: str, target: Mapping[str, ShapeDtype]
) -> tuple[list[LeafPlan], list[Problem]]:
    """Finds the one rule of every leaf, and with it the leaf's torch keys."""
    leaves, problems = [], []
    for path, leaf in sorted(target.items()):
        info = TensorInfo(tuple(leaf.shape), np.dtype(leaf.dtype))
        found = [
            (rule, keys) for rule in table.rules if (keys := rule.torch_keys(path, info.shape))
        ]
        if len(found) != 1:
            text = f"{len(found)} rows of convert/tables.py lead to this leaf, need one"
            problems.append(Problem("rule", path, text))
            continue
        rule, keys = found[0]
        keys = tuple(key if rule.at_root else prefix + key for key in keys)
        try:
            rule.tensor_shape(info.shape)
        except ValueError as error:
            problems.append(Problem("rule", path, f"{list(info.shape)}: {error}"))
            continue
        leaves.append(LeafPlan(path, info, keys, rule))
    uses = Counter(key for leaf in leaves for key in leaf.keys)
    problems += [Problem("rule", key, f"used by {n} leaves") for key, n in uses.items() if n > 1]
    return leaves, problems


def _with_dtype(leaf: LeafPlan, dtype: np.dtype) -> LeafPlan:
    return dataclasses.replace(leaf, info=TensorInfo(leaf.info.shape, dtype))


def _drop_ignored(table: Table, keys: Iterable[str]) -> list[str]:
    """The keys that no row of `ignore` covers; logs what is left out, and why."""
    ignored: Counter[Ignore] = Counter()
    kept = []
    for key in keys:
        ignore = next((ignore for ignore in table.ignore if ignore.matches(key)), None)
        if ignore is None:
            kept.append(key)
        else:
            ignored[ignore] += 1
    for ignore, count in ignored.items():
        _log.info("left out: %d tensors %s (%s)", count, ignore.pattern, ignore.reason)
    return kept


def _differences(
    expected: Mapping[str, ShapeDtype],
    got: Mapping[str, TensorInfo],
    owner: Mapping[str, LeafPlan],
) -> list[Problem]:
    """Names that are missing, and shapes that differ."""
    problems = []
    for name, want in expected.items():
        fate = f" -> {owner[name].path}" if name in owner and owner[name].path != name else ""
        if name not in got:
            problems.append(Problem("missing", name, f"{list(want.shape)}{fate}"))
        elif got[name].shape != tuple(want.shape):
            text = f"got {list(got[name].shape)}, expected {list(want.shape)}{fate}"
            problems.append(Problem("shape", name, text))
    return problems


def _unexpected(table: Table, prefix: str, key: str, info: TensorInfo) -> Problem:
    bare = key.removeprefix(prefix)
    has_rule = any(rule.layer_of(key if rule.at_root else bare) is not None for rule in table.rules)
    reason = (
        "the config has no place for it"
        if has_rule
        else "no rule; add one to convert/tables.py, or an Ignore with the reason"
    )
    return Problem("unexpected", key, f"{list(info.shape)} {reason}")


def _gaps(table: Table, prefix: str, keys: Iterable[str]) -> list[Problem]:
    """Layer numbers that are skipped."""
    found = defaultdict(set)
    for key in keys:
        for rule in table.rules:
            if layer := rule.layer_of(key.removeprefix(prefix)):
                found[prefix + rule.torch.partition("{i}")[0]].add(int(layer))
    return [
        Problem("gap", f"{stem}*", f"has {_listed(numbers)} but not {_listed(absent)}")
        for stem, numbers in found.items()
        if (absent := set(range(max(numbers))) - numbers)
    ]


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def _mixed_dtypes(leaf: LeafPlan, source: Mapping[str, TensorInfo]) -> list[Problem]:
    example = {source[key].dtype.name: key for key in reversed(leaf.keys) if key in source}
    if len(example) < 2:
        return []
    dtypes = ", ".join(f"{dtype} ({key})" for dtype, key in sorted(example.items()))
    return [Problem("dtypes", leaf.path, f"stacks {dtypes}; choose one with --dtype")]


def _unsupported_dtypes(infos: Mapping[str, TensorInfo]) -> list[Problem]:
    supported = ", ".join(sorted(DTYPES))
    return [
        Problem("dtype", name, f"{info.dtype} is not one of {supported}; choose one with --dtype")
        for name, info in infos.items()
        if info.dtype not in DTYPES.values()
    ]


def _is_same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equality of dtype, shape and bytes: NaNs and signed zeros are told apart."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and np.array_equal(_bytes(a), _bytes(b))


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
