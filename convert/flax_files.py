"""Reads and writes Flax folders: a config.json, and params/ with an Orbax checkpoint."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import type_handlers

from convert.checkpoint import Checkpoint, TensorInfo, contiguous, map_ahead
from convert.checksums import check_sum, checksum, read_checksums, with_checks, write_checksums
from convert.errors import Problem, raise_any
from convert.hf_config import CONFIG
from convert.orbax_readers import make_reader, reason
from convert.paths import replacing
from convert.trees import flatten, unflatten
from flax_projector.file_types import recognise_any
from flax_projector.files import any_path, check_orbax_path, system_error
from flax_projector.logs import raised_only
from flax_projector.storage import AnyPath

_PARAMS = "params"
FLAX_NAMES = frozenset({CONFIG, _PARAMS})
"""The files of a Flax folder."""
_MARKER = "_CHECKPOINT_METADATA"  # in every finished Orbax checkpoint
_CHUNK_BYTES = 16 << 20
"""Leaves are stored in chunks of at most this size. A process that needs a shard of a leaf then
reads little more than the shard, and buffers of this size are reused, where larger ones would be
allocated anew, page by page."""
_MAPPED = tensorstore.Context.Spec({"file_io_mode": {"mode": "memmap"}})
"""Files are mapped into memory, so that what is read is copied once, not twice."""


def is_flax_folder(path: str | Path) -> bool:
    """Whether `write_flax` wrote this folder."""
    return (Path(path) / _PARAMS / _MARKER).exists()


def open_flax(src: str | Path) -> Checkpoint:
    """Opens a folder that `write_flax` wrote, without reading its leaves.

    A leaf that is read is compared with its checksum.

    Raises:
      ValueError: if it is not such a folder, or not complete.
    """
    params = _params_of(src)
    return with_checks(open_orbax(params), params)


def open_orbax(path: Path, *, subtree: str = "") -> Checkpoint:
    """Opens an Orbax checkpoint of a tree, without reading its leaves.

    Args:
      path: the folder that Orbax wrote.
      subtree: a path such as "params/"; only the leaves below it are opened, named without it.
    """
    check_orbax_path(path, is_new=False)
    try:
        metadata = make_reader().metadata(path)
        found = {
            p.removeprefix(subtree): m
            for p, m in flatten(dict(metadata)).items()
            if p.startswith(subtree)
        }
        infos = {p: TensorInfo(tuple(m.shape), np.dtype(m.dtype)) for p, m in found.items()}
    except Exception as error:  # on damaged files Orbax raises all kinds of errors
        raise _damaged(path, f"is not a complete Orbax checkpoint: {reason(error)}") from error

    is_ocdbt = type_handlers.is_ocdbt_checkpoint(path)
    mapped = tensorstore.Context(_MAPPED, type_handlers.get_ts_context(use_ocdbt=is_ocdbt))
    reader = type_handlers.NumpyHandler()  # returns whole arrays, however they were sharded

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
        except Exception as error:  # of all kinds again
            raise _damaged(path, f"is damaged: {reason(error)}") from error
        return array

    return Checkpoint(infos, read, frozenset({path}))


def load_params(src: str | Path, abstract: Mapping[str, Any]) -> dict:
    """Reads the parameters of a Flax folder straight into their shards.

    Those of which this process has all shards are compared with their checksums.

    Args:
      src: the folder.
      abstract: nested dict of ShapeDtypeStructs with shardings.

    Raises:
      ConversionError: if names, shapes or dtypes differ from `abstract`. Orbax itself would cast.
      ValueError: if it is not a Flax folder, or files are missing, cut off or damaged.
    """
    _check_same(Path(src), open_flax(src).infos, flatten(abstract))
    folder = _params_of(src)
    args = ocp.args.PyTreeRestore(abstract, ocp.checkpoint_utils.construct_restore_args(abstract))
    with ocp.Checkpointer(make_reader()) as checkpointer:
        try:
            params = checkpointer.restore(folder, args)
        except Exception as error:  # of all kinds again
            raise _damaged(folder, f"is damaged: {reason(error)}") from error
    sums = read_checksums(folder)
    for path, leaf in flatten(params).items() if sums else ():
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            check_sum(folder, sums, path, _on_host(leaf))
    return params


def write_flax(
    dst: str | AnyPath, checkpoint: Checkpoint, config_text: str, *, overwrite: bool = False
) -> None:
    """Writes a Flax folder, which appears when it is complete.

    Involves only the calling process: if there are several, call it in the first.

    Args:
      dst: the folder.
      checkpoint: every leaf by flax path, each of them complete on this host.
      config_text: the config.json.
      overwrite: replaces a folder that an earlier conversion wrote.
    """
    with replacing(any_path(dst), names=FLAX_NAMES, overwrite=overwrite) as part:
        fill_flax(part, checkpoint, config_text)


def fill_flax(folder: Path, checkpoint: Checkpoint, config_text: str) -> None:
    """Writes the content of a Flax folder, one leaf at a time.

    Args:
      folder: to be made; an absolute path, which Orbax requires.
      checkpoint: every leaf by flax path, each of them complete on this host.
      config_text: the config.json.

    Raises:
      OSError: if it cannot be written. What reading a leaf raises is passed on. In either case,
        and on Ctrl-C, nothing is being written any more.
    """
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix="write_flax"
    )
    leaves = _LeafHandler()
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False,  # would double the time, and weights hardly shrink
        multiprocessing_options=alone,
        type_handler_registry=type_handlers.create_type_handler_registry(
            (_Leaf, leaves),
            (jax.Array, type_handlers.ArrayHandler()),  # unused, but Orbax warns without one
        ),
    )
    tree = unflatten({path: _Leaf(checkpoint, path) for path in checkpoint.infos})
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    folder.mkdir()

    def save() -> None:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            checkpointer.save(folder / _PARAMS, ocp.args.PyTreeSave(tree, save_args))

    try:
        _run_to_its_end(save, leaves.stop)
    except Exception as error:  # Orbax raises all kinds of errors
        if leaves.unreadable is not None:
            raise leaves.unreadable from None
        raise _os_error(error) from error
    write_checksums(folder / _PARAMS, leaves.sums)
    (folder / CONFIG).write_text(config_text, "utf-8")


class _Leaf:
    """A leaf that is read when it is written."""

    def __init__(self, checkpoint: Checkpoint, path: str) -> None:
        self.shape, self.dtype = checkpoint.infos[path]
        self.nbytes = checkpoint.infos[path].nbytes
        self.checkpoint, self.path = checkpoint, path


class _LeafHandler(type_handlers.NumpyHandler):
    """Writes one leaf as a numpy array while it reads the next ones; holds no others.

    Attributes:
      stop: tells it to read no more leaves.
      unreadable: what reading a leaf raised.
      sums: the checksum of every leaf that was read, by flax path.
    """

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self.stop = threading.Event()
        self.unreadable: Exception | None = None
        self.sums: dict[str, str] = {}

    async def serialize(
        self,
        values: Sequence[_Leaf],
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> list:
        args = args or [ocp.SaveArgs()] * len(values)
        # No need to wait until every byte is on the disk: a conversion can be repeated.
        settings = tensorstore.Context.Spec({"file_io_sync": False})
        unsynced = tensorstore.Context(settings, infos[0].ts_context)
        paths = [value.path for value in values]
        leaves = map_ahead(self._reader(values[0].checkpoint), paths)
        writing = []
        try:
            for info, arg in zip(infos, args, strict=True):
                _, leaf = await asyncio.to_thread(next, leaves)  # while another is being written
                await _wait(writing)
                info = info.replace(ts_context=unsynced)
                writing = await super().serialize([leaf], [info], [arg])
                del leaf
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to report
                await _wait(writing)
            raise
        await _wait(writing)
        return []

    def _reader(self, checkpoint: Checkpoint) -> Callable[[str], np.ndarray]:
        def read(path: str) -> np.ndarray:
            if self.stop.is_set():
                raise InterruptedError("stopped")
            try:
                leaf = contiguous(checkpoint.read(path))
                self.sums[path] = checksum(leaf)
                return leaf
            except Exception as error:
                self.unreadable = self.unreadable or error
                raise

        return read


async def _wait(writing: Sequence[Any]) -> None:
    for future in writing:
        await asyncio.to_thread(future.result)


def _run_to_its_end(function: Callable[[], None], stop: threading.Event) -> None:
    """Runs a function that Ctrl-C must not interrupt, but may stop; returns when it has ended.

    Signals interrupt only the main thread, and so the function runs in another one.
    """
    with ThreadPoolExecutor(1) as worker, raised_only():
        done = worker.submit(function)
        try:
            done.result()
        except BaseException:
            stop.set()
            raise


def _os_error(error: Exception) -> OSError:
    """The error of the system inside an error of tensorstore, or all of its first line."""
    if isinstance(error, OSError):
        return error
    return system_error(error) or OSError(reason(error))


def _params_of(src: str | Path) -> Path:
    if not is_flax_folder(src):
        raise ValueError(f"{src} is not a Flax folder: expected {CONFIG} and {_PARAMS}/ in it")
    return Path(src).resolve() / _PARAMS


def _on_host(leaf: jax.Array) -> np.ndarray:
    """A copy of an array, which the array does not keep as that of `np.asarray`."""
    if leaf.is_fully_replicated:
        return np.array(leaf.addressable_data(0))
    copy = np.empty(leaf.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            copy[shard.index] = shard.data
    return copy


def _damaged(path: Path, reason: str) -> ValueError:
    """The error of a folder that Orbax cannot read, which names the file at fault if it can."""
    files = [file for file in path.rglob("*") if file.is_file()]
    # Data may begin like anything, but stands in few large files; a pointer of Git LFS is small.
    small = [file for file in files if file.parent.name != "d" or file.stat().st_size < 200]
    return ValueError(recognise_any(small) or f"{path} {reason}")


def _check_same(src: Path, infos: Mapping[str, TensorInfo], wanted: Mapping[str, Any]) -> None:
    def describe(leaf: Any) -> str:
        return f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" if leaf is not None else "nothing"

    pairs = {path: (infos.get(path), wanted.get(path)) for path in infos.keys() | wanted.keys()}
    raise_any(
        f"{src} does not hold the requested parameters",
        [
            Problem("leaf", path, f"got {describe(got)}, expected {describe(want)}")
            for path, (got, want) in pairs.items()
            if describe(got) != describe(want)
        ],
    )
