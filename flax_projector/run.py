"""What the programs share: from a config to the loaded model and its data."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from convert.load import load_tower, resolve_model
from convert.models import LLAMA, WHISPER_ENCODER
from flax_projector.config import TrainConfig
from flax_projector.data import (
    BatchSource,
    Inputs,
    ManifestRow,
    Utterance,
    Waveforms,
    prepare,
    read_manifest,
)
from flax_projector.decode import make_normalizer
from flax_projector.evaluate import Evaluator
from flax_projector.features import keep_features
from flax_projector.llama import abstract_decoder
from flax_projector.prompt import Prompt, load_tokenizer, make_prompt
from flax_projector.sharding import batch_sharding
from flax_projector.speech_llm import Params, SpeechLLM, make_speech_llm
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
    model = make_speech_llm(whisper, config.projector, llama, dtype=dtype, remat=config.remat)
    return LoadedModel(
        model=model,
        encoder_params=load_tower(
            WHISPER_ENCODER,
            encoder_folder,
            abstract_encoder(whisper, param_dtype=dtype, mesh=mesh),
        ),
        llm_params=load_tower(
            LLAMA, llm_folder, abstract_decoder(llama, param_dtype=dtype, mesh=mesh)
        ),
        prompt=make_prompt(load_tokenizer(llm_folder), config.prompt),
        normalize=make_normalizer(encoder_folder),
        mesh=mesh,
    )


def make_source(
    name: str,
    rows: Sequence[ManifestRow],
    loaded: LoadedModel,
    config: TrainConfig,
    **kwargs: Any,
) -> BatchSource:
    """Batches of a set of rows; `kwargs` go to `BatchSource`."""
    utterances = prepare(rows, loaded.prompt, config.data)
    source = BatchSource(
        utterances,
        inputs=_make_inputs(name, utterances, loaded, config),
        prompt=loaded.prompt,
        config=config.data,
        pool_stride=config.projector.projector_pool_stride,
        mesh=loaded.mesh,
        **kwargs,
    )
    log.info("%s: %d utterances, buckets %s", name, len(utterances), source.buckets)
    return source


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
        encoder_name=f"{config.encoder} {config.dtype}",
    )


def make_eval_sources(loaded: LoadedModel, config: TrainConfig) -> dict[str, BatchSource]:
    """One source for each manifest of `data.eval`, by its file name."""
    return {
        Path(path).stem: make_source(
            Path(path).stem,
            read_manifest(path),
            loaded,
            config,
            batch_size=config.data.eval_batch_size,
        )
        for path in config.data.eval
    }


def make_evaluator(loaded: LoadedModel, config: TrainConfig) -> Evaluator:
    """Evaluation of the loaded model with the run's limits."""
    return Evaluator(
        loaded.model,
        loaded.prompt,
        loaded.normalize,
        mesh=loaded.mesh,
        max_new_tokens=config.max_new_tokens,
        num_threads=config.data.num_threads,
    )
