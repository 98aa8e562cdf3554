"""Recognises by its first bytes a file that is not what its name promises, and says what to do."""

import re
from collections.abc import Iterable

from flax_projector.storage import AnyPath

_NUM_BYTES = 512

_UNPACK = "unpack it first"
_COPY = "copy or download it again"
_OTHER = "its weights cannot be read here, so get the model in safetensors"

_KINDS: tuple[tuple[bytes, str], ...] = (
    (
        rb"version https://git-lfs",
        "is a pointer of Git LFS, which stands for the file: fetch the file itself, with "
        "`git lfs pull` in its folder",
    ),
    (
        rb"\s*(<!--.*?-->\s*)?(?i:<!doctype html|<html|<head|<body)",
        "is a web page, which a download got in place of the file: download it again, and check "
        "the address (on the Hugging Face hub it has /resolve/ in it, not /blob/)",
    ),
    (
        rb"\s*<\?xml",
        "is XML, perhaps an error that a download got in place of the file: download it again",
    ),
    (rb"GGUF|lmgg|fmgg|tjgg", f"is in the format of llama.cpp (GGUF): {_OTHER}"),
    (rb"\x89HDF\r\n\x1a\n", f"is an HDF5 file, of Keras or TensorFlow: {_OTHER}"),
    (rb"\x08\x01\x12", f"is a SavedModel of TensorFlow: {_OTHER}"),
    (rb"\x08[\x02-\x20](\x12[\x01-\x40][ -~]|:)", f"is an ONNX model: {_OTHER}"),
    (rb"....TFL3", f"is a TensorFlow Lite model: {_OTHER}"),
    (
        rb"([\x81-\x8f]|\xde..|\xdf....)[\xa1-\xbf\xd9-\xdb]",
        f"is in Flax's older format (msgpack): {_OTHER}",
    ),
    (rb"\x93NUMPY", f"is an array of NumPy (.npy): {_OTHER}"),
    (rb"\x1f\x8b\x08", f"is compressed with gzip: {_UNPACK}"),
    (rb"BZh[1-9]", f"is compressed with bzip2: {_UNPACK}"),
    (rb"\xfd7zXZ\x00", f"is compressed with xz: {_UNPACK}"),
    (rb"\x28\xb5\x2f\xfd", f"is compressed with zstd: {_UNPACK}"),
    (rb"7z\xbc\xaf\x27\x1c", f"is a 7z archive: {_UNPACK}"),
    (rb"Rar!\x1a\x07", f"is a RAR archive: {_UNPACK}"),
    (rb".{257}ustar", f"is a tar archive: {_UNPACK}"),
    (rb"\xff\xfe|\xfe\xff", "is a text in UTF-16: save it in UTF-8"),
    (rb"\x00{16,}\Z", f"begins with zeros, as a file that was not copied to its end: {_COPY}"),
    (rb"\Z", f"is empty: {_COPY}"),
)
"""How a file begins, as a pattern, and what it is: the end of a sentence, and the way out."""


def recognise(path: AnyPath) -> str | None:
    """What a file is, if that is something else than a checkpoint, a config or a tokenizer.

    Args:
      path: of an existing file.

    Returns:
      The end of a sentence that begins with the path: "is empty: copy or download it again".
    """
    with path.open("rb") as file:
        start = file.read(_NUM_BYTES)
    return next((text for form, text in _KINDS if re.match(form, start, re.DOTALL)), None)


def recognise_any(paths: Iterable[AnyPath]) -> str | None:
    """The first of several files that `recognise` knows, as a whole sentence; None if none is."""
    for path in sorted(paths):
        if path.is_file() and (text := recognise(path)):
            return f"{path} {text}"
    return None
