"""Plans which utterances share a batch, and its static lengths. Reads no audio."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flax_projector.batch import Bucket
from flax_projector.chat.prompt import Prompt
from flax_projector.config import DataConfig
from flax_projector.data.audio import Problem
from flax_projector.data.bad_rows import BadRow
from flax_projector.data.manifest import ManifestRow
from flax_projector.data.sound import DURATION_TOLERANCE_SECS
from flax_projector.lengths import SAMPLE_RATE, num_audio_tokens, num_encoder_frames


@dataclass(frozen=True, slots=True)
class Utterance:
    """A row, with what a batch must know about it before any audio is read.

    Attributes:
      row: the row itself.
      max_frames: the most encoder frames that it may fill; stated durations are rounded. With
        `--data.audio-tokens window`, those of the window.
      target: label ids, including the end of turn.
    """

    row: ManifestRow
    max_frames: int
    target: tuple[int, ...]


def prepare(
    rows: Sequence[ManifestRow], prompt: Prompt, config: DataConfig
) -> tuple[list[Utterance], list[BadRow]]:
    """Tokenizes transcripts; rows that no bucket can hold are returned as bad rows instead.

    Raises:
      ValueError: if nothing is left.
    """
    utterances, bad = [], []
    limit, window_frames = config.bucket_secs[-1], num_encoder_frames(config.window_samples)
    for row in rows:
        text = row.text.lower() if config.text_case == "lower" else row.text
        target = prompt.encode_target(text)
        if row.duration > limit:
            detail = f"{row.duration:.3f} s; --data.bucket-secs ends at {limit:g}"
            bad.append(BadRow(row.id, row.source, Problem.TOO_LONG, detail, row.text))
        elif len(target) > config.max_text_tokens:
            detail = f"{len(target)} labels; --data.max-text-tokens is {config.max_text_tokens}"
            bad.append(BadRow(row.id, row.source, Problem.TOO_MANY_LABELS, detail, row.text))
        elif config.whole_window:
            utterances.append(Utterance(row, window_frames, target))
        else:
            # With a margin, since manifests round durations and resampling rounds samples.
            secs = row.duration + DURATION_TOLERANCE_SECS
            max_frames = num_encoder_frames(round(secs * SAMPLE_RATE)) + 1
            utterances.append(Utterance(row, min(max_frames, window_frames), target))
    if not utterances:
        bounds = " ".join(f"{secs:g}" for secs in config.bucket_secs)
        raise ValueError(
            f"none of {len(rows)} utterances fits the run: all are longer than its "
            f"--data.bucket-secs {bounds}, or have more labels than its --data.max-text-tokens "
            f"{config.max_text_tokens}"
        )
    return utterances, bad


def assign(utterances: Sequence[Utterance], config: DataConfig) -> np.ndarray:
    """Index of the smallest bucket that holds each utterance's audio.

    Args:
      utterances: none may be longer than the last bucket.
      config: gives `bucket_bounds`.
    """
    durations = [u.row.duration for u in utterances]
    return np.searchsorted(np.asarray(config.bucket_bounds), durations)


def make_buckets(
    utterances: Sequence[Utterance], prompt: Prompt, config: DataConfig, pool_stride: int
) -> list[Bucket]:
    """The tightest static lengths that hold the utterances of each bucket and of all before it."""
    assigned = assign(utterances, config)
    lengths = np.zeros((len(config.bucket_bounds), 3), int)
    for bucket, u in zip(assigned, utterances, strict=True):
        audio_tokens = num_audio_tokens(u.max_frames, pool_stride)
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


def epoch_plan(
    members: np.ndarray,
    assigned: np.ndarray,
    num_buckets: int,
    batch_size: int,
    rng: np.random.Generator | None,
) -> list[tuple[int, np.ndarray]]:
    """Batches of one epoch as (bucket, utterance indices); every member occurs exactly once.

    Utterances left over after filling a bucket's batches move up to the next bucket, so that only
    the last batch of the last bucket is padded, at its end, with index -1.

    Args:
      members: indices of the epoch's utterances.
      assigned: bucket of every utterance.
      num_buckets: number of buckets.
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
