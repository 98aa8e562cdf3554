"""Whisper's front half, frozen: log-mel features and the encoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from transformers.audio_utils import mel_filter_bank

from flax_projector.config import SpecAugmentConfig, WhisperConfig
from flax_projector.lengths import HOP_LENGTH, SAMPLE_RATE
from flax_projector.models.attention import attend, kernel_length
from flax_projector.models.layers import HeadProjection, dense, exact_gelu
from flax_projector.sharding import ENCODER_RULES, abstract_params

WINDOW_LENGTH = 400  # samples of one STFT window: 25 ms


@functools.cache
def _mel_filters(num_mel_bins: int) -> np.ndarray:
    """Slaney mel filters f32[W, M] on the W = 201 frequencies of the STFT."""
    filters = mel_filter_bank(
        num_frequency_bins=1 + WINDOW_LENGTH // 2,
        num_mel_filters=num_mel_bins,
        min_frequency=0.0,
        max_frequency=8000.0,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return filters.astype(np.float32)


@functools.cache
def _half_dft() -> tuple[np.ndarray, np.ndarray]:
    """Cosines [201, W] for the even half of a window, and sines [199, W] for its odd half."""
    middle = WINDOW_LENGTH // 2
    angles = 2 * np.pi * np.outer(np.arange(middle + 1), np.arange(middle + 1)) / WINDOW_LENGTH
    return np.cos(angles).astype(np.float32), np.sin(angles[1:-1]).astype(np.float32)


def _power_spectrum(windows: Float[Array, "B F samples"]) -> Float[Array, "B F W"]:
    """|DFT|^2 of real windows of 400 samples, at 201 frequencies.

    Uses two matrix products instead of `jnp.fft`: under a mesh, XLA gathers the whole batch on
    every device to run an FFT. Sample i and its mirror 400 - i share a cosine and, except for the
    sign, a sine, so the window is folded first: that halves the products, and gives the rounding
    error of an FFT.
    """
    middle = WINDOW_LENGTH // 2
    first, second = windows[..., 1:middle], windows[..., :middle:-1]
    even = jnp.concatenate(
        [windows[..., :1], first + second, windows[..., middle : middle + 1]], axis=-1
    )
    cosines, sines = _half_dft()
    highest = jax.lax.Precision.HIGHEST
    real = jnp.einsum("BFj,jW->BFW", even, cosines, precision=highest)
    imaginary = jnp.einsum("BFj,jW->BFW", first - second, sines, precision=highest)
    return jnp.square(real) + jnp.square(imaginary)


def _windows(samples: Float[Array, "B N"], count: int) -> Float[Array, "B F samples"]:
    """The first windows of 400 samples, each 160 after the one before: shifts of a [B, F, 160].

    Reading them sample by sample takes an index of millions of numbers, and a TPU's slowest way to
    read memory.
    """
    num_hops = count + WINDOW_LENGTH // HOP_LENGTH
    hops = samples[:, : num_hops * HOP_LENGTH].reshape(len(samples), num_hops, HOP_LENGTH)
    starts = range(0, WINDOW_LENGTH, HOP_LENGTH)
    parts = [hops[:, i : i + count, : WINDOW_LENGTH - start] for i, start in enumerate(starts)]
    return jnp.concatenate(parts, axis=-1)


def log_mel(samples: Float[Array, "B N"], num_mel_bins: int) -> Float[Array, "B M F"]:
    """Whisper's log-mel features.

    Args:
      samples: 16 kHz waveforms in [-1, 1], zero-padded to the window (30 s: N = 480000).
      num_mel_bins: 80, or 128 from large-v3 on.

    Returns:
      f32[B, M, F], F = floor(N / 160): log10 power, at most 8 below the loudest bin of the
      utterance's window, scaled by (x + 4) / 4.

    Raises:
      ValueError: if N is not above 200, half an STFT window.

    Source: `WhisperFeatureExtractor` (transformers): periodic Hann window, reflected edges, last
    STFT frame dropped.
    """
    n = samples.shape[-1]
    if n <= WINDOW_LENGTH // 2:
        raise ValueError(f"{n} samples: need more than {WINDOW_LENGTH // 2}, half an STFT window")
    hann = np.hanning(WINDOW_LENGTH + 1)[:-1].astype(np.float32)  # periodic
    samples = samples.astype(jnp.float32)
    padded = jnp.pad(samples, ((0, 0), (WINDOW_LENGTH // 2,) * 2), mode="reflect")
    power = _power_spectrum(_windows(padded, n // HOP_LENGTH) * hann)  # [B, F, W]
    filters = _mel_filters(num_mel_bins)
    mel = jnp.einsum("BFW,WM->BMF", power, filters, precision=jax.lax.Precision.HIGHEST)
    log = jnp.log10(jnp.maximum(mel, 1e-10))
    log = jnp.maximum(log, jnp.max(log, axis=(1, 2), keepdims=True) - 8.0)
    return (log + 4.0) / 4.0


def mask_time(
    mel: Float[Array, "B M F"],
    num_samples: Int[Array, "B"] | None,
    config: SpecAugmentConfig,
    key: Array,
) -> Float[Array, "B M F"]:
    """Zeroes random stretches of each clip's features: the time masks of SpecAugment.

    Args:
      mel: log-mel features.
      num_samples: length of each clip, within which the masks lie; None if the clips fill the
        window.
      config: how many masks, and how long.
      key: random key.

    Source: `_compute_mask_indices` (transformers): the number of masks is rounded at random; they
    start at different frames and may overlap.
    """
    b, _, f = mel.shape
    length = config.mask_time_length
    if f < length:
        return mel
    num_frames = jnp.full(b, f) if num_samples is None else num_samples // HOP_LENGTH
    count_key, start_key = jax.random.split(key)
    counts = config.mask_time_prob * num_frames / length + jax.random.uniform(count_key, (b,))
    counts = jnp.maximum(counts.astype(int), config.mask_time_min_masks)
    most = max(int(config.mask_time_prob * f / length + 1), config.mask_time_min_masks)
    # The positions of the largest random numbers are starts that all differ. They are found by
    # sorting: a TPU's `top_k` gathers the whole batch on every chip.
    is_start = jnp.arange(f) <= num_frames[:, None] - length  # [B, F]
    ranks = jnp.where(is_start, jax.random.uniform(start_key, (b, f), minval=1e-6), 0.0)
    positions = jnp.broadcast_to(jnp.arange(f), (b, f))
    ranks, starts = (x[:, :most] for x in jax.lax.sort_key_val(-ranks, positions))  # [B, n]
    is_drawn = (jnp.arange(most) < counts[:, None]) & (ranks < 0)
    offsets = jnp.arange(f) - starts[..., None]  # [B, n, F]
    is_masked = (offsets >= 0) & (offsets < length) & is_drawn[..., None]
    return jnp.where(jnp.any(is_masked, axis=1)[:, None], 0.0, mel)


def _layer_norm(module: nn.Module, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=1e-5,  # torch's default; flax's is 1e-6
        use_fast_variance=False,  # E[x^2] - E[x]^2 loses digits on Whisper's large activations
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        name=name,
    )


class EncoderSelfAttention(nn.Module):
    """Self-attention of a clip's frames; Whisper's keys have no bias."""

    config: WhisperConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S E"], num_frames: int | None = None
    ) -> Float[Array, "B S E"]:
        """[B, S, E] in `dtype`; every frame sees the first `num_frames`: the rest is padding."""
        b, s, e = x.shape

        def project(name: str, *, use_bias: bool = True) -> Float[Array, "B H S d"]:
            return HeadProjection(
                self.config.encoder_attention_heads,
                e,
                use_bias=use_bias,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )(x)

        q, k, v = project("q_proj"), project("k_proj", use_bias=False), project("v_proj")
        q *= q.shape[-1] ** -0.5
        out = attend(q, k, v, num_keys=num_frames).swapaxes(1, 2).reshape(b, s, e)
        return dense(self, e, ("heads", "embed"), "out_proj")(out)


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer; returns (x, None), as `nn.scan` expects."""

    config: WhisperConfig
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S E"], num_frames: int | None = None
    ) -> tuple[Float[Array, "B S E"], None]:
        """[B, S, E] in `dtype`, and None, since the scan has nothing to collect.

        Frames from `num_frames` on are padding, which no frame sees; None if there is none.
        """
        c = self.config
        attention = EncoderSelfAttention(c, self.dtype, self.param_dtype, name="self_attn")
        x = x + attention(_layer_norm(self, "self_attn_layer_norm")(x), num_frames)
        h = _layer_norm(self, "final_layer_norm")(x)
        h = exact_gelu(dense(self, c.encoder_ffn_dim, ("embed", "mlp"), "fc1")(h))
        x = x + dense(self, c.d_model, ("mlp", "embed"), "fc2")(h)
        return nn.with_logical_constraint(x, ("batch", None, None)), None


class WhisperEncoder(nn.Module):
    """Whisper's encoder with scanned layers: parameters of all layers are stacked on axis 0.

    Attributes:
      config: the encoder's shape.
      dtype: compute dtype; norms and softmax use at least f32.
      param_dtype: storage dtype.

    Source: `WhisperEncoder` (transformers).
    """

    config: WhisperConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, mel: Float[Array, "B M F"]) -> Float[Array, "B S E"]:
        """Encodes log-mel features.

        Args:
          mel: [B, M, F]; F = 3000 is the window of 30 s that Whisper was trained on. A shorter
            window uses only the first position embeddings.

        Returns:
          [B, S, E] in `dtype`, S = F / 2: frames of the whole window, silence included.

        Raises:
          ValueError: if M or F does not fit the config.
        """
        c = self.config
        _, m, f = mel.shape
        if m != c.num_mel_bins or f % 2 or f > 2 * c.max_source_positions:
            raise ValueError(
                f"mel features {mel.shape}: need [B, {c.num_mel_bins}, F] with F even and at most "
                f"{2 * c.max_source_positions}"
            )
        x = mel.astype(self.dtype).swapaxes(1, 2)  # [B, F, M]
        x = exact_gelu(self._conv(stride=1, axes=("kernel", "mel", "embed"), name="conv1")(x))
        x = exact_gelu(self._conv(stride=2, axes=("kernel", "conv_in", "embed"), name="conv2")(x))
        embed_positions = nn.Embed(
            c.max_source_positions,
            c.d_model,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=nn.with_logical_partitioning(
                nn.initializers.normal(0.02), ("positions", "embed")
            ),
            name="embed_positions",
        )
        s = f // 2
        x = x + embed_positions(jnp.arange(s))
        x = jnp.pad(x, ((0, 0), (0, kernel_length(s) - s), (0, 0)))  # [B, padded S, E]
        scanned = nn.scan(
            EncoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=c.encoder_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = scanned(c, self.dtype, self.param_dtype, name="layers")(x, s)
        return _layer_norm(self, "layer_norm")(x[:, :s])

    def rows_at_once(self, num_mel_frames: int) -> int | None:
        """How many rows of a device a TPU encodes fastest together; None if all of them.

        What the layers pass on stays in the memory on the chip as long as it fits. The rule is that
        the widest of it, in the MLP, takes half of that memory.
        """
        if not pltpu.is_tpu_device():
            return None
        length = kernel_length(num_mel_frames // 2)
        row_bytes = length * self.config.encoder_ffn_dim * jnp.dtype(self.dtype).itemsize
        return pltpu.get_tpu_info().vmem_capacity_bytes // 2 // row_bytes or None

    def _conv(self, *, stride: int, axes: tuple[str, str, str], name: str) -> nn.Conv:
        return nn.Conv(
            self.config.d_model,
            kernel_size=(3,),
            strides=(stride,),
            padding=1,  # as torch; "SAME" pads a strided convolution on the right only
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.with_logical_partitioning(nn.initializers.normal(0.02), axes),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[2:]),
            name=name,
        )


def abstract_encoder(
    config: WhisperConfig, *, param_dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None
) -> dict:
    """Shapes, dtypes and shardings of the encoder's parameters."""
    module = WhisperEncoder(config, param_dtype=param_dtype)
    mel = jax.ShapeDtypeStruct((1, config.num_mel_bins, 2), param_dtype)
    return abstract_params(module, mel, mesh, ENCODER_RULES)
