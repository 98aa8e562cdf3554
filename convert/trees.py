"""Nested dicts of parameters, and the same parameters by flax path."""

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
    """Every leaf of a Flax checkpoint, in the form that modules take: {"fc1": {"kernel": x}}."""
    # Copied: an array on a CPU could share memory with a file that may change.
    return unflatten({path: jnp.array(checkpoint.read(path)) for path in checkpoint.infos})
