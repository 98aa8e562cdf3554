"""Reads and writes files of `torch.save`, with torch.

They are read with `torch.load(weights_only=True)`, a restricted unpickler: it rebuilds tensors and
plain containers, and refuses everything else instead of running it.
"""

import contextlib
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from convert.checkpoint import Checkpoint, TensorInfo, contiguous
from convert.extras import import_torch

TORCH_SUFFIXES = (".pt", ".pth", ".bin")

_ZIP = b"PK\x03\x04"  # how the format since torch 1.6 begins, the only one that can be mapped
_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older format
_MAX_PROTOCOL = 3  # of pickles, in torch's restricted unpickler
_HEADER = struct.Struct("<4s5H3I2H")  # of an entry of a zip, up to its name
_ADVICE = "save only tensors, torch.save(model.state_dict(), path), or use safetensors"


def is_saved(path: Path) -> bool:
    """Whether a file begins as one of `torch.save` does, or with any other complete pickle."""
    if _is_zip(path):
        return True
    with path.open("rb") as file:
        return _read_pickle(file) is not None


@dataclass(frozen=True)
class Saved:
    """The content of a file of `torch.save`.

    Attributes:
      path: of the file.
      content: plain containers, numbers, texts and tensors.
      entries: of its zip; none for the older format, which has no checksums.
    """

    path: Path
    content: Any
    entries: Sequence[zipfile.ZipInfo]

    def checkpoint(self, tensors: Mapping[str, Any]) -> Checkpoint:
        """Tensors of the content by name, whose data is compared with its checksum when read.

        Raises:
          ValueError: naming the path and the tensor, if NumPy cannot hold one of them.
        """
        infos = {key: _info(self.path, key, tensor) for key, tensor in tensors.items()}
        check_data = _make_data_check(self.path, self.entries)

        def read(key: str) -> np.ndarray:
            check_data(tensors[key])
            return _to_numpy(tensors[key], infos[key])

        return Checkpoint(infos, read, frozenset({self.path}))


def open_saved(path: Path) -> Checkpoint:
    """Opens a file of `torch.save` that holds a dictionary of tensors.

    Raises:
      ValueError: naming the path, if it is damaged, contains objects other than tensors, or torch
        is not installed.
    """
    saved = load_saved(path)
    _check_state(path, saved.content)
    return saved.checkpoint(saved.content)


def load_saved(path: Path) -> Saved:
    """Loads a file of `torch.save`.

    Raises:
      ValueError: naming the path, if it is damaged, contains objects other than tensors and plain
        ones, or torch is not installed.
    """
    torch = import_torch(f"reading {path}")

    if path.suffix == ".safetensors":  # which torch.load goes by
        raise ValueError(f"{path} is a file of torch.save: rename it to {path.stem}.pt")
    is_zip = _is_zip(path)
    entries = _check_zip(path) if is_zip else []
    if not is_zip:
        _check_pickle(path)
    # The data can be used as it lies in the file, unless another program has compressed it.
    can_be_mapped = is_zip and all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    try:
        with warnings.catch_warnings(action="ignore"):  # on what is refused below
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=can_be_mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} {_why_refused(path, error, is_zip=is_zip)}") from error
    except Exception as error:  # on damaged files the unpickler raises all kinds of errors
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise ValueError(f"{path} is not a complete file of torch.save: {reason}") from error

    return Saved(path, state, entries)


def write_torch(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes a new file with `torch.save`: a dictionary of tensors, sorted by name.

    All tensors are in memory at once, since torch cannot write them one at a time.

    Raises:
      OSError: if it cannot be written.
    """
    import_torch(f"writing {path}")
    state = {key: to_tensor(tensor) for key, tensor in checkpoint.stream()}
    save_content(path, dict(sorted(state.items())))


def save_content(path: str | Path, content: Any) -> None:
    """Writes a new file with `torch.save`.

    Raises:
      OSError: if it cannot be written.
    """
    torch = import_torch(f"writing {path}")
    with Path(path).open("xb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's own, in place of the one that the file raised
            raise _os_error_in(error) or error from error


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_ZIP)) == _ZIP


def _os_error_in(error: BaseException | None) -> OSError | None:
    """The error of the system while which another one was raised, if any."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _check_zip(path: Path) -> list[zipfile.ZipInfo]:
    """The entries of a zip file, after checking everything in it but the tensors' data."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            entries = archive.infolist()
            for entry in entries:
                with archive.open(entry) as content:  # checks the name in the entry's own header
                    if "/data/" not in entry.filename and _has_sums(entries):
                        while content.read(1 << 20):  # checks the sum at the end
                            pass
                _check_header(file, entry)
            names = archive.namelist()
            if len(set(names)) < len(names):
                raise zipfile.BadZipFile("two of its entries have the same name")
    except Exception as error:  # on damaged files zipfile raises all kinds of errors
        raise ValueError(
            f"{path} is not a complete file of torch.save ({error}): copy or download it again"
        ) from error
    if not any(name.endswith("/data.pkl") for name in names):
        raise ValueError(f"{path} {_what_zip(names)}")
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(
            f"{path} is a TorchScript archive, which holds code: load it with "
            "torch.jit.load(path), and save its state_dict() with torch.save"
        )
    return entries


def _check_header(file: IO[bytes], entry: zipfile.ZipInfo) -> None:
    """Checks an entry's own header, which zipfile hardly uses, against the zip's directory."""
    file.seek(entry.header_offset)
    _, _, flags, method, _, _, *stated, _, _ = _HEADER.unpack(file.read(_HEADER.size))
    follow_later = flags & 8  # behind the data
    expected = (entry.CRC, entry.compress_size, entry.file_size)
    for found, value in zip(stated, expected, strict=True):
        is_elsewhere = (follow_later and found == 0) or found == 0xFFFFFFFF  # in 64 bits
        if (found != value and not is_elsewhere) or method != entry.compress_type:
            raise zipfile.BadZipFile(f"the two headers of {entry.filename} differ")


def _has_sums(entries: Sequence[zipfile.ZipInfo]) -> bool:
    """Whether checksums were not turned off, with `torch.serialization.set_crc32_options`."""
    return any(entry.CRC for entry in entries)


def _what_zip(names: Sequence[str]) -> str:
    """What a zip file is that is not of `torch.save`, as the end of a sentence."""
    if names and all(name.endswith(".npy") for name in names):
        return (
            "holds arrays of NumPy (.npz): write them with "
            "safetensors.numpy.save_file(dict(numpy.load(path)), new)"
        )
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    inside = f"{', '.join(names[:3])}{more}" if names else "nothing"
    return f"is a zip archive of {inside}, and was not written by torch.save: unpack it first"


def _check_pickle(path: Path) -> None:
    """Checks the beginning of a file in the older format, which is a pickle of a number."""
    with path.open("rb") as file:
        pickled = _read_pickle(file)
    if pickled is None:
        raise ValueError(f"{path} is not a complete file of torch.save")
    if pickled[1] != _MAGIC:
        raise ValueError(
            f"{path} is a pickle that torch.save did not write. It is refused, since unpickling it "
            f"could run any code: {_ADVICE}"
        )


def _read_pickle(file: IO[bytes]) -> tuple[int, int | None] | None:
    """Parses a pickle, without running it.

    Returns:
      Its protocol, and the last number in it; None if it is not a complete pickle.
    """
    protocol, number = 0, None
    try:
        for operation, argument, _ in pickletools.genops(file):
            if operation.name == "PROTO":
                protocol = int(argument or 0)
            elif isinstance(argument, int):
                number = argument
    except Exception:  # bytes that are not a pickle raise all kinds of errors
        return None
    return protocol, number


def _why_refused(path: Path, error: pickle.UnpicklingError, *, is_zip: bool) -> str:
    """Why torch did not unpickle a file, as the end of a sentence."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        if is_zip:
            archive = stack.enter_context(zipfile.ZipFile(file))
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            file = stack.enter_context(archive.open(name))
        start = file.read(2)
    protocol = start[1] if start.startswith(pickle.PROTO) else 0
    if code is None and protocol > _MAX_PROTOCOL:
        return (
            f"was saved with pickle protocol {protocol}, but torch.load(weights_only=True) reads "
            f"only protocols up to {_MAX_PROTOCOL}: save it again, without pickle_protocol"
        )
    what = f" ({code[1]})" if code else ""
    return (
        f"contains more than tensors{what}. It is refused, since unpickling it could run any code: "
        f"{_ADVICE}"
    )


def _check_state(path: Path, state: Any) -> None:
    """Checks that what a file holds is a dictionary of tensors by name, or says what it is."""
    if not isinstance(state, dict):
        found = type(state).__name__
        raise ValueError(
            f"{path} holds a {found}, expected a dictionary of tensors by name: save "
            "model.state_dict()"
        )
    others = {key: x for key, x in state.items() if not (isinstance(key, str) and _is_tensor(x))}
    if not others:
        return
    names = ", ".join(
        f"{str(key)[:60]} ({type(x).__name__})" for key, x in list(others.items())[:9]
    )
    if {"state", "param_groups"} <= others.keys():
        advice = "this is the state of an optimizer, so take the file of the model"
    elif len(others) < len(state):
        advice = "leave these out, as model.state_dict() does"
    elif place := _place_of_tensors(state):
        advice = f"save the model alone: torch.save(torch.load({path.name!r}){place}, NEW)"
    else:
        advice = "save model.state_dict()"
    raise ValueError(f"{path} holds {names}, expected a dictionary of tensors by name: {advice}")


def _place_of_tensors(state: Any, depth: int = 3) -> str | None:
    """Where in nested dictionaries one of tensors by name is: "['model']"."""
    if not isinstance(state, dict) or not depth:
        return None
    if state and all(isinstance(key, str) and _is_tensor(x) for key, x in state.items()):
        return ""
    for key, inner in state.items():
        if (place := _place_of_tensors(inner, depth - 1)) is not None:
            return f"[{key!r}]{place}"
    return None


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _info(path: Path, key: str, tensor: Any) -> TensorInfo:
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_nested:
        problem = "is nested: save a tensor for each of its parts"
    elif tensor.layout != torch.strided:
        problem = f"is sparse ({tensor.layout}): save tensor.to_dense()"
    elif tensor.is_meta:
        problem = "has no values (device meta): save the model after its weights are loaded"
    elif tensor.is_quantized:
        problem = f"is quantised ({name}): save the model as it was before, or tensor.dequantize()"
    else:
        try:
            return TensorInfo(tuple(tensor.shape), np.dtype(name))
        except TypeError:
            problem = f"has dtype {name}, which numpy does not have"
    raise ValueError(f"{path}: tensor {key} {problem}")


def _make_data_check(path: Path, entries: Sequence[zipfile.ZipInfo]) -> Callable[[Any], None]:
    """A function that checks the checksum of the data behind a tensor, once.

    Args:
      path: of the file.
      entries: of its zip; none for the older format, which has no checksums.
    """
    import torch

    sums = {(entry.file_size, entry.CRC) for entry in entries}
    checked = set()

    def check(tensor: Any) -> None:
        storage = tensor.untyped_storage()
        if not storage.nbytes() or storage.data_ptr() in checked:
            return
        data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        is_known = (len(data), zlib.crc32(data.data)) in sums
        # Otherwise damaged; or, rarely, not as in the file, as of a big-endian machine.
        if not is_known and (bad := _first_damaged(path)):
            raise ValueError(
                f"{path} is damaged: the checksum of {bad} in it is another. Copy or download it "
                "again"
            )
        checked.add(storage.data_ptr())

    return check if _has_sums(entries) else lambda tensor: None


def _first_damaged(path: Path) -> str | None:
    """The first entry of a zip whose content does not have its checksum."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            try:
                with archive.open(entry) as content:
                    while content.read(1 << 20):
                        pass
            except Exception:  # of all kinds again
                return entry.filename
    return None


def _to_numpy(tensor: Any, info: TensorInfo) -> np.ndarray:
    import torch

    plain = tensor.resolve_conj().resolve_neg().contiguous()
    # Through its bytes: torch cannot make a numpy array of bfloat16.
    return plain.reshape(-1).view(torch.uint8).numpy().view(info.dtype).reshape(info.shape)


def to_tensor(array: np.ndarray) -> Any:
    """The tensor with the same bytes, whose memory it may share."""
    import torch

    dtype = getattr(torch, array.dtype.name)
    data = torch.from_numpy(contiguous(array).reshape(-1).view(np.uint8))
    return data.view(dtype).reshape(array.shape)
