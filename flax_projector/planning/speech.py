"""The utterances that a plan is made for: those of a run, or assumed ones if they are not there."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from flax_projector.batch import Bucket
from flax_projector.chat.prompt import Prompt, TranscriptEncoder, make_prompt
from flax_projector.chat.rendering import Rendering
from flax_projector.chat.tokenizer import TextTokenizer, load_tokenizer
from flax_projector.config import TrainConfig
from flax_projector.data.audio import BadAudio, Problem
from flax_projector.data.batches import Batches
from flax_projector.data.inputs import Clip, Waveforms
from flax_projector.data.labels import Labels
from flax_projector.data.rows import ManifestRow, Rows
from flax_projector.data.shared_arrays import SharedArrays
from flax_projector.data.sources import read_source
from flax_projector.data.utterances import Utterance, Utterances, prepare
from flax_projector.lengths import SAMPLE_RATE, num_encoder_frames

PREFIX, PROMPT = 24, 8  # tokens before and after the audio
LABELS_PER_SEC = (2.7, 4.3)  # least and most; read English has 3.5
_EPOCH_BATCHES = 500  # so many that the shortest bucket has some of its own


@dataclass(frozen=True)
class Speech:
    """What a plan knows of a run's data.

    Attributes:
      batches: the run's batches, of which nothing is read.
      utterances: what is in them.
      prompt: around the audio.
      assumptions: sentences that say what was assumed.
    """

    batches: Batches
    utterances: Utterances
    prompt: Prompt
    assumptions: tuple[str, ...]


class KeptFrames:
    """Encoder frames that would be kept, as `data.inputs.Inputs`; there are none to be read."""

    name = "frames"

    def __init__(self, dim: int, dtype: DTypeLike):
        """Takes the width of the encoder and the dtype that it computes in."""
        self._dim, self.dtype = dim, jnp.dtype(dtype)

    def shape(self, bucket: Bucket) -> tuple[int, ...]:
        """(S, E)."""
        return (bucket.num_frames, self._dim)

    def read(self, utterance: Utterance) -> Clip:
        """Raises an error."""
        raise BadAudio(Problem.MISSING_FILE, f"{utterance.row.audio}: a plan reads no audio")


def prompt_of_ids(before_audio: Iterable[int], after_audio: Iterable[int]) -> Prompt:
    """A prompt of token ids alone: it lays utterances out, but encodes no text."""
    unused = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    end_of_turn = 2
    return Prompt(
        tokenizer=unused,
        rendering=Rendering("", "", "", "", "", ""),
        before_audio=tuple(before_audio),
        after_audio=tuple(after_audio),
        end_of_turn=end_of_turn,
        encode_target=TranscriptEncoder(TextTokenizer(unused, ()), "", (), "", end_of_turn),
    )


def read_speech(config: TrainConfig, mesh: Mesh) -> Speech:
    """The batches of a run: of its sources, or of assumed ones.

    The sources are read if the LLM's tokenizer is at hand, without which nobody knows their labels.

    Args:
      config: the run's config, with nothing left open.
      mesh: the mesh that it would run on.

    Raises:
      ValueError: if a source cannot be read.
    """
    folder, data = Path(config.llm).expanduser(), config.data
    assumptions = []
    if (folder / "tokenizer.json").is_file():
        prompt = make_prompt(load_tokenizer(folder), config.prompt)
    else:
        prompt = prompt_of_ids(range(PREFIX), range(PROMPT))
        assumptions.append(
            f"prompt: {PREFIX} tokens before the audio and {PROMPT} after it, since --llm is no "
            "folder with a tokenizer"
        )
    weights = None
    if data.train and not assumptions:
        with tempfile.TemporaryDirectory() as scratch:
            rows = [read_source(source, data, Path(scratch))[0] for source in data.train]
            utterances, _ = prepare(rows, prompt, data)
        weights = dict(zip(data.train, data.train_weights or [1.0] * len(rows), strict=True))
    else:
        utterances = assumed_utterances(config)
        low, high = LABELS_PER_SEC
        why = "which needs --llm FOLDER to be counted" if data.train else "which is not given"
        assumptions.append(
            f"speech: lengths like those of read books, up to {data.bucket_secs[-1]:g} s with a "
            f"mean of {0.8 * data.bucket_secs[-1]:g} s, and {low} to {high} labels a second, at "
            f"most --data.max-text-tokens {data.max_text_tokens}; instead of --data.train, {why}"
        )
    inputs = (
        KeptFrames(config.projector.encoder_dim, config.dtype)
        if data.cache_features
        else Waveforms(data.window_samples)
    )
    batches = Batches(
        utterances,
        inputs=inputs,
        prompt=prompt,
        config=data,
        pool_stride=config.projector.projector_pool_stride,
        mesh=mesh,
        batch_size=data.batch_size,
        accumulation_steps=config.accumulation_steps,
        shuffle_seed=config.seed,
        weights=weights,
    )
    return Speech(batches, utterances, prompt, tuple(assumptions))


def assumed_utterances(config: TrainConfig) -> Utterances:
    """Utterances like those of read books: most are nearly as long as the longest bucket allows.

    Their share below x seconds is (x / longest)^4, so that the mean is 0.8 of the longest.
    """
    data = config.data
    count = _EPOCH_BATCHES * data.batch_size
    secs = data.bucket_secs[-1] * ((np.arange(count) + 0.5) / count) ** 0.25
    # Low-discrepancy numbers: every length occurs with every rate.
    low, high = LABELS_PER_SEC
    rates = low + (high - low) * (np.arange(count) * 0.6180339887 % 1)
    labels = np.minimum(np.rint(secs * rates) + 1, data.max_text_tokens)
    frames = num_encoder_frames(np.rint(secs * SAMPLE_RATE).astype(int)) + 1
    if data.whole_window:
        frames[:] = data.window_frames
    columns = SharedArrays(
        part=np.zeros(count, np.uint16),
        number=np.zeros(count, np.int32),
        durations=secs,
        max_frames=np.minimum(frames, data.window_frames).astype(np.int32),
        num_labels=labels.astype(np.int32),
    )
    row = ManifestRow("assumed", "assumed.wav", "assumed", 1.0)
    return Utterances([(Rows.of([row]), Labels.of([(0,)]))], columns)
