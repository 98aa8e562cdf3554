"""One engine for both directions: plan on names, shapes and dtypes alone, then convert lazily.

A conversion is a view: a checkpoint of the other side, whose tensors are made when they are read.
Writers read them one by one, so that memory holds one leaf, never the model.
"""

import dataclasses
import functools
import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from convert.checkpoint import DTYPES, Checkpoint, TensorInfo, contiguous, copy_into, map_ahead
from convert.errors import Problem, raise_any
from convert.rules import Ignore, Rule, Table

_log = logging.getLogger(__name__)

_ADVICE = "use all of its files, and the config.json that came with them"


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
    title = f"{table.name}: the checkpoint does not fit the config: {_ADVICE}"
    raise_any(title, _alien(table, source))
    leaves, problems = _expand(table, prefix, target)
    owner = {key: leaf for leaf in leaves for key in leaf.keys}
    copies = {
        tied.key: prefix + tied.twin
        for tied in table.tied
        if tied.key in source and tied.key not in owner
    }
    spare = without_ignored(
        table, [key for key in source if key not in owner and key not in copies]
    )
    used = {key: info for key, info in source.items() if key in owner}

    problems += _differences({key: leaf.tensor_info for key, leaf in owner.items()}, used, owner)
    problems += [_unexpected(table, prefix, key, source[key]) for key in spare]
    problems += _gaps(table, prefix, source)
    problems += _unsupported_dtypes(used)
    problems += [problem for leaf in leaves for problem in _mixed_dtypes(leaf, used)]
    raise_any(title, problems)

    for key, twin in copies.items():
        _log.info("left out: %s (the config says that it is the same as %s)", key, twin)
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
      prefix: of the torch keys, one of the table's; None writes its first.

    Raises:
      ConversionError: unless the source has exactly the leaves of the target, each with a rule.
      ValueError: if the table has no such prefix.
    """
    prefix = table.prefixes[0] if prefix is None else prefix
    if prefix not in table.prefixes:
        known = ", ".join(map(repr, table.prefixes))
        raise ValueError(f"prefix {prefix!r} of a {table.name} is not one of {known}")
    leaves, problems = _expand(table, prefix, target)
    known = {path: info for path, info in source.items() if path in target}
    problems += _differences(target, known, {leaf.path: leaf for leaf in leaves})
    problems += [
        Problem("unexpected", path, f"{list(source[path].shape)} has no place in the model")
        for path in source.keys() - target.keys()
    ]
    problems += _unsupported_dtypes(known)
    raise_any(f"{table.name}: the parameters do not fit the config: {_ADVICE}", problems)
    return Plan(tuple(_with_dtype(leaf, source[leaf.path].dtype) for leaf in leaves))


def as_flax(plan: Plan, source: Checkpoint) -> Checkpoint:
    """The Flax side of a torch checkpoint: its leaves by flax path, made when they are read.

    Raises:
      ConversionError: if a tensor that the model ties to another differs from it.
    """
    check_copies(plan, source)
    leaves = {leaf.path: leaf for leaf in plan.leaves}

    def read(path: str) -> np.ndarray:
        leaf = leaves[path]
        if leaf.rule.is_stacked:
            return read_part(leaf, source, (slice(None),) * len(leaf.info.shape))
        return leaf.rule.transform.forward(source.read(leaf.keys[0]))

    return Checkpoint(plan.params, read)


def check_copies(plan: Plan, source: Checkpoint) -> None:
    """Checks that tied tensors, of which only one has a leaf, are equal.

    Raises:
      ConversionError: naming every tensor that differs from the one it is tied to.
    """
    raise_any(
        "tied tensors differ",
        [
            Problem("tied", key, f"differs from {twin}; set tie_word_embeddings to false")
            for key, twin in plan.copies
            if not is_same(source.read(key), source.read(twin))
        ],
    )


def read_part(leaf: LeafPlan, source: Checkpoint, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a Flax leaf; nothing else is copied out of its torch tensors.

    Args:
      leaf: of a plan to Flax.
      source: the torch checkpoint that the plan is for.
      index: a slice of every axis of the leaf, as JAX describes a shard.

    Returns:
      A contiguous array. It has memory of its own, since JAX may keep it, and a file may change.
    """
    shape = [len(range(n)[along]) for n, along in zip(leaf.info.shape, index, strict=True)]
    part = np.empty(shape, leaf.info.dtype)
    if leaf.rule.is_stacked:
        keys, slots, index = leaf.keys[index[0]], part, index[1:]
    else:
        keys, slots = leaf.keys, part[np.newaxis]
    for i, key in enumerate(keys):
        tensor = leaf.rule.transform.forward(source.read(key))
        copy_into(slots[i, ...], tensor[*index, ...])
    return part


def as_torch(plan: Plan, source: Checkpoint) -> Checkpoint:
    """The torch side of Flax parameters: tensors by torch key, made when they are read.

    The layers of one leaf follow each other in `infos`; read in this order, each leaf is read once.
    """
    places = {key: (leaf, i) for leaf in plan.leaves for i, key in enumerate(leaf.keys)}
    read_leaf = functools.lru_cache(maxsize=1)(source.read)
    lock = threading.Lock()  # readers of two layers of a leaf share it

    def read(key: str) -> np.ndarray:
        leaf, i = places[key]
        if leaf.rule.is_stacked:
            with lock:
                part = read_leaf(leaf.path)[i]
        else:
            part = source.read(leaf.path)
        return leaf.rule.transform.inverse(part)

    return Checkpoint(plan.tensors, read)


def check_round_trip(before: Checkpoint, after: Checkpoint) -> None:
    """Checks that what was converted and converted back is what it was, byte for byte.

    It proves that nothing was lost, not that every tensor found its place: that is proved by
    comparing forward passes.

    Raises:
      ConversionError: naming every tensor that is missing, new or different.
    """
    problems = [
        Problem("missing", name, "did not come back")
        for name in before.infos.keys() - after.infos.keys()
    ]
    comparable = []
    for name, info in after.infos.items():
        was = before.infos.get(name)
        if was is None:
            problems.append(Problem("new", name, "was not there before"))
        elif info != was:
            change = f"{was.dtype}{list(was.shape)} -> {info.dtype}{list(info.shape)}"
            problems.append(Problem("header", name, change))
        else:
            comparable.append(name)

    def came_back(name: str) -> bool:
        return is_same(after.read(name), before.read(name))

    problems += [
        Problem("bytes", name, "other values came back")
        for name, is_equal in map_ahead(came_back, comparable)
        if not is_equal
    ]
    raise_any("the round trip changed the checkpoint: do not use the result", problems)


def without_ignored(table: Table, keys: Iterable[str]) -> list[str]:
    """The torch keys that no row of `ignore` covers; logs what is left out, and why."""
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


_BLOCK_BYTES = 16 << 20
"""Tensors are compared in blocks that the cache holds, and whose memory is used again."""


def is_same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equality of dtype, shape and bytes: NaNs and signed zeros are told apart."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if a.ndim == 0 or a.size == 0:
        return _bytes(a).tobytes() == _bytes(b).tobytes()
    num_rows = max(1, _BLOCK_BYTES * len(a) // a.nbytes)
    blocks = (slice(start, start + num_rows) for start in range(0, len(a), num_rows))
    return all(np.array_equal(_bytes(a[block]), _bytes(b[block])) for block in blocks)


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


def _alien(table: Table, keys: Iterable[str]) -> list[Problem]:
    """What is wrong with a checkpoint none of whose keys the table knows."""
    keys = list(keys)
    if table.num_known(keys, table.prefix_of(keys)):
        return []
    expected = " or ".join(repr(prefix) for prefix in table.prefixes)
    for key in sorted(keys):
        parts = key.split(".")
        for i in range(1, len(parts)):
            if table.num_known([".".join(parts[i:])], ""):
                found = ".".join(parts[:i]) + "."
                return [Problem("prefix", found, f"of the keys should be {expected}: rename them")]
    example = f", but {min(keys)!r}" if keys else ": it is empty"
    return [Problem("names", table.name, f"no key of this model is in the checkpoint{example}")]


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
            hint = f" ({owner[name].rule.hint})" if name in owner and owner[name].rule.hint else ""
            text = f"got {list(got[name].shape)}, expected {list(want.shape)}{fate}{hint}"
            problems.append(Problem("shape", name, text))
    return problems


def _unexpected(table: Table, prefix: str, key: str, info: TensorInfo) -> Problem:
    bare = key.removeprefix(prefix)
    has_rule = any(rule.layer_of(key if rule.at_root else bare) is not None for rule in table.rules)
    reason = (
        "the config has no place for it"
        if has_rule
        else f"belongs to no {table.name}; to-flax leaves it out with --ignore '{key}'"
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


def _bytes(array: np.ndarray) -> np.ndarray:
    widest = np.uint64 if array.nbytes % 8 == 0 else np.uint8  # eight at a time is faster
    return contiguous(array).reshape(-1).view(np.uint8).view(widest)
