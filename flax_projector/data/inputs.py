"""Where the audio of a batch comes from."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np

from flax_projector.batch import Bucket
from flax_projector.data.audio import BadAudio, Problem, load_audio
from flax_projector.data.bad_rows import BadRow
from flax_projector.data.batch_plan import Utterance
from flax_projector.lengths import SAMPLE_RATE, num_encoder_frames


@runtime_checkable
class Inputs(Protocol):
    """Waveforms from audio files, or encoder frames that were computed earlier.

    Attributes:
      name: name of the `Batch` field that it fills.
    """

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
    """Audio files, for an encoder that runs in the step."""

    name = "samples"

    def __init__(self, window_samples: int):
        self._window_samples = window_samples

    def shape(self, bucket: Bucket) -> tuple[int, ...]:
        """(N,): the samples of the whole window, whatever the bucket."""
        return (self._window_samples,)

    def read(self, utterance: Utterance) -> tuple[np.ndarray, int]:
        """f32[N] samples at 16 kHz, at most a whole window, and their number of encoder frames."""
        row = utterance.row
        samples = load_audio(row.audio, offset=row.offset, duration=row.duration)
        num_frames = num_encoder_frames(len(samples))
        if num_frames > utterance.max_frames:
            secs = len(samples) / SAMPLE_RATE
            text = f"{row.audio} lasts {secs:.2f} s, more than its bucket holds"
            raise BadAudio(Problem.WRONG_DURATION, text)
        return samples, num_frames


def bad_row(utterance: Utterance, error: BadAudio) -> BadRow:
    """The bad row for an utterance whose clip cannot be used."""
    row = utterance.row
    return BadRow(row.id, row.source, error.problem, str(error), row.text)


def find_unreadable(
    utterances: Sequence[Utterance], inputs: Inputs, *, num_threads: int
) -> list[BadRow]:
    """Tries to read clips, and returns the rows of those that cannot be used."""

    def try_to_read(utterance: Utterance) -> BadRow | None:
        try:
            inputs.read(utterance)
        except BadAudio as error:
            return bad_row(utterance, error)
        return None

    with ThreadPoolExecutor(num_threads) as pool:
        return [row for row in pool.map(try_to_read, utterances) if row is not None]
