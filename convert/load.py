"""Loads weights for training, from a folder, a bucket or the hub into sharded device arrays."""

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError
from jax.experimental import multihost_utils

from convert import engine
from convert.bucket import copy_small_files
from convert.checkpoint import TensorInfo
from convert.checksums import crc32
from convert.errors import Problem, raise_any
from convert.flax_files import is_flax_folder, load_params
from convert.hf_config import training
from convert.models import PROJECTOR, ModelKind
from convert.spread import spread
from convert.stored import StoredModel, open_stored
from convert.trees import flatten, unflatten
from flax_projector.config import ProjectorConfig
from flax_projector.files import is_url
from flax_projector.logs import progress_bar
from flax_projector.storage import AnyPath

_log = logging.getLogger(__name__)

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]
_NOT_HUB_FILES = ["*.fp32*"]  # some models come with a second copy of their weights


def resolve_model(path_or_hub_id: str) -> Path:
    """The folder of a model: a path as it is, or a download from the Hugging Face hub (cached).

    Of a model in a bucket, given by URL, it is a temporary folder: see `copy_small_files`.

    Raises:
      ValueError: if there is no such folder, and the model cannot be downloaded or has no
        safetensors.
    """
    if is_url(path_or_hub_id):
        return copy_small_files(path_or_hub_id)
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
            "HF_HUB_OFFLINE forbids downloads: unset it, or"
            if constants.HF_HUB_OFFLINE
            else "Check the name; if it needs a login, run `hf auth login`; without a network,"
        )
        raise ValueError(
            f"{path_or_hub_id!r} is not a folder, and could not be downloaded from the hub "
            f"({type(error).__name__}). {advice} copy the model's folder from another machine and "
            "pass its path"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{path_or_hub_id!r} has no .safetensors on the hub, only weights in other formats, "
            f"which are not downloaded. Run `hf download {path_or_hub_id} --local-dir FOLDER`, "
            "then `flax-projector-convert to-flax FOLDER CONVERTED`"
        )
    return folder


def load_tower(kind: ModelKind, path: str | Path, abstract: Mapping[str, Any]) -> dict:
    """Loads a model leaf by leaf, straight into its shards.

    Every byte is read once: if there are several processes, or the model is in a bucket, for the
    device which `spread` gives it to first. Besides the arrays, host memory holds a process's parts
    of a single leaf (all layers of one kernel).

    Args:
      kind: the model in the folder.
      path: an HF folder, a safetensors file, or a folder that `to_flax` wrote.
      abstract: nested dict of ShapeDtypeStructs with shardings.

    Returns:
      Nested dict of arrays with the shapes, dtypes and shardings of `abstract`. Other dtypes are
      cast, which is logged.

    Raises:
      ConversionError: if the checkpoint does not have exactly these leaves.
    """
    return _load(kind, open_stored(path), abstract)


def _load(kind: ModelKind, stored: StoredModel, abstract: Mapping[str, Any]) -> dict:
    if is_flax_folder(stored.path):
        return _load_flax(stored, abstract)
    target, checkpoint = flatten(abstract), stored.checkpoint
    if stored.side == "flax":  # the state of a run: a projector, small enough to be read whole
        _log_casts(stored.path, checkpoint.infos, target)
        return unflatten({p: _place(checkpoint.read(p).__getitem__, x) for p, x in target.items()})

    plan = engine.plan_to_flax(kind.table, checkpoint.infos, target)
    engine.check_copies(plan, checkpoint)
    _log_casts(stored.path, plan.params, target)
    size, label = sum(leaf.info.nbytes for leaf in plan.leaves), f"loading {kind.name}"
    arrays = {}
    with progress_bar(_log, label, total=size, unit="B", unit_scale=True) as progress:
        for leaf in plan.leaves:
            read_part = functools.partial(engine.read_part, leaf, checkpoint)
            like = target[leaf.path]
            if jax.process_count() == 1 and checkpoint.fetch is None:
                # It reads every byte of a file once, whoever needs it, without an exchange.
                arrays[leaf.path] = _place(read_part, like)
            else:
                first, exchange = spread(like, leaf.order)
                arrays[leaf.path] = jax.block_until_ready(exchange(_place(read_part, like, first)))
            progress.update(leaf.info.nbytes)
    return unflatten(arrays)


def load_projector_params(
    path: str | AnyPath,
    config: ProjectorConfig,
    abstract: Mapping[str, Any],
    *,
    step: int | None = None,
) -> dict:
    """Loads the parameters of a projector into their shards, for a run that continues with them.

    Args:
      path: any form of checkpoint that `open_stored` reads.
      config: of the run.
      abstract: nested dict of ShapeDtypeStructs with shardings, of the same config.
      step: see `open_stored`.

    Raises:
      ConversionError: if the checkpoint does not have exactly these leaves, or if it computes
        something else according to its config.json.
    """
    stored = open_stored(path, step=step)
    if stored.config_text is not None:
        theirs = PROJECTOR.parse_text(stored.config_text, str(path))
        raise_any(
            f"{path} is not the projector that the run is configured for",
            [
                Problem("config", name, f"the checkpoint has {a!r}, the run has {b!r}")
                for name, (a, b) in theirs.differences(config).items()
            ],
        )
    return _load(PROJECTOR, stored, abstract)


def digest(kind: ModelKind, path: str | Path) -> str:
    """A digest of a model's config and weights that does not depend on the path.

    Reads every weight that the model uses, in threads: 1.5 GB/s on two cores, in a seventh of the
    time that loading takes. The processes of a run share the work if the model is in a bucket;
    files on disks may differ between hosts.

    Args:
      kind: the model.
      path: any form of checkpoint that `open_stored` reads.

    Raises:
      ValueError: if there is no such model.
    """
    stored = open_stored(path)
    config = stored.config_text and kind.parse_text(stored.config_text, str(path))
    infos = stored.checkpoint.infos
    names = sorted(n for n in infos if not any(rule.matches(n) for rule in kind.table.ignore))
    is_shared = stored.checkpoint.fetch is not None and jax.process_count() > 1
    mine = names[jax.process_index() :: jax.process_count()] if is_shared else names
    used = stored.checkpoint.only(mine)

    with (
        used.with_progress(f"comparing {kind.name}") as checkpoint,
        ThreadPoolExecutor(4) as threads,
    ):
        numbers = list(threads.map(lambda name: crc32(checkpoint.read(name)), mine))
    sums = np.zeros(len(names), np.uint32)
    sums[np.isin(names, mine)] = numbers
    if is_shared:
        sums = multihost_utils.process_allgather(sums).max(axis=0)
    found = hashlib.sha256(repr(config).encode())
    for name, number in zip(names, sums, strict=True):
        found.update(f"{name} {infos[name]} {number}\n".encode())
    return found.hexdigest()[:16]


def read_training(path: str | AnyPath) -> dict[str, str]:
    """What its config.json says of the training of a projector; see `hf_config.training`."""
    text = open_stored(path).config_text
    return {} if text is None else training(text)


def _place(
    read_part: Callable[[tuple[slice, ...]], np.ndarray],
    like: jax.ShapeDtypeStruct,
    as_bits: jax.ShapeDtypeStruct | None = None,
) -> jax.Array:
    """Puts this host's parts of a leaf on its devices, reading each part once.

    Waits for the transfer: otherwise the leaves that are read next would pile up in host memory.

    Args:
      read_part: reads a part of the leaf.
      like: the leaf.
      as_bits: the same in another sharding, with another name for its bits; None means `like`.
    """
    first = as_bits or like
    parts: dict[str, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        key = str(index)  # slices cannot be keys before Python 3.12
        if key not in parts:
            parts[key] = read_part(index).astype(like.dtype, copy=False).view(first.dtype)
        return parts[key]

    array = jax.make_array_from_callback(like.shape, first.sharding, part)
    return jax.block_until_ready(array)


def _load_flax(stored: StoredModel, abstract: Mapping[str, Any]) -> dict:
    target, infos = flatten(abstract), stored.checkpoint.infos
    _log_casts(stored.path, infos, target)
    on_disk = {  # in the stored dtypes: Orbax would cast silently
        p: jax.ShapeDtypeStruct(
            leaf.shape, infos[p].dtype if p in infos else leaf.dtype, sharding=leaf.sharding
        )
        for p, leaf in target.items()
    }
    params = load_params(stored.path, unflatten(on_disk))
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), params, dict(abstract))


def _log_casts(
    path: str | Path,
    infos: Mapping[str, TensorInfo],
    target: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    casts = {
        f"{infos[p].dtype} -> {np.dtype(leaf.dtype)}"
        for p, leaf in target.items()
        if p in infos and infos[p].dtype != leaf.dtype
    }
    if casts:
        _log.info("%s: casting %s", path, ", ".join(sorted(casts)))
