"""The public functions: the commands, and loading a projector."""

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from convert import engine
from convert.checkpoint import DTYPES, Checkpoint, TensorInfo
from convert.compare import Comparison, compare
from convert.extras import import_torch
from convert.flax_files import FLAX_NAMES, fill_flax
from convert.hf_config import CONFIG, architecture, rendered_prompt, training, with_dtype
from convert.load import resolve_model
from convert.models import PROJECTOR, ModelKind, config_text_of, detect
from convert.paths import replacing
from convert.plan import Plan
from convert.round_trip import check_round_trip
from convert.rules import Ignore
from convert.stored import StoredModel, has_steps, open_stored
from convert.torch_files import WEIGHTS, write_safetensors
from convert.torch_save import TORCH_SUFFIXES, write_torch
from convert.trees import read_tree
from flax_projector.config import ProjectorConfig
from flax_projector.files import check_orbax_path, local_path
from flax_projector.models.projector import ResidualAudioProjector

_log = logging.getLogger(__name__)

_Writer = Callable[[Path, Checkpoint, str], None]

_HF_NAMES = frozenset({CONFIG, WEIGHTS})
_FILES = {".safetensors": write_safetensors, **dict.fromkeys(TORCH_SUFFIXES, write_torch)}
"""Writers of `to_torch` for single files, by suffix."""


@dataclass(frozen=True)
class Summary:
    """What the headers of a checkpoint show.

    Attributes:
      architecture: the model's name in its config.json, "llama (LlamaForCausalLM)"; without one,
        the name that its tensors suggest; "unknown" if nothing does.
      kind: the model; None if it is not supported.
      config: dataclass of the config.json; None if there is none, or no `kind`.
      problem: why it cannot be converted as it is; None if it can.
      infos: shape and dtype of every tensor by torch key, or of every leaf by flax path.
      prompt: what the LLM reads around the audio, if the projector's config.json has it as text.
    """

    architecture: str
    kind: ModelKind | None
    config: Any
    problem: str | None
    infos: Mapping[str, TensorInfo]
    prompt: Mapping[str, Any] | None = None


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
      src: any PyTorch form that `open_stored` reads, or the id of a model on the Hugging Face hub.
      dst: the new folder.
      step: which `checkpoint-N` of a Trainer folder; None takes the latest.
      given: fields of `ProjectorConfig` for a projector whose config.json lacks them, or that has
        no config.json.
      ignore: patterns of tensors that the model has no place for; "*" matches anything. They are
        logged and left out, and converting back does not restore them.
      dtype: cast to this dtype first ("float32", "float16", "bfloat16"); None keeps every bit.
      overwrite: replace what an earlier conversion wrote.
      verify: read the result, convert it back and compare every byte.

    Returns:
      `dst`.

    Raises:
      ValueError: if the checkpoint is damaged or cannot be converted; nothing is written then.
    """
    stored = open_stored(_find(src), step=step)
    if stored.side == "flax":
        raise ValueError(f"{src} is a Flax checkpoint already: `to-torch` converts it back")
    (stored,) = _without([stored], ignore)
    dst = local_path(dst)
    check_orbax_path(dst, is_new=True)
    return _convert(stored, dst, given=given, dtype=dtype, overwrite=overwrite, verify=verify)


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
      dst: the new folder; or a file, for the weights alone: `.safetensors`, or `.pt`, `.pth` or
        `.bin` for `torch.load`.
      step: which checkpoint of a run; None takes the latest.
      prefix: of the keys; None writes the one of tiny-audio's model, "projector.".
      dtype: cast to this dtype first ("float32", "float16", "bfloat16"); None keeps every bit.
      overwrite: replace what an earlier conversion wrote.
      verify: read the result, convert it back and compare every byte.

    Returns:
      `dst`.

    Raises:
      ValueError: if the checkpoint is damaged or cannot be converted; nothing is written then.
    """
    stored = open_stored(src, step=step)
    if stored.side == "torch":
        raise ValueError(f"{src} is a PyTorch checkpoint already: `to-flax` converts it")
    return _convert(
        stored, local_path(dst), prefix=prefix, dtype=dtype, overwrite=overwrite, verify=verify
    )


def inspect(path: str | Path, *, step: int | None = None) -> Summary:
    """Reads the headers of a checkpoint, and plans its conversion.

    Args:
      path: any form that `open_stored` reads, or the id of a model on the Hugging Face hub.
      step: which checkpoint of a Trainer folder or a run; None takes the latest.

    Raises:
      ValueError: if it is not a checkpoint, or damaged.
    """
    stored = open_stored(_find(path), step=step)
    text, infos = stored.config_text, stored.checkpoint.infos
    name = architecture(text) if text is not None else "unknown"
    try:
        kind = detect(stored)
        config = kind.parse_text(text, CONFIG) if text is not None else None
    except ValueError as error:
        return Summary(name, None, None, str(error), infos)
    try:
        text = config_text_of(stored, kind, {})
        _plan(stored, kind, kind.parse_text(text, CONFIG))
        problem = None
    except ValueError as error:
        problem = str(error)
    said = stored.config_text
    prompt = rendered_prompt(said) if kind is PROJECTOR and said is not None else None
    return Summary(name if config else kind.name, kind, config, problem, infos, prompt)


def verify(
    a: str | Path,
    b: str | Path,
    *,
    step: int | None = None,
    given: Mapping[str, Any] | None = None,
    ignore: Collection[str] = (),
) -> Comparison:
    """Compares two checkpoints: their tensors and configs, and the outputs of projectors.

    Args:
      a: any form that `open_stored` reads, or the id of a model on the Hugging Face hub. A
        projector is run in PyTorch, which must be installed.
      b: likewise; a projector is run in Flax.
      step: which checkpoint of a Trainer folder or a run; of both, if both have several.
      given: fields of `ProjectorConfig` that no config.json contains.
      ignore: patterns of tensors of PyTorch to leave out, as in `to_flax`.

    Raises:
      ValueError: if one of them is not a model, or they are different kinds of models.
    """
    paths = [_find(a), _find(b)]
    steps = [step if has_steps(path) else None for path in paths]
    if step is not None and steps == [None, None]:
        raise ValueError(
            f"there is no step {step}: neither {a} nor {b} is a folder of checkpoint-N or a "
            "training run"
        )
    stored = [open_stored(path, step=s) for path, s in zip(paths, steps, strict=True)]
    one, two = _without(stored, ignore)
    return compare(one, two, given or {})


def load_projector(
    path: str | Path,
    *,
    step: int | None = None,
    given: Mapping[str, Any] | None = None,
    dtype: DTypeLike = "float32",
) -> tuple[ResidualAudioProjector, dict[str, Any]]:
    """Loads a projector, ready to use on its own.

      projector, params = load_projector("converted")
      tokens = projector.apply({"params": params}, frames)  # [B, S, E] -> [B, A, D]

    Args:
      path: a projector in any form that `open_stored` reads, of PyTorch or of Flax, or its id on
        the Hugging Face hub.
      step: which checkpoint of a Trainer folder or a run; None takes the latest.
      given: fields of `ProjectorConfig` for a projector whose config.json lacks them, or that has
        no config.json.
      dtype: of the computation. The parameters keep the dtype that they are stored in.

    Returns:
      The module, and its parameters as a nested dict of arrays.

    Raises:
      ValueError: if the checkpoint is damaged, holds another model, or fields have to be given.
    """
    stored = open_stored(_find(path), step=step)
    kind = detect(stored)
    if kind is not PROJECTOR:
        raise ValueError(f"{path} is a {kind.name}, not a projector")
    text = config_text_of(stored, kind, given or {})
    config: ProjectorConfig = kind.parse_text(text, str(stored.path))
    plan = _plan(stored, kind, config)
    leaves = stored.checkpoint
    if stored.side == "torch":
        leaves = engine.as_flax(plan, leaves)
    return ResidualAudioProjector(config, dtype), read_tree(leaves)


def _find(path: str | Path) -> str | Path:
    """The path itself; or where a model of the hub was downloaded to, if it is a hub id."""
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)) and not local_path(path).exists()
    return resolve_model(str(path)) if is_id else path


def _without(models: Sequence[StoredModel], patterns: Collection[str]) -> list[StoredModel]:
    """The models without the tensors of PyTorch that match the user's patterns."""
    kept = [set(stored.checkpoint.infos) for stored in models]
    for pattern in patterns:
        matches = Ignore(pattern, "--ignore").matches
        ignored = [
            set(filter(matches, stored.checkpoint.infos)) if stored.side == "torch" else set()
            for stored in models
        ]
        if not any(ignored):
            raise ValueError(f"--ignore {pattern!r} matches no tensor: `inspect` lists them all")
        names = ", ".join(sorted(set().union(*ignored)))
        _log.info("left out by --ignore %s: %s", pattern, names)
        kept = [names - left for names, left in zip(kept, ignored, strict=True)]
    return [
        replace(stored, checkpoint=stored.checkpoint.only(names))
        for stored, names in zip(models, kept, strict=True)
    ]


def _convert(
    stored: StoredModel,
    dst: Path,
    *,
    given: Mapping[str, Any] | None = None,
    prefix: str | None = None,
    dtype: str | None,
    overwrite: bool,
    verify: bool,
) -> Path:
    """Writes a model for the other framework; reads it, converts it back and compares."""
    check_apart(stored, dst)
    names, write = _output_form(dst, stored.side)
    kind = detect(stored)
    text = config_text_of(stored, kind, given or {})
    if dtype is not None:
        stored, text = _cast(stored, dtype), with_dtype(text, dtype)
    config = kind.parse_text(text, str(stored.path))
    if stored.side == "torch":
        prefix = kind.table.prefix_of(stored.checkpoint.infos)  # the round trip restores it
    else:
        _warn_of_epsilon(config)
        _warn_of_training(text)
    plan = _plan(stored, kind, config, prefix)
    with replacing(dst, names=names, overwrite=overwrite) as part:
        with _other_side(plan, stored).with_progress("converting") as shown:
            write(part, shown, text)
        if verify:
            written = open_stored(part)
            back = _other_side(_plan(written, kind, config, prefix), written)
            before = stored.checkpoint.only(plan.tensors if stored.side == "torch" else plan.params)
            with back.with_progress("verifying") as shown:
                check_round_trip(before, shown)
            _log.info(
                "verified: %d tensors, %d bytes came back identical",
                len(before.infos),
                before.nbytes,
            )
    return dst


def check_apart(stored: StoredModel, dst: Path) -> None:
    """Checks that writing the destination changes no file that the model is read from."""
    place = dst.resolve()
    for file in stored.checkpoint.files:
        for real in (file.parent.resolve() / file.name, file.resolve()):  # a link, and its target
            if real.is_relative_to(place) or place.is_relative_to(real):
                raise ValueError(
                    f"{dst} overlaps with {file}, which is being converted: choose another "
                    "destination"
                )


def _output_form(dst: Path, side: str) -> tuple[Collection[str], _Writer]:
    """The names in a finished destination, none if it is a file; and the function that writes it.

    Args:
      dst: the destination.
      side: of what is converted.
    """
    if side == "flax" and dst.suffix in _FILES:
        if dst.suffix in TORCH_SUFFIXES:
            import_torch(f"writing {dst}")  # fails now, before any work
        write_file = _FILES[dst.suffix]
        return (), lambda file, tensors, _: write_file(file, tensors)
    is_like_a_file = re.match(r"\.[a-z]", dst.suffix, re.IGNORECASE)  # unlike "smollm2-1.7b"
    if is_like_a_file and not dst.is_dir():
        or_file = f", or a file ending in {', '.join(_FILES)}" if side == "flax" else ""
        raise ValueError(
            f"{dst} ends in {dst.suffix}, expected a folder, whose name has no suffix{or_file}"
        )
    return (FLAX_NAMES, fill_flax) if side == "torch" else (_HF_NAMES, _fill_hf)


def _fill_hf(folder: Path, tensors: Checkpoint, text: str) -> None:
    folder.mkdir()
    write_safetensors(folder / WEIGHTS, tensors)
    (folder / CONFIG).write_text(text, "utf-8")


def _plan(stored: StoredModel, kind: ModelKind, config: Any, prefix: str | None = None) -> Plan:
    """The conversion to the other framework; `prefix` is that of the torch keys to be written."""
    infos, target = stored.checkpoint.infos, kind.leaves_for(config, stored)
    if stored.side == "torch":
        return engine.plan_to_flax(kind.table, infos, target)
    return engine.plan_to_torch(kind.table, infos, target, prefix=prefix)


def _other_side(plan: Plan, stored: StoredModel) -> Checkpoint:
    view = engine.as_flax if stored.side == "torch" else engine.as_torch
    return view(plan, stored.checkpoint)


def _cast(stored: StoredModel, dtype: str) -> StoredModel:
    """The model in another dtype; logs it if that changes anything."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(sorted(DTYPES))}")
    others = {str(info.dtype) for info in stored.checkpoint.infos.values()} - {dtype}
    if not others:
        return stored
    _log.info("casting %s to %s: not bit for bit", ", ".join(sorted(others)), dtype)
    return replace(stored, checkpoint=stored.checkpoint.cast(DTYPES[dtype]))


def _warn_of_epsilon(config: Any) -> None:
    """Warns of the one field of a projector that tiny-audio has in its code, not in its config."""
    upstream = ProjectorConfig.rms_norm_eps
    if isinstance(config, ProjectorConfig) and config.rms_norm_eps != upstream:
        _log.warning(
            "WARNING: rms_norm_eps is %g, but tiny-audio does not read it: it always uses %g, and "
            "will compute other outputs. Write the value into its LlamaRMSNorm(..., eps=...), or "
            "use convert/torch_projector.py, which reads it from config.json",
            config.rms_norm_eps,
            upstream,
        )


def _warn_of_training(text: str) -> None:
    """Warns of what tiny-audio does otherwise: it would ask the LLM in other words, or more."""
    if training(text).get("data.audio_tokens") == "clip":
        _log.warning(
            "WARNING: this projector was trained with the audio tokens of the clip alone "
            "(--data.audio-tokens clip), but tiny-audio's LLM reads those of the whole 30 s: many "
            "words will be wrong there. Leave out the frames after the clip, or train for it with "
            "--data.audio-tokens window"
        )
    if needs := (rendered_prompt(text) or {}).get("needs"):
        _log.warning(
            "WARNING: tiny-audio renders the messages with the LLM's chat template as it is, but "
            "this projector was trained with %s. config.json has the prompt as text, under "
            "rendered_prompt: give that to the LLM",
            " and ".join(needs),
        )
