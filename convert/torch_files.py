"""PyTorch checkpoints on disk: headers first, then one tensor at a time."""

import json
import os
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from convert.checkpoint import DTYPES, Checkpoint, TensorInfo, contiguous

WEIGHTS = "model.safetensors"

_FOLDER_FORMS = (  # what a folder may hold, best first
    "model.safetensors.index.json",
    WEIGHTS,
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
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
      path: a safetensors file, a file of `torch.save`, an `.index.json` of a sharded set, or an HF
        folder with one of these. A file's first bytes tell which it is, not its name.

    Raises:
      ValueError: naming the path, if it is none of these, damaged, or needs unpickling.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_in(path)
    is_index = path.name.endswith(".index.json") and path.exists()
    return _open_sharded(path) if is_index else _open_file(path)


def has_weights(folder: Path) -> bool:
    """Whether `open_torch` finds something to open in the folder."""
    return _find_weights(folder) is not None


def write_safetensors(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes what `safetensors.numpy.save_file` writes, but one tensor at a time.

    The library wants all tensors in memory.

    Args:
      path: of the new file.
      checkpoint: tensors by torch key, read in the order of its `infos`.
    """
    codes = {dtype: code for code, dtype in _SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # as Hugging Face writes
    offsets, end = {}, 0
    # The library's order: the widest dtypes first, so that every tensor is aligned; then by name.
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
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now; and twice as fast
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)
        file.write(len(text).to_bytes(8, "little") + text)
        for key, tensor in checkpoint.stream():
            file.seek(8 + len(text) + offsets[key])
            file.write(contiguous(tensor).reshape(-1).view(np.uint8).data)


def write_torch(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes a new file of `torch.save`: a dictionary of tensors, sorted by name.

    torch has no writer for one tensor at a time: memory holds all of them.
    """
    import torch  # only these files need it

    state = {key: _to_tensor(tensor) for key, tensor in checkpoint.stream()}
    with Path(path).open("xb") as file:
        torch.save(dict(sorted(state.items())), file)


def _find_weights(folder: Path) -> Path | None:
    """The file to open in an HF folder."""
    for name in _FOLDER_FORMS:
        if (folder / name).exists():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    return files[0] if len(files) == 1 else None


def _weights_in(folder: Path) -> Path:
    if found := _find_weights(folder):
        return found
    files = ", ".join(sorted(file.name for file in folder.glob("*.safetensors")))
    raise ValueError(
        f"{folder} is not a PyTorch checkpoint: expected one of {', '.join(_FOLDER_FORMS)}; "
        f"found {files or 'none of them and no other .safetensors'}"
    )


def _open_file(path: Path) -> Checkpoint:
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{" or path.suffix == ".safetensors":
        return _open_safetensors(path)
    if zipfile.is_zipfile(path) or _is_pickle(path) or path.suffix in TORCH_SUFFIXES:
        return _open_pickled(path)
    raise ValueError(
        f"{path} is not a checkpoint: expected an HF folder, a safetensors file, an .index.json or "
        "a file of torch.save"
    )


def _open_safetensors(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="np"):
            pass  # the library checks that header and data fit together
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error

    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    infos = {key: _header(path, key, entry) for key, entry in header.items()}

    def read(key: str) -> np.ndarray:
        # Mapped, not copied as the library would: what is converted is read from the file directly.
        shape, dtype = infos[key]
        if 0 in shape:
            return np.empty(shape, dtype)
        start = 8 + size + header[key]["data_offsets"][0]
        return np.memmap(path, dtype, "r", start, shape).view(np.ndarray)

    return Checkpoint(infos, read, frozenset({path}))


def _header(path: Path, key: str, entry: Mapping[str, Any]) -> TensorInfo:
    code = entry["dtype"]
    if code not in _SAFETENSORS_DTYPES:
        known = ", ".join(_SAFETENSORS_DTYPES)
        raise ValueError(f"{path}: tensor {key} has dtype {code}, can read {known}")
    return TensorInfo(tuple(entry["shape"]), _SAFETENSORS_DTYPES[code])


def _open_sharded(index: Path) -> Checkpoint:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not the index of a checkpoint: {error!r}") from error
    if not isinstance(weight_map, dict) or {type(name) for name in weight_map.values()} != {str}:
        raise ValueError(
            f"{index} is not the index of a checkpoint: weight_map = {str(weight_map)[:60]}, "
            "expected an object of file names by tensor"
        )
    shards = {name: _open_file(index.parent / name) for name in sorted(set(weight_map.values()))}
    held = {key: name for name, shard in shards.items() for key in shard.infos}
    wrong = sorted(
        key for key in weight_map.keys() | held.keys() if weight_map.get(key) != held.get(key)
    )
    if wrong:
        raise ValueError(f"{index} and its files disagree about {', '.join(wrong)}")
    infos = {key: shards[name].infos[key] for key, name in weight_map.items()}
    files = frozenset({index}).union(*(shard.files for shard in shards.values()))
    return Checkpoint(infos, lambda key: shards[weight_map[key]].read(key), files)


def _is_pickle(path: Path) -> bool:
    """Whether a file begins with a whole pickle of any protocol; reads it without running it."""
    try:
        with path.open("rb") as file:
            for _ in pickletools.genops(file):
                pass
    except Exception:  # whatever the arguments of what is no opcode look like
        return False
    return True


def _open_pickled(path: Path) -> Checkpoint:
    import torch  # only these files need it

    is_zip = zipfile.is_zipfile(path)  # since torch 1.6; only this format can be mapped
    try:
        with warnings.catch_warnings(action="ignore"):  # about what is refused a line later
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if not is_zip and not _is_pickle(path):
            raise ValueError(f"{path} is not a complete file of torch.save") from error
        raise ValueError(
            f"{path} needs unpickling, which can run any code: refused. Save only tensors in it, "
            "torch.save(model.state_dict(), path), or use safetensors"
        ) from error
    except Exception as error:  # damaged bytes make the unpickler raise anything
        raise ValueError(f"{path} is not a complete file of torch.save: {error!r}") from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        inside = f" of {', '.join(map(str, list(state)[:9]))}" if isinstance(state, dict) else ""
        raise ValueError(
            f"{path} holds {type(state).__name__}{inside}, expected a dictionary of tensors by "
            "name: save model.state_dict()"
        )
    infos = {key: _torch_info(path, key, tensor) for key, tensor in state.items()}
    return Checkpoint(infos, lambda key: _to_numpy(state[key], infos[key]), frozenset({path}))


def _torch_info(path: Path, key: str, tensor: Any) -> TensorInfo:
    name = str(tensor.dtype).removeprefix("torch.")
    try:
        return TensorInfo(tuple(tensor.shape), np.dtype(name))
    except TypeError as error:
        raise ValueError(f"{path}: tensor {key} has dtype {name}, unknown to numpy") from error


def _to_numpy(tensor: Any, info: TensorInfo) -> np.ndarray:
    import torch

    # By way of its bytes: torch cannot make a numpy array of bfloat16.
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return data.view(info.dtype).reshape(info.shape)


def _to_tensor(array: np.ndarray) -> Any:
    import torch

    dtype = getattr(torch, array.dtype.name)
    data = torch.from_numpy(contiguous(array).reshape(-1).view(np.uint8))
    return data.view(dtype).reshape(array.shape)
