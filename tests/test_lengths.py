"""How lengths follow from each other."""

import pytest

from flax_projector.lengths import num_encoder_frames


@pytest.mark.parametrize(
    ("num_samples", "expected"),
    [(0, 0), (1, 1), (319, 1), (320, 1), (321, 2), (16_000, 50), (480_000, 1500)],
)
def test_num_encoder_frames_counts_the_partly_filled_one(num_samples, expected) -> None:
    assert num_encoder_frames(num_samples) == expected
