"""Weights for training: from a folder or the hub into sharded device arrays, without torch."""

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError

from convert import engine
from convert.checkpoint import TensorInfo, progress_bar
from convert.errors import Problem, raise_any
from convert.flax_files import is_flax_folder, load_params
from convert.models import PROJECTOR, ModelKind
from convert.sources import Source, open_source
from convert.trees import flatten, unflatten
from flax_projector.config import ProjectorConfig

_log = logging.getLogger(__name__)

_HUB_FILES = ["*.safetensors", "*.json"]
_NOT_HUB_FILES = ["*.fp32*"]  # some models come with a second copy of their weights


def resolve_model(path_or_hub_id: str) -> Path:
    """The folder of a model: itself, or downloaded from the Hugging Face hub (and then cached).

    Raises:
      ValueError: if there is no such folder and the hub does not give the model, or not in
        safetensors.
    """
    folder = Path(path_or_hub_id).expanduser()
    if folder.exists():
        return folder
    try:
        folder = Path(
            snapshot_download(
                path_or_hub_id, allow_patterns=_HUB_FILES, ignore_patterns=_NOT_HUB_FILES
            )
        )
    except (HTTPError, HFValidationError, OSError) as error:  # a timeout is an HTTPError
        advice = (
            "HF_HUB_OFFLINE forbids downloading: unset it, or"
            if constants.HF_HUB_OFFLINE
            else "Check the name; if it needs a login, run `hf auth login`; without network,"
        )
        raise ValueError(
            f"{path_or_hub_id!r} is neither a folder here nor a model that the hub gave "
            f"({type(error).__name__}). {advice} copy the model's folder from a machine that has "
            "it and pass its path"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{path_or_hub_id!r} has no .safetensors on the hub, only other weights, such as .bin, "
            f"which are not downloaded. Run `hf download {path_or_hub_id} --local-dir FOLDER` and "
            "`python -m convert to-flax FOLDER OUT`"
        )
    return folder


def load_tower(kind: ModelKind, path: str | Path, abstract: Mapping[str, Any]) -> dict:
    """Loads a model leaf by leaf, straight into its shards.

    A process copies only the bytes of its own shards out of the file, each once. Beside the arrays,
    host memory holds its shards of one leaf (all layers of one kernel), never the model.

    Args:
      kind: what the folder holds.
      path: an HF folder, a safetensors file, or a folder that `python -m convert` wrote.
      abstract: nested dict of ShapeDtypeStructs with shardings.

    Returns:
      Nested dict of arrays in the shapes, dtypes and shardings of `abstract`. Other dtypes are
      cast, and the log says so.

    Raises:
      ConversionError: if the checkpoint does not have exactly these leaves.
    """
    return _load(kind, open_source(path), abstract)


def _load(kind: ModelKind, source: Source, abstract: Mapping[str, Any]) -> dict:
    if is_flax_folder(source.path):
        return _load_flax(source, abstract)
    target, checkpoint = flatten(abstract), source.checkpoint
    if source.side == "flax":  # the state of a run: a projector, small enough to be read whole
        _log_casts(source.path, checkpoint.infos, target)
        return unflatten({p: _place(checkpoint.read(p).__getitem__, x) for p, x in target.items()})

    plan = engine.plan_to_flax(kind.table, checkpoint.infos, target)
    engine.check_copies(plan, checkpoint)
    _log_casts(source.path, plan.params, target)
    num_bytes, is_quiet = sum(leaf.info.nbytes for leaf in plan.leaves), jax.process_index() > 0
    arrays = {}
    with progress_bar(f"loading {kind.name}", num_bytes, is_quiet=is_quiet) as progress:
        for leaf in plan.leaves:
            read_part = functools.partial(engine.read_part, leaf, checkpoint)
            arrays[leaf.path] = _place(read_part, target[leaf.path])
            progress.update(leaf.info.nbytes)
    return unflatten(arrays)


def load_projector(path: str | Path, config: ProjectorConfig, abstract: Mapping[str, Any]) -> dict:
    """Loads a projector, whichever form it has, into the run that wants to go on with it.

    Args:
      path: anything that `python -m convert` reads.
      config: of the run.
      abstract: nested dict of ShapeDtypeStructs with shardings, of the same config.

    Raises:
      ConversionError: if the checkpoint does not have exactly these leaves, or its config.json says
        that it computes something else.
    """
    source = open_source(path)
    if source.config_text is not None:
        theirs = PROJECTOR.parse_text(source.config_text, str(path))
        raise_any(
            f"{path} is another projector than the run's",
            [
                Problem("config", name, f"the checkpoint has {a!r}, the run {b!r}")
                for name, (a, b) in theirs.differences(config).items()
            ],
        )
    return _load(PROJECTOR, source, abstract)


def _place(
    read_part: Callable[[tuple[slice, ...]], np.ndarray], like: jax.ShapeDtypeStruct
) -> jax.Array:
    """Puts this host's parts of a leaf on its devices; each part is read once.

    It waits until they are there: other leaves read meanwhile would pile up on the host.
    """
    parts: dict[str, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        key = str(index)  # slices cannot be keys before Python 3.12
        if key not in parts:
            parts[key] = read_part(index).astype(like.dtype, copy=False)
        return parts[key]

    array = jax.make_array_from_callback(like.shape, like.sharding, part)
    return jax.block_until_ready(array)


def _load_flax(source: Source, abstract: Mapping[str, Any]) -> dict:
    target, infos = flatten(abstract), source.checkpoint.infos
    _log_casts(source.path, infos, target)
    stored = {  # as on disk: Orbax would cast without a word
        p: jax.ShapeDtypeStruct(
            leaf.shape, infos[p].dtype if p in infos else leaf.dtype, sharding=leaf.sharding
        )
        for p, leaf in target.items()
    }
    params = load_params(source.path, unflatten(stored))
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), params, dict(abstract))


def _log_casts(
    path: str | Path,
    source: Mapping[str, TensorInfo],
    target: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    casts = {
        f"{source[p].dtype} -> {np.dtype(leaf.dtype)}"
        for p, leaf in target.items()
        if p in source and source[p].dtype != leaf.dtype
    }
    if casts:
        _log.info("%s: casting %s", path, ", ".join(sorted(casts)))
