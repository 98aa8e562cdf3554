"""Nested dicts of parameters, and the same by flax path."""

from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"fc1": {"kernel": x}} -> {"fc1/kernel": x}."""
    flat: Any = flatten_dict(dict(tree), sep="/")
    return flat


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"fc1/kernel": x} -> {"fc1": {"kernel": x}}."""
    return unflatten_dict(leaves, sep="/")
