"""Nested dicts of parameters, and the same by flax path."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from convert.checkpoint import Checkpoint


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"fc1": {"kernel": x}} -> {"fc1/kernel": x}."""
    flat: Any = flatten_dict(dict(tree), sep="/")
    return flat


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"fc1/kernel": x} -> {"fc1": {"kernel": x}}."""
    return unflatten_dict(leaves, sep="/")


def read_tree(checkpoint: Checkpoint) -> dict[str, Any]:
    """Every leaf of a Flax checkpoint, as a module takes them: {"fc1": {"kernel": array}}."""
    # Copied: an array on a CPU may share memory with a file that changes.
    return unflatten({path: jnp.array(checkpoint.read(path)) for path in checkpoint.infos})
