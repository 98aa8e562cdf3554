"""The chat prompt around the audio: one definition for training, evaluation and decoding."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from flax_projector.batch import AUDIO_TOKEN, TokenLayout
from flax_projector.config import PromptConfig

_START, _END = "<|im_start|>", "<|im_end|>"  # ChatML: SmolLM2, SmolLM3, Qwen


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads `tokenizer.json` from an HF folder.

    Raises:
      ValueError: if the folder has none.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: the LLM's folder must have a fast tokenizer")
    return Tokenizer.from_file(str(path))


@dataclass(frozen=True)
class Prompt:
    """Token ids around the audio.

    An utterance's sequence is

      before_audio | audio tokens | after_audio | transcript, end_of_turn | padding

    where only the transcript and the end of turn are labels.

    Attributes:
      tokenizer: the LLM's tokenizer.
      before_audio: the system turn and the beginning of the user turn.
      after_audio: the end of the user turn and the beginning of the assistant turn.
      end_of_turn: the last label, which also ends decoding.
    """

    tokenizer: Tokenizer
    before_audio: tuple[int, ...]
    after_audio: tuple[int, ...]
    end_of_turn: int

    def encode_target(self, text: str) -> tuple[int, ...]:
        """The labels for a transcript: its token ids and the end of turn."""
        return (*self.tokenizer.encode(text, add_special_tokens=False).ids, self.end_of_turn)

    def token_id(self, token: str) -> int:
        """The id of a token in the vocabulary.

        Raises:
          ValueError: if there is no such token.
        """
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"the LLM's tokenizer has no token {token!r}")
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, up to the end of turn."""
        ids = list(ids)
        if self.end_of_turn in ids:
            ids = ids[: ids.index(self.end_of_turn)]
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def merged_length(self, num_audio_tokens: int, num_labels: int) -> int:
        """Length of an utterance's sequence: the last label is predicted, never read."""
        return len(self.before_audio) + num_audio_tokens + len(self.after_audio) + num_labels - 1

    def layout(
        self, num_audio_tokens: int, target: Sequence[int], *, merged_len: int, text_len: int
    ) -> TokenLayout:
        """Lays out one utterance in static lengths, padded on the right.

        Args:
          num_audio_tokens: number of audio tokens in the clip.
          target: labels, from `encode_target`.
          merged_len: L, the static length of the sequence.
          text_len: T, the static number of labels.

        Raises:
          ValueError: if the utterance does not fit.
        """
        needed = self.merged_length(num_audio_tokens, len(target))
        if needed > merged_len or len(target) > text_len:
            raise ValueError(
                f"{num_audio_tokens} audio tokens and {len(target)} labels need length {needed}: "
                f"the bucket has length {merged_len} and {text_len} labels"
            )
        audio = (AUDIO_TOKEN,) * num_audio_tokens
        prompt = (*self.before_audio, *audio, *self.after_audio)
        tokens = np.full(merged_len, self.end_of_turn, np.int32)
        tokens[:needed] = (*prompt, *target[:-1])
        labels = np.zeros(text_len, np.int32)
        labels[: len(target)] = target
        steps = np.arange(text_len, dtype=np.int32)
        return TokenLayout(
            tokens=tokens,
            prompt_len=len(prompt),
            label_positions=np.minimum(len(prompt) - 1 + steps, merged_len - 1, dtype=np.int32),
            labels=labels,
            label_valid=steps < len(target),
        )


def make_prompt(tokenizer: Tokenizer, config: PromptConfig) -> Prompt:
    """Tokenizes the prompt's texts.

    Raises:
      ValueError: if the tokenizer does not know ChatML's markers.
    """
    end = tokenizer.token_to_id(_END)
    if end is None or tokenizer.token_to_id(_START) is None:
        raise ValueError(
            f"the LLM's tokenizer has no {_START} and {_END}: only ChatML models are supported"
        )

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

    system = f"{_START}system\n{config.system}{_END}\n" if config.system else ""
    return Prompt(
        tokenizer=tokenizer,
        before_audio=encode(f"{system}{_START}user\n{config.user}"),
        after_audio=encode(f"{_END}\n{_START}assistant\n"),
        end_of_turn=end,
    )
