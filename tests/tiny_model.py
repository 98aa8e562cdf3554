"""A tiny speech LLM with random parameters, and random batches for it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flax_projector.batch import AUDIO_TOKEN, Batch
from flax_projector.config import LlamaConfig, MeshConfig, ProjectorConfig, WhisperConfig
from flax_projector.models.llama import abstract_decoder
from flax_projector.models.projector import abstract_projector
from flax_projector.models.speech_llm import SpeechLLM, make_speech_llm
from flax_projector.models.whisper import abstract_encoder
from flax_projector.sharding import make_mesh

WHISPER = WhisperConfig(
    num_mel_bins=80, d_model=12, encoder_layers=2, encoder_attention_heads=3, encoder_ffn_dim=20
)
LLAMA = LlamaConfig(
    vocab_size=61,
    hidden_size=20,
    intermediate_size=28,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)
PROJECTOR = ProjectorConfig(encoder_dim=12, llm_dim=20, projector_hidden_dim=16)
SAMPLES, FRAMES, LENGTH, TEXT = 16_000, 24, 19, 5
PREFIX = (4, 31, 7)  # begins every row


def make_model(projector: ProjectorConfig = PROJECTOR, **options: Any) -> SpeechLLM:
    """The modules, in f32."""
    options = {"dtype": jnp.float32, "remat": "products", **options}
    return make_speech_llm(WHISPER, projector, LLAMA, **options)


def random_params(abstract: Any, seed: int) -> Any:
    """Parameters of these shapes, all of them random; no norm is one and no bias is zero."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = 0.2 * rng.standard_normal(leaf.shape)
        return jnp.asarray(noise + (path[-1].key == "scale"), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract)


@functools.cache
def make_params() -> tuple[Any, Any, Any]:
    """Random parameters of projector, encoder and LLM."""
    abstract = (abstract_projector(PROJECTOR), abstract_encoder(WHISPER), abstract_decoder(LLAMA))
    return random_params(abstract, seed=9)


def make_batch(num_rows: int, *, seed: int = 0, audio: str = "frames") -> Batch:
    """Random rows with 2 to 6 audio tokens and 1 to 5 labels.

    Args:
      num_rows: B.
      seed: of the random numbers.
      audio: "samples", which the encoder hears, or "frames", as if it had heard them. With frames a
        step is compiled in a fraction of the time.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, LLAMA.vocab_size, (num_rows, LENGTH), dtype=np.int32)
    tokens[:, : len(PREFIX)] = PREFIX
    num_audio = rng.integers(2, 7, num_rows)
    for row, count in zip(tokens, num_audio, strict=True):
        row[len(PREFIX) :][:count] = AUDIO_TOKEN
    starts = len(PREFIX) + num_audio[:, None] + 2
    num_labels = rng.integers(1, TEXT + 1, num_rows)
    shape = {"samples": (SAMPLES,), "frames": (FRAMES, WHISPER.d_model)}[audio]
    scale = {"samples": 0.1, "frames": 1.0}[audio]
    heard: dict[str, Any] = {
        audio: scale * rng.standard_normal((num_rows, *shape)).astype(np.float32)
    }
    return Batch(
        num_frames=(4 * num_audio).astype(np.int32),
        tokens=tokens,
        prompt_len=(starts[:, 0] + 1).astype(np.int32),
        label_positions=(starts + np.arange(TEXT)).astype(np.int32),
        labels=rng.integers(0, LLAMA.vocab_size, (num_rows, TEXT), dtype=np.int32),
        label_valid=np.arange(TEXT) < num_labels[:, None],
        max_frames=FRAMES,
        **heard,
    )


def rows_of(batch: Batch, rows: int | slice) -> Batch:
    """Some rows of a batch."""
    return jax.tree.map(lambda x: x[rows], batch)


def with_padding(batch: Batch, num_rows: int) -> Batch:
    """A batch with rows of padding at its end."""
    return jax.tree.map(lambda x: np.pad(x, [(0, num_rows)] + [(0, 0)] * (x.ndim - 1)), batch)


def mesh_of(num_devices: int) -> Mesh:
    """A data-parallel mesh over the first devices."""
    return make_mesh(MeshConfig(), jax.devices()[:num_devices])
