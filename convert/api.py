"""The commands as functions."""

import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert import engine
from convert.checkpoint import DTYPES, Checkpoint, TensorInfo
from convert.compare import Comparison, compare
from convert.flax_files import FLAX_NAMES, fill_flax
from convert.hf_config import CONFIG, architecture, with_dtype
from convert.load import resolve_model
from convert.models import ModelKind, config_text_of, detect
from convert.paths import replacing
from convert.rules import Ignore
from convert.sources import Source, has_steps, open_source
from convert.torch_files import TORCH_SUFFIXES, WEIGHTS, write_safetensors, write_torch
from flax_projector.config import ProjectorConfig

_log = logging.getLogger(__name__)

_Writer = Callable[[Path, Checkpoint, str], None]

_HF_NAMES = frozenset({CONFIG, WEIGHTS})
_FILES = {".safetensors": write_safetensors, **dict.fromkeys(TORCH_SUFFIXES, write_torch)}
"""What `to_torch` writes instead of a folder, by suffix."""


@dataclass(frozen=True)
class Summary:
    """What the headers of a checkpoint tell.

    Attributes:
      architecture: what its config.json calls it, "llama (LlamaForCausalLM)"; without one, what
        its tensors' names tell; "unknown" if nothing does.
      kind: what it holds; None if that is not supported.
      config: dataclass of the config.json; None if there is none, or no `kind`.
      problem: why it cannot be converted as it is; None if it can.
      infos: shape and dtype of every tensor by torch key, or of every leaf by flax path.
    """

    architecture: str
    kind: ModelKind | None
    config: Any
    problem: str | None
    infos: Mapping[str, TensorInfo]


def to_flax(
    src: str | Path,
    dst: str | Path,
    *,
    step: int | None = None,
    given: Mapping[str, Any] | None = None,
    ignore: Collection[str] = (),
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> Path:
    """Converts a PyTorch checkpoint into a Flax folder (config.json and params/).

    Args:
      src: any PyTorch form that `open_source` knows, or a model's id on the Hugging Face hub.
      dst: the new folder.
      step: which `checkpoint-N` of a Trainer folder; None takes the latest.
      given: fields of `ProjectorConfig` for a projector whose config.json lacks them, or is absent.
      ignore: patterns of tensors that no model here has a place for, "*" stands for anything. They
        are logged and left out: converting back does not bring them back.
      dtype: casts first ("float32", "float16", "bfloat16"); None keeps every bit.
      overwrite: replaces what an earlier conversion wrote.
      verify: reads the result, converts it back and compares every byte.

    Returns:
      `dst`.

    Raises:
      ValueError: if the source is damaged or cannot be expressed; then nothing is written.
    """
    source = open_source(_find(src), step=step)
    if source.side == "flax":
        raise ValueError(f"{src} is of Flax already: `to-torch` converts it back")
    source = replace(source, checkpoint=_without(source.checkpoint, ignore))
    return _convert(source, Path(dst), given=given, dtype=dtype, overwrite=overwrite, verify=verify)


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
    source = open_source(src, step=step)
    if source.side == "torch":
        raise ValueError(f"{src} is of PyTorch already: `to-flax` converts it")
    return _convert(
        source, Path(dst), prefix=prefix, dtype=dtype, overwrite=overwrite, verify=verify
    )


def inspect(path: str | Path, *, step: int | None = None) -> Summary:
    """Reads the headers of a checkpoint of either side, and plans its conversion.

    Args:
      path: any form that `open_source` knows, or a model's id on the Hugging Face hub.
      step: which checkpoint of a Trainer folder or a run; None takes the latest.

    Raises:
      ValueError: if it is no checkpoint, or damaged.
    """
    source = open_source(_find(path), step=step)
    text, infos = source.config_text, source.checkpoint.infos
    name = architecture(text) if text is not None else "unknown"
    try:
        kind = detect(source)
        config = kind.parse_text(text, CONFIG) if text is not None else None
    except ValueError as error:
        return Summary(name, None, None, str(error), infos)
    try:
        text = config_text_of(source, kind, {})
        _plan(source, kind, kind.parse_text(text, CONFIG))
        problem = None
    except ValueError as error:
        problem = str(error)
    return Summary(name if config else kind.name, kind, config, problem, infos)


def verify(
    a: str | Path,
    b: str | Path,
    *,
    step: int | None = None,
    given: Mapping[str, Any] | None = None,
) -> Comparison:
    """Compares two checkpoints of either side: tensors and configs, and outputs of projectors.

    Args:
      a: any form that `open_source` knows, or a model's id on the Hugging Face hub; a projector is
        run in PyTorch.
      b: likewise; a projector is run in Flax.
      step: which checkpoint of a Trainer folder or a run; of both, if both have steps.
      given: fields of `ProjectorConfig` that no config.json says.

    Raises:
      ValueError: if one of them is no model, or they are different models.
    """
    paths = [_find(a), _find(b)]
    steps = [step if has_steps(path) else None for path in paths]
    if step is not None and steps == [None, None]:
        raise ValueError(
            f"neither {a} nor {b} has a step {step}: they are no folders of checkpoint-N, and no "
            "training runs"
        )
    one, two = (open_source(path, step=s) for path, s in zip(paths, steps, strict=True))
    return compare(one, two, given or {})


def _find(path: str | Path) -> Path:
    """The path itself; or where a model of the hub lies, if that is what it names."""
    if Path(path).exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)):
        return Path(path)
    return resolve_model(str(path))


def _without(checkpoint: Checkpoint, patterns: Collection[str]) -> Checkpoint:
    """The checkpoint without the tensors that the user leaves out."""
    kept = checkpoint.infos.keys()
    for pattern in patterns:
        ignored = sorted(filter(Ignore(pattern, "--ignore").matches, checkpoint.infos))
        if not ignored:
            raise ValueError(f"--ignore {pattern!r} matches no tensor: `inspect` lists them")
        _log.info("left out, since you ignore %s: %s", pattern, ", ".join(ignored))
        kept -= set(ignored)
    return checkpoint.only(kept)


def _convert(
    source: Source,
    dst: Path,
    *,
    given: Mapping[str, Any] | None = None,
    prefix: str | None = None,
    dtype: str | None,
    overwrite: bool,
    verify: bool,
) -> Path:
    """Writes what the source is on the other side; converts that back and compares."""
    _check_apart(source, dst)
    names, write = _form(dst, source.side)
    kind = detect(source)
    text = config_text_of(source, kind, given or {})
    if dtype is not None:
        source, text = _cast(source, dtype), with_dtype(text, dtype)
    config = kind.parse_text(text, str(source.path))
    if source.side == "torch":
        prefix = kind.table.prefix_of(source.checkpoint.infos)  # comes back
    else:
        _warn_of_epsilon(config)
    plan = _plan(source, kind, config, prefix)
    with replacing(dst, names=names, overwrite=overwrite) as part:
        with _other_side(plan, source).with_progress("converting") as shown:
            write(part, shown, text)
        if verify:
            written = open_source(part)
            back = _other_side(_plan(written, kind, config, prefix), written)
            before = source.checkpoint.only(plan.tensors if source.side == "torch" else plan.params)
            with back.with_progress("verifying") as shown:
                engine.check_round_trip(before, shown)
            _log.info(
                "verified: %d tensors, %d bytes came back identical",
                len(before.infos),
                before.nbytes,
            )
    return dst


def _check_apart(source: Source, dst: Path) -> None:
    """Checks that writing the destination changes no file that the source is read from."""
    place = dst.resolve()
    for file in source.checkpoint.files:
        for real in (file.parent.resolve() / file.name, file.resolve()):  # a link, and its file
            if real.is_relative_to(place) or place.is_relative_to(real):
                raise ValueError(f"{dst} overlaps with the source, {file}: choose another place")


def _form(dst: Path, side: str) -> tuple[Collection[str], _Writer]:
    """What a finished destination holds, nothing if it is a file; and what writes it."""
    if side == "flax" and dst.suffix in _FILES:
        write_file = _FILES[dst.suffix]
        return (), lambda file, tensors, _: write_file(file, tensors)
    is_like_a_file = re.match(r"\.[a-z]", dst.suffix, re.IGNORECASE)  # unlike "smollm2-1.7b"
    if is_like_a_file and not dst.is_dir():
        or_file = f", or a file of {', '.join(_FILES)}" if side == "flax" else ""
        raise ValueError(
            f"{dst} ends in {dst.suffix}, expected a folder, whose name has no suffix{or_file}"
        )
    return (FLAX_NAMES, fill_flax) if side == "torch" else (_HF_NAMES, _fill_hf)


def _fill_hf(folder: Path, tensors: Checkpoint, text: str) -> None:
    folder.mkdir()
    write_safetensors(folder / WEIGHTS, tensors)
    (folder / CONFIG).write_text(text, "utf-8")


def _plan(source: Source, kind: ModelKind, config: Any, prefix: str | None = None) -> engine.Plan:
    """The conversion to the other side; `prefix` is that of torch keys, if they are to be made."""
    infos, leaves = source.checkpoint.infos, kind.leaves(config)
    if source.side == "torch":
        return engine.plan_to_flax(kind.table, infos, leaves)
    return engine.plan_to_torch(kind.table, infos, leaves, prefix=prefix)


def _other_side(plan: engine.Plan, source: Source) -> Checkpoint:
    view = engine.as_flax if source.side == "torch" else engine.as_torch
    return view(plan, source.checkpoint)


def _cast(source: Source, dtype: str) -> Source:
    """The source in another dtype, with a word in the log if that changes anything."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(sorted(DTYPES))}")
    others = {str(info.dtype) for info in source.checkpoint.infos.values()} - {dtype}
    if not others:
        return source
    _log.info("casting %s to %s: not bit for bit", ", ".join(sorted(others)), dtype)
    return replace(source, checkpoint=source.checkpoint.cast(DTYPES[dtype]))


def _warn_of_epsilon(config: Any) -> None:
    """Says what upstream does not read: the one field of a projector that it keeps in its code."""
    upstream = ProjectorConfig.rms_norm_eps
    if isinstance(config, ProjectorConfig) and config.rms_norm_eps != upstream:
        _log.warning(
            "WARNING: rms_norm_eps is %g, but tiny-audio never reads it and computes with %g, to "
            "other outputs. Write the value into its LlamaRMSNorm(..., eps=...), or run "
            "convert/torch_projector.py, which reads it from config.json",
            *(config.rms_norm_eps, upstream),
        )
