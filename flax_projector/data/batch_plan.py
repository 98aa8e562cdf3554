"""Plans which utterances share a batch, and its static lengths. Reads no audio."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flax_projector.batch import Bucket
from flax_projector.chat.prompt import Prompt
from flax_projector.config import DataConfig
from flax_projector.data.utterances import Utterances
from flax_projector.lengths import num_audio_tokens, num_encoder_frames

_POSITIONS = 8
"""The LLM computes a multiple of so many positions: the rows of a TPU's tile. Lengths in between
cost more than the next multiple."""
_ENCODER_COST = 0.08
"""Times the pool stride: a second of the window costs as much in the encoder as so many seconds of
a clip in the LLM. By FLOPs for the smallest pair of the presets, by docs/pods.md for the largest.
"""


def assign(utterances: Utterances, config: DataConfig) -> np.ndarray:
    """i8[N], the index of the smallest bucket that holds each utterance's audio.

    Args:
      utterances: none may be longer than the last bucket.
      config: gives `bucket_bounds`.
    """
    bounds = np.asarray(config.bucket_bounds)
    return np.searchsorted(bounds, utterances.durations).astype(np.int8)


def batch_multiples(config: DataConfig, pool_stride: int) -> tuple[int, ...]:
    """How many times the batch size a batch of each bucket holds: as many as cost no more.

    A clip costs its length in the LLM, and the window in the encoder. It is counted with kept
    frames too, so that keeping them changes no batch. Whole multiples, since whatever divides the
    batch size divides them: the devices' share of a batch and the order of utterances do not depend
    on how many devices there are.
    """
    encoder = _ENCODER_COST * pool_stride * config.window_secs
    last = config.bucket_bounds[-1] + encoder
    return tuple(int(last / (bound + encoder) + 1e-9) for bound in config.bucket_bounds)


def make_buckets(
    utterances: Utterances, prompt: Prompt, config: DataConfig, pool_stride: int
) -> list[Bucket]:
    """The static lengths that hold the utterances of each bucket and of all before it.

    They are the tightest ones, but for the positions that the LLM computes.
    """
    assigned, num_labels = assign(utterances, config), utterances.num_labels
    audio_tokens = num_audio_tokens(utterances.max_frames, pool_stride)
    merged = prompt.merged_length(audio_tokens, num_labels)
    lengths = np.zeros((len(config.bucket_bounds), 3), int)
    for column, values in enumerate((audio_tokens, merged, num_labels)):
        np.maximum.at(lengths[:, column], assigned, values)
    lengths = np.maximum.accumulate(lengths)
    # Keys and values of what comes before the audio are constants of a run.
    computed = lengths[:, 1] - len(prompt.before_audio)
    lengths[:, 1] += np.where(computed > 0, -computed % _POSITIONS, 0)
    window_frames = num_encoder_frames(config.window_samples)
    multiples = batch_multiples(config, pool_stride)
    return [
        Bucket(min(int(a) * pool_stride, window_frames), int(merged), int(text), multiple)
        for (a, merged, text), multiple in zip(lengths, multiples, strict=True)
    ]


@dataclass(frozen=True)
class EpochPlan:
    """The batches of an epoch, by number.

    Attributes:
      sizes: how many utterances a batch of each bucket holds.
      buckets: i8[n], the bucket of each batch.
      starts: i64[n], where its utterances begin in `members`.
      members: i32, the utterances; -1 for padding.
    """

    sizes: Sequence[int]
    buckets: np.ndarray
    starts: np.ndarray
    members: np.ndarray

    def __len__(self) -> int:
        return len(self.buckets)

    def __getitem__(self, number: int) -> tuple[int, np.ndarray]:
        """The bucket of a batch, and its utterances."""
        bucket, start = int(self.buckets[number]), self.starts[number]
        return bucket, self.members[start : start + self.sizes[bucket]]


def epoch_members(
    sources: np.ndarray, weights: Sequence[float], seed: int, epoch: int
) -> np.ndarray:
    """The utterances in an epoch of a mixture, ascending; with weights of 1, each occurs once.

    A source with n utterances and weight w gives round(n * w) of them, at least one, to each epoch:
    the next ones in an endless sequence of permutations of the source. So how often two utterances
    of a source have been drawn never differs by more than one. Weight 2 gives every utterance twice
    per epoch; weight 0.5 gives one half in one epoch and the other half in the next.

    Args:
      sources: index of each utterance's source.
      weights: one per source.
      seed: seed of the permutations.
      epoch: number of the epoch, from 0.
    """
    drawn = []
    for source, weight in enumerate(weights):
        members = np.flatnonzero(sources == source)
        if not len(members):
            continue
        num_draws = max(1, round(len(members) * weight))
        draws = np.arange(num_draws * epoch, num_draws * (epoch + 1))
        for number in np.unique(draws // len(members)):
            order = np.random.default_rng((seed, source, number)).permutation(members)
            drawn.append(order[draws[draws // len(members) == number] % len(members)])
    return np.sort(np.concatenate(drawn))


def count_batches(counts: np.ndarray, sizes: Sequence[int]) -> int:
    """Number of batches in an epoch, see `epoch_plan`.

    Args:
      counts: number of the epoch's utterances in each bucket.
      sizes: how many utterances a batch of each bucket holds.
    """
    total = carried = 0
    for count, size in zip(counts.tolist(), sizes, strict=True):
        num_full, carried = divmod(carried + count, size)
        total += num_full
    return total + (carried > 0)


def epoch_plan(
    members: np.ndarray,
    assigned: np.ndarray,
    sizes: Sequence[int],
    rng: np.random.Generator | None,
) -> EpochPlan:
    """Batches of one epoch; every member occurs exactly once.

    Utterances left over after filling a bucket's batches move up to the next bucket, so that only
    the last batch of the last bucket is padded, at its end, with index -1.

    Args:
      members: indices of the epoch's utterances.
      assigned: bucket of every utterance.
      sizes: how many utterances a batch of each bucket holds.
      rng: shuffles utterances within buckets, then batches; None keeps the members' order.
    """
    batches, buckets = [], []
    carried, member_buckets = np.zeros(0, np.int32), assigned[members]
    for bucket, size in enumerate(sizes):
        batched = np.concatenate([carried, members[member_buckets == bucket].astype(np.int32)])
        if rng is not None:
            batched = rng.permutation(batched)
        is_last = bucket == len(sizes) - 1
        padding = -len(batched) % size if is_last else 0
        batched = np.pad(batched, (0, padding), constant_values=-1)
        num_full = len(batched) // size
        batches.append(batched[: num_full * size])
        buckets.append(np.full(num_full, bucket, np.int8))
        carried = batched[num_full * size :]
    buckets = np.concatenate(buckets)
    lengths = np.array(sizes)[buckets]
    starts = np.cumsum(lengths) - lengths
    if rng is not None:
        order = rng.permutation(len(buckets))
        buckets, starts = buckets[order], starts[order]
    return EpochPlan(sizes, buckets, starts, np.concatenate(batches))
