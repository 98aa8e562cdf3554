"""The commands as functions."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert import engine
from convert.checkpoint import DTYPES, Checkpoint, TensorInfo
from convert.compare import Comparison, compare
from convert.errors import ConversionError
from convert.flax_files import open_flax, write_flax
from convert.hf_config import CONFIG, architecture, with_dtype
from convert.models import ModelKind, config_text_of, detect
from convert.paths import replacing
from convert.sources import Source, open_source
from convert.torch_files import TORCH_SUFFIXES, WEIGHTS, open_torch, write_safetensors, write_torch

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What the headers of a checkpoint tell.

    Attributes:
      architecture: what its config.json calls it, "llama (LlamaForCausalLM)"; without one, what
        its tensors' names tell; "unknown" if nothing does.
      kind: what it holds; None if that cannot be converted.
      config: dataclass of the config.json; None if there is none, or no `kind`.
      reason: why it cannot be converted; None if it can.
      infos: shape and dtype of every tensor by torch key, or of every leaf by flax path.
    """

    architecture: str
    kind: ModelKind | None
    config: Any
    reason: str | None
    infos: Mapping[str, TensorInfo]


def to_flax(
    src: str | Path,
    dst: str | Path,
    *,
    step: int | None = None,
    given: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> Path:
    """Converts a PyTorch checkpoint into a Flax folder (config.json and params/).

    Args:
      src: any PyTorch form that `open_source` knows.
      dst: the new folder.
      step: which `checkpoint-N` of a Trainer folder; None takes the latest.
      given: fields of `ProjectorConfig` for a projector whose config.json lacks them, or is absent.
      dtype: casts first ("float32", "float16", "bfloat16"); None keeps every bit.
      overwrite: replaces what an earlier conversion wrote.
      verify: reads the result, converts it back and compares every byte.

    Returns:
      `dst`.

    Raises:
      ValueError: if the source is damaged or cannot be expressed; then nothing is written.
    """
    source, kind, text = _open(src, dst, step, given, dtype)
    if source.side == "flax":
        raise ValueError(f"{src} is of Flax already: `to-torch` converts it back")
    tensors, leaves = source.checkpoint, kind.leaves(kind.parse_text(text, str(src)))
    plan = engine.plan_to_flax(kind.table, tensors.infos, leaves)
    with replacing(Path(dst), overwrite=overwrite) as part:
        with engine.as_flax(plan, tensors).with_progress("to flax") as shown:
            write_flax(part, shown, text)
        if verify:
            written = open_flax(part)
            prefix = kind.table.prefix_of(tensors.infos)
            back = engine.plan_to_torch(kind.table, written.infos, leaves, prefix=prefix)
            _verify(tensors.only(plan.tensors), engine.as_torch(back, written))
    return Path(dst)


def to_torch(
    src: str | Path,
    dst: str | Path,
    *,
    step: int | None = None,
    prefix: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> Path:
    """Converts Flax parameters into an HF folder (config.json and model.safetensors).

    Args:
      src: a folder that `to_flax` or a training run wrote, or the folder of a run.
      dst: the new folder; or a file, to write the weights alone: `.safetensors`, or `.pt`, `.pth`
        or `.bin` for `torch.load`.
      step: which checkpoint of a run; None takes the latest.
      prefix: of the keys; None writes what the PyTorch model of upstream has, "projector.".
      dtype: casts first ("float32", "float16", "bfloat16"); None keeps every bit.
      overwrite: replaces what an earlier conversion wrote.
      verify: reads the result, converts it back and compares every byte.

    Returns:
      `dst`.

    Raises:
      ValueError: if the source is damaged or cannot be expressed; then nothing is written.
    """
    source, kind, text = _open(src, dst, step, None, dtype)
    if source.side == "torch":
        raise ValueError(f"{src} is of PyTorch already: `to-flax` converts it")
    if prefix is not None and prefix not in kind.table.prefixes:
        known = ", ".join(map(repr, kind.table.prefixes))
        raise ValueError(f"prefix {prefix!r} of a {kind.name} is not one of {known}")
    params, leaves = source.checkpoint, kind.leaves(kind.parse_text(text, str(src)))
    plan = engine.plan_to_torch(kind.table, params.infos, leaves, prefix=prefix)
    with replacing(Path(dst), overwrite=overwrite) as part:
        with engine.as_torch(plan, params).with_progress("to torch") as shown:
            _write_torch_side(part, shown, text)
        if verify:
            written = open_torch(part)
            back = engine.plan_to_flax(kind.table, written.infos, leaves)
            _verify(params, engine.as_flax(back, written))
    return Path(dst)


def inspect(path: str | Path, *, step: int | None = None) -> Summary:
    """Reads the headers of a checkpoint of either side; no tensor is read.

    Raises:
      ValueError: if it is no checkpoint, or damaged.
    """
    source = open_source(path, step=step)
    text, infos = source.config_text, source.checkpoint.infos
    name = architecture(text) if text is not None else "unknown"
    try:
        kind = detect(source)
        config = kind.parse_text(text, CONFIG) if text is not None else None
    except ValueError as error:
        reason = error.reason if isinstance(error, ConversionError) else str(error)
        return Summary(name, None, None, reason.replace("\n", "; "), infos)
    return Summary(kind.name if text is None else name, kind, config, None, infos)


def verify(
    a: str | Path,
    b: str | Path,
    *,
    step: int | None = None,
    given: Mapping[str, Any] | None = None,
) -> Comparison:
    """Compares two checkpoints of either side: tensors, configs, and outputs of both frameworks.

    Args:
      a: any form that `open_source` knows; is run in PyTorch.
      b: likewise; is run in Flax.
      step: which checkpoint of a Trainer folder or a run, in those that have steps.
      given: fields of `ProjectorConfig` that no config.json says.

    Raises:
      ValueError: if one of them is no model, or they are different models.
    """
    return compare(open_source(a, step=step), open_source(b, step=step), given or {})


def _open(
    src: str | Path,
    dst: str | Path,
    step: int | None,
    given: Mapping[str, Any] | None,
    dtype: str | None,
) -> tuple[Source, ModelKind, str]:
    """A source as it is to be converted, its model, and the config.json of the result."""
    if Path(dst).resolve() == Path(src).resolve():
        raise ValueError(f"{dst} is the source: choose another destination")
    source = open_source(src, step=step)
    kind = detect(source)
    text = config_text_of(source, kind, given or {})
    if dtype is None:
        return source, kind, text
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(sorted(DTYPES))}")
    before = sorted({str(info.dtype) for info in source.checkpoint.infos.values()})
    _log.info("casting %s to %s: not bit for bit", ", ".join(before), dtype)
    source = replace(source, checkpoint=source.checkpoint.cast(DTYPES[dtype]))
    return source, kind, with_dtype(text, dtype)


def _write_torch_side(part: Path, tensors: Checkpoint, text: str) -> None:
    if part.suffix == ".safetensors":
        write_safetensors(part, tensors)
    elif part.suffix in TORCH_SUFFIXES:
        write_torch(part, tensors)
    else:
        part.mkdir()
        write_safetensors(part / WEIGHTS, tensors)
        (part / CONFIG).write_text(text, "utf-8")


def _verify(before: Checkpoint, after: Checkpoint) -> None:
    with after.with_progress("verifying") as shown:
        engine.check_round_trip(before, shown)
    _log.info(
        "verified: %d tensors, %d bytes came back identical", len(before.infos), before.nbytes
    )
