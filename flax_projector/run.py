"""Loads the model that a config describes, and writes its projector."""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from convert.checkpoint import in_memory
from convert.flax_files import write_flax
from convert.hf_config import config_text, run_config_dict
from convert.load import digest, load_tower, read_training, resolve_model
from convert.models import LLAMA, PROJECTOR, WHISPER_ENCODER
from convert.trees import flatten
from flax_projector import hosts
from flax_projector.chat.prompt import Prompt, make_prompt, remake_prompt
from flax_projector.chat.tokenizer import load_tokenizer
from flax_projector.config import (
    TINY_AUDIO_SYSTEM,
    TINY_AUDIO_USER,
    LlamaConfig,
    NormalizerName,
    TrainConfig,
    WhisperConfig,
    option,
)
from flax_projector.data.bad_rows import BadRowLog
from flax_projector.data.sources import BatchMaker
from flax_projector.files import any_path
from flax_projector.models.llama import abstract_decoder, embedding_rms
from flax_projector.models.speech_llm import Params, SpeechLLM, encode_prefix, make_speech_llm
from flax_projector.models.whisper import abstract_encoder
from flax_projector.run_folder import RunFolder
from flax_projector.sharding import replicated, spread_sharding, use_mesh
from flax_projector.storage import AnyPath
from flax_projector.training.evaluate import Evaluator
from flax_projector.training.normalizers import Normalizer, make_normalizers
from flax_projector.training.throughput import FlopCounter, make_flop_counter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Towers:
    """The folders of the frozen towers, and what was found there.

    Attributes:
      encoder: the encoder's.
      llm: the LLM's.
      contents: digests of what the run learns from, by option: of the towers, and of the projector
        that it starts from, if it has one and that is needed.
    """

    encoder: Path
    llm: Path
    contents: dict[str, str]


def find_towers(config: TrainConfig) -> Towers:
    """Finds or downloads the towers that a config names, and reads them once.

    Raises:
      ValueError: naming the options, if there is no such model.
      HostsDiffer: on all processes, if one has other contents.
    """
    folders, wrong = {}, []
    for name in ("encoder", "llm"):
        try:
            folders[name] = resolve_model(getattr(config, name))
        except ValueError as error:
            wrong.append(f"{option(name)}: {error}")
    if wrong:
        raise ValueError("\n".join(wrong))
    kinds = {"encoder": WHISPER_ENCODER, "llm": LLAMA}
    contents = {name: digest(kind, folders[name]) for name, kind in kinds.items()}
    path, folder = config.init_projector, RunFolder(any_path(config.out))
    if path and not (folder.config.is_file() and folder.read_config().init_projector == path):
        contents["init_projector"] = digest(PROJECTOR, path)
    hosts.agree({f"contents of {option(name)}": value for name, value in contents.items()})
    return Towers(**folders, contents=contents)


@dataclass(frozen=True)
class LoadedModel:
    """The modules, the frozen towers' parameters on the mesh, and the text processing.

    Attributes:
      config: the run's config.
      towers: where the towers were found.
      model: the modules.
      encoder_params: the frozen encoder's parameters.
      llm_params: the frozen LLM's parameters.
      prompt: the chat prompt, with the LLM's tokenizer.
      normalizers: what may be done to texts before they are compared, by name.
      mesh: the mesh that the parameters are on.
    """

    config: TrainConfig
    towers: Towers
    model: SpeechLLM
    encoder_params: Params
    llm_params: Params
    prompt: Prompt
    normalizers: Mapping[NormalizerName, Normalizer]
    mesh: Mesh

    @property
    def frozen(self) -> tuple[Params, Params]:
        """The parameters that training never changes: the encoder's and the LLM's."""
        return self.encoder_params, self.llm_params

    def make_batch_maker(self, folder: RunFolder, bad_rows: BadRowLog) -> BatchMaker:
        """A `BatchMaker` for the run's training and evaluation sets."""
        if folder.path != folder.on_disk:
            log.info("%s: what needs a disk is kept in %s", folder.path, folder.on_disk)
        encode = jax.jit(self.model.encode, out_shardings=spread_sharding(self.mesh))
        return BatchMaker(
            self.config,
            folder,
            self.prompt,
            self.mesh,
            bad_rows,
            functools.partial(encode, self.encoder_params),
            encoder_digest=self.towers.contents["encoder"],
        )

    def make_evaluator(self, bad_rows: BadRowLog) -> Evaluator:
        """An `Evaluator` with the run's limits."""
        return Evaluator(
            self.model,
            self.prompt,
            self.normalizers,
            mesh=self.mesh,
            decoding=self.config.decoding,
            num_threads=self.config.data.num_threads,
            bad_rows=bad_rows,
        )

    def make_flop_counter(self, projector_params: Params) -> FlopCounter:
        """A counter of the FLOPs in the run's steps."""
        data = self.config.data
        return make_flop_counter(
            (projector_params, *self.frozen),
            self.model.llm.config,
            window_frames=0 if data.cache_features else data.window_frames,
        )

    def embedding_rms(self) -> float:
        """Root mean square of the LLM's embedding table."""
        return embedding_rms(self.llm_params, self.mesh)

    def write_projector(self, folder: AnyPath, params: Params) -> None:
        """Writes a projector as a Flax folder, replacing any earlier one; every process calls it.

        Args:
          folder: the folder to write.
          params: the projector's parameters.
        """
        whole: Any = jax.device_get(jax.device_put(params, replicated(self.mesh)))
        if jax.process_index() == 0:
            text = config_text(run_config_dict(self.config, self.prompt.to_json()))
            write_flax(folder, in_memory(flatten(whole)), text, overwrite=True)

    def log_parameters(self, projector_params: Params) -> None:
        """Logs what is trained and what is frozen, with parameter counts."""
        parts = {
            "encoder": (self.encoder_params, "frozen"),
            "projector": (projector_params, "trained"),
            "llm": (self.llm_params, "frozen"),
        }
        for name, (params, role) in parts.items():
            count = sum(leaf.size for leaf in jax.tree.leaves(params))
            log.info("%-9s %13s parameters, %s", name, f"{count:,}", role)


def resolve_config(config: TrainConfig) -> TrainConfig:
    """Fills in what a config leaves open: the messages of the prompt, and the audio tokens.

    They are those of the run in `config.out`, if there is one; else those that the projector of
    `config.init_projector` was trained with, if its config.json says so; else the defaults.

    Raises:
      ValueError: if the run or the projector cannot be read.
    """
    folder, heard = RunFolder.of(config), {}
    has_run = folder.config.is_file()
    if has_run:
        saved = folder.read_config()
        heard = {name: _get(saved, name) for name in _LEFT_OPEN}
    elif config.init_projector:
        heard = read_training(config.init_projector)
    for name, default in _LEFT_OPEN.items():
        if _get(config, name) is None:
            known = heard.get(name)
            config = _set(config, name, default if known is None else known)
    if config.init_projector and not has_run:
        warn_of_other_training(config, config.init_projector, heard)
    return config


def warn_of_other_training(config: TrainConfig, path: str, heard: Mapping[str, Any]) -> None:
    """Warns of a projector that was trained with other messages or audio tokens than a config has.

    Args:
      config: the config.
      path: of the projector.
      heard: what `read_training` says of it.
    """
    for name in _LEFT_OPEN:
        if heard.get(name) not in (None, _get(config, name)):
            text = "%s is %r, but %s was trained with %r"
            log.warning(text, option(name), _get(config, name), path, heard[name])


_LEFT_OPEN = {
    "prompt.system": TINY_AUDIO_SYSTEM,
    "prompt.user": TINY_AUDIO_USER,
    "data.audio_tokens": "clip",
}
"""The options whose defaults are other things than values, with their last resort."""


def _get(config: TrainConfig, name: str) -> Any:
    section, field = name.split(".")
    return getattr(getattr(config, section), field)


def _set(config: TrainConfig, name: str, value: Any) -> TrainConfig:
    section, field = name.split(".")
    changed: Any = dataclasses.replace(getattr(config, section), **{field: value})
    return dataclasses.replace(config, **{section: changed})


def load_model(config: TrainConfig, mesh: Mesh, towers: Towers | None = None) -> LoadedModel:
    """Loads both towers straight into their shards.

    Args:
      config: the run's config.
      mesh: the mesh to load them on.
      towers: what `find_towers` has found; None calls it.

    Raises:
      ValueError: if a tower is not supported or the projector does not fit the towers.
    """
    towers = towers or find_towers(config)
    whisper = WHISPER_ENCODER.read_config(towers.encoder)
    llama = LLAMA.read_config(towers.llm)
    prompt = load_prompt(config, towers.llm)  # before the towers, which take their time
    dtype = jnp.dtype(config.dtype)
    model = make_model(config, whisper, llama)
    encoder_params = load_tower(
        WHISPER_ENCODER, towers.encoder, abstract_encoder(whisper, param_dtype=dtype, mesh=mesh)
    )
    llm_params = load_tower(
        LLAMA, towers.llm, abstract_decoder(llama, param_dtype=dtype, mesh=mesh)
    )
    with use_mesh(mesh):
        prefix = encode_prefix(model, llm_params, prompt.before_audio, mesh)
    return LoadedModel(
        config=config,
        towers=towers,
        model=dataclasses.replace(model, prefix=prefix),
        encoder_params=encoder_params,
        llm_params=llm_params,
        prompt=prompt,
        normalizers=make_normalizers(towers.encoder),
        mesh=mesh,
    )


def make_model(config: TrainConfig, whisper: WhisperConfig, llama: LlamaConfig) -> SpeechLLM:
    """The modules of a run, which still lack the keys and values of their prefix.

    Args:
      config: the run's config.
      whisper: the encoder's shape.
      llama: the LLM's shape.

    Raises:
      ValueError: if the projector does not fit the towers.
    """
    return make_speech_llm(
        whisper,
        config.projector,
        llama,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        augmentation=config.spec_augment if config.spec_augment.mask_time_prob else None,
    )


def load_prompt(config: TrainConfig, llm_folder: Path) -> Prompt:
    """The prompt of the run in `config.out`; if there is none yet, the one that it begins with.

    Raises:
      ValueError: if the LLM's tokenizer cannot make it.
    """
    tokenizer, saved = load_tokenizer(llm_folder), RunFolder(any_path(config.out)).read_prompt()
    # Of process 0, so that hosts agree on the date around midnight.
    now = hosts.broadcast("date", datetime.now().isoformat(timespec="seconds"))
    if saved is not None:
        return remake_prompt(tokenizer, config.prompt, saved)
    return make_prompt(tokenizer, config.prompt, date=datetime.fromisoformat(now))
