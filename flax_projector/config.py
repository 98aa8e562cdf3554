"""Every configuration of the project: frozen dataclasses, their checks and the named presets.

The dataclasses are the only home of defaults. Tower and projector configs keep the field names of
their PyTorch counterparts, so that a `config.json` and a dataclass read alike. Modules receive
their own sub-config; only the programs see a whole `TrainConfig`.
"""

import dataclasses
import functools
import json
import math
import numbers
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

SAMPLE_RATE = 16_000  # Hz; the only rate Whisper knows
HOP_LENGTH = 160  # samples between mel frames: 100 mel frames per second
SAMPLES_PER_FRAME = 2 * HOP_LENGTH  # conv2 has stride 2: 50 encoder frames per second

DTypeName = Literal["float32", "bfloat16"]
RematName = Literal["none", "products", "layers"]


_Rule = tuple[Callable[[Any], bool], str]

_POSITIVE: _Rule = (lambda v: v >= 1, "must be at least 1")
_NOT_NEGATIVE: _Rule = (lambda v: (v or 0) >= 0, "must be at least 0")
_ABOVE_ZERO: _Rule = (lambda v: v > 0, "must be greater than 0")
_RATE: _Rule = (lambda v: 0 <= v < 1, "must be in [0, 1)")
_NOT_EMPTY: _Rule = (lambda v: len(v) > 0, "must not be empty")
_ASCENDING: _Rule = (
    lambda v: len(v) > 0 and list(v) == sorted(set(v)),
    "must be ascending, without repeats, not empty",
)
_NO_REPEATS: _Rule = (lambda v: len(v) == len(set(v)), "must not name anything twice")
_AXIS: _Rule = (lambda v: v >= 1 or v == -1, "must be at least 1, or -1 for the devices left over")


def _multiple_of(divisor: int, what: str) -> _Rule:
    return (
        lambda v: divisor >= 1 and v % divisor == 0,
        f"must be a multiple of {what} = {divisor}",
    )


def _require(config: object, **rules: _Rule) -> None:
    """Raises one ValueError that lists every number that is none; or every rule that fails."""
    values = vars(config)
    problems = {
        name: f"must be {_NUMBERS[kind]}"
        for name, kind in _number_fields(type(config)).items()
        if not _is_number(values[name], kind)
    }
    if not problems:
        problems = {name: text for name, (is_ok, text) in rules.items() if not is_ok(values[name])}
    if problems:
        title = type(config).__name__
        raise ValueError(
            "\n".join(f"{title}.{n} = {values[n]!r}: {t}" for n, t in problems.items())
        )


_NUMBERS = {int: "a whole number", int | None: "a whole number or None", float: "a finite number"}


@functools.cache
def _number_fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {name: kind for name, kind in hints.items() if kind in _NUMBERS}


def _is_number(value: Any, kind: Any) -> bool:
    if value is None:
        return kind == int | None
    if isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, numbers.Real) and math.isfinite(value)
    return isinstance(value, numbers.Integral)


@dataclass(frozen=True)
class ProjectorConfig:
    """The projector's shape and initialisation, with the field names of the PyTorch config.

    Source: the attributes that `ResidualAudioProjector` reads from its config, with its fallbacks.
    `rms_norm_eps` is a constant there (1e-6; one late variant used 1e-8).
    """

    encoder_dim: int
    """Width E of the encoder's frames."""
    llm_dim: int
    """Width D of the LLM's embeddings."""
    projector_pool_stride: int = 4
    """Encoder frames concatenated into one audio token (k): 4 gives 12.5 tokens per second."""
    projector_hidden_dim: int | None = None
    """Width of the residual MLPs; None or 0 means 4 x llm_dim."""
    projector_num_layers: int = 2
    """Residual MLP blocks, each followed by a norm."""
    projector_dropout: float = 0.0
    """Dropout rate after the activation, after fc2 and on the output."""
    projector_init_std: float = 0.02
    """Standard deviation of the initial kernels; fc2 starts at a tenth of it."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in every norm."""

    def __post_init__(self) -> None:
        _require(
            self,
            encoder_dim=_POSITIVE,
            llm_dim=_POSITIVE,
            projector_pool_stride=_POSITIVE,
            projector_hidden_dim=_NOT_NEGATIVE,
            projector_num_layers=_NOT_NEGATIVE,
            projector_dropout=_RATE,
            projector_init_std=_ABOVE_ZERO,
            rms_norm_eps=_ABOVE_ZERO,
        )

    @property
    def hidden_dim(self) -> int:
        """Width of the residual MLPs, resolved."""
        return self.projector_hidden_dim or 4 * self.llm_dim

    def differences(self, other: "ProjectorConfig") -> dict[str, tuple[Any, Any]]:
        """Fields in which another config makes another function: name -> (ours, the other's).

        Dropout and initialisation belong to training; a width may be given or derived; without
        layers there is no hidden width.
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

    num_mel_bins: int
    d_model: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    max_source_positions: int = 1500
    """Encoder frames of the full window: 1500 = 30 seconds."""

    def __post_init__(self) -> None:
        _require(
            self,
            num_mel_bins=_POSITIVE,
            encoder_layers=_POSITIVE,
            encoder_ffn_dim=_POSITIVE,
            max_source_positions=_POSITIVE,
            encoder_attention_heads=_POSITIVE,
            d_model=_multiple_of(self.encoder_attention_heads, "encoder_attention_heads"),
        )


@dataclass(frozen=True)
class Llama3RopeScaling:
    """How Llama 3.x stretches rotary positions over a longer context, with HF's field names."""

    factor: float
    """By which the low frequencies are divided."""
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    """Context length before the stretch; wavelengths below it / high_freq_factor are kept."""

    def __post_init__(self) -> None:
        _require(
            self,
            factor=_ABOVE_ZERO,
            low_freq_factor=_ABOVE_ZERO,
            high_freq_factor=(lambda v: v > self.low_freq_factor, "must exceed low_freq_factor"),
            original_max_position_embeddings=_POSITIVE,
        )


@dataclass(frozen=True)
class LlamaConfig:
    """A Llama-family decoder, with the field names of HF's `LlamaConfig` where it has them.

    The fields below `tie_word_embeddings` tell the families apart: Llama and SmolLM2, Llama 3.x,
    Qwen2, Qwen3, SmolLM3.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    rope_scaling: Llama3RopeScaling | None = None
    no_rope_layers: tuple[int, ...] = ()
    """Numbers of the layers without rotary positions (SmolLM3)."""
    qkv_bias: bool = False
    """The projections to queries, keys and values have biases (Qwen2)."""
    o_bias: bool = False
    """The projection out of attention has one."""
    qk_norm: bool = False
    """Each head's queries and keys are normalised before they are rotated (Qwen3)."""

    def __post_init__(self) -> None:
        _require(
            self,
            no_rope_layers=(
                lambda v: all(0 <= i < self.num_hidden_layers for i in v),
                f"must be layers from 0 to {self.num_hidden_layers - 1}",
            ),
            vocab_size=_POSITIVE,
            hidden_size=_POSITIVE,
            intermediate_size=_POSITIVE,
            num_hidden_layers=_POSITIVE,
            num_key_value_heads=_POSITIVE,
            num_attention_heads=_multiple_of(self.num_key_value_heads, "num_key_value_heads"),
            head_dim=_multiple_of(2, "coordinates per rotation"),
            rms_norm_eps=_ABOVE_ZERO,
            rope_theta=_ABOVE_ZERO,
        )


@dataclass(frozen=True)
class PromptConfig:
    """The texts around the audio, in ChatML; a prompt at inference must be the one of training."""

    system: str = "/no_think /system_override"
    """System message; empty leaves the system turn out."""
    user: str = "Transcribe: "
    """User message; the audio follows it."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; their product must be the number of devices."""

    data: int = -1
    """Data-parallel replicas; -1 takes all devices that the other axes leave."""
    fsdp: int = 1
    """Ways that parameters are split, each also taking its share of the batch."""
    tensor: int = 1
    """Ways that heads and MLP columns are split."""

    def __post_init__(self) -> None:
        _require(
            self,
            data=_AXIS,
            fsdp=_AXIS,
            tensor=_AXIS,
        )


@dataclass(frozen=True)
class DataConfig:
    """What is read, and into which static shapes.

    A source is a manifest (`clips.jsonl`, `gs://bucket/clips.tsv`), or a data set of Hugging Face:
    `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`, where NAME is a hub id or a local folder. Behind it
    stand the columns that are not called `audio` and `text`: `hf:NAME:SPLIT:text=sentence`, and
    `id=COLUMN` where ids are not the numbers of the rows.
    """

    train: tuple[str, ...] = ()
    """Sources of the training utterances."""
    train_weights: tuple[float, ...] = ()
    """How often an epoch holds each utterance, for every source of `train`; empty means once. 2
    repeats a source, 0.5 takes one half in one epoch and the other half in the next."""
    eval: tuple[str, ...] = ()
    """Sources that are evaluated, each reported under its file name."""
    hf_streaming: bool = False
    """Keep the rows of `hf:` sources as they come, in `cache_dir`, rather than download whole data
    sets."""
    hf_max_rows: int = 0
    """Rows that are taken of each `hf:` source, from its beginning; 0 takes all."""
    cache_dir: str = ""
    """Folder of streamed rows and of durations that had to be read, which runs may share; empty
    means `data` in the run folder."""
    max_bad_rate: float = 0.01
    """Share of defective rows (missing, undecodable, without text, ...) of a set above which the
    run stops. Below, they are left out and listed in `bad_rows.jsonl` of the run folder."""
    batch_size: int = 8
    """Utterances per optimizer step, over all devices."""
    eval_batch_size: int = 16
    """Utterances per decoding batch, over all devices."""
    window_secs: float = 30.0
    """Audio window of the encoder, in seconds. Whisper was trained on 30. A shorter one takes less
    time in proportion, but gives other frames: those of whisper-base differ from a window of 30 s
    by 8% of their norm at 15 s, 12% at 10 s and 20% at 4 s. A projector must be used with the
    window it was trained with."""
    bucket_secs: tuple[float, ...] = (5.0, 10.0, 15.0)
    """Upper bounds of the audio-length buckets, in seconds: one compiled step each. Longer clips
    than the last are left out, never cut."""
    max_text_tokens: int = 128
    """Label positions per utterance (transcript and end of turn); longer ones are left out."""
    cache_features: bool = False
    """Compute the frozen encoder's frames once and keep them in the run folder."""
    num_threads: int = 4
    """Threads that read and resample audio; of each worker process, if there are any."""
    num_workers: int = 0
    """Processes that read and resample audio for training; 0 leaves it to threads alone."""

    def __post_init__(self) -> None:
        _require(
            self,
            train=_NO_REPEATS,
            train_weights=(
                lambda v: len(v) in (0, len(self.train)) and all(w > 0 for w in v),
                f"must have a weight above 0 for each of the {len(self.train)} sources of train",
            ),
            eval=_NO_REPEATS,
            hf_max_rows=_NOT_NEGATIVE,
            max_bad_rate=(lambda v: 0 <= v <= 1, "must be in [0, 1]"),
            batch_size=_POSITIVE,
            eval_batch_size=_POSITIVE,
            window_secs=_ABOVE_ZERO,
            bucket_secs=_ASCENDING,
            max_text_tokens=_POSITIVE,
            num_threads=_POSITIVE,
            num_workers=_NOT_NEGATIVE,
        )
        if self.window_samples % SAMPLES_PER_FRAME:
            raise ValueError(f"DataConfig.window_secs = {self.window_secs}: use a multiple of 0.02")
        if self.bucket_secs[-1] > self.window_secs:
            raise ValueError(
                f"DataConfig.bucket_secs ends at {self.bucket_secs[-1]} s, beyond the encoder's "
                f"window of {self.window_secs} s: lower it or raise window_secs"
            )

    @property
    def window_samples(self) -> int:
        """Samples N of the encoder's window."""
        return round(self.window_secs * SAMPLE_RATE)

    @property
    def window_frames(self) -> int:
        """Encoder frames S of the window."""
        return self.window_samples // SAMPLES_PER_FRAME


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay; the defaults are the recipe of tiny-audio."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    warmup_steps: int = 500
    """Steps from 0 to the peak."""
    final_lr_rate: float = 0.0
    """Learning rate at the last step, as a fraction of the peak."""
    b1: float = 0.9
    """Decay of the mean of gradients, per step."""
    b2: float = 0.999
    """Decay of the mean of squared gradients, per step."""
    eps: float = 1e-8
    """Added to the root of that mean."""
    weight_decay: float = 0.01
    """Applied to kernels only: norms and biases are not decayed."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""

    def __post_init__(self) -> None:
        _require(
            self,
            learning_rate=_ABOVE_ZERO,
            warmup_steps=_NOT_NEGATIVE,
            final_lr_rate=_RATE,
            b1=_RATE,
            b2=_RATE,
            eps=_ABOVE_ZERO,
            weight_decay=_NOT_NEGATIVE,
            clip_norm=_ABOVE_ZERO,
        )


@dataclass(frozen=True)
class SpecAugmentConfig:
    """Time masks on the log-mel features in training, with the field names of HF's config."""

    mask_time_prob: float = 0.0
    """Share of a clip's frames that is masked, overlaps not counted; 0 leaves masks out."""
    mask_time_length: int = 10
    """Frames of a mask: 100 per second."""
    mask_time_min_masks: int = 2
    """Masks of a clip at least."""

    def __post_init__(self) -> None:
        _require(
            self,
            mask_time_prob=_RATE,
            mask_time_length=_POSITIVE,
            mask_time_min_masks=_NOT_NEGATIVE,
        )


@dataclass(frozen=True)
class CTCConfig:
    """A warm start: the projector learns to spell before the LLM is asked what it reads.

    In the first steps the loss is CTC between the audio tokens and the embedding rows of the
    transcript's tokens, without the LLM's layers: a fraction of a step's cost, and none of the
    plateau that a speech LLM sits on until it has found out how sound and text align.
    """

    num_steps: int = 0
    """Steps of the warm start, the first of the run's; 0 leaves it out."""
    learning_rate: float = 1e-3
    """Peak learning rate of the warm start, which has a warm-up and a decay of its own."""
    blank: str = "<|endoftext|>"
    """Token whose embedding row is CTC's blank; no transcript may hold it."""

    def __post_init__(self) -> None:
        _require(
            self,
            num_steps=_NOT_NEGATIVE,
            learning_rate=_ABOVE_ZERO,
            blank=_NOT_EMPTY,
        )


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    encoder: str
    """Frozen Whisper: HF folder or hub id."""
    llm: str
    """Frozen Llama-family LLM: HF folder or hub id."""
    projector: ProjectorConfig
    """The part that is trained."""
    out: str = "runs/default"
    """Run folder: config, checkpoints, metrics and the final projector."""
    resume: bool = True
    """Continue a run that is found in `out`; otherwise that is an error."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ctc: CTCConfig = field(default_factory=CTCConfig)
    spec_augment: SpecAugmentConfig = field(default_factory=SpecAugmentConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    dtype: DTypeName = "bfloat16"
    """Compute dtype, and storage of the frozen towers; master weights are always float32."""
    remat: RematName = "products"
    """What the backward pass of the LLM computes again: "none" keeps all that it needs in memory;
    "products" keeps the outputs of the linear layers (a third of the memory, and no slower);
    "layers" keeps the layers' inputs only (the least memory, a third more compute)."""
    num_steps: int = 20_000
    """Optimizer steps of the whole run."""
    accumulation_steps: int = 1
    """Micro-batches that a step's batch is computed in, one after the other: memory for one. It
    changes no gradient, but which dropout and which SpecAugment masks are drawn."""
    log_every_steps: int = 10
    """Steps between two lines of metrics, each of which is a mean over them."""
    eval_every_steps: int = 1000
    """0 evaluates only before the first and after the last step; none during a CTC warm start."""
    save_every_steps: int = 500
    """Steps between two checkpoints."""
    save_every_mins: float = 30.0
    """A checkpoint also when this many minutes have passed since the last, at a step that logs."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept. The projector with the lowest word error rate, and of equal
    ones the lowest loss, stays in `best`."""
    max_new_tokens: int = 96
    """Tokens decoded per utterance in evaluation."""
    seed: int = 0
    """Seeds initialisation, shuffling and dropout."""
    init_projector: str | None = None
    """Start from this projector (a converted folder or an HF folder) instead of a random one."""
    init_output_scale: float = 1.0
    """Initial weight of the projector's last norm, and so the initial RMS of an audio token. The
    seed's 1.0 is several times the RMS of an LLM's text embeddings."""
    distributed: bool = False
    """Several hosts: call jax.distributed.initialize first."""
    profile_steps: int = 0
    """Write a profiler trace of this many steps, after the first ten, to `profile` in the run
    folder."""
    wandb_project: str | None = None
    """Log to this project of Weights & Biases as well; needs `pip install wandb`."""

    def __post_init__(self) -> None:
        _require(
            self,
            encoder=_NOT_EMPTY,
            llm=_NOT_EMPTY,
            out=_NOT_EMPTY,
            init_output_scale=_ABOVE_ZERO,
            num_steps=_POSITIVE,
            accumulation_steps=_POSITIVE,
            log_every_steps=_POSITIVE,
            eval_every_steps=_NOT_NEGATIVE,
            save_every_steps=_POSITIVE,
            save_every_mins=_ABOVE_ZERO,
            profile_steps=_NOT_NEGATIVE,
            keep_checkpoints=_POSITIVE,
            max_new_tokens=_POSITIVE,
        )
        if self.spec_augment.mask_time_prob and self.data.cache_features:
            raise ValueError(
                "TrainConfig.spec_augment.mask_time_prob masks features that data.cache_features "
                "computes only once: turn one of the two off"
            )
        if self.ctc.num_steps >= self.num_steps:
            raise ValueError(
                f"TrainConfig.ctc.num_steps = {self.ctc.num_steps}: must leave steps of num_steps"
                f" = {self.num_steps} to the LLM"
            )


_SPEECH = "docs/demo/speech"
_WHISPER_BASE_SMOLLM2 = TrainConfig(  # with tiny-audio's recipe: batches of 3 x 8, SpecAugment
    encoder="openai/whisper-base",
    llm="HuggingFaceTB/SmolLM2-135M-Instruct",
    projector=ProjectorConfig(encoder_dim=512, llm_dim=576),
    out="runs/whisper-base-smollm2-135m",
    data=DataConfig(batch_size=24),
    accumulation_steps=3,
    spec_augment=SpecAugmentConfig(mask_time_prob=0.05),
)

PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "demo": (
        "Spoken commands on two CPU cores in minutes: what `make demo` runs.",
        dataclasses.replace(
            _WHISPER_BASE_SMOLLM2,
            out="runs/demo",
            prompt=PromptConfig(system=""),
            data=DataConfig(
                train=(f"{_SPEECH}/train.jsonl",),
                eval=(
                    f"{_SPEECH}/heldout_seen_voices.jsonl",
                    f"{_SPEECH}/heldout_unseen_voices.jsonl",
                ),
                window_secs=4.0,
                bucket_secs=(2.1, 2.5, 4.0),
                batch_size=4,
                max_text_tokens=20,
                eval_batch_size=64,
                cache_features=True,
            ),
            optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=40),
            ctc=CTCConfig(num_steps=600),
            init_output_scale=0.13,  # the RMS of the LLM's own embeddings
            accumulation_steps=1,
            spec_augment=SpecAugmentConfig(),
            dtype="float32",
            num_steps=900,
            eval_every_steps=150,
            save_every_steps=150,
            max_new_tokens=24,
        ),
    ),
    "whisper-base-smollm2-135m": (
        "The smallest pair of real towers, with tiny-audio's recipe.",
        _WHISPER_BASE_SMOLLM2,
    ),
    "whisper-turbo-smollm3-3b": (
        "tiny-audio's published pair, with its recipe.",
        dataclasses.replace(
            _WHISPER_BASE_SMOLLM2,
            encoder="openai/whisper-large-v3-turbo",
            llm="HuggingFaceTB/SmolLM3-3B",
            projector=ProjectorConfig(encoder_dim=1280, llm_dim=2048),
            out="runs/whisper-turbo-smollm3-3b",
            remat="layers",
        ),
    ),
    "tiny": (
        "A few steps of towers with a few parameters, to test a set-up: pass both folders.",
        TrainConfig(
            encoder="whisper-tiny-random",
            llm="llama-tiny-random",
            projector=ProjectorConfig(encoder_dim=24, llm_dim=40, projector_hidden_dim=32),
            out="runs/tiny",
            data=DataConfig(
                eval_batch_size=8, window_secs=2.0, bucket_secs=(1.0, 2.0), max_text_tokens=20
            ),
            optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
            dtype="float32",
            num_steps=6,
            log_every_steps=1,
            eval_every_steps=0,
            save_every_steps=2,
            max_new_tokens=5,
        ),
    ),
}


def to_json(config: TrainConfig) -> str:
    """The resolved config, as it is saved in the run folder."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> TrainConfig:
    """Reads what `to_json` wrote.

    Raises:
      ValueError: if a field is unknown or missing.
    """
    return _build(TrainConfig, json.loads(text))


def _build(cls: Any, values: dict[str, Any]) -> Any:
    types = typing.get_type_hints(cls)
    if unknown := sorted(set(values) - set(types)):
        raise ValueError(f"{cls.__name__} has no field {unknown}: written by another version?")
    kwargs = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(types[name]):
            value = _build(types[name], value)
        kwargs[name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**kwargs)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from error


MAY_CHANGE_ON_RESUME = (
    *("log_every_steps", "eval_every_steps", "save_every_steps", "save_every_mins", "mesh."),
    *("keep_checkpoints", "resume", "distributed", "max_new_tokens", "out", "remat"),
    *("profile_steps", "wandb_project", "accumulation_steps"),
    *("data.num_threads", "data.num_workers", "data.cache_dir", "data.max_bad_rate"),
    "data.eval",  # the sets and their batch size
)


def changes(saved: TrainConfig, current: TrainConfig) -> tuple[list[str], list[str]]:
    """Fields that differ, as `name: saved -> current`.

    Returns:
      Those that decide what is learnt, and those that may change when a run goes on.
    """

    def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
        flat = {}
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            if dataclasses.is_dataclass(value):
                flat |= flatten(value, f"{prefix}{f.name}.")
            else:
                flat[prefix + f.name] = value
        return flat

    before, now = flatten(saved), flatten(current)
    refused, allowed = [], []
    for name in before:
        if before[name] != now[name]:
            may_change = name.startswith(MAY_CHANGE_ON_RESUME)
            (allowed if may_change else refused).append(
                f"{name}: {before[name]!r} -> {now[name]!r}"
            )
    return refused, allowed
