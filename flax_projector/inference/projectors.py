"""What a user names to listen with: a run, or a projector from elsewhere."""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from convert.hf_config import rendered_prompt
from convert.load import resolve_model
from convert.models import PROJECTOR, detect
from convert.stored import has_steps, open_stored
from convert.torch_files import has_weights
from flax_projector.chat.prompt import Prompt
from flax_projector.config import DataConfig, PromptConfig, TrainConfig, option
from flax_projector.files import any_path, is_url, parse_json, reading, whole_path
from flax_projector.lengths import FRAME_SECS
from flax_projector.run import resolve_config
from flax_projector.run_folder import RunFolder, find_from_projector
from flax_projector.storage import AnyPath, temporary_folder
from flax_projector.training.best import find_best

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Named:
    """A projector, and all that is needed to listen with it.

    Attributes:
      config: with the present paths of the towers.
      folder: of the run; for a projector from elsewhere, a temporary one that holds no run.
      projector: what holds the projector's weights.
      step: which checkpoint, if it holds several.
      rendered: the prompt with its token ids, if a projector from elsewhere comes with it.
    """

    config: TrainConfig
    folder: RunFolder
    projector: AnyPath
    step: int | None
    rendered: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_of_other_training(self) -> bool:
        """Whether the config is that of a run, and the projector is not in the run's folder."""
        is_inside = whole_path(self.projector).is_relative_to(whole_path(self.folder.path))
        return self.folder.config.is_file() and not is_inside

    def check_prompt(self, prompt: Prompt) -> None:
        """Checks the prompt that the LLM's tokenizer makes.

        Raises:
          ValueError: if the projector was trained with other token ids.
        """
        ours = json.loads(prompt.to_json())
        if wrong := [name for name in ours if self.rendered.get(name, ours[name]) != ours[name]]:
            raise ValueError(
                f"{self.projector} was trained with another tokenizer than that in "
                f"{self.config.llm}: {wrong[0]} was {self.rendered[wrong[0]]}, and is "
                f"{ours[wrong[0]]} now. Name its own LLM with --llm"
            )


def find_named(
    name: str | AnyPath, *, projector: str | None, encoder: str | None, llm: str | None
) -> Named:
    """Finds out what was named.

    Args:
      name: the folder of a run; or of a projector, in any form that the converter reads and that
        has a config.json, or its hub id.
      projector: of a run, see `choose_projector`.
      encoder: folder or hub id of the encoder; None takes the one that the run or the projector
        names.
      llm: the same for the LLM.

    Raises:
      ValueError: if it is none of these, or lacks something.
    """
    path = any_path(name)
    if not path.exists():
        return _of_projector(_downloaded(str(name)), projector, encoder, llm)
    folder = RunFolder(path)
    if _is_run(folder):
        config = folder.read_config()
        where, step = choose_projector(folder, projector)
        return Named(_as_used(config, folder, encoder, llm), folder, where, step)
    return _of_projector(path, projector, encoder, llm)


def _is_run(folder: RunFolder) -> bool:
    """Whether it is the folder of a run, even if that is damaged; only models have a model type."""
    if not folder.config.is_file():
        return folder.checkpoints.exists()
    try:
        return "model_type" not in parse_json(folder.config.read_text("utf-8"))
    except (TypeError, ValueError):
        return folder.checkpoints.exists()


def _downloaded(name: str) -> Path:
    if is_url(name) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"{name} does not exist: name the folder of a run, or of a projector")
    try:
        return resolve_model(name)
    except ValueError as error:
        raise ValueError(f"there is no run or projector {name}: {error}") from error


def _of_projector(path: AnyPath, choice: str | None, encoder: str | None, llm: str | None) -> Named:
    """A projector without a run: what its config.json does not say is as a run has it by default.

    Raises:
      ValueError: if it is no projector, or does not say enough.
    """
    if choice is not None:
        raise ValueError(f"--projector chooses one of a run, but {path} is no run: leave it out")
    if path.is_dir() and not _holds_model(path):
        raise ValueError(
            f"{path} is not the folder of a run, nor of a projector: it has neither config.json "
            "nor weights"
        )
    stored = open_stored(path)
    if detect(stored) is not PROJECTOR:
        raise ValueError(f"{path} is no projector: name the folder of a run, or of a projector")
    if (text := stored.config_text) is None:
        raise ValueError(
            f"{path} has no config.json: convert it with `python -m convert to-flax`, which takes "
            "as options what its weights do not show"
        )
    data: dict[str, Any] = json.loads(text)
    keys = {"encoder": (encoder, "audio_model_id"), "llm": (llm, "text_model_id")}
    towers = {
        name: given or find_from_projector(path, data.get(key) or "")
        for name, (given, key) in keys.items()
    }
    if missing := [option(tower) for tower, found in towers.items() if not found]:
        raise ValueError(f"{path} does not name its towers: pass {' and '.join(missing)}")
    rendered = rendered_prompt(text) or {}
    with reading(path, way_out="correct its config.json"):
        config = TrainConfig(
            **towers,
            projector=PROJECTOR.parse_text(text, str(path)),
            out=str(temporary_folder() / "no-run"),
            prompt=_prompt(rendered),
            data=_data(data),
            dtype="float32" if jax.default_backend() == "cpu" else "bfloat16",
            init_projector=str(path),
            **_known(data, "max_new_tokens"),
        )
    # What it does not say is as in a run that starts from it.
    config = dataclasses.replace(resolve_config(config), init_projector=None)
    log.info("%s is no run: %s", path, _shown(config))
    return Named(config, RunFolder(any_path(config.out)), path, None, rendered)


def _holds_model(path: AnyPath) -> bool:
    has_files = isinstance(path, Path) and has_weights(path)
    return has_files or (path / "config.json").exists() or has_steps(path)


def _known(data: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: data[name] for name in names if data.get(name) is not None}


def _prompt(rendered: Mapping[str, Any]) -> PromptConfig:
    """The prompt as a run rendered it; left open if the messages are all that is known."""
    if not rendered:
        return PromptConfig()
    before, after = rendered["before_audio"], rendered["after_audio"]
    return PromptConfig(before=before, after=after, end=rendered["end"])


def _data(data: Mapping[str, Any]) -> DataConfig:
    """Its window, and buckets of which none is longer than the clips of its training."""
    config = DataConfig(bucket_secs=(FRAME_SECS,), **_known(data, "window_secs"))
    default = DataConfig().bucket_secs
    longest = min(data.get("max_clip_secs") or default[-1], config.window_secs)
    shorter = [bound for bound in default if bound < longest]
    return dataclasses.replace(config, bucket_secs=(*shorter, longest))


def _shown(config: TrainConfig) -> str:
    prompt, data = config.prompt, config.data
    messages = f"system message {prompt.system!r}, user message {prompt.user!r}"
    if prompt.end:
        messages = f"prompt {prompt.before!r}, audio, {prompt.after!r}"
    return (
        f"encoder {config.encoder}, LLM {config.llm}, {messages}, audio tokens of the "
        f"{data.audio_tokens}, a window of {data.window_secs:g} s, pieces of up to "
        f"{data.bucket_secs[-1]:g} s, {config.dtype}"
    )


def choose_projector(folder: RunFolder, choice: str | None) -> tuple[AnyPath, int | None]:
    """Where one of a run's projectors is.

    Args:
      folder: the run's folder.
      choice: "final", after the last step; "best", with the lowest error rate; the step of a
        checkpoint, as digits; the path of any other projector. None takes the final one or, if the
        run has not ended, its newest checkpoint, as the converter does.

    Returns:
      The path of a checkpoint, and the step if there are several.

    Raises:
      ValueError: if the run does not have it.
    """
    steps, best = folder.steps(), find_best(folder)
    is_finished = (folder.projector / "config.json").is_file()
    others = [f"--projector {name}" for name in map(str, sorted(steps))]
    others = ["--projector best"] * (best is not None) + others
    way_out = f"pass {' or '.join(others)}" if others else "wait for its first checkpoint"
    match choice:
        case None if is_finished:
            return folder.projector, None
        case None if steps:
            log.info("%s has not ended: its newest checkpoint is used", folder.path)
            return folder.path, max(steps)
        case None | "final":
            if not is_finished:
                raise ValueError(f"{folder.path} has not ended, so it has no projector: {way_out}")
            return folder.projector, None
        case "best":
            if best is None:
                raise ValueError(
                    f"{folder.path} has no best projector: it has not been evaluated after a step. "
                    "Leave out --projector"
                )
            return best, None
        case _ if re.fullmatch(r"[0-9]+", choice):
            return folder.path, int(choice)
    return any_path(choice), None


def _as_used(
    config: TrainConfig, folder: RunFolder, encoder: str | None, llm: str | None
) -> TrainConfig:
    """The config of a run, for this machine and directory."""
    cache = folder.find(config.data.cache_dir) if config.data.cache_dir else ""
    if not Path(cache).is_dir():
        cache = ""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, cache_features=False, cache_dir=cache),
        out=str(folder.path),
        encoder=encoder or folder.find(config.encoder),
        llm=llm or folder.find(config.llm),
    )
