"""The batches of a set of utterances, by number."""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from flax_projector.batch import Batch, Bucket, abstract_batch, empty_batch, to_global
from flax_projector.chat.prompt import Prompt
from flax_projector.config import DataConfig
from flax_projector.data.bad_rows import BadRow, BadRows
from flax_projector.data.batch_plan import (
    EpochPlan,
    assign,
    count_batches,
    epoch_members,
    epoch_plan,
    make_buckets,
)
from flax_projector.data.inputs import Inputs, read_clip
from flax_projector.data.shared_arrays import SharedArrays
from flax_projector.data.utterances import Utterance, Utterances
from flax_projector.lengths import num_audio_tokens
from flax_projector.sharding import batch_sharding, local_rows, padded_batch_size


class LocalBatch(NamedTuple):
    """One host's part of a batch.

    Attributes:
      batch: this host's rows, as NumPy arrays.
      bad: the rows whose clips cannot be used, and why; in `batch`, they are padding. Also those
        that are doubtful, whether or not they are used.
    """

    batch: Batch
    bad: tuple[BadRow, ...]


class Batches:
    """Batches by number, epoch after epoch: batch i is the same whoever asks for it.

    Each process builds only its own rows. A clip that turns out to be unusable when it is read
    becomes a padding row, so that it does not change the order of batches, and a long run survives
    it.

    Can be pickled for worker processes, without its mesh.
    """

    def __init__(
        self,
        utterances: Utterances,
        *,
        inputs: Inputs,
        prompt: Prompt,
        config: DataConfig,
        pool_stride: int,
        mesh: Mesh,
        batch_size: int,
        name: str = "train",
        accumulation_steps: int = 1,
        shuffle_seed: int | None = None,
        num_batches: int | None = None,
        weights: Mapping[str, float] | None = None,
        left_out: BadRows | None = None,
        drop_doubtful: bool = False,
    ):
        """Plans the batches.

        Args:
          utterances: the set's utterances, from `prepare`.
          inputs: where audio is read from: waveforms or kept frames.
          prompt: the run's prompt.
          config: gives the bucket lengths.
          pool_stride: k, the projector's pool stride.
          mesh: determines which rows this process provides.
          batch_size: utterances per batch of the last bucket, over all devices; see
            `batch_multiples`. If the devices cannot share them equally, the arrays have
            additional padding rows.
          name: the set's name, for the list of bad rows and for messages.
          accumulation_steps: number of micro-batches, which must share the rows equally too.
          shuffle_seed: seed for shuffling; None keeps the order.
          num_batches: number of batches; None means one epoch.
          weights: by source, see `epoch_members`; 1 for sources that are not listed.
          left_out: the set's bad rows, which are not among the utterances; scores count them.
          drop_doubtful: treat clips that may be no speech like those that cannot be read.

        Raises:
          ValueError: if there are weights but no seed.
        """
        if weights and shuffle_seed is None:
            raise ValueError(f"{name}: weights {dict(weights)} need a shuffle_seed")
        self.utterances = utterances
        self.left_out = BadRows.of([]) if left_out is None else left_out
        self.name = name
        self.buckets = make_buckets(utterances, prompt, config, pool_stride)
        self.mesh = mesh
        self._inputs, self._prompt, self._pool_stride = inputs, prompt, pool_stride
        self._columns = SharedArrays(
            assigned=assign(utterances, config), sources=utterances.source_numbers
        )
        self._weights = [(weights or {}).get(source, 1.0) for source in utterances.sources]
        self._seed = shuffle_seed
        self._sizes = [batch_size * bucket.multiple for bucket in self.buckets]
        self._whole_window, self._drop_doubtful = config.whole_window, drop_doubtful
        self._window_samples = config.window_samples
        num_rows = padded_batch_size(mesh, batch_size, accumulation_steps)
        self._num_rows = [num_rows * bucket.multiple for bucket in self.buckets]
        self._rows = [local_rows(mesh, number) for number in self._num_rows]
        self._epochs = self._epoch_starts(num_batches or 0)
        self._len = int(self._epochs[1]) if num_batches is None else num_batches

    def __getstate__(self) -> dict[str, Any]:
        # Devices belong to this process, and what is left out to the one that reports it.
        return {n: v for n, v in self.__dict__.items() if n not in ("mesh", "left_out")}

    def _drawn(self, epoch: int) -> np.ndarray:
        if self._seed is None:
            return np.arange(len(self.utterances))
        return epoch_members(self._columns["sources"], self._weights, self._seed, epoch)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - it lives as long as the run
    def _epoch(self, epoch: int) -> EpochPlan:
        rng = None if self._seed is None else np.random.default_rng((self._seed, epoch))
        return epoch_plan(self._drawn(epoch), self._columns["assigned"], self._sizes, rng)

    def _epoch_starts(self, num_batches: int) -> np.ndarray:
        """i64, the number of the first batch of each epoch, until there are `num_batches`."""

        def count(epoch: int) -> int:
            assigned = self._columns["assigned"][self._drawn(epoch)]
            return count_batches(np.bincount(assigned, minlength=len(self._sizes)), self._sizes)

        starts = [0, first := len(self._epoch(0))]
        # With fractions of sources, epochs differ in how many clips of each length they hold.
        is_alike = all(float(w).is_integer() for w in self._weights) or len(set(self._sizes)) == 1
        while starts[-1] < num_batches:
            starts.append(starts[-1] + (first if is_alike else count(len(starts) - 1)))
        return np.array(starts)

    def __len__(self) -> int:
        return self._len

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash that differs between sets whose batches differ, wherever their clips are."""
        digest = hashlib.sha256(repr((self._weights, self._seed, self._sizes)).encode())
        digest.update(self._columns["assigned"].tobytes())
        self.utterances.update(digest)
        return digest.hexdigest()[:16]

    def _batch(self, index: int) -> tuple[int, np.ndarray]:
        """The bucket and utterance indices of a batch."""
        epoch = int(np.searchsorted(self._epochs, index, side="right")) - 1
        return self._epoch(epoch)[index - int(self._epochs[epoch])]

    def bucket(self, index: int) -> Bucket:
        """The static lengths of a batch."""
        return self.buckets[self._batch(index)[0]]

    def abstract_batches(self) -> list[tuple[Bucket, Batch]]:
        """Shapes and shardings of the global batches, for every bucket that may occur."""
        numbers = set(self._epoch(0).buckets.tolist())
        if set(self._weights) != {1.0}:  # epochs differ in how many clips of each length they hold
            numbers = {i for i, bucket in enumerate(self.buckets) if bucket.num_frames}
        sharding = batch_sharding(self.mesh)
        abstract = {}  # by lengths, which two buckets may share
        for number in sorted(numbers):
            batch, num_rows = self._empty(number), self._num_rows[number]
            abstract[self.buckets[number]] = abstract_batch(batch, num_rows, sharding)
        return list(abstract.items())

    def to_global(self, batch: Batch) -> Batch:
        """The global batch on the devices, assembled from every process's part."""
        # This process has the same share of every batch.
        num_rows = len(batch.num_frames) * self._num_rows[-1] // len(self._rows[-1])
        return to_global(batch, num_rows, batch_sharding(self.mesh))

    def members(self, index: int) -> list[Utterance | None]:
        """The utterances in all rows of a batch, over all processes; None for padding."""
        number, batch = self._batch(index)
        padding = [None] * (self._num_rows[number] - len(batch))
        return [self.utterances[int(i)] if i >= 0 else None for i in batch] + padding

    def __getitem__(self, index: int) -> LocalBatch:
        (number, _), members = self._batch(index), self.members(index)
        bucket, batch, bad = self.buckets[number], self._empty(number), []
        for row, utterance in enumerate(members[i] for i in self._rows[number]):
            if utterance is None:
                continue
            clip, wrong = read_clip(utterance, self._inputs, drop_doubtful=self._drop_doubtful)
            if wrong is not None:
                bad.append(wrong)
            if clip is None:
                continue
            num_heard = bucket.num_frames if self._whole_window else clip.num_frames
            layout = self._prompt.layout(
                num_audio_tokens(num_heard, self._pool_stride),
                utterance.target,
                merged_len=bucket.merged_len,
                text_len=bucket.text_len,
            )
            batch.set_row(row, clip.audio, clip.num_frames, layout)
        return LocalBatch(batch, tuple(bad))

    def _empty(self, number: int) -> Batch:
        """This process's part of a batch of a bucket, without utterances."""
        bucket = self.buckets[number]
        return empty_batch(
            bucket,
            len(self._rows[number]),
            fill=self._prompt.end_of_turn,
            audio_shape={self._inputs.name: self._inputs.shape(bucket)},
            audio_dtype=self._inputs.dtype,
            window_samples=self._window_samples,
            whole_window=self._whole_window,
        )
