"""Model shapes, with the field names of their PyTorch counterparts."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge

from flax_projector.config.fields import (
    Count,
    PositiveFloat,
    PositiveInt,
    Rate,
    Rule,
    check,
    multiple_of,
)

DTypeName = Literal["float32", "bfloat16"]
RematName = Literal["none", "products", "gates", "attention", "layers"]  # most memory first
AudioTokensName = Literal["clip", "window"]
TextCaseName = Literal["keep", "lower"]
NormalizerName = Literal["english", "basic", "none"]
BadClipsName = Literal["wrong", "exclude"]
TranscriptFormat = Literal["text", "json", "jsonl", "srt", "vtt"]


@dataclass(frozen=True)
class ProjectorConfig:
    """The projector's shape and initialisation, with the field names of the PyTorch config.

    Source: the attributes that `ResidualAudioProjector` reads from its config, and its fallbacks.
    `rms_norm_eps` is a constant there (1e-6; one late variant used 1e-8).
    """

    encoder_dim: PositiveInt
    """Width E of the encoder's frames."""
    llm_dim: PositiveInt
    """Width D of the LLM's embeddings."""
    projector_pool_stride: PositiveInt = 4
    """Encoder frames concatenated into one audio token (k): 4 gives 12.5 tokens per second."""
    projector_hidden_dim: Annotated[int | None, Ge(0)] = None
    """Width of the residual MLPs; None or 0 means 4 x llm_dim."""
    projector_num_layers: Count = 2
    """Number of residual MLP blocks, each followed by a norm."""
    projector_dropout: Rate = 0.0
    """Dropout rate after the activation, after fc2 and on the output."""
    projector_init_std: PositiveFloat = 0.02
    """Standard deviation of the initial kernels; fc2 starts at a tenth of it."""
    rms_norm_eps: PositiveFloat = 1e-6
    """Added to the mean square in every norm."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def hidden_dim(self) -> int:
        """Width of the residual MLPs, with the default resolved."""
        return self.projector_hidden_dim or 4 * self.llm_dim

    def differences(self, other: "ProjectorConfig") -> dict[str, tuple[Any, Any]]:
        """The fields that make another config compute something else: name -> (ours, theirs).

        Dropout and initialisation matter only in training, so they are not compared. The hidden
        width is compared after resolving its default, and only if either config has layers.
        """
        names = ["encoder_dim", "llm_dim", "projector_pool_stride", "projector_num_layers"]
        if self.projector_num_layers or other.projector_num_layers:
            names.append("hidden_dim")
        return {
            name: (getattr(self, name), getattr(other, name))
            for name in (*names, "rms_norm_eps")
            if getattr(self, name) != getattr(other, name)
        }


@dataclass(frozen=True)
class WhisperConfig:
    """The Whisper encoder's shape, with the field names of HF's `WhisperConfig`."""

    num_mel_bins: PositiveInt
    d_model: PositiveInt
    encoder_layers: PositiveInt
    encoder_attention_heads: PositiveInt
    encoder_ffn_dim: PositiveInt
    max_source_positions: PositiveInt = 1500
    """Encoder frames in the full window: 1500 = 30 seconds."""

    def __post_init__(self) -> None:
        check(
            self,
            d_model=multiple_of(self.encoder_attention_heads, "encoder_attention_heads"),
        )


@dataclass(frozen=True)
class Llama3RopeScaling:
    """How Llama 3.x stretches rotary positions over a longer context, with HF's field names."""

    factor: PositiveFloat
    """Divisor of the low frequencies."""
    low_freq_factor: PositiveFloat
    high_freq_factor: PositiveFloat
    original_max_position_embeddings: PositiveInt
    """Context length before the stretch; wavelengths below this / high_freq_factor are kept."""

    def __post_init__(self) -> None:
        check(
            self,
            high_freq_factor=Rule(
                lambda v: v > self.low_freq_factor, "must exceed low_freq_factor"
            ),
        )


@dataclass(frozen=True)
class LlamaConfig:
    """A Llama-family decoder, with the field names of HF's `LlamaConfig` where it has them.

    The fields below `tie_word_embeddings` tell the families apart: Llama and SmolLM2, Llama 3.x,
    Qwen2, Qwen3, SmolLM3.
    """

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    rms_norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat = 10000.0
    tie_word_embeddings: bool = False
    rope_scaling: Llama3RopeScaling | None = None
    no_rope_layers: tuple[int, ...] = ()
    """Indices of the layers without rotary positions (SmolLM3)."""
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values have biases (Qwen2)."""
    o_bias: bool = False
    """Whether the output projection of attention has a bias."""
    qk_norm: bool = False
    """Whether each head's queries and keys are normalised before the rotation (Qwen3)."""

    def __post_init__(self) -> None:
        check(
            self,
            no_rope_layers=Rule(
                lambda v: all(0 <= i < self.num_hidden_layers for i in v),
                f"must be layers from 0 to {self.num_hidden_layers - 1}",
            ),
            num_attention_heads=multiple_of(self.num_key_value_heads, "num_key_value_heads"),
            head_dim=multiple_of(2, "coordinates per rotation"),
        )
