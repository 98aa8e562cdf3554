"""Planned batches of speech, read ahead and resumable by number -> global arrays."""

import functools
import hashlib
import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from flax_projector.audio import BadAudio, Problem, load_audio
from flax_projector.bad_rows import BadRow, BadRowLog
from flax_projector.batch_plan import (
    Bucket,
    Utterance,
    assign,
    epoch_members,
    epoch_plan,
    make_buckets,
)
from flax_projector.config import SAMPLE_RATE, DataConfig
from flax_projector.projector import output_length
from flax_projector.prompt import Prompt
from flax_projector.sharding import batch_sharding, local_rows, padded_batch_size
from flax_projector.whisper import num_encoder_frames

log = logging.getLogger(__name__)


@runtime_checkable
class Inputs(Protocol):
    """Where the encoder's side of a batch comes from: waveforms, or frames kept from before."""

    name: str

    def shape(self, bucket: Bucket) -> tuple[int, ...]:
        """Static shape of one utterance."""
        ...

    def read(self, utterance: Utterance) -> tuple[np.ndarray, int]:
        """The utterance's array, unpadded, and its number of encoder frames.

        Raises:
          BadAudio: if the clip cannot be used.
        """
        ...


class Waveforms:
    """Reads sound files, for an encoder that runs in the step."""

    name = "samples"

    def __init__(self, window_samples: int):
        self._window_samples = window_samples

    def shape(self, bucket: Bucket) -> tuple[int, ...]:
        """[N] samples, of the whole window."""
        return (self._window_samples,)

    def read(self, utterance: Utterance) -> tuple[np.ndarray, int]:
        """f32[<= N] samples at 16 kHz."""
        row = utterance.row
        samples = load_audio(row.audio, offset=row.offset, duration=row.duration)
        num_frames = num_encoder_frames(len(samples))
        if num_frames > utterance.max_frames:
            secs = len(samples) / SAMPLE_RATE
            text = f"{row.audio} lasts {secs:.2f} s, more than its bucket holds"
            raise BadAudio(Problem.WRONG_DURATION, text)
        return samples, num_frames


def find_unreadable(
    utterances: Sequence[Utterance], inputs: Inputs, *, num_threads: int
) -> list[BadRow]:
    """Reads clips; those that cannot be used."""
    with ThreadPoolExecutor(num_threads) as pool:
        errors = pool.map(lambda utterance: _try_to_read(utterance, inputs), utterances)
        return [
            _bad_row(utterance, error.problem, str(error))
            for utterance, error in zip(utterances, errors, strict=True)
            if error is not None
        ]


def _try_to_read(utterance: Utterance, inputs: Inputs) -> BadAudio | None:
    """What is wrong with a clip, if anything."""
    try:
        inputs.read(utterance)
    except BadAudio as error:
        return error
    return None


def _bad_row(utterance: Utterance, reason: Problem, detail: str) -> BadRow:
    row = utterance.row
    return BadRow(row.id, row.source, reason, detail, row.text)


class BatchSource:
    """Batches by number, endless when shuffled: batch i is the same for everyone who asks.

    Each process builds only its own rows. `__getitem__` gives a dict of numpy arrays with these
    rows on axis 0: `samples` f32[B, N] or `frames` f32[B, S, E], `frame_valid` bool[B, S], what
    `Prompt.layout` describes, and `problem` i32[B]. A clip that turns out to be unusable when it is
    read becomes a row of padding without labels, and `problem` says why: the order of batches
    never depends on it, and a long run survives it. `take_problems` must remove the entry.

    It pickles, for worker processes, without its mesh.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
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
        left_out: Sequence[BadRow] = (),
    ):
        """Plans the batches.

        Args:
          utterances: from `prepare`.
          inputs: waveforms or kept frames.
          prompt: of the run.
          config: lengths.
          pool_stride: k of the projector.
          mesh: decides which rows this process provides.
          batch_size: utterances per batch, over all devices; the arrays have more rows where it
            does not divide over them.
          name: of the set, for the list of bad rows.
          accumulation_steps: parts that a batch is computed in, for the number of its rows.
          shuffle_seed: None keeps the order.
          num_batches: length; None is one epoch.
          weights: of the rows' sources, see `epoch_members`; 1 where nothing is said.
          left_out: bad rows that are not among the utterances, for who must account for all.

        Raises:
          ValueError: if there are weights without a seed.
        """
        if weights and shuffle_seed is None:
            raise ValueError(f"{name}: weights {dict(weights)} need a shuffle_seed")
        self.utterances = list(utterances)
        self.left_out = tuple(left_out)
        self.name = name
        self.buckets = make_buckets(utterances, prompt, config, pool_stride)
        self.mesh = mesh
        self.num_rows = padded_batch_size(mesh, batch_size, accumulation_steps)
        self._inputs, self._prompt, self._pool_stride = inputs, prompt, pool_stride
        self._assigned = assign(utterances, config)
        names = list(dict.fromkeys(u.row.source for u in utterances))
        number = {source: i for i, source in enumerate(names)}
        self._sources = np.array([number[u.row.source] for u in utterances])
        self._weights = [(weights or {}).get(source, 1.0) for source in names]
        self._seed = shuffle_seed
        self._batch_size = batch_size
        self._rows = local_rows(mesh, self.num_rows)
        self._epoch_len = len(self._epoch(0))
        self._len = self._epoch_len if num_batches is None else num_batches

    def __getstate__(self) -> dict[str, Any]:
        # Devices belong to one process.
        return {name: value for name, value in self.__dict__.items() if name != "mesh"}

    @functools.lru_cache(maxsize=2)  # noqa: B019 - one source per run
    def _epoch(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        members, rng = np.arange(len(self.utterances)), None
        if self._seed is not None:
            members = epoch_members(self._sources, self._weights, self._seed, epoch)
            rng = np.random.default_rng((self._seed, epoch))
        return epoch_plan(members, self._assigned, len(self.buckets), self._batch_size, rng)

    def __len__(self) -> int:
        return self._len

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells apart sources whose batches differ."""
        digest = hashlib.sha256(repr((self._weights, self._seed, self._batch_size)).encode())
        for utterance, bucket in zip(self.utterances, self._assigned, strict=True):
            digest.update(f"{utterance.row.key}\t{bucket}\t{utterance.target}\n".encode())
        return digest.hexdigest()[:16]

    def _batch(self, index: int) -> tuple[int, np.ndarray]:
        """Bucket and utterance numbers of a batch."""
        return self._epoch(index // self._epoch_len)[index % self._epoch_len]

    def bucket(self, index: int) -> Bucket:
        """The static lengths of a batch."""
        return self.buckets[self._batch(index)[0]]

    def abstract_batches(self) -> list[tuple[Bucket, dict[str, jax.ShapeDtypeStruct]]]:
        """What the global batches of every bucket that may occur look like, shortest first."""
        sharding = batch_sharding(self.mesh)
        numbers = {number for number, _ in self._epoch(0)}
        if set(self._weights) != {1.0}:  # epochs differ in how many clips of a length they hold
            numbers = {i for i, bucket in enumerate(self.buckets) if bucket.num_frames}
        abstract = {}
        for number in sorted(numbers):
            bucket = self.buckets[number]
            arrays = self._padding(bucket)
            del arrays["problem"]
            abstract[bucket] = {
                name: jax.ShapeDtypeStruct(
                    (self.num_rows, *x.shape[1:]), x.dtype, sharding=sharding
                )
                for name, x in arrays.items()
            }
        return list(abstract.items())

    def members(self, index: int) -> list[Utterance | None]:
        """Utterances of all rows of a batch, over all processes; None for padding."""
        _, batch = self._batch(index)
        padding = [None] * (self.num_rows - len(batch))
        return [self.utterances[i] if i >= 0 else None for i in batch] + padding

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        bucket = self.bucket(index)
        members = self.members(index)
        batch = self._padding(bucket)
        for row, utterance in enumerate(members[i] for i in self._rows):
            if utterance is None:
                continue
            try:
                self._fill_row(row, utterance, bucket, batch)
            except BadAudio as error:
                batch["problem"][row] = error.problem
        return batch

    def _padding(self, bucket: Bucket) -> dict[str, np.ndarray]:
        """This process's part of a batch without utterances."""
        num_rows = len(self._rows)
        row = _padding_row(bucket, self._prompt.end_of_turn)
        batch = {name: np.stack([value] * num_rows) for name, value in row.items()}
        batch[self._inputs.name] = np.zeros((num_rows, *self._inputs.shape(bucket)), np.float32)
        return batch

    def _fill_row(
        self, row: int, utterance: Utterance, bucket: Bucket, batch: dict[str, np.ndarray]
    ) -> None:
        array, num_frames = self._inputs.read(utterance)
        layout = self._prompt.layout(
            output_length(num_frames, self._pool_stride),
            utterance.target,
            merged_len=bucket.merged_len,
            text_len=bucket.text_len,
        )
        batch[self._inputs.name][row, : len(array)] = array
        batch["frame_valid"][row, :num_frames] = True
        for name, value in layout.items():
            batch[name][row] = value

    def bad_rows(self, index: int, problem: np.ndarray) -> list[BadRow]:
        """The rows of this process's part of a batch that were left out.

        Args:
          index: of the batch.
          problem: i32[B] its entry of this name.
        """
        members, found = self.members(index), []
        for row, code in zip(self._rows[problem > 0], problem[problem > 0], strict=True):
            if (utterance := members[row]) is not None:
                # A worker process hands over a number: what is wrong shows when it is read again.
                error = _try_to_read(utterance, self._inputs)
                detail = str(error or f"{utterance.row.audio} could be read the second time")
                found.append(_bad_row(utterance, Problem(code), detail))
        return found


def _padding_row(bucket: Bucket, fill: int) -> dict[str, np.ndarray]:
    """A row without an utterance: no label counts."""
    zeros = np.zeros(bucket.text_len, np.int32)
    return {
        "frame_valid": np.zeros(bucket.num_frames, bool),
        "tokens": np.full(bucket.merged_len, fill, np.int32),
        "prompt_len": np.array(0, np.int32),
        "label_positions": zeros,
        "labels": zeros,
        "label_valid": zeros.astype(bool),
        "problem": np.array(Problem.NONE, np.int32),
    }


class BatchIterator:
    """Batches in order, read ahead by Grain in threads, or in processes with threads.

    Its state is the number of the next batch: it does not depend on who reads, and a run may
    continue with another number of threads, workers or hosts.
    """

    def __init__(self, source: BatchSource, *, num_threads: int, num_workers: int = 0):
        """Reads nothing yet.

        Args:
          source: of the batches.
          num_threads: of each process that reads.
          num_workers: processes beside this one; 0 reads here.
        """
        self._source, self._next, self._grain = source, 0, None
        self._num_threads, self._num_workers = num_threads, num_workers

    def _start(self) -> grain.DatasetIterator:
        ahead = max(2, 2 * self._num_threads)
        options = grain.ReadOptions(num_threads=self._num_threads, prefetch_buffer_size=ahead)
        batches = grain.MapDataset.source(self._source)[self._next :].to_iter_dataset(options)
        if self._num_workers:
            if not flags.FLAGS.is_parsed():  # Grain asks them what its workers should do
                flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(
                num_workers=self._num_workers, per_worker_buffer_size=2
            )
            batches = batches.mp_prefetch(workers, worker_init_fn=_end_with_parent)
        return iter(batches)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._next >= len(self._source):
            raise StopIteration
        if self._grain is None:
            self._grain = self._start()
        batch = next(self._grain)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """JSON that `set_state` continues from."""
        return {"next_batch": self._next, "data": self._source.fingerprint}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where another iterator stood; warns if its source had other batches."""
        if state["data"] != self._source.fingerprint:
            log.warning(
                "%s: its rows are not those that the run began with: batches from %d on are not "
                "what they would have been",
                *(self._source.name, state["next_batch"]),
            )
        self.close()
        self._next = state["next_batch"]

    def close(self) -> None:
        """Ends threads and processes; the next batch would start them again."""
        if self._grain is not None:
            self._grain.close()
            self._grain = None


def _end_with_parent(_index: int, _count: int) -> None:
    """Ends this worker process when the main one is gone, also by SIGKILL: Grain's would stay.

    Not by Linux's PR_SET_PDEATHSIG: it sends the signal when the thread ends that started the
    worker, which is one of Grain's.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None  # as in every process that multiprocessing starts

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def take_problems(
    batch: dict[str, np.ndarray], source: BatchSource, index: int, bad_rows: BadRowLog
) -> dict[str, np.ndarray]:
    """The batch without its `problem`, which is listed.

    Args:
      batch: this process's rows.
      source: of the batch.
      index: of the batch.
      bad_rows: gets the rows that could not be used.

    Raises:
      ValueError: if there are too many by now.
    """
    problem = batch["problem"]
    if problem.any():
        bad_rows.add(source.name, source.bad_rows(index, problem))
    return {name: value for name, value in batch.items() if name != "problem"}


def to_global(batch: dict[str, np.ndarray], source: BatchSource) -> dict[str, jax.Array]:
    """Assembles the global batch on the devices from each process's rows."""
    sharding = batch_sharding(source.mesh)
    return {
        name: jax.make_array_from_process_local_data(
            sharding, rows, (source.num_rows, *rows.shape[1:])
        )
        for name, rows in batch.items()
    }
