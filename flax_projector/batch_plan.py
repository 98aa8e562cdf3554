"""Which utterances share a batch, and its static lengths: no audio is read here."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flax_projector.audio import DURATION_TOLERANCE_SECS, Problem
from flax_projector.bad_rows import BadRow
from flax_projector.config import SAMPLE_RATE, DataConfig
from flax_projector.manifest import ManifestRow
from flax_projector.projector import output_length
from flax_projector.prompt import Prompt
from flax_projector.whisper import num_encoder_frames


@dataclass(frozen=True, slots=True)
class Utterance:
    """A row with what its batch needs to know before any audio is read.

    Attributes:
      row: of the manifest.
      max_frames: encoder frames that it fills at most (a written duration is rounded).
      target: label ids, end of turn included.
    """

    row: ManifestRow
    max_frames: int
    target: tuple[int, ...]


@dataclass(frozen=True)
class Bucket:
    """Static lengths of the batches of similar utterances; every bucket is compiled once.

    Attributes:
      num_frames: S.
      merged_len: L.
      text_len: T.
    """

    num_frames: int
    merged_len: int
    text_len: int


def prepare(
    rows: Sequence[ManifestRow], prompt: Prompt, config: DataConfig
) -> tuple[list[Utterance], list[BadRow]]:
    """Tokenizes transcripts; what no bucket can hold is left out, and returned as bad rows.

    Raises:
      ValueError: if nothing is left.
    """
    utterances, bad = [], []
    limit, window_frames = config.bucket_secs[-1], num_encoder_frames(config.window_samples)
    for row in rows:
        target = prompt.encode_target(row.text)
        if row.duration > limit:
            detail = f"{row.duration:.2f} s, data.bucket_secs ends at {limit:g}"
            bad.append(BadRow(row.id, row.source, Problem.TOO_LONG, detail, row.text))
        elif len(target) > config.max_text_tokens:
            detail = f"{len(target)} labels, data.max_text_tokens is {config.max_text_tokens}"
            bad.append(BadRow(row.id, row.source, Problem.TOO_MANY_LABELS, detail, row.text))
        else:
            # Manifests round durations, and resampling rounds samples: one frame more.
            secs = row.duration + DURATION_TOLERANCE_SECS
            max_frames = num_encoder_frames(round(secs * SAMPLE_RATE)) + 1
            utterances.append(Utterance(row, min(max_frames, window_frames), target))
    if not utterances:
        raise ValueError(
            f"none of {len(rows)} utterances fits: raise data.bucket_secs {config.bucket_secs} or "
            f"data.max_text_tokens {config.max_text_tokens}"
        )
    return utterances, bad


def assign(utterances: Sequence[Utterance], config: DataConfig) -> np.ndarray:
    """Index of the smallest bucket that holds each utterance's audio.

    Args:
      utterances: none longer than the last bucket.
      config: `bucket_secs`.
    """
    durations = [u.row.duration for u in utterances]
    return np.searchsorted(np.asarray(config.bucket_secs), durations)


def make_buckets(
    utterances: Sequence[Utterance], prompt: Prompt, config: DataConfig, pool_stride: int
) -> list[Bucket]:
    """The tightest static lengths that hold each bucket's utterances and all smaller ones."""
    assigned = assign(utterances, config)
    lengths = np.zeros((len(config.bucket_secs), 3), int)
    for bucket, u in zip(assigned, utterances, strict=True):
        audio_tokens = output_length(u.max_frames, pool_stride)
        needed = (audio_tokens, prompt.merged_length(audio_tokens, len(u.target)), len(u.target))
        lengths[bucket] = np.maximum(lengths[bucket], needed)
    lengths = np.maximum.accumulate(lengths)
    window_frames = num_encoder_frames(config.window_samples)
    return [
        Bucket(min(int(a) * pool_stride, window_frames), int(merged), int(text))
        for a, merged, text in lengths
    ]


def epoch_members(
    sources: np.ndarray, weights: Sequence[float], seed: int, epoch: int
) -> np.ndarray:
    """Which utterances an epoch of a mixture holds, ascending; with weights of 1, each once.

    A source of n utterances and weight w gives round(n * w) of them, at least one, to every epoch:
    the next ones of an endless sequence of permutations of the source. At any time, two of its
    utterances have been drawn equally often or once more: weight 2 is every utterance twice an
    epoch, weight 0.5 one half in one epoch and the other half in the next.

    Args:
      sources: source of each utterance.
      weights: of the sources.
      seed: of the permutations.
      epoch: number from 0.
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


def epoch_plan(
    members: np.ndarray,
    assigned: np.ndarray,
    num_buckets: int,
    batch_size: int,
    rng: np.random.Generator | None,
) -> list[tuple[int, np.ndarray]]:
    """Batches of one epoch as (bucket, utterance indices); every member occurs exactly once.

    What does not fill a batch moves up into the next bucket, so that only the last batch of the
    last bucket is padded, with index -1.

    Args:
      members: indices of the epoch's utterances.
      assigned: bucket of each utterance there is.
      num_buckets: how many there are.
      batch_size: utterances per batch.
      rng: shuffles utterances within buckets, then batches; None keeps the members' order.
    """
    plan = []
    carried = np.zeros(0, int)
    for bucket in range(num_buckets):
        batched = np.concatenate([carried, members[assigned[members] == bucket]])
        if rng is not None:
            batched = rng.permutation(batched)
        is_last = bucket == num_buckets - 1
        padding = -len(batched) % batch_size if is_last else 0
        batched = np.pad(batched, (0, padding), constant_values=-1)
        num_full = len(batched) // batch_size
        batches = batched[: num_full * batch_size].reshape(num_full, batch_size)
        plan += [(bucket, batch) for batch in batches]
        carried = batched[num_full * batch_size :]
    if rng is not None:
        plan = [plan[i] for i in rng.permutation(len(plan))]
    return plan
