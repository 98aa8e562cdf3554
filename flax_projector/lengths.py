"""Lengths and how they relate: samples, mel frames, encoder frames and audio tokens.

A second of audio is 16,000 samples, 100 mel frames, 50 encoder frames and 50 / k audio tokens.
"""

from typing import TypeVar

import numpy as np

Lengths = TypeVar("Lengths", int, np.ndarray)

SAMPLE_RATE = 16_000  # Hz; the only rate that Whisper accepts
HOP_LENGTH = 160  # samples from one mel frame to the next
SAMPLES_PER_FRAME = 2 * HOP_LENGTH  # per encoder frame: Whisper's conv2 has stride 2
FRAME_SECS = SAMPLES_PER_FRAME / SAMPLE_RATE


def num_encoder_frames(num_samples: Lengths) -> Lengths:
    """Encoder frames needed for `num_samples` of audio; the last may be partly filled."""
    return -(-num_samples // SAMPLES_PER_FRAME)


def num_audio_tokens(num_frames: Lengths, pool_stride: int) -> Lengths:
    """Audio tokens from `num_frames` encoder frames: ceil(S / k), since the tail is zero-padded."""
    return -(-num_frames // pool_stride)
