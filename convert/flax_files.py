"""Converted checkpoints on disk: DIR/config.json beside DIR/params/, an Orbax checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from convert.errors import Problem, raise_any
from convert.hf_config import CONFIG, config_text
from convert.paths import replacing
from convert.rules import TensorInfo
from convert.trees import flatten, unflatten

_PARAMS = "params"


def is_flax_folder(path: str | Path) -> bool:
    """Whether `save_params` wrote this folder."""
    return (Path(path) / _PARAMS / "_CHECKPOINT_METADATA").exists()


def save_params(
    dst: str | Path, tree: Mapping[str, Any], config: Mapping[str, Any] | str, *, overwrite=False
) -> None:
    """Writes a converted checkpoint; the folder appears when it is complete.

    Only the calling process takes part: with several, call it on the first.

    Args:
      dst: the folder.
      tree: nested dict of arrays, each wholly on this host.
      config: what goes into config.json; a text is kept as it is.
      overwrite: replaces a folder that an earlier conversion wrote.
    """
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix="save_params"
    )
    with replacing(Path(dst).resolve(), overwrite=overwrite) as part:
        part.mkdir()
        with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
            checkpointer.save(part / _PARAMS, jax.tree.map(np.asarray, tree))
        (part / CONFIG).write_text(config_text(config), "utf-8")


def load_params(src: str | Path, abstract: Any = None) -> dict:
    """Reads the parameters of a converted checkpoint.

    Args:
      src: the folder.
      abstract: nested dict of ShapeDtypeStructs with shardings, to get arrays sharded like that;
        None gives numpy arrays.

    Raises:
      ConversionError: if names, shapes or dtypes differ from `abstract`. Orbax itself would cast.
      ValueError: if it is no converted checkpoint, or files are missing or cut off.
    """
    infos = param_infos(src)
    if abstract is None:
        # Shapes for Orbax to fill, without memory behind them.
        leaves = {p: np.broadcast_to(np.zeros((), i.dtype), i.shape) for p, i in infos.items()}
        abstract = unflatten(leaves)
    else:
        _check_same(Path(src), infos, flatten(abstract))
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            return checkpointer.restore(_params_of(src), abstract)
        except ValueError as error:
            raise ValueError(f"{src}: params/ is damaged: {error}") from error


def param_infos(src: str | Path) -> dict[str, TensorInfo]:
    """Shape and dtype of every leaf by flax path, from the metadata alone."""
    params = _params_of(src)
    with ocp.StandardCheckpointer() as checkpointer:
        metadata: Any = checkpointer.metadata(params).item_metadata
    if metadata is None:
        raise ValueError(f"{src}: params/ is not a complete Orbax checkpoint")
    leaves = flatten(dict(metadata))
    return {path: TensorInfo(tuple(m.shape), np.dtype(m.dtype)) for path, m in leaves.items()}


def _params_of(src: str | Path) -> Path:
    if not is_flax_folder(src):
        raise ValueError(f"{src} is not a converted checkpoint: expected config.json and params/")
    return Path(src).resolve() / _PARAMS


def _check_same(src: Path, infos: Mapping[str, TensorInfo], wanted: Mapping[str, Any]) -> None:
    def describe(leaf: Any) -> str:
        return f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" if leaf is not None else "nothing"

    pairs = {path: (infos.get(path), wanted.get(path)) for path in infos.keys() | wanted.keys()}
    raise_any(
        f"{src} does not hold the parameters that are asked for",
        [
            Problem("leaf", path, f"got {describe(got)}, expected {describe(want)}")
            for path, (got, want) in pairs.items()
            if describe(got) != describe(want)
        ],
    )
