"""The whole model: waveform -> frozen encoder -> projector -> prompt -> frozen LLM -> logits."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from flax_projector.batch import Batch
from flax_projector.config import (
    LlamaConfig,
    ProjectorConfig,
    RematName,
    SpecAugmentConfig,
    WhisperConfig,
)
from flax_projector.models.layers import products_of
from flax_projector.models.llama import KVCache, LlamaDecoder, make_cache
from flax_projector.models.projector import ResidualAudioProjector
from flax_projector.models.whisper import WhisperEncoder, log_mel, mask_time
from flax_projector.sharding import encoder_rules, map_parts, num_batch_shards, replicated

Params = Any  # nested dict of arrays
Module = WhisperEncoder | ResidualAudioProjector | LlamaDecoder


def apply(module: Module, params: Params, *args: Any, **kwargs: Any) -> Any:
    """Calls a module on a bare parameter tree, with products as precise as its dtype."""
    with products_of(module.dtype):
        return module.apply({"params": params}, *args, **kwargs)


@dataclass(frozen=True)
class SpeechLLM:
    """The three modules and how they fit together; parameters are passed in, one tree per module.

    Attributes:
      encoder: the frozen encoder.
      projector: the part that is trained.
      llm: the frozen LLM.
      augmentation: masking of the features in training, if any.
      prefix: keys and values of the tokens that every sequence begins with, from `encode_prefix`;
        if None, they are computed for every row.
    """

    encoder: WhisperEncoder
    projector: ResidualAudioProjector
    llm: LlamaDecoder
    augmentation: SpecAugmentConfig | None = None
    prefix: KVCache | None = field(default=None, compare=False)

    @property
    def prefix_len(self) -> int:
        """Number of tokens in the prefix."""
        return 0 if self.prefix is None else self.prefix.k.shape[3]

    def encode(
        self,
        encoder_params: Params,
        samples: Float[Array, "B N"],
        num_samples: Int[Array, "B"] | None = None,
        *,
        augment_key: Array | None = None,
    ) -> Float[Array, "B S E"]:
        """Encoder frames of 16 kHz waveforms.

        Args:
          encoder_params: the frozen encoder's parameters.
          samples: waveforms in [-1, 1], zero-padded to the window.
          num_samples: length of each clip, without the padding; None if the clips fill the window.
            Only augmentation needs it.
          augment_key: random key for `augmentation`; None for evaluation.
        """
        with encoder_rules(len(samples)):
            samples = nn.with_logical_constraint(samples, ("batch", None))
            with jax.named_scope("log_mel"):  # names its time in profiles and plans
                mel = log_mel(samples, self.encoder.config.num_mel_bins)
                if augment_key is not None and self.augmentation is not None:
                    mel = mask_time(mel, num_samples, self.augmentation, augment_key)
            encode = functools.partial(apply, self.encoder, encoder_params)
            return map_parts(encode, mel, self.encoder.rows_at_once(mel.shape[-1]))

    def embed_audio(
        self,
        projector_params: Params,
        frames: Float[Array, "B S E"],
        frame_valid: Bool[Array, "B S"],
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B A D"]:
        """Projects frames to audio tokens. Padding frames are zeroed, as if the clip ended there.

        Args:
          projector_params: the projector's parameters.
          frames: encoder output.
          frame_valid: True for frames that contain part of the clip.
          dropout_key: random key for dropout; None for a deterministic pass.
        """
        frames = jnp.where(frame_valid[..., None], frames, 0)
        rngs = {} if dropout_key is None else {"dropout": dropout_key}
        return apply(
            self.projector, projector_params, frames, deterministic=dropout_key is None, rngs=rngs
        )

    def hear(
        self,
        projector_params: Params,
        encoder_params: Params,
        batch: Batch,
        *,
        key: Array | None = None,
    ) -> Float[Array, "B A D"]:
        """The audio tokens of a batch; waveforms are encoded first, frames used as they are.

        Args:
          projector_params: the projector's parameters.
          encoder_params: the frozen encoder's parameters.
          batch: utterances, as waveforms or frames.
          key: random key for dropout and augmentation; None for evaluation, which uses neither.
        """
        dropout_key = augment_key = None
        if key is not None:
            dropout_key, augment_key = jax.random.split(key)
        frames = batch.frames
        if frames is None:
            frames = self.encode(
                encoder_params, batch.windows, batch.num_samples, augment_key=augment_key
            )[:, : batch.max_frames]
            frames = nn.with_logical_constraint(frames, ("batch", None, None))
        return self.embed_audio(
            projector_params, frames, batch.frame_valid, dropout_key=dropout_key
        )

    def merge(
        self, llm_params: Params, batch: Batch, audio: Float[Array, "B A D"]
    ) -> Float[Array, "B L D"]:
        """Input embeddings: the i-th AUDIO_TOKEN of a row becomes the row's i-th audio token."""
        is_audio = batch.is_audio
        text = apply(self.llm, llm_params, jnp.where(is_audio, 0, batch.tokens), method="embed")
        slot = jnp.clip(jnp.cumsum(is_audio, axis=1) - 1, 0, audio.shape[1] - 1)  # [B, L]
        audio = jnp.take_along_axis(audio, slot[..., None], axis=1)  # [B, L, D]
        return jnp.where(is_audio[..., None], audio.astype(text.dtype), text)

    def embedding_logits(
        self, llm_params: Params, audio: Float[Array, "B A D"], token_ids: np.ndarray
    ) -> Float[Array, "B A Z"]:
        """Inner products of audio tokens with the LLM's embeddings of Z token ids, f32."""
        tokens = jnp.asarray(token_ids)[None]
        rows = apply(self.llm, llm_params, tokens, method="embed")[0]  # [Z, D]
        return jnp.einsum("BAD,ZD->BAZ", audio, rows, preferred_element_type=jnp.float32)

    def label_logits(
        self,
        llm_params: Params,
        inputs: Float[Array, "B L D"],
        label_positions: Int[Array, "B T"],
    ) -> Float[Array, "B T V"]:
        """Logits only where labels are predicted: for all positions, [B, L, V] would be gigabytes.

        Sequences are padded on the right, so the causal mask alone hides the padding. The prefix is
        not recomputed: it depends neither on the audio nor on the projector.
        """
        start, length = self.prefix_len, inputs.shape[1]
        hidden, _ = apply(
            self.llm,
            llm_params,
            inputs[:, start:],
            positions=jnp.arange(start, length)[None],
            prefix=self.prefix,
            method="blocks",
        )
        index = jnp.maximum(label_positions - start, 0)  # padding rows have their labels at 0
        hidden = jnp.take_along_axis(hidden, index[..., None], axis=1)  # [B, T, D]
        return apply(self.llm, llm_params, hidden, method="logits")


def make_speech_llm(
    whisper: WhisperConfig,
    projector: ProjectorConfig,
    llama: LlamaConfig,
    *,
    dtype: DTypeLike,
    remat: RematName,
    augmentation: SpecAugmentConfig | None = None,
) -> SpeechLLM:
    """Assembles the modules: towers stored and computed in `dtype`, the projector stored in f32.

    Raises:
      ValueError: if the projector's widths differ from the towers'.
    """
    widths = {"encoder": whisper.d_model, "llm": llama.hidden_size}
    problems = [
        f"--{name} has width {width}, but the projector is made for {made_for}: take another "
        f"--{name}, or train with --projector.{name}-dim {width}"
        for name, width in widths.items()
        if (made_for := getattr(projector, f"{name}_dim")) != width
    ]
    if problems:
        raise ValueError("\n".join(problems))
    return SpeechLLM(
        encoder=WhisperEncoder(whisper, dtype=dtype, param_dtype=dtype),
        projector=ResidualAudioProjector(projector, dtype=dtype, param_dtype=jnp.float32),
        llm=LlamaDecoder(llama, dtype=dtype, param_dtype=dtype, remat=remat),
        augmentation=augmentation,
    )


def encode_prefix(
    model: SpeechLLM, llm_params: Params, tokens: Sequence[int], mesh: Mesh
) -> KVCache | None:
    """Computes keys and values of the tokens before the audio, once for all rows and all steps.

    Args:
      model: the modules.
      llm_params: the LLM's parameters.
      tokens: token ids of the prompt's beginning.
      mesh: the mesh that the parameters are on.

    Returns:
      NumPy arrays [layers, 1, K, tokens, d], the same on every process, which become constants of
      the compiled step; None if there are no tokens.
    """
    if not tokens:
        return None
    length = len(tokens)
    llm = functools.partial(apply, model.llm)

    def run(llm_params: Params) -> KVCache:
        rows = jnp.tile(jnp.array(tokens), (num_batch_shards(mesh), 1))  # one per batch shard
        _, cache = llm(
            llm_params,
            llm(llm_params, rows, method="embed"),
            positions=jnp.arange(length)[None],
            cache=make_cache(model.llm.config, len(rows), length, model.llm.dtype),
            method="blocks",
        )
        return jax.tree.map(lambda x: x[:, :1], cache)

    return jax.device_get(jax.jit(run, out_shardings=replicated(mesh))(llm_params))


def rms(x: Float[Array, "B L D"], valid: Bool[Array, "B L"]) -> Float[Array, ""]:
    """Root mean square of the valid vectors' elements, f32."""
    mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1)  # [B, L]
    count = jnp.maximum(jnp.sum(valid), 1)
    return jnp.sqrt(jnp.sum(jnp.where(valid, mean_square, 0)) / count)
