"""Reads sound files of any length as 16 kHz mono, block by block."""

import itertools
from collections.abc import Iterator

import numpy as np
import soxr

from flax_projector.data.audio import Audio, check_num_samples, check_samples, mix, open_clip
from flax_projector.data.sound import open_stream
from flax_projector.lengths import SAMPLE_RATE


def stream_audio(audio: Audio) -> Iterator[np.ndarray]:
    """The samples that `load_audio` gives, in blocks of some seconds.

    Of channels that cancel each other, it takes the loudest of each block.

    Args:
      audio: path, URL or stored clip.

    Yields:
      f32[N], one block after the other.

    Raises:
      BadAudio: as `load_audio` and `check_samples`, when what is wrong is reached.
    """
    count = 0
    with open_clip(audio, open_stream, whole=False) as sound:
        resampler = soxr.ResampleStream(sound.samplerate, SAMPLE_RATE, 1, dtype="float32")
        end = np.zeros((0, 1), np.float32)
        for block in itertools.chain(sound.blocks, [end]):
            mono = mix(block)
            if sound.samplerate != SAMPLE_RATE:
                mono = resampler.resample_chunk(np.ascontiguousarray(mono), last=block is end)
            if len(mono):
                check_samples(audio, mono)
                yield mono
            count += len(mono)
    check_num_samples(audio, count)


def stated_secs(audio: Audio) -> float | None:
    """The length of a clip as its header states it; None if it states none.

    Raises:
      BadAudio: if the clip is missing, or is found to be unusable without reading it.
    """
    with open_clip(audio, open_stream, whole=False) as sound:
        return sound.secs
