"""All settings of a run."""

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from annotated_types import Ge, Interval

from flax_projector.config.decode import DecodeConfig
from flax_projector.config.fields import (
    ASCENDING,
    HOST_AND_PORT,
    MAY_CHANGE,
    MAY_MOVE,
    MESH_AXIS,
    NAMES_WITH_VALUES,
    NO_REPEATS,
    OF_PROCESS,
    POSITIVE_OR_AUTO,
    Count,
    PositiveFloat,
    PositiveInt,
    Rate,
    Rule,
    Text,
    check,
    option,
)
from flax_projector.config.models import (
    AudioTokensName,
    DTypeName,
    NormalizerName,
    ProjectorConfig,
    RematName,
    TextCaseName,
)
from flax_projector.config.optimizer import OptimizerConfig
from flax_projector.lengths import FRAME_SECS, SAMPLE_RATE, SAMPLES_PER_FRAME

AUDIO = "<audio>"
"""Stands for the audio in the texts of a prompt; tiny-audio's placeholder."""
TINY_AUDIO_SYSTEM, TINY_AUDIO_USER = "/no_think /system_override", f"Transcribe: {AUDIO}"
"""The messages that tiny-audio trains with."""


@dataclass(frozen=True)
class PromptConfig:
    """What the LLM reads around the audio: two messages in its own chat template.

    An LLM without a template needs `end`, and usually `before` and `after`. The prompt is kept with
    the run: evaluation and transcription use the same one.
    """

    system: str | None = None
    """System message; with `--prompt.system ""` there is none. If not given: that of
    `--init-projector`, or else tiny-audio's `/no_think /system_override`."""
    user: str | None = None
    """User message; the audio takes the place of `<audio>`, or follows it. If not given: that of
    `--init-projector`, or else tiny-audio's `Transcribe: <audio>`."""
    template_args: Annotated[tuple[str, ...], NAMES_WITH_VALUES] = ()
    """Arguments of the chat template, as in `--prompt.template-args enable_thinking=false`."""
    before: str = ""
    """Instead of the template: text before the audio."""
    after: str = ""
    """Instead of the template: text between the audio and the transcript."""
    end: str = ""
    """Instead of the template: the token that ends the transcript, as in
    `--prompt.end "<|endoftext|>"`."""

    def __post_init__(self) -> None:
        check(
            self,
            prefix="prompt.",
            end=Rule(
                lambda v: v or not (self.before or self.after),
                "must be given with --prompt.before and --prompt.after",
            ),
        )


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; their product must be the number of devices.

    On several slices of TPUs or machines with GPUs, only `data` goes across.
    """

    data: Annotated[int, MESH_AXIS] = -1
    """Data-parallel replicas; -1 uses all devices that the other axes leave over."""
    fsdp: Annotated[int, MESH_AXIS] = 1
    """Number of shards that parameters are split into; each also takes a share of the batch."""
    tensor: Annotated[int, MESH_AXIS] = 1
    """Number of shards that heads, MLP columns and the vocabulary are split into."""

    def __post_init__(self) -> None:
        check(self, prefix="mesh.")


@dataclass(frozen=True)
class DistributedConfig:
    """The processes of a run on several hosts, where they are not detected: all three or none.

    On TPU slices, by SLURM's `srun`, Open MPI up to version 4, and in Indexed Jobs of Kubernetes,
    JAX detects them.
    """

    coordinator: Annotated[str | None, HOST_AND_PORT] = None
    """HOST:PORT of process 0, where the others find it; any free port."""
    num_processes: Annotated[int | None, Ge(1)] = None
    """Number of processes of the run. 1, alone, turns detection off."""
    process_id: Annotated[int | None, Ge(0)] = None
    """Number of this process, from 0."""

    def __post_init__(self) -> None:
        check(
            self,
            prefix="distributed.",
            process_id=Rule(
                lambda v: v is None or self.num_processes is None or v < self.num_processes,
                f"must be less than --distributed.num-processes {self.num_processes}, since "
                "processes are numbered from 0",
            ),
        )
        values = {option(f"distributed.{f.name}"): getattr(self, f.name) for f in fields(self)}
        given = [name for name, value in values.items() if value is not None]
        missing = [name for name, value in values.items() if value is None]
        is_alone = self.num_processes == 1 and len(given) == 1
        if given and missing and not is_alone:
            raise ValueError(f"{' and '.join(given)} must be given with {' and '.join(missing)}")


@dataclass(frozen=True)
class DataConfig:
    """Which data is read, and the static shapes that it is read into.

    A source is a manifest (`clips.jsonl`, `gs://bucket/clips.tsv`) or a Hugging Face data set:
    `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`, where NAME is a hub id or a local folder. If its
    columns are not called `audio` and `text`, append their names, as in
    `hf:NAME:SPLIT:text=sentence`. Append `id=COLUMN` if rows have ids other than their numbers.
    """

    train: Annotated[tuple[str, ...], NO_REPEATS, MAY_MOVE] = ()
    """Sources of the training utterances."""
    train_weights: tuple[float, ...] = ()
    """How often each utterance occurs in an epoch: one number for each source in `train`; empty
    means once. 2 repeats a source; 0.5 takes one half in one epoch, the other half in the next."""
    eval: Annotated[tuple[str, ...], NO_REPEATS, MAY_CHANGE] = ()
    """Sources to evaluate on, each reported under the name of its file or data set."""
    eval_normalizers: Annotated[tuple[NormalizerName, ...], MAY_CHANGE] = ("english",)
    """What is done to texts before errors are counted: one for all of `eval`, or one for each.
    "english" and "basic", for other languages, are Whisper's; "none" keeps case and punctuation."""
    hf_streaming: bool = False
    """Stream `hf:` sources and keep the rows in `cache_dir`, instead of downloading whole data
    sets."""
    hf_max_rows: Count = 0
    """Use only this many rows from the start of each `hf:` source; 0 uses all."""
    cache_dir: Annotated[str, MAY_CHANGE] = ""
    """Folder for streamed rows, durations read from audio files, and kept frames; several runs may
    share it. Empty means `data` in the run folder. Of what is in a bucket, only frames are kept
    there; the rest is in `data` in the run folder or, if that is in a bucket, in the user's cache
    folder."""
    max_bad_rate: Annotated[float, Interval(ge=0, le=1), MAY_CHANGE] = 0.01
    """Largest allowed share of defective rows (missing file, undecodable, no transcript, ...) in a
    set. Above it the run stops; otherwise such rows are left out and listed in `bad_rows.jsonl` in
    the run folder."""
    drop_doubtful: bool = False
    """Leave clips that are silent, too loud or clipped out of training. They are listed either way,
    count as no defects, and are always evaluated."""
    batch_size: PositiveInt = 8
    """Utterances per optimizer step, over all devices, of those as long as the last bucket. A batch
    of a shorter bucket holds a multiple of it: as many as cost no more. With the default
    `bucket_secs`, a window of 30 s and a pool stride of 2, a batch size of 8 means batches of 16
    clips of up to 5 s, and of 8 in the other buckets."""
    eval_batch_size: Annotated[PositiveInt, MAY_CHANGE] = 16
    """Utterances per decoding batch, likewise."""
    window_secs: PositiveFloat = 30.0
    """The encoder's audio window, in seconds. Whisper was trained on 30. A shorter window takes
    proportionally less time, but gives different frames: compared with a window of 30 s, those of
    whisper-base change by 8% of their norm at 15 s, 12% at 10 s and 20% at 4 s. Use a projector
    with the window it was trained with."""
    audio_tokens: AudioTokensName | None = None
    """Which audio tokens the LLM reads. "clip": those of the clip. "window": those of the whole
    window, the silence after the clip included, so that all clips have the same length and there
    is one bucket. If not given: those that `--init-projector` was trained with (tiny-audio's with
    "window"), or else "clip"."""
    bucket_secs: Annotated[tuple[float, ...], ASCENDING] = (5.0, 8.0, 11.0, 13.0, 15.0)
    """Upper bounds of the audio-length buckets, in seconds; each bucket compiles one step. Clips
    longer than the last bound are left out, never cut."""
    max_text_tokens: PositiveInt = 128
    """Maximum labels per utterance: transcript and end of turn. Longer transcripts are left out."""
    text_case: TextCaseName = "keep"
    """Case of the labels. "keep" leaves transcripts as they are. "lower" turns them into lower
    case: those in capitals, as in LibriSpeech, take more tokens and read unlike the LLM's texts.
    The references of an evaluation are reported as they are."""
    cache_features: bool = False
    """Compute the frozen encoder's frames once and keep them in `cache_dir`, for all runs."""
    num_threads: Annotated[PositiveInt, MAY_CHANGE] = 4
    """Threads that read and resample audio, in each worker process if there are any."""
    num_workers: Annotated[Count, MAY_CHANGE] = 0
    """Worker processes that read and resample audio for training; 0 uses only threads."""

    def __post_init__(self) -> None:
        check(
            self,
            prefix="data.",
            train_weights=Rule(
                lambda v: len(v) in (0, len(self.train)) and all(w > 0 for w in v),
                f"must be empty, or one weight above 0 for each of {len(self.train)} train sources",
            ),
            eval_normalizers=Rule(
                lambda v: len(v) > 0 and len(v) in (1, len(self.eval)),
                f"must be one for all, or one for each of {len(self.eval)} eval sources",
            ),
        )
        if self.window_samples % SAMPLES_PER_FRAME:
            raise ValueError(
                f"--data.window-secs = {self.window_secs}: must be a multiple of {FRAME_SECS}"
            )
        if self.bucket_secs[-1] > self.window_secs:
            raise ValueError(
                f"--data.bucket-secs ends at {self.bucket_secs[-1]} s, beyond the encoder's window "
                f"of {self.window_secs} s: lower it, or raise --data.window-secs"
            )

    def normalizer_of(self, source: str) -> NormalizerName:
        """The normaliser for a source, one of `eval` or another.

        Raises:
          ValueError: if it is another, and those of `eval` do not all have the same.
        """
        if len(set(self.eval_normalizers)) == 1:
            return self.eval_normalizers[0]
        if source in self.eval:
            return self.eval_normalizers[self.eval.index(source)]
        raise ValueError(
            f"{source} is none of the run's --data.eval, for which it has several normalisers: "
            "choose one with --normalizer"
        )

    @property
    def window_samples(self) -> int:
        """N, the number of samples in the encoder's window."""
        return round(self.window_secs * SAMPLE_RATE)

    @property
    def window_frames(self) -> int:
        """S, the number of encoder frames in the window."""
        return self.window_samples // SAMPLES_PER_FRAME

    @property
    def whole_window(self) -> bool:
        """Whether the LLM reads the audio tokens of the whole window."""
        return self.audio_tokens == "window"

    @property
    def bucket_bounds(self) -> tuple[float, ...]:
        """`bucket_secs`, or only the last of them if all clips are as long as the window."""
        return self.bucket_secs[-1:] if self.whole_window else self.bucket_secs


@dataclass(frozen=True)
class SpecAugmentConfig:
    """Time masks on the log-mel features in training, with the field names of HF's config."""

    mask_time_prob: Rate = 0.0
    """Share of a clip's mel frames to mask, ignoring overlaps; 0 masks nothing."""
    mask_time_length: PositiveInt = 10
    """Length of a mask in mel frames, of which there are 100 per second."""
    mask_time_min_masks: Count = 2
    """Minimum number of masks per clip."""

    def __post_init__(self) -> None:
        check(self, prefix="spec_augment.")


@dataclass(frozen=True)
class CTCConfig:
    """A warm start: the projector learns to spell before the LLM is used.

    For the first steps, the loss is CTC between the audio tokens and the LLM's embeddings of the
    transcript's tokens; the LLM's layers do not run. Such a step costs a fraction of a full one,
    and the run skips the plateau that a speech LLM stays on until it has learnt how audio and text
    align.
    """

    num_steps: Count = 0
    """Steps of warm start at the beginning of the run; 0 turns it off."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate of the warm start, which has its own warm-up and decay."""
    blank: Text = "<|endoftext|>"
    """Token whose embedding row is CTC's blank; it must not occur in any transcript."""

    def __post_init__(self) -> None:
        check(self, prefix="ctc.")


@dataclass(frozen=True)
class TrainConfig(DecodeConfig):
    """All settings of a run; those of decoding are options without a prefix."""

    encoder: Annotated[Text, MAY_MOVE]
    """The frozen Whisper model: an HF folder, which may be a URL (gs://...), or a hub id."""
    llm: Annotated[Text, MAY_MOVE]
    """The frozen Llama-family LLM: likewise."""
    projector: ProjectorConfig
    """The part that is trained."""
    out: Annotated[Text, MAY_CHANGE] = "runs/default"
    """Run folder: config, checkpoints, metrics and the final projector. A path, or
    `gs://BUCKET/FOLDER`."""
    resume: Annotated[bool, MAY_CHANGE] = True
    """Continue the run found in `out`. With `--no-resume`, finding one is an error."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ctc: CTCConfig = field(default_factory=CTCConfig)
    spec_augment: SpecAugmentConfig = field(default_factory=SpecAugmentConfig)
    mesh: Annotated[MeshConfig, MAY_CHANGE] = field(default_factory=MeshConfig)
    dtype: DTypeName = "bfloat16"
    """Compute dtype, also for storing the frozen towers; master weights are always float32."""
    remat: Annotated[RematName, MAY_CHANGE] = "products"
    """What the LLM's backward pass recomputes. "none" keeps everything in memory; "products" keeps
    the outputs of the linear layers (a third of the memory, and no slower); "gates" all but one of
    the two widest, "attention" neither of them (a quarter of the memory of "products"); "layers"
    keeps only the layers' inputs (least memory, a third more compute)."""
    num_steps: PositiveInt = 20_000
    """Optimizer steps in the whole run."""
    accumulation_steps: Annotated[PositiveInt, MAY_CHANGE] = 1
    """Number of micro-batches that a step's batch is split into. They are computed one after the
    other, in the memory of one. Gradients stay the same; dropout and SpecAugment draw different
    random numbers."""
    log_every_steps: Annotated[PositiveInt, MAY_CHANGE] = 10
    """Steps between two lines of metrics; each line is a mean over its steps."""
    eval_every_steps: Annotated[Count, MAY_CHANGE] = 1000
    """Steps between two evaluations; 0 evaluates only before the first and after the last step.
    There are none during a CTC warm start."""
    save_every_steps: Annotated[PositiveInt, MAY_CHANGE] = 500
    """Steps between two checkpoints."""
    save_every_mins: Annotated[PositiveFloat, MAY_CHANGE] = 30.0
    """Also save when this many minutes have passed since the last checkpoint, at the next step
    that logs."""
    stall_mins: Annotated[float, Ge(0), MAY_CHANGE] = 0.0
    """End the run with an error that says where it is stuck when there has been no step for so many
    minutes, so that a scheduler can start it again; 0 waits for ever. Evaluations count by their
    batches, of which the first one compiles, and so may take minutes."""
    keep_checkpoints: Annotated[PositiveInt, MAY_CHANGE] = 2
    """How many of the newest checkpoints to keep. `best` always keeps the projector with the lowest
    error rate (and, among equals, the lowest loss)."""
    seed: int = 0
    """Seeds initialisation, shuffling, dropout and SpecAugment."""
    init_projector: Annotated[str | None, MAY_MOVE] = None
    """Start from this projector (a converted folder or an HF folder) instead of a random one."""
    init_output_scale: Annotated[float | Literal["auto"], POSITIVE_OR_AUTO] = 1.0
    """Initial weight of the projector's last norm, and thus the initial RMS of an audio token. The
    original's 1.0 is several times the RMS of an LLM's text embeddings; "auto" is that RMS. Without
    effect if `init_projector` is given."""
    compile_cache: Annotated[Text, MAY_CHANGE] = "auto"
    """Where compiled programs are kept for the next start: a folder, which may be a URL, or "off".
    "auto" is $JAX_COMPILATION_CACHE_DIR; if that is not set, on several hosts, `compile_cache` in
    the run folder, and on one, `flax-projector/xla` in the user's cache."""
    distributed: Annotated[DistributedConfig, OF_PROCESS] = field(default_factory=DistributedConfig)
    profile_steps: Annotated[Count, MAY_CHANGE] = 0
    """Write a profiler trace of this many steps, after the first ten, to `profile` in the run
    folder."""
    wandb_project: Annotated[str | None, MAY_CHANGE] = None
    """Also log to this Weights & Biases project; needs `pip install wandb`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spec_augment.mask_time_prob and self.data.cache_features:
            raise ValueError(
                "--spec-augment.mask-time-prob masks features anew at every step, but "
                "--data.cache-features computes them only once: turn one of the two off"
            )
        if self.ctc.num_steps >= self.num_steps:
            raise ValueError(
                f"--ctc.num-steps {self.ctc.num_steps} must be less than --num-steps "
                f"{self.num_steps}: the remaining steps are the LLM's"
            )

    @property
    def decoding(self) -> DecodeConfig:
        """The settings of decoding alone."""
        return DecodeConfig(**{f.name: getattr(self, f.name) for f in fields(DecodeConfig)})
