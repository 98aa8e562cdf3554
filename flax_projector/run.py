"""What the programs share: from a config to the loaded model and its data."""

import dataclasses
import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from convert.checkpoint import in_memory
from convert.flax_files import write_flax
from convert.hf_config import config_text, run_config_dict
from convert.load import load_tower, resolve_model
from convert.models import LLAMA, WHISPER_ENCODER
from convert.trees import flatten
from flax_projector.bad_rows import BadRow, BadRowLog
from flax_projector.batch_plan import Utterance, prepare
from flax_projector.config import TrainConfig
from flax_projector.data import BatchSource, Inputs, Waveforms, find_unreadable
from flax_projector.decode import make_normalizer
from flax_projector.evaluate import Evaluator
from flax_projector.features import keep_features
from flax_projector.files import write_atomically
from flax_projector.hf_data import PREFIX, read_hf
from flax_projector.llama import abstract_decoder
from flax_projector.manifest import ManifestRow, read_manifest
from flax_projector.prompt import Prompt, load_tokenizer, make_prompt
from flax_projector.sharding import batch_sharding, replicated, use_mesh
from flax_projector.speech_llm import Params, SpeechLLM, encode_prefix, make_speech_llm
from flax_projector.whisper import abstract_encoder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """The modules, the frozen towers' parameters on the mesh, and the text side.

    Attributes:
      model: the modules.
      encoder_params: frozen.
      llm_params: frozen.
      prompt: with the LLM's tokenizer.
      normalize: for word error rates.
      mesh: where everything lies.
    """

    model: SpeechLLM
    encoder_params: Params
    llm_params: Params
    prompt: Prompt
    normalize: EnglishTextNormalizer
    mesh: Mesh

    @property
    def frozen(self) -> tuple[Params, Params]:
        """The parameters that no step changes: encoder, LLM."""
        return self.encoder_params, self.llm_params


def load_model(config: TrainConfig, mesh: Mesh) -> LoadedModel:
    """Reads both towers into their shards.

    Raises:
      ValueError: if a tower is not supported or the projector does not fit.
    """
    encoder_folder, llm_folder = resolve_model(config.encoder), resolve_model(config.llm)
    whisper = WHISPER_ENCODER.read_config(encoder_folder)
    llama = LLAMA.read_config(llm_folder)
    dtype = jnp.dtype(config.dtype)
    augmentation = config.spec_augment if config.spec_augment.mask_time_prob else None
    model = make_speech_llm(
        *(whisper, config.projector, llama),
        dtype=dtype,
        remat=config.remat,
        augmentation=augmentation,
    )
    encoder_params = load_tower(
        WHISPER_ENCODER,
        encoder_folder,
        abstract_encoder(whisper, param_dtype=dtype, mesh=mesh),
    )
    llm_params = load_tower(
        LLAMA, llm_folder, abstract_decoder(llama, param_dtype=dtype, mesh=mesh)
    )
    prompt = make_prompt(load_tokenizer(llm_folder), config.prompt)
    with use_mesh(mesh):
        prefix = encode_prefix(model, llm_params, prompt.before_audio, mesh)
    return LoadedModel(
        model=dataclasses.replace(model, prefix=prefix),
        encoder_params=encoder_params,
        llm_params=llm_params,
        prompt=prompt,
        normalize=make_normalizer(encoder_folder),
        mesh=mesh,
    )


def read_source(source: str, config: TrainConfig) -> tuple[list[ManifestRow], list[BadRow]]:
    """Reads the rows of a manifest or of a data set of Hugging Face, see `DataConfig`.

    Raises:
      ValueError: if there is none.
    """
    cache = Path(config.data.cache_dir or Path(config.out) / "data")
    if source.startswith(PREFIX):
        return read_hf(source, config.data, cache)
    return read_manifest(source, cache=cache)


def source_name(source: str) -> str:
    """Under which a source is reported: a manifest's file name, or a data set's."""
    if source.startswith(PREFIX):
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", source.removeprefix(PREFIX)).strip("-.")
    return PurePath(source).stem


def open_bad_rows(config: TrainConfig) -> BadRowLog:
    """The list of the run's bad rows, `bad_rows.jsonl` in its folder."""
    return BadRowLog(Path(config.out) / "bad_rows.jsonl", max_rate=config.data.max_bad_rate)


def make_source(
    name: str,
    rows: Sequence[ManifestRow],
    bad: Sequence[BadRow],
    loaded: LoadedModel,
    config: TrainConfig,
    bad_rows: BadRowLog,
    **kwargs: Any,
) -> BatchSource:
    """Batches of a set of rows.

    Args:
      name: of the set.
      rows: usable ones.
      bad: the others.
      loaded: model and prompt.
      config: of the run.
      bad_rows: gets `bad` and what no bucket holds.
      kwargs: for `BatchSource`.

    Raises:
      ValueError: if too many rows are defective, none is left, or hosts see different rows.
    """
    num_rows = len(rows) + len(bad)
    if not rows:
        bad_rows.start(name, bad, num_rows=num_rows)
        raise ValueError(f"{name}: none of {num_rows} rows can be used")
    utterances, unfit = prepare(rows, loaded.prompt, config.data)
    left_out = [*bad, *unfit]
    known = bad_rows.known(name)
    unreadable = find_unreadable(
        [utterance for utterance in utterances if utterance.row.key in known],
        Waveforms(config.data.window_samples),
        num_threads=config.data.num_threads,
    )
    bad_rows.start(name, left_out, num_rows=num_rows, unreadable=unreadable)
    source = BatchSource(
        utterances,
        inputs=_make_inputs(name, utterances, loaded, config),
        prompt=loaded.prompt,
        config=config.data,
        pool_stride=config.projector.projector_pool_stride,
        mesh=loaded.mesh,
        name=name,
        left_out=left_out,
        **kwargs,
    )
    _require_same_on_all_hosts(source)
    log.info("%s: %d utterances, buckets %s", name, len(utterances), source.buckets)
    return source


def _require_same_on_all_hosts(source: BatchSource) -> None:
    """Hosts that miss different files would train on different batches, or wait for each other."""
    ours = np.frombuffer(bytes.fromhex(source.fingerprint), np.uint8)
    everywhere = np.reshape(multihost_utils.process_allgather(ours), (-1, len(ours)))
    if not (everywhere == ours).all():
        raise ValueError(
            f"{source.name}: the hosts see different rows: give all of them the same files"
        )


def make_train_source(loaded: LoadedModel, config: TrainConfig, bad_rows: BadRowLog) -> BatchSource:
    """The batches of the run: all of `data.train`, mixed by their weights, shuffled.

    Raises:
      ValueError: if there is no training data, or none that can be used.
    """
    sources = config.data.train
    if not sources:
        raise ValueError("no training data: pass --data.train MANIFEST.jsonl")
    rows, bad = _read_all(sources, config)
    return make_source(
        "train",
        rows,
        bad,
        loaded,
        config,
        bad_rows,
        batch_size=config.data.batch_size,
        accumulation_steps=config.accumulation_steps,
        shuffle_seed=config.seed,
        num_batches=config.num_steps,
        weights=dict(zip(sources, config.data.train_weights or [1.0] * len(sources), strict=True)),
    )


def _read_all(
    sources: Sequence[str], config: TrainConfig
) -> tuple[list[ManifestRow], list[BadRow]]:
    parts = [read_source(source, config) for source in sources]
    return [row for rows, _ in parts for row in rows], [row for _, bad in parts for row in bad]


def _make_inputs(
    name: str, utterances: Sequence[Utterance], loaded: LoadedModel, config: TrainConfig
) -> Inputs:
    if not config.data.cache_features:
        return Waveforms(config.data.window_samples)
    encode = jax.jit(loaded.model.encode)

    def encode_batch(samples: np.ndarray) -> jax.Array:
        on_devices = jax.device_put(samples, batch_sharding(loaded.mesh))
        return encode(loaded.encoder_params, on_devices)[0]

    return keep_features(
        Path(config.out) / "features" / name,
        utterances,
        encode_batch,
        window_samples=config.data.window_samples,
        batch_size=config.data.eval_batch_size,
        encoder_dim=config.projector.encoder_dim,
        encoder_name=f"{config.encoder} {config.dtype}",
    )


def make_eval_sources(
    loaded: LoadedModel, config: TrainConfig, bad_rows: BadRowLog
) -> dict[str, BatchSource]:
    """One source for each of `data.eval`, by its name.

    Raises:
      ValueError: if one has no usable row, or two have one name.
    """
    names = [source_name(source) for source in config.data.eval]
    if len(set(names)) < len(names) or "train" in names:
        raise ValueError(f"data.eval {config.data.eval}: names must differ, not be 'train'")
    return {
        name: make_source(
            name,
            *read_source(source, config),
            loaded,
            config,
            bad_rows,
            batch_size=config.data.eval_batch_size,
        )
        for name, source in zip(names, config.data.eval, strict=True)
    }


def make_evaluator(loaded: LoadedModel, config: TrainConfig, bad_rows: BadRowLog) -> Evaluator:
    """Evaluation of the loaded model with the run's limits."""
    return Evaluator(
        loaded.model,
        loaded.prompt,
        loaded.normalize,
        mesh=loaded.mesh,
        max_new_tokens=config.max_new_tokens,
        num_threads=config.data.num_threads,
        bad_rows=bad_rows,
    )


def write_projector(folder: Path, params: Params, config: TrainConfig, mesh: Mesh) -> None:
    """Writes a projector as a Flax folder, in place of an earlier one; every process must call."""
    whole = jax.device_get(jax.device_put(params, replicated(mesh)))
    if jax.process_index() == 0:
        leaves = in_memory(flatten(whole))
        write_flax(folder, leaves, config_text(run_config_dict(config)), overwrite=True)


def read_best(folder: Path) -> dict[str, Any]:
    """Step, word error rate and loss of the projector in `best`; infinite if there is none."""
    path = folder / "best.json"
    if path.is_file():
        return json.loads(path.read_text())
    return {"step": None, "wer": math.inf, "loss": math.inf}


def write_best(folder: Path, best: dict[str, Any]) -> None:
    """Records what `read_best` reads."""
    if jax.process_index() == 0:
        write_atomically(folder / "best.json", json.dumps(best) + "\n")
