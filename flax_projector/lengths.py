"""Lengths and how they relate: samples, mel frames, encoder frames and audio tokens.

A second of audio is 16,000 samples, 100 mel frames, 50 encoder frames and 50 / k audio tokens.
"""

SAMPLE_RATE = 16_000  # Hz; the only rate that Whisper accepts
HOP_LENGTH = 160  # samples from one mel frame to the next
SAMPLES_PER_FRAME = 2 * HOP_LENGTH  # per encoder frame: Whisper's conv2 has stride 2
FRAME_SECS = SAMPLES_PER_FRAME / SAMPLE_RATE


def num_encoder_frames(num_samples: int) -> int:
    """Encoder frames needed for `num_samples` of audio; the last may be partly filled."""
    return -(-num_samples // SAMPLES_PER_FRAME)


def num_audio_tokens(num_frames: int, pool_stride: int) -> int:
    """Audio tokens from `num_frames` encoder frames: ceil(S / k), since the tail is zero-padded."""
    return -(-num_frames // pool_stride)
