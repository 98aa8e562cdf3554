"""Opens PyTorch checkpoints of every form; reads and writes safetensors, without torch."""

import functools
import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from convert.bucket import LINK, RemoteFile
from convert.checkpoint import DTYPES, Checkpoint, TensorInfo, View, contiguous
from convert.torch_save import TORCH_SUFFIXES, is_saved, open_saved
from flax_projector.file_types import recognise
from flax_projector.files import local_path, parse_json

_log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"

_FOLDER_FORMS = (  # the files that a folder is opened by, in transformers' order
    WEIGHTS,
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_SAFETENSORS_DTYPES = {
    "F32": DTYPES["float32"],
    "F16": DTYPES["float16"],
    "BF16": DTYPES["bfloat16"],
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def open_torch(path: str | Path) -> Checkpoint:
    """Opens a checkpoint without reading its tensors.

    Args:
      path: a safetensors file, a file of `torch.save`, the `.index.json` of a sharded set, or an HF
        folder with one of these. Files are recognised by their first bytes, not by their names.

    Raises:
      ValueError: naming the path, if it is none of these, damaged, contains objects other than
        tensors, or is a file of `torch.save` and torch is not installed.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_in(path)
    is_index = path.name.endswith(".index.json") and path.exists()
    return _open_sharded(path) if is_index else _open_file(path)


def has_weights(folder: Path) -> bool:
    """Whether `open_torch` finds something to open in the folder."""
    return _find_weights(folder) is not None


def check_adapters(path: Path) -> None:
    """Checks that no adapter lies beside the weights, which transformers would add to them.

    Args:
      path: a folder; or a file in it, which is taken without the adapter.

    Raises:
      ValueError: naming the adapter, and the weights without it.
    """
    folder = path if path.is_dir() else path.parent
    found = [name for name in _ADAPTER_FILES if (folder / name).is_file()]
    if not found or path.name in found:
        return
    if path != folder:
        _log.warning("WARNING: %s is taken without the adapter beside it, %s", path, found[0])
        return
    weights = _find_weights(folder)
    alone = "it holds no other model"
    if weights is not None and weights.name not in found:
        alone = f"pass {weights} to leave it out"
    raise ValueError(
        f"{folder} holds an adapter ({', '.join(found)}), which changes what a model computes: "
        f"merge it into the model, with PEFT's `model.merge_and_unload()`, and save that; {alone}"
    )


def write_safetensors(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes the same file as `safetensors.numpy.save_file`, but one tensor at a time.

    The library needs all tensors in memory.

    Args:
      path: the new file.
      checkpoint: tensors by torch key, read in the order of its `infos`.
    """
    codes = {dtype: code for code, dtype in _SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # as Hugging Face does
    offsets, end = {}, 0
    # In the library's order: the widest dtypes first, which aligns every tensor; then by name.
    for key, info in sorted(checkpoint.infos.items(), key=lambda x: (-x[1].dtype.itemsize, x[0])):
        offsets[key], end = end, end + info.nbytes
        header[key] = {
            "dtype": codes[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offsets[key], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with Path(path).open("xb") as file:
        if hasattr(os, "posix_fallocate"):  # detects a full disk early, and is twice as fast
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)
        file.write(len(text).to_bytes(8, "little") + text)
        for key, tensor in checkpoint.stream():
            file.seek(8 + len(text) + offsets[key])
            file.write(contiguous(tensor).reshape(-1).view(np.uint8).data)


def _find_weights(folder: Path) -> Path | None:
    """The file that an HF folder is opened by; None if there is none."""
    for name in _FOLDER_FORMS:
        if (folder / name).is_file():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    return files[0] if len(files) == 1 else None


def _weights_in(folder: Path) -> Path:
    if found := _find_weights(folder):
        return found
    files = ", ".join(sorted(file.name for file in folder.glob("*.safetensors")))
    raise ValueError(
        f"{folder} is not a PyTorch checkpoint: expected one of {', '.join(_FOLDER_FORMS)}, or a "
        f"single .safetensors file; found {files or 'none of them'}"
    )


def _open_file(path: Path) -> Checkpoint:
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    with path.open("rb") as file:
        start = file.read(40)
    if start.startswith(LINK):
        return _open_remote(path)
    if start[7:9] == b"\x00{":  # behind the length of the header
        return _open_safetensors(path)
    if kind := recognise(path):
        raise ValueError(f"{path} {kind}")
    if is_saved(path):
        return open_saved(path)
    form = {".safetensors": "a complete safetensors file"}
    form |= dict.fromkeys(TORCH_SUFFIXES, "a complete file of torch.save")
    expected = form.get(path.suffix, "a checkpoint, neither of safetensors nor of torch.save")
    raise ValueError(f"{path} is not {expected}: it begins with {start!r}")


def _open_safetensors(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="np"):
            pass  # the library checks that header and data match
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error

    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    infos = {key: _header(path, key, entry) for key, entry in header.items()}

    def read(key: str) -> np.ndarray:
        # Mapped into memory, where the library would copy.
        shape, dtype = infos[key]
        if 0 in shape:
            return np.empty(shape, dtype)
        start = 8 + size + header[key]["data_offsets"][0]
        return np.memmap(path, dtype, "r", start, shape).view(np.ndarray)

    return Checkpoint(infos, read, frozenset({path}))


def _open_remote(link: Path) -> Checkpoint:
    file = RemoteFile(link)
    infos = {key: _header(file.url, key, entry) for key, entry in file.header.items()}
    fetch = functools.partial(file.fetch, infos)
    return Checkpoint(infos, lambda key: next(fetch([key], lambda x: x)), frozenset({link}), fetch)


def _header(path: str | Path, key: str, entry: Mapping[str, Any]) -> TensorInfo:
    code = entry["dtype"]
    if code not in _SAFETENSORS_DTYPES:
        known = ", ".join(_SAFETENSORS_DTYPES)
        raise ValueError(f"{path}: tensor {key} has dtype {code}, expected one of {known}")
    return TensorInfo(tuple(entry["shape"]), _SAFETENSORS_DTYPES[code])


def _open_sharded(index: Path) -> Checkpoint:
    try:
        weight_map: dict[str, str] = parse_json(index.read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        kind = recognise(index) or f"is not the index of a checkpoint: {error!r}"
        raise ValueError(f"{index} {kind}") from error
    if not isinstance(weight_map, dict) or {type(name) for name in weight_map.values()} != {str}:
        raise ValueError(
            f"{index} is not the index of a checkpoint: weight_map = {str(weight_map)[:60]}, "
            "expected an object with a file name for each tensor"
        )
    names = sorted(set(weight_map.values()))
    shards = {name: _open_file(local_path(index.parent / name)) for name in names}
    found: dict[str, str] = {}
    for name, shard in shards.items():
        if twice := sorted(found.keys() & shard.infos.keys()):
            raise ValueError(
                f"{index.parent / name} and {index.parent / found[twice[0]]} both hold {twice[0]}: "
                "save the model anew, or leave one of them out of the index"
            )
        found |= dict.fromkeys(shard.infos, name)
    wrong = sorted(
        key for key in weight_map.keys() | found.keys() if weight_map.get(key) != found.get(key)
    )
    if wrong:
        more = f" and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError(f"{index} and its files disagree about {', '.join(wrong[:20])}{more}")
    infos = {key: shards[name].infos[key] for key, name in weight_map.items()}
    files = frozenset({index}).union(*(shard.files for shard in shards.values()))

    def fetch(keys: Sequence[str], view: View) -> Iterator[np.ndarray]:
        for name, group in itertools.groupby(keys, weight_map.__getitem__):
            yield from shards[name].views(list(group), view)

    is_remote = any(shard.fetch for shard in shards.values())
    return Checkpoint(
        infos,
        lambda key: shards[weight_map[key]].read(key),
        files,
        fetch if is_remote else None,
    )
