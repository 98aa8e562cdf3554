"""Flax checkpoints on disk: DIR/config.json beside DIR/params/, an Orbax checkpoint."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import type_handlers

from convert.checkpoint import Checkpoint, TensorInfo, contiguous, map_ahead
from convert.errors import Problem, raise_any
from convert.hf_config import CONFIG
from convert.paths import replacing
from convert.trees import flatten, unflatten

_PARAMS = "params"
FLAX_NAMES = frozenset({CONFIG, _PARAMS})
"""What a Flax folder holds."""
_MARKER = "_CHECKPOINT_METADATA"  # in every finished Orbax checkpoint
_CHUNK_BYTES = 16 << 20
"""Leaves are stored in chunks of this size at most: a process that needs a shard of a leaf reads
little more than that, and a buffer of this size is reused where a larger one would be mapped anew,
page by page."""
_MAPPED = tensorstore.Context.Spec({"file_io_mode": {"mode": "memmap"}})
"""Files are mapped: what is read of them is copied once, not twice."""


def is_flax_folder(path: str | Path) -> bool:
    """Whether `write_flax` wrote this folder."""
    return (Path(path) / _PARAMS / _MARKER).exists()


def open_flax(src: str | Path) -> Checkpoint:
    """Opens a folder that `write_flax` wrote without reading its leaves.

    Raises:
      ValueError: if it is none, or not complete.
    """
    return open_orbax(_params_of(src))


def open_orbax(path: Path, *, subtree: str = "") -> Checkpoint:
    """Opens an Orbax checkpoint of a tree.

    Args:
      path: the folder that Orbax wrote.
      subtree: only the leaves below this path, "params/" for example, and named without it.
    """
    handler: Any = ocp.PyTreeCheckpointHandler()
    try:
        metadata = handler.metadata(path)
        found = {
            p.removeprefix(subtree): m
            for p, m in flatten(dict(metadata)).items()
            if p.startswith(subtree)
        }
        infos = {p: TensorInfo(tuple(m.shape), np.dtype(m.dtype)) for p, m in found.items()}
    except Exception as error:  # damaged files make Orbax raise anything
        raise ValueError(f"{path} is not a complete Orbax checkpoint: {error!r}") from error

    is_ocdbt = type_handlers.is_ocdbt_checkpoint(path)
    mapped = tensorstore.Context(_MAPPED, type_handlers.get_ts_context(use_ocdbt=is_ocdbt))
    reader = type_handlers.NumpyHandler()  # gives whole arrays, whatever devices saved their shards

    def read(leaf: str) -> np.ndarray:
        info = type_handlers.ParamInfo(
            name=found[leaf].name,
            parent_dir=found[leaf].directory,
            is_ocdbt_checkpoint=is_ocdbt,
            use_zarr3=metadata.use_zarr3,
            ts_context=mapped,
        )
        try:
            (array,) = asyncio.run(reader.deserialize([info]))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return array

    return Checkpoint(infos, read, frozenset({path}))


def load_params(src: str | Path, abstract: Mapping[str, Any]) -> dict:
    """Reads the parameters of a folder straight into their shards.

    Args:
      src: the folder.
      abstract: nested dict of ShapeDtypeStructs with shardings.

    Raises:
      ConversionError: if names, shapes or dtypes differ from `abstract`. Orbax itself would cast.
      ValueError: if it is no converted checkpoint, or files are missing or cut off.
    """
    _check_same(Path(src), open_flax(src).infos, flatten(abstract))
    args = ocp.args.StandardRestore(abstract)
    return _restore(_params_of(src), ocp.StandardCheckpointHandler(), args)


def write_flax(
    dst: str | Path, checkpoint: Checkpoint, config_text: str, *, overwrite: bool = False
) -> None:
    """Writes a folder that appears when it is complete.

    Only the calling process takes part: with several, call it on the first.

    Args:
      dst: the folder.
      checkpoint: every leaf by flax path, each wholly on this host.
      config_text: of the config.json.
      overwrite: replaces a folder that an earlier conversion wrote.
    """
    with replacing(Path(dst), names=FLAX_NAMES, overwrite=overwrite) as part:
        fill_flax(part, checkpoint, config_text)


def fill_flax(folder: Path, checkpoint: Checkpoint, config_text: str) -> None:
    """Writes what `write_flax` writes into a new folder, one leaf at a time.

    Args:
      folder: absolute, as Orbax wants it.
      checkpoint: every leaf by flax path, each wholly on this host.
      config_text: of the config.json.
    """
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix="write_flax"
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False,  # weights hardly shrink, and it takes half of the time
        multiprocessing_options=alone,
        type_handler_registry=type_handlers.create_type_handler_registry(
            (_Leaf, _LeafHandler(deepcopy_host_arrays=False)),
            (jax.Array, type_handlers.ArrayHandler()),  # unused, but Orbax warns without one
        ),
    )
    tree = unflatten({path: _Leaf(checkpoint, path) for path in checkpoint.infos})
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    folder.mkdir()
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(folder / _PARAMS, ocp.args.PyTreeSave(tree, save_args))
    (folder / CONFIG).write_text(config_text, "utf-8")


class _Leaf:
    """A leaf that is not there yet."""

    def __init__(self, checkpoint: Checkpoint, path: str) -> None:
        self.shape, self.dtype = checkpoint.infos[path]
        self.nbytes = checkpoint.infos[path].nbytes
        self.checkpoint, self.path = checkpoint, path


class _LeafHandler(type_handlers.NumpyHandler):
    """Writes one leaf as a numpy array while it reads the next ones, and holds no others."""

    async def serialize(
        self,
        values: Sequence[_Leaf],
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> list:
        args = args or [ocp.SaveArgs()] * len(values)
        # A conversion can be repeated: it need not wait until the disk has every byte.
        settings = tensorstore.Context.Spec({"file_io_sync": False})
        unsynced = tensorstore.Context(settings, infos[0].ts_context)
        read = values[0].checkpoint.read
        paths = [value.path for value in values]
        leaves = map_ahead(lambda path: contiguous(read(path)), paths)
        writing = []
        for info, arg in zip(infos, args, strict=True):
            _, leaf = await asyncio.to_thread(next, leaves)  # while the last one is being written
            await _wait(writing)
            info = info.replace(ts_context=unsynced)
            writing = await super().serialize([leaf], [info], [arg])
            del leaf
        await _wait(writing)
        return []


async def _wait(writing: Sequence[Any]) -> None:
    for future in writing:
        await asyncio.to_thread(future.result)


def _params_of(src: str | Path) -> Path:
    if not is_flax_folder(src):
        raise ValueError(f"{src} is not a converted checkpoint: expected {CONFIG} and {_PARAMS}/")
    return Path(src).resolve() / _PARAMS


def _restore(path: Path, handler: Any, args: Any) -> dict:
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            return checkpointer.restore(path, args)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error


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
