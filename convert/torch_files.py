"""PyTorch checkpoints on disk: headers first, then one tensor at a time."""

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from convert.paths import replacing
from convert.rules import DTYPES, TensorInfo

WEIGHTS = "model.safetensors"

_FOLDER_FORMS = (  # what a folder may hold, best first
    "model.safetensors.index.json",
    WEIGHTS,
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")
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


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
      infos: shape and dtype of every tensor, from the headers.
      read: gives one tensor.
      metadata: texts in the header of a safetensors file.
    """

    infos: Mapping[str, TensorInfo]
    read: Callable[[str], np.ndarray]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def cast(self, dtype: np.dtype) -> "Checkpoint":
        """The same tensors, converted to `dtype` when they are read."""
        infos = {key: TensorInfo(info.shape, dtype) for key, info in self.infos.items()}
        return Checkpoint(infos, lambda key: self.read(key).astype(dtype), self.metadata)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a checkpoint without reading its tensors.

    Args:
      path: a `.safetensors`, `.pt`, `.pth` or `.bin` file, an `.index.json` of a sharded set, or an
        HF folder with one of these.

    Raises:
      ValueError: naming the path, if it is none of these, damaged, or needs unpickling.
    """
    path = Path(path)
    if path.is_dir():
        return open_checkpoint(_weights_in(path))
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.name.endswith(".index.json"):
        return _open_sharded(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in _TORCH_SUFFIXES:
        return _open_torch(path)
    raise ValueError(
        f"{path} is not a checkpoint: expected an HF folder, .safetensors, .index.json or one of "
        f"{', '.join(_TORCH_SUFFIXES)}"
    )


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, np.ndarray],
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes tensors as Hugging Face does, sorted by name; the file appears when it is complete.

    Args:
      path: of the file.
      tensors: by torch key.
      metadata: texts for the header; None writes {"format": "pt"}.
      overwrite: replaces an existing file.
    """
    # safetensors 0.8.0 writes views (a transposed kernel) scrambled, without an error.
    ordered = {key: np.ascontiguousarray(tensors[key]) for key in sorted(tensors)}
    with replacing(Path(path), overwrite=overwrite) as part:
        part.touch()
        mode = part.stat().st_mode
        save_file(ordered, part, dict(metadata or {"format": "pt"}))
        part.chmod(mode)  # safetensors leaves the file unreadable for others, whatever the umask


def _weights_in(folder: Path) -> Path:
    """The file to open in an HF folder."""
    for name in _FOLDER_FORMS:
        if (folder / name).exists():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    found = ", ".join(file.name for file in files) or "none of them and no other .safetensors"
    raise ValueError(
        f"{folder} is not a PyTorch checkpoint: expected one of {', '.join(_FOLDER_FORMS)}; "
        f"found {found}"
    )


def _open_safetensors(path: Path) -> Checkpoint:
    try:
        file = safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    infos = {key: _header(path, key, file.get_slice(key)) for key in file.keys()}  # noqa: SIM118
    return Checkpoint(infos, file.get_tensor, file.metadata() or {})


def _header(path: Path, key: str, tensor: Any) -> TensorInfo:
    code = tensor.get_dtype()
    if code not in _SAFETENSORS_DTYPES:
        known = ", ".join(_SAFETENSORS_DTYPES)
        raise ValueError(f"{path}: tensor {key} has dtype {code}, can read {known}")
    return TensorInfo(tuple(tensor.get_shape()), _SAFETENSORS_DTYPES[code])


def _open_sharded(index: Path) -> Checkpoint:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not the index of a checkpoint: {error!r}") from error
    shards = {
        name: open_checkpoint(index.parent / name) for name in sorted(set(weight_map.values()))
    }
    held = {key: name for name, shard in shards.items() for key in shard.infos}
    wrong = sorted(
        key for key in weight_map.keys() | held.keys() if weight_map.get(key) != held.get(key)
    )
    if wrong:
        raise ValueError(f"{index} and its files disagree about {', '.join(wrong)}")
    infos = {key: shards[name].infos[key] for key, name in weight_map.items()}
    return Checkpoint(infos, lambda key: shards[weight_map[key]].read(key))


def _open_torch(path: Path) -> Checkpoint:
    import torch  # only these files need it

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} needs unpickling, which can run any code: refused. Save only tensors in it, "
            "torch.save(model.state_dict(), path), or use safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is not a complete file of torch.save (its zip format): {error}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(
            f"{path} holds {type(state).__name__}, expected a dictionary of tensors: save "
            "model.state_dict()"
        )
    infos = {key: _torch_info(path, key, tensor) for key, tensor in state.items()}
    return Checkpoint(infos, lambda key: _to_numpy(state[key], infos[key]))


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
