"""The commands as functions."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert import engine
from convert.flax_files import is_flax_folder, load_params, param_infos, save_params
from convert.hf_config import CONFIG, config_file, read_config_text, with_dtype
from convert.models import ModelKind, detect, read_infos
from convert.paths import replacing
from convert.progress import with_progress
from convert.rules import DTYPES, TensorInfo
from convert.torch_files import WEIGHTS, Checkpoint, open_checkpoint, write_safetensors
from convert.trees import flatten, unflatten

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What the headers of a checkpoint tell.

    Attributes:
      kind: what it holds; None if that cannot be converted.
      config: dataclass of the config.json; None if there is none, or no `kind`.
      infos: shape and dtype of every tensor by torch key, or of every leaf by flax path.
    """

    kind: ModelKind | None
    config: Any
    infos: Mapping[str, TensorInfo]


def to_flax(
    src: str | Path,
    dst: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    dtype: str | None = None,
) -> Path:
    """Converts a PyTorch checkpoint into a Flax folder (config.json and params/).

    Args:
      src: HF folder, .safetensors, .pt, .pth or .bin file; its config.json is in the same folder.
      dst: the new folder.
      overwrite: replaces what an earlier conversion wrote.
      verify: reads the result, converts it back and compares every byte.
      dtype: casts first ("float32", "float16", "bfloat16"); None keeps every bit.

    Returns:
      `dst`.

    Raises:
      ValueError: if the source is damaged or cannot be expressed; then nothing is written.
    """
    src, dst = Path(src), Path(dst)
    _check_different(src, dst)
    if is_flax_folder(src):
        raise ValueError(f"{src} is a Flax folder already: `to-torch` converts it back")
    kind = detect(src)
    target = kind.leaves(kind.read_config(src))
    source = _cast(open_checkpoint(src), dtype)
    plan = engine.plan_to_flax(kind.table, source.infos, target)
    with replacing(dst, overwrite=overwrite) as part:
        leaves = with_progress(engine.to_flax(plan, source.read), plan.nbytes, "to flax")
        save_params(part, unflatten(dict(leaves)), _config_text(src, dtype))
        if verify:
            prefix = kind.table.prefix_of(source.infos)
            written = _open_flax(part)
            back = engine.plan_to_torch(kind.table, written.infos, target, prefix=prefix)
            _verify(plan.tensors, source, engine.to_torch(back, written.read), back.nbytes)
    return dst


def to_torch(
    src: str | Path,
    dst: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    dtype: str | None = None,
) -> Path:
    """Converts a Flax folder into an HF folder (config.json and model.safetensors).

    Args:
      src: a folder that `to_flax` or a training run wrote.
      dst: the new folder; or a `.safetensors` file, to write the weights alone.
      overwrite: replaces what an earlier conversion wrote.
      verify: reads the result, converts it back and compares every byte.
      dtype: casts first ("float32", "float16", "bfloat16"); None keeps every bit.

    Returns:
      `dst`.

    Raises:
      ValueError: if the source is damaged or cannot be expressed; then nothing is written.
    """
    src, dst = Path(src), Path(dst)
    _check_different(src, dst)
    kind = detect(src)
    target = kind.leaves(kind.read_config(src))
    source = _cast(_open_flax(src), dtype)
    plan = engine.plan_to_torch(kind.table, source.infos, target)
    with replacing(dst, overwrite=overwrite) as part:
        tensors = with_progress(engine.to_torch(plan, source.read), plan.nbytes, "to torch")
        if dst.suffix == ".safetensors":
            write_safetensors(part, dict(tensors))
        else:
            part.mkdir()
            write_safetensors(part / WEIGHTS, dict(tensors))
            (part / CONFIG).write_text(_config_text(src, dtype), "utf-8")
        if verify:
            written = open_checkpoint(part)
            back = engine.plan_to_flax(kind.table, written.infos, target)
            _verify(plan.params, source, engine.to_flax(back, written.read), back.nbytes)
    return dst


def inspect(path: str | Path) -> Summary:
    """Reads the headers of a checkpoint of either side; no tensor is read."""
    infos = read_infos(path)
    try:
        kind = detect(path)
        config = kind.read_config(path) if config_file(path).exists() else None
    except ValueError as error:
        _log.info("cannot be converted: %s", error)
        return Summary(None, None, infos)
    return Summary(kind, config, infos)


def _open_flax(folder: Path) -> Checkpoint:
    """A Flax folder in the same shape as a torch checkpoint; all of it is in memory."""
    leaves = flatten(load_params(folder))
    return Checkpoint(param_infos(folder), leaves.__getitem__)


def _cast(checkpoint: Checkpoint, dtype: str | None) -> Checkpoint:
    if dtype is None:
        return checkpoint
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(sorted(DTYPES))}")
    before = sorted({str(info.dtype) for info in checkpoint.infos.values()})
    _log.info("casting %s to %s: not bit for bit", ", ".join(before), dtype)
    return checkpoint.cast(DTYPES[dtype])


def _config_text(src: Path, dtype: str | None) -> str:
    text = read_config_text(src)
    return text if dtype is None else with_dtype(text, dtype)


def _verify(
    infos: Mapping[str, TensorInfo],
    source: Checkpoint,
    returned: Iterable[tuple[str, np.ndarray]],
    nbytes: int,
) -> None:
    engine.check_round_trip(infos, source.read, with_progress(returned, nbytes, "verifying"))
    _log.info("verified: %d tensors, %d bytes came back identical", len(infos), nbytes)


def _check_different(src: Path, dst: Path) -> None:
    if dst.resolve() == src.resolve():
        raise ValueError(f"{dst} is the source: choose another destination")
