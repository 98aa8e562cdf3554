"""One engine for both directions: plans on names, shapes and dtypes alone, then converts lazily.

A conversion is a view: a checkpoint of the other framework, whose tensors are made when they are
read. Writers read them one by one, so memory holds a single leaf, never the whole model.
"""

import dataclasses
import functools
import logging
import threading
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from convert import misfits
from convert.checkpoint import Checkpoint, TensorInfo, copy_into
from convert.errors import Problem, raise_any
from convert.plan import LeafPlan, Plan, ShapeDtype, by_key
from convert.round_trip import is_same
from convert.rules import Ignore, Table

_log = logging.getLogger(__name__)

_ADVICE = "use all of its files, and the config.json that came with them"


def plan_to_flax(
    table: Table, tensors: Mapping[str, TensorInfo], target: Mapping[str, ShapeDtype]
) -> Plan:
    """Plans the conversion of a torch checkpoint.

    Args:
      table: the model's mapping.
      tensors: every tensor of the checkpoint, by torch key.
      target: every leaf of the model, by flax path. Its dtypes are not used: tensors keep theirs.

    Raises:
      ConversionError: unless every tensor and every leaf of the target is used exactly once, or
        the table ignores it and gives a reason.
    """
    prefix = table.prefix_of(tensors)
    title = f"{table.name}: the checkpoint does not fit the config: {_ADVICE}"
    raise_any(title, misfits.adapter_weights(tensors) or misfits.foreign_names(table, tensors))
    leaves, problems = _match(table, prefix, target)
    owner = by_key(leaves)
    copies = {
        tied.key: prefix + tied.twin
        for tied in table.tied
        if tied.key in tensors and tied.key not in owner
    }
    others = [key for key in tensors if key not in owner and key not in copies]
    used = {key: info for key, info in tensors.items() if key in owner}
    expected = {key: leaf.tensor_info for key, leaf in owner.items()}

    problems += misfits.misfitting_shapes(expected, used, owner)
    problems += [
        misfits.unexpected_tensor(table, prefix, key, tensors[key])
        for key in without_ignored(table, others)
    ]
    problems += misfits.skipped_layers(table, prefix, tensors)
    problems += misfits.unsupported_dtypes(used)
    problems += [problem for leaf in leaves for problem in misfits.mixed_dtypes(leaf, used)]
    raise_any(title, problems)

    for key, twin in copies.items():
        _log.info("left out %s: the config says that it is the same as %s", key, twin)
    leaves = (_with_dtype(leaf, tensors[leaf.keys[0]].dtype) for leaf in leaves)
    return Plan(tuple(leaves), tuple(copies.items()))


def plan_to_torch(
    table: Table,
    params: Mapping[str, TensorInfo],
    target: Mapping[str, ShapeDtype],
    *,
    prefix: str | None = None,
) -> Plan:
    """Plans the conversion of Flax parameters.

    Args:
      table: the model's mapping.
      params: every leaf of the checkpoint, by flax path.
      target: every leaf of the model, by flax path. Its dtypes are not used: leaves keep theirs.
      prefix: of the torch keys, one of the table's; None writes its first.

    Raises:
      ConversionError: unless the checkpoint has exactly the leaves of the target, each with a rule.
      ValueError: if the table has no such prefix.
    """
    prefix = table.prefixes[0] if prefix is None else prefix
    if prefix not in table.prefixes:
        known = ", ".join(map(repr, table.prefixes))
        raise ValueError(f"prefix {prefix!r} of a {table.name} is not one of {known}")
    leaves, problems = _match(table, prefix, target)
    known = {path: info for path, info in params.items() if path in target}
    problems += misfits.misfitting_shapes(target, known, {leaf.path: leaf for leaf in leaves})
    problems += [
        Problem("unexpected", path, f"{list(params[path].shape)} has no place in the model")
        for path in params.keys() - target.keys()
    ]
    problems += misfits.unsupported_dtypes(known)
    raise_any(f"{table.name}: the parameters do not fit the config: {_ADVICE}", problems)
    return Plan(tuple(_with_dtype(leaf, params[leaf.path].dtype) for leaf in leaves))


def without_ignored(table: Table, keys: Iterable[str]) -> list[str]:
    """The torch keys that the table does not ignore; logs how many it does, and why."""
    ignored: Counter[Ignore] = Counter()
    kept = []
    for key in keys:
        ignore = next((ignore for ignore in table.ignore if ignore.matches(key)), None)
        if ignore is None:
            kept.append(key)
        else:
            ignored[ignore] += 1
    for ignore, count in ignored.items():
        _log.info("left out %d tensors %s: %s", count, ignore.pattern, ignore.reason)
    return kept


def as_flax(plan: Plan, tensors: Checkpoint) -> Checkpoint:
    """A torch checkpoint as Flax sees it: its leaves by flax path, made when they are read.

    Raises:
      ConversionError: if a tensor that the model ties to another differs from it.
    """
    check_copies(plan, tensors)
    leaves = {leaf.path: leaf for leaf in plan.leaves}

    def read(path: str) -> np.ndarray:
        leaf = leaves[path]
        if leaf.rule.is_stacked:
            return read_part(leaf, tensors, (slice(None),) * len(leaf.info.shape))
        return leaf.rule.transform.forward(tensors.read(leaf.keys[0]))

    return Checkpoint(plan.params, read)


def check_copies(plan: Plan, tensors: Checkpoint) -> None:
    """Checks that tied tensors, of which only one has a leaf, are equal.

    Raises:
      ConversionError: naming every tensor that differs from the one it is tied to.
    """
    raise_any(
        "tied tensors differ",
        [
            Problem("tied", key, f"differs from {twin}: set tie_word_embeddings to false")
            for key, twin in plan.copies
            if not is_same(tensors.read(key), tensors.read(twin))
        ],
    )


def read_part(leaf: LeafPlan, tensors: Checkpoint, index: tuple[slice, ...]) -> np.ndarray:
    """Reads a part of a Flax leaf, and copies nothing else out of its torch tensors.

    Args:
      leaf: of a plan to Flax.
      tensors: the torch checkpoint that the plan is for.
      index: a slice of every axis of the leaf, which is how JAX describes a shard.

    Returns:
      A contiguous array that owns its memory, since JAX may keep it, and a file may change.
    """
    shape = [len(range(n)[along]) for n, along in zip(leaf.info.shape, index, strict=True)]
    part = np.empty(shape, leaf.info.dtype)
    if leaf.rule.is_stacked:
        keys, slots, index = leaf.keys[index[0]], part, index[1:]
    else:
        keys, slots = leaf.keys, part[np.newaxis]

    def view(tensor: np.ndarray) -> np.ndarray:
        return leaf.rule.transform.forward(tensor)[*index, ...]

    for i, tensor in enumerate(tensors.views(keys, view)):
        copy_into(slots[i, ...], tensor)
    return part


def as_torch(plan: Plan, params: Checkpoint) -> Checkpoint:
    """Flax parameters as PyTorch sees them: tensors by torch key, made when they are read.

    The layers of one leaf follow each other in `infos`; read in this order, each leaf is read once.
    """
    places = {key: (leaf, i) for leaf in plan.leaves for i, key in enumerate(leaf.keys)}
    read_leaf = functools.lru_cache(maxsize=1)(params.read)
    lock = threading.Lock()  # threads that read two layers of a leaf share it

    def read(key: str) -> np.ndarray:
        leaf, i = places[key]
        if leaf.rule.is_stacked:
            with lock:
                part = read_leaf(leaf.path)[i]
        else:
            part = params.read(leaf.path)
        return leaf.rule.transform.inverse(part)

    return Checkpoint(plan.tensors, read)


def _match(
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
            text = f"{len(found)} rows of convert/tables.py lead to this leaf, expected one"
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
