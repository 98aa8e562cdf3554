"""Where the audio of a batch comes from."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from flax_projector.batch import Bucket
from flax_projector.data.audio import BadAudio, Problem, check_samples, load_audio
from flax_projector.data.bad_rows import BadRow
from flax_projector.data.utterances import Utterance
from flax_projector.lengths import SAMPLE_RATE, SAMPLES_PER_FRAME, num_encoder_frames


class Clip(NamedTuple):
    """An utterance's audio.

    Attributes:
      audio: waveform or encoder frames, unpadded.
      num_frames: number of encoder frames that contain part of the clip.
      doubt: why it may be no speech.
    """

    audio: np.ndarray
    num_frames: int
    doubt: BadAudio | None = None


@runtime_checkable
class Inputs(Protocol):
    """Waveforms from audio files, or encoder frames that were computed earlier.

    Attributes:
      name: name of the `Batch` field that it fills.
      dtype: of what it reads.
    """

    name: str
    dtype: np.dtype

    def shape(self, bucket: Bucket) -> tuple[int, ...]:
        """Static shape of one utterance."""
        ...

    def read(self, utterance: Utterance) -> Clip:
        """The utterance's audio.

        Raises:
          BadAudio: if the clip cannot be used.
        """
        ...


class Waveforms:
    """Audio files, for an encoder that runs in the step."""

    name = "samples"
    dtype = np.dtype(np.float32)

    def __init__(self, window_samples: int):
        self._window_samples = window_samples

    def shape(self, bucket: Bucket) -> tuple[int, ...]:
        """(N,): as many samples as the bucket has frames; the rest of the window is silence."""
        return (bucket.num_frames * SAMPLES_PER_FRAME,)

    def read(self, utterance: Utterance) -> Clip:
        """f32[N] samples at 16 kHz, at most a whole window."""
        row = utterance.row
        samples = load_audio(row.audio, offset=row.offset, duration=row.duration)
        num_frames = num_encoder_frames(len(samples))
        if num_frames > utterance.max_frames:
            # Its stated duration is right within the tolerance, which reaches beyond the window.
            secs, window = len(samples) / SAMPLE_RATE, self._window_samples / SAMPLE_RATE
            text = f"{row.audio} lasts {secs:.3f} s; --data.window-secs is {window:g}"
            raise BadAudio(Problem.TOO_LONG, text)
        return Clip(samples, num_frames, check_samples(row.audio, samples))


class Silence(Waveforms):
    """Silence as long as the clips are, for what a model says without hearing anything.

    Clips that cannot be used stay so: the same ones are scored as with sound.
    """

    def read(self, utterance: Utterance) -> Clip:
        """f32[N] zeros."""
        clip = super().read(utterance)
        return Clip(np.zeros_like(clip.audio), clip.num_frames, clip.doubt)


class Samples(Waveforms):
    """Waveforms that are in memory already, by the number that is their utterance's id."""

    def __init__(self, window_samples: int, clips: Sequence[np.ndarray]):
        super().__init__(window_samples)
        self._clips = clips

    def read(self, utterance: Utterance) -> Clip:
        """f32[N] samples at 16 kHz."""
        samples = self._clips[int(utterance.row.id)]
        return Clip(samples, num_encoder_frames(len(samples)))


def read_clip(
    utterance: Utterance, inputs: Inputs, *, drop_doubtful: bool
) -> tuple[Clip | None, BadRow | None]:
    """Reads a clip.

    Args:
      utterance: whose clip.
      inputs: where it is read from.
      drop_doubtful: use none that may be no speech.

    Returns:
      The clip if it is to be used, and its row if something is wrong with it.
    """
    row, clip = utterance.row, None
    try:
        clip = inputs.read(utterance)
        problem = clip.doubt
    except BadAudio as error:
        problem = error
    if problem is None:
        return clip, None
    if drop_doubtful:
        clip = None
    is_used = clip is not None
    return clip, BadRow(row.id, row.source, problem.problem, str(problem), row.text, is_used)


def find_unreadable(
    utterances: Sequence[Utterance], inputs: Inputs, *, num_threads: int, drop_doubtful: bool
) -> list[BadRow]:
    """Tries to read clips, and returns the rows of those that something is wrong with."""

    def try_to_read(utterance: Utterance) -> BadRow | None:
        return read_clip(utterance, inputs, drop_doubtful=drop_doubtful)[1]

    with ThreadPoolExecutor(num_threads) as pool:
        return [row for row in pool.map(try_to_read, utterances) if row is not None]
