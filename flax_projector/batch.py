"""A batch of utterances in static shapes: what the data layer hands to the models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from flax_projector.lengths import SAMPLES_PER_FRAME
from flax_projector.sharding import split_rows

Leaf = Any  # a NumPy or JAX array; in trees that JAX builds, also a shape or a sharding

AUDIO_TOKEN = -1  # placeholder for one audio token in a sequence of ids; no tokenizer uses it


@dataclass(frozen=True)
class Bucket:
    """Static lengths shared by batches of similar utterances; each bucket is compiled once.

    Attributes:
      num_frames: S, the number of encoder frames.
      merged_len: L, the length of the sequence that the LLM reads.
      text_len: T, the number of labels.
      multiple: how many times the run's batch size a batch holds.
    """

    num_frames: int
    merged_len: int
    text_len: int
    multiple: int = 1


class TokenLayout(NamedTuple):
    """One utterance's sequence, padded on the right.

    Attributes:
      tokens: token ids, with AUDIO_TOKEN in the place of each audio token.
      prompt_len: number of tokens before the transcript.
      label_positions: position in the sequence at which each label is predicted.
      labels: the transcript and the end of turn.
      label_valid: True for labels, False for the padding after them.
    """

    tokens: Int[np.ndarray, "L"]
    prompt_len: int
    label_positions: Int[np.ndarray, "T"]
    labels: Int[np.ndarray, "T"]
    label_valid: Bool[np.ndarray, "T"]


@flax.struct.dataclass
class Batch:
    """Utterances in static shapes; a padding row has no frames and no valid labels.

    Built on the host from NumPy arrays (`empty_batch`, `set_row`), moved to the devices by
    `to_global`, and read in compiled functions. The audio is either waveforms, for an encoder that
    runs in the step, or encoder frames that were computed earlier.

    Attributes:
      num_frames: i32[B], number of encoder frames that contain part of the clip.
      tokens: i32[B, L]; this and the next four are as in `TokenLayout`.
      prompt_len: i32[B].
      label_positions: i32[B, T].
      labels: i32[B, T].
      label_valid: bool[B, T].
      samples: f32[B, N], 16 kHz waveforms in [-1, 1], zero-padded to the bucket; or None.
      frames: f32|bf16[B, S, E], encoder output, zero-padded; or None.
      max_frames: S; a static value.
      window_samples: number of samples in the encoder's window, if waveforms are shorter; a static
        value.
      whole_window: True if a clip's audio tokens are those of the whole window, the silence after
        the clip included; a static value.
    """

    num_frames: Leaf
    tokens: Leaf
    prompt_len: Leaf
    label_positions: Leaf
    labels: Leaf
    label_valid: Leaf
    samples: Leaf = None
    frames: Leaf = None
    max_frames: int = flax.struct.field(pytree_node=False, kw_only=True)
    window_samples: int = flax.struct.field(pytree_node=False, kw_only=True, default=0)
    whole_window: bool = flax.struct.field(pytree_node=False, kw_only=True, default=False)

    @property
    def frame_valid(self) -> Bool[Array, "B S"]:
        """True for encoder frames that become audio tokens: none in a padding row."""
        if self.whole_window:
            return jnp.tile(self.num_frames[:, None] > 0, (1, self.max_frames))
        return jnp.arange(self.max_frames) < self.num_frames[:, None]

    @property
    def windows(self) -> Float[Array, "B N"]:
        """The waveforms, zero-padded to the encoder's window.

        Neither the host's memory nor the way to the devices holds what is added here.
        """
        missing = max(0, self.window_samples - self.samples.shape[1])
        return jnp.pad(self.samples, ((0, 0), (0, missing)))

    @property
    def num_samples(self) -> Int[Array, "B"]:
        """Length of each clip in 16 kHz samples, rounded up to whole encoder frames."""
        return SAMPLES_PER_FRAME * jnp.asarray(self.num_frames)

    @property
    def num_tokens(self) -> Int[Array, "B"]:
        """Number of tokens that the LLM reads: the last label is predicted, never read."""
        num_labels = jnp.sum(self.label_valid, axis=1)
        return jnp.where(num_labels > 0, self.prompt_len + num_labels - 1, 0)

    @property
    def is_audio(self) -> Bool[Array, "B L"]:
        """True at the positions of audio tokens."""
        return self.tokens == AUDIO_TOKEN

    @property
    def is_text(self) -> Bool[Array, "B L"]:
        """True at the positions of text tokens that the LLM reads."""
        is_read = jnp.arange(self.tokens.shape[1]) < self.num_tokens[:, None]
        return is_read & ~self.is_audio

    def set_row(self, row: int, audio: np.ndarray, num_frames: int, layout: TokenLayout) -> None:
        """Puts an utterance into a padding row; only for batches of NumPy arrays.

        Args:
          row: the row's number.
          audio: unpadded samples or frames, whichever the batch has.
          num_frames: number of encoder frames that contain part of the clip.
          layout: the utterance's tokens and labels.
        """
        rows = self.samples if self.frames is None else self.frames
        rows[row, : len(audio)] = audio
        self.num_frames[row] = num_frames
        for name, value in layout._asdict().items():
            getattr(self, name)[row] = value

    def split(self, count: int) -> "Batch":
        """Micro-batches on a new axis 0; see `split_rows`."""
        return jax.tree.map(lambda x: split_rows(x, count), self)


def empty_batch(
    bucket: Bucket,
    num_rows: int,
    *,
    fill: int,
    audio_shape: Mapping[str, tuple[int, ...]],
    audio_dtype: DTypeLike = np.float32,
    window_samples: int = 0,
    whole_window: bool = False,
) -> Batch:
    """A batch of padding rows, as NumPy arrays.

    Args:
      bucket: the static lengths.
      num_rows: B.
      fill: token id to pad with.
      audio_shape: {"samples": (N,)} or {"frames": (S, E)}, without the batch axis.
      audio_dtype: of the audio.
      window_samples: see `Batch`.
      whole_window: see `Batch`.
    """
    labels = np.zeros((num_rows, bucket.text_len), np.int32)
    return Batch(
        num_frames=np.zeros(num_rows, np.int32),
        tokens=np.full((num_rows, bucket.merged_len), fill, np.int32),
        prompt_len=np.zeros(num_rows, np.int32),
        label_positions=labels.copy(),
        labels=labels,
        label_valid=labels.astype(bool),
        max_frames=bucket.num_frames,
        window_samples=window_samples,
        whole_window=whole_window,
        **{name: np.zeros((num_rows, *shape), audio_dtype) for name, shape in audio_shape.items()},
    )


def abstract_batch(batch: Batch, num_rows: int, sharding: Sharding) -> Batch:
    """Shapes and shardings of the global batch; `batch` is one host's part of it."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((num_rows, *x.shape[1:]), x.dtype, sharding=sharding), batch
    )


def to_global(batch: Batch, num_rows: int, sharding: Sharding) -> Batch:
    """The global batch on the devices, assembled from every host's rows.

    Args:
      batch: this host's rows.
      num_rows: number of rows in the global batch.
      sharding: how axis 0 is split.
    """
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x, (num_rows, *x.shape[1:])),
        batch,
    )
