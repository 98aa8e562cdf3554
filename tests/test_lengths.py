"""How lengths follow from each other."""

import pytest

from flax_projector.lengths import FRAME_SECS, num_audio_tokens, num_encoder_frames


@pytest.mark.parametrize(
    ("num_samples", "expected"),
    [(0, 0), (1, 1), (319, 1), (320, 1), (321, 2), (16_000, 50), (480_000, 1500)],
)
def test_num_encoder_frames_counts_the_partly_filled_one(num_samples, expected) -> None:
    assert num_encoder_frames(num_samples) == expected


@pytest.mark.parametrize(
    ("num_frames", "pool_stride", "expected"),
    [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (1500, 2, 750), (7, 1, 7)],
)
def test_num_audio_tokens_counts_the_partly_filled_one(num_frames, pool_stride, expected) -> None:
    assert num_audio_tokens(num_frames, pool_stride) == expected


def test_a_second_has_50_encoder_frames() -> None:
    assert FRAME_SECS == 0.02
