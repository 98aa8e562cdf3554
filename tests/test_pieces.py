"""Sound of any length is cut where nobody speaks, into pieces that fit."""

import itertools

import numpy as np
import pytest

from flax_projector.inference.pieces import Piece, cut, to_pieces
from flax_projector.inference.queues import in_batches
from tests.media import clips, spoken

RATE = 16_000


def blocks(samples: np.ndarray, size: int = 10 * RATE) -> list[np.ndarray]:
    """As files are read."""
    return [samples[i : i + size] for i in range(0, len(samples), size)]


@pytest.fixture(scope="module")
def speech() -> list[np.ndarray]:
    return clips(12)


def check(pieces: list[Piece], samples: np.ndarray, max_secs: float) -> None:
    """Pieces are in order, apart from each other, no longer than they may be, and of the file."""
    assert all(len(piece.samples) <= max_secs * RATE for piece in pieces)
    assert all(a.end <= b.start for a, b in itertools.pairwise(pieces))
    padded, place = np.concatenate([samples, np.zeros(512, np.float32)]), 0
    for piece in pieces:
        first = int(piece.start * RATE)
        at = max(place, first - round(0.25 * RATE) // 512 * 512 - 512)
        while not np.array_equal(padded[at : at + len(piece.samples)], piece.samples):
            at += 1
            assert at <= first, "the samples are not those of the file at that time"
        assert first + 1 <= place + at + len(piece.samples)
        place = at + len(piece.samples)


def test_each_clip_is_a_piece_if_there_are_pauses_between(speech):
    samples, spans = spoken(speech, pause_secs=1.2)
    pieces = list(cut(blocks(samples), max_secs=4.0))
    check(pieces, samples, 4.0)
    assert len(pieces) == len(spans)
    for piece, (start, end) in zip(pieces, spans, strict=True):
        assert start - 0.05 <= piece.start <= piece.end <= end + 0.1
        assert piece.end - piece.start > 0.6 * (end - start)


def test_clips_with_short_pauses_are_joined_as_long_as_they_fit(speech):
    samples, spans = spoken(speech, pause_secs=0.25)
    pieces = list(cut(blocks(samples), max_secs=8.0))
    check(pieces, samples, 8.0)
    assert len(spans) / 4 < len(pieces) < len(spans) / 2
    starts = [start for start, _ in spans]
    for piece in pieces:  # each begins with a clip
        assert min(abs(piece.start - start) for start in starts) < 0.3


def test_speech_without_a_pause_is_cut_and_none_of_it_is_lost(speech):
    voiced = np.concatenate([clip[RATE // 4 : -RATE // 3] for clip in speech])
    pieces = list(cut(blocks(voiced), max_secs=2.0))
    check(pieces, voiced, 2.0)
    assert sum(piece.end - piece.start for piece in pieces) > 0.9 * len(voiced) / RATE


def test_the_size_of_blocks_does_not_matter(speech):
    samples, _ = spoken(speech[:3], pause_secs=0.8)
    whole, parts = (list(cut(blocks(samples, n), max_secs=4.0)) for n in (len(samples), 777))
    assert [(p.start, p.end) for p in whole] == [(p.start, p.end) for p in parts]
    assert all(np.array_equal(a.samples, b.samples) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("level", [0.0, 1e-3])
def test_in_silence_and_noise_there_is_no_speech(level):
    noise = level * np.random.default_rng(0).standard_normal(20 * RATE).astype(np.float32)
    assert not list(to_pieces(blocks(noise), max_secs=4.0))


def test_what_fits_is_one_piece_as_it_is(speech):
    for samples in (speech[0], np.random.default_rng(0).uniform(-1, 1, 4 * RATE)):
        (piece,) = to_pieces(blocks(samples, RATE), max_secs=4.0)
        np.testing.assert_array_equal(piece.samples, samples)
        assert (piece.start, piece.end) == (0.0, len(samples) / RATE)
    assert not list(to_pieces([np.zeros(RATE, np.float32)], max_secs=4.0))


def test_memory_does_not_grow_with_the_file(speech, monkeypatch):
    """Whatever is between two pieces: speech, pauses and silence."""
    from flax_projector.inference import pieces as module

    held, forget = [], module._Cutter._forget

    def counted(self):
        forget(self)
        held.append(len(self._frames))

    monkeypatch.setattr(module._Cutter, "_forget", counted)
    samples, _ = spoken(speech, pause_secs=0.8)
    silence = np.zeros(60 * RATE, np.float32)
    assert list(cut([silence, samples, silence, samples], max_secs=4.0))
    assert max(held) * 512 / RATE < 5.0


@pytest.mark.parametrize("count", [0, 1, 5, 37])
def test_every_item_is_in_one_batch_of_a_bucket_that_holds_it(count):
    items = np.random.default_rng(count).uniform(0.1, 3.0, count).tolist()
    bounds, sizes = (1.0, 2.0, 3.0), (6, 3, 2)
    found = list(in_batches(items, secs=float, bounds=bounds, sizes=sizes, max_waiting=16))
    assert sorted(item for _, batch in found for item in batch) == sorted(items)
    for number, batch in found:
        assert 0 < len(batch) <= sizes[number] and max(batch) <= bounds[number]
    assert sum(len(batch) < sizes[number] for number, batch in found) <= 2 * (1 + count // 16)


def test_a_batch_is_given_as_soon_as_it_is_full_and_none_waits_for_long():
    taken = []

    def items():
        for number in range(40):
            taken.append(number)
            yield 2.5 if number == 0 else 0.5

    batches = in_batches(items(), secs=float, bounds=(1.0, 3.0), sizes=(4, 2), max_waiting=10)
    assert next(batches) == (0, [0.5] * 4) and len(taken) == 5
    assert next(batches) == (0, [0.5] * 4) and len(taken) == 9
    assert next(batches) == (1, [0.5, 2.5]) and len(taken) == 10
