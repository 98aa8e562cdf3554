"""Finds what keeps a checkpoint from being converted, from names, shapes and dtypes alone."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import islice

from convert.checkpoint import CASTABLE, DTYPES, TensorInfo
from convert.errors import Problem
from convert.plan import LeafPlan, ShapeDtype
from convert.rules import Table
from convert.tables import ADAPTERS


def adapter_weights(keys: Iterable[str]) -> list[Problem]:
    """The problem of LoRA weights and the like, which are not in the model's own weights."""
    found = [key for key in keys if any(part in f".{key}" for part in ADAPTERS)]
    if not found:
        return []
    text = (
        f"and {len(found) - 1} others are weights of an adapter (LoRA): merge them into the model, "
        "with PEFT's `model.merge_and_unload()`, and save that"
    )
    return [Problem("adapter", min(found), text)]


def foreign_names(table: Table, keys: Iterable[str]) -> list[Problem]:
    """The problem of a checkpoint in which the table knows no key at all; otherwise none."""
    keys = list(keys)
    if table.num_known(keys, table.prefix_of(keys)):
        return []
    expected = " or ".join(repr(prefix) for prefix in table.prefixes)
    for key in sorted(keys):
        parts = key.split(".")
        ends = [".".join(parts[i:]) for i in range(len(parts))]
        if any(ignore.matches(end) for ignore in table.ignore for end in ends):
            continue  # a decoder must not be renamed to an encoder
        for i in range(1, len(parts)):
            if table.num_known([ends[i]], ""):
                found = ".".join(parts[:i]) + "."
                return [Problem("prefix", found, f"expected {expected}: rename the tensors")]
    found = f", only others such as {min(keys)!r}" if keys else ": it is empty"
    return [Problem("names", table.name, f"the checkpoint has no tensor of this model{found}")]


def misfitting_shapes(
    expected: Mapping[str, ShapeDtype],
    found: Mapping[str, TensorInfo],
    owner: Mapping[str, LeafPlan],
) -> list[Problem]:
    """Names that are missing, and shapes that differ.

    Args:
      expected: what the model has, by torch key or by flax path.
      found: what the checkpoint has.
      owner: the leaf of each name.
    """
    problems = []
    for name, want in expected.items():
        target = f" -> {owner[name].path}" if name in owner and owner[name].path != name else ""
        if name not in found:
            problems.append(Problem("missing", name, f"{list(want.shape)}{target}"))
        elif found[name].shape != tuple(want.shape):
            hint = f" ({owner[name].rule.hint})" if name in owner and owner[name].rule.hint else ""
            text = f"got {list(found[name].shape)}, expected {list(want.shape)}{target}{hint}"
            problems.append(Problem("shape", name, text))
    return problems


def unexpected_tensor(table: Table, prefix: str, key: str, info: TensorInfo) -> Problem:
    """The problem of a tensor that the model has no place for."""
    bare = key.removeprefix(prefix)
    parts = {rule.torch.partition(".")[0] for rule in table.rules}
    has_rule = any(rule.layer_of(key if rule.at_root else bare) is not None for rule in table.rules)
    if has_rule and key.startswith(prefix):
        reason = "the config has no place for it"
    elif has_rule or any(table.num_known([key], other) for other in table.prefixes):
        reason = f"does not begin with {prefix!r}, as others do"
    elif bare.partition(".")[0] in parts:
        reason = f"is not in our {table.name}, which would compute something else without it"
    else:
        reason = (
            f"is not part of a {table.name}; if that computes the same without it, "
            f"`to-flax --ignore '{key}'` leaves it out"
        )
    return Problem("unexpected", key, f"{list(info.shape)} {reason}")


def skipped_layers(table: Table, prefix: str, keys: Iterable[str]) -> list[Problem]:
    """Gaps in the numbers of layers."""
    found = defaultdict(set)
    for key in keys:
        for rule in table.rules:
            if layer := rule.layer_of(key.removeprefix(prefix)):
                found[prefix + rule.torch.partition("{i}")[0]].add(int(layer))
    return [
        Problem("gap", f"{stem}*", f"has {_listed(numbers)} but not {_listed(absent)}")
        for stem, numbers in found.items()
        if (absent := list(islice((i for i in range(max(numbers)) if i not in numbers), 100)))
    ]


def mixed_dtypes(leaf: LeafPlan, infos: Mapping[str, TensorInfo]) -> list[Problem]:
    """The problem of a leaf whose torch tensors have several dtypes."""
    example = {infos[key].dtype.name: key for key in reversed(leaf.keys) if key in infos}
    if len(example) < 2:
        return []
    dtypes = ", ".join(f"{dtype} ({key})" for dtype, key in sorted(example.items()))
    return [Problem("dtypes", leaf.path, f"stacks {dtypes}: choose one with --dtype")]


def unsupported_dtypes(infos: Mapping[str, TensorInfo]) -> list[Problem]:
    """Tensors of a dtype that the converter does not write."""
    supported = ", ".join(sorted(DTYPES))
    casts = "choose one with --dtype"
    stays = "it cannot be cast without loss or scales, so save the model in one of these"
    return [
        Problem(
            "dtype",
            name,
            f"{info.dtype} is not one of {supported}: {casts if info.dtype in CASTABLE else stays}",
        )
        for name, info in infos.items()
        if info.dtype not in DTYPES.values()
    ]


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
