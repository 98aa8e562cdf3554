"""The clips of Hugging Face data sets, as they are stored in their tables.

`datasets` would decode audio with torch; we take what is stored instead.
"""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from flax_projector.data.audio import BadAudio, Problem, file_stamp
from flax_projector.files import is_url


@dataclass(frozen=True)
class Table:
    """The audio column of a data set; pickled as the paths of its files.

    Attributes:
      dataset: the column, in the format of arrow.
      source: the name of the source.
      folder: paths are relative to it, if they exist there.
      version: differs between data sets with other rows.
    """

    dataset: Any
    source: str
    folder: Path
    version: str


@dataclass(frozen=True, slots=True)
class TableClip:
    """One clip of a data set, found by row number."""

    table: Table
    index: int

    def _parts(self) -> dict[str, Any]:
        return parts_of(self.table.dataset[self.index].column(0)[0])

    def fetch(self) -> bytes | str:
        """The encoded file, or its path."""
        return encoded(self._parts(), self.table.folder, str(self))

    def file(self) -> str:
        """The path or URL of a clip that is a file; else empty."""
        parts = self._parts()
        path = str(parts["path"]) if set(parts) == {"path"} else ""
        return _find(path, self.table.folder) if path else ""

    def stamp(self) -> list[int | str]:
        """The version of the data set and, if the clip is a file, of that."""
        path = self.file()
        return [self.table.version, *(file_stamp(path) if path else ())]

    def __str__(self) -> str:
        return f"{self.table.source}[{self.index}]"


def parts_of(stored: Any) -> dict[str, Any]:
    """What is stored of a clip, however it is stored: "bytes", "path", "array"."""
    if not stored.is_valid:
        return {}
    kind = str(stored.type)
    if kind.startswith("struct"):
        return {name: part for name, part in stored.items() if part.is_valid}
    return {"bytes" if kind.endswith("binary") else "path": stored}


def encoded(parts: dict[str, Any], folder: Path, name: str) -> bytes | str:
    """The encoded file of a clip, or its path.

    Raises:
      BadAudio: if there is none, or what is stored as samples is not a sound.
    """
    if "array" in parts:
        try:
            return _to_wav(parts["array"], parts["sampling_rate"].as_py())
        except (KeyError, OverflowError, TypeError, ValueError, soundfile.SoundFileError) as error:
            raise BadAudio(Problem.UNDECODABLE, f"{name} holds no sound: {error}") from error
    if "bytes" in parts and (content := parts["bytes"].as_py()):
        return content
    if "path" in parts and (path := parts["path"].as_py()):
        return _find(path, folder)
    raise BadAudio(Problem.MISSING_FILE, f"{name}: the row has no audio")


def _find(path: str, folder: Path) -> str:
    """The path of a clip, which may be relative to the data set's folder."""
    beside = os.path.join(folder, path)
    return beside if os.path.exists(beside) and not is_url(path) else path


def _to_wav(array: Any, rate: int) -> bytes:
    """Decoded samples as a wav file.

    Args:
      array: samples of one channel, or of several; the longer axis is time.
      rate: samples per second.
    """
    samples = np.array(array.as_py())
    if samples.ndim > 2:
        raise ValueError(f"its samples have the shape {samples.shape}")
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        samples = samples.T
    # Lossless: float64 becomes float32 when it is read, too.
    is_pcm = np.issubdtype(samples.dtype, np.integer)  # int16, as `hf_source` has checked
    file = io.BytesIO()
    soundfile.write(
        file,
        samples.astype(np.int16 if is_pcm else np.float32),
        rate,
        format="WAV",
        subtype="PCM_16" if is_pcm else "FLOAT",
    )
    return file.getvalue()
