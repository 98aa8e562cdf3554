"""The prompt as token ids: one definition for training, evaluation and decoding."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import tokenizers
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from flax_projector.batch import AUDIO_TOKEN, TokenLayout
from flax_projector.chat.rendering import Rendering, render
from flax_projector.chat.tokenizer import (
    TextTokenizer,
    control_tokens,
    encode,
    with_placeholder,
)
from flax_projector.config import AUDIO, PromptConfig
from flax_projector.lengths import Lengths

# Texts after which the tokens of a prompt's end are counted. Some tokenizers merge the end with
# what follows, as in "Transcript: " + "Hello": then its last tokens belong to the transcript.
_TRANSCRIPTS = ("hello", "Hello", "7", "\u00e9", "\u4f60", '"Oh', "(a)", "<b>", "\U0001f389")


@dataclass(frozen=True)
class TranscriptEncoder:
    """Makes the labels of transcripts.

    Attributes:
      encode_text: encodes lead, transcript and trail together.
      lead: text of the prompt since its last control token.
      lead_ids: the ids of `lead` that stay the same whatever follows; the prompt has them.
      trail: text between the transcript and the end of turn.
      end_of_turn: the last label.
    """

    encode_text: TextTokenizer
    lead: str
    lead_ids: tuple[int, ...]
    trail: str
    end_of_turn: int

    def __call__(self, text: str) -> tuple[int, ...]:
        """The labels for a transcript; see `batch`."""
        return self.batch([text])[0]

    def batch(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """The labels for transcripts: their token ids and the end of turn.

        Whitespace around a transcript is removed, and special tokens in it are plain text.

        Raises:
          ValueError: if one changes the tokens of the prompt before it.
        """
        found = self.encode_text([self.lead + text.strip() + self.trail for text in texts])
        count, labels = len(self.lead_ids), []
        for text, ids in zip(texts, found, strict=True):
            if tuple(ids[:count]) != self.lead_ids:
                raise ValueError(
                    f"the transcript {text!r} changes the tokens of the prompt before it, "
                    f"{self.lead!r}: end --prompt.after with a special token, a newline or a space"
                )
            labels.append((*ids[count:], self.end_of_turn))
        return labels

    def digest(self) -> str:
        """A hash of all that the labels depend on."""
        parts = (self.encode_text.to_str(), self.lead, self.lead_ids, self.trail, self.end_of_turn)
        return hashlib.sha256(repr((tokenizers.__version__, parts)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Prompt:
    """Token ids around the audio.

    An utterance's sequence is

      before_audio | audio tokens | after_audio | transcript, end_of_turn | padding

    where only the transcript and the end of turn are labels. It is what the tokenizer makes of the
    whole rendered conversation at once.

    Attributes:
      tokenizer: the LLM's tokenizer.
      rendering: the conversation as text.
      before_audio: the beginning of the conversation.
      after_audio: what comes between the audio and the transcript.
      end_of_turn: the last label, which also ends decoding.
      encode_target: makes the labels of a transcript.
    """

    tokenizer: Tokenizer
    rendering: Rendering
    before_audio: tuple[int, ...]
    after_audio: tuple[int, ...]
    end_of_turn: int
    encode_target: TranscriptEncoder

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

    def merged_length(self, num_audio_tokens: Lengths, num_labels: Lengths) -> Lengths:
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

    def to_json(self) -> str:
        """The texts and the ids, one per line, as a run keeps them."""
        fields = {
            **dataclasses.asdict(self.rendering),
            "before_audio_ids": self.before_audio,
            "after_audio_ids": self.after_audio,
            "end_of_turn_id": self.end_of_turn,
        }
        lines = (f'  "{x}": {json.dumps(y, ensure_ascii=False)}' for x, y in fields.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"


def make_prompt(
    tokenizer: PreTrainedTokenizerFast, config: PromptConfig, *, date: datetime | None = None
) -> Prompt:
    """Renders the tokenizer's chat template and tokenizes what comes out.

    Args:
      tokenizer: the LLM's, from `load_tokenizer`.
      config: the messages; or the texts, for LLMs without a template.
      date: for templates that print it; None means now.

    Raises:
      ValueError: if there is no template, or it does not suit; see `render`.
    """
    rendering = render(tokenizer, config, date=date or datetime.now())
    backend = tokenizer.backend_tokenizer
    before, after, end = rendering.before_audio, rendering.after_audio, rendering.end
    controls = control_tokens(backend, before + after + end)
    with_audio, audio_id = with_placeholder(backend, AUDIO)
    end_of_turn, trail = _find_end(end, with_audio, controls)

    text = before + AUDIO + after
    opening = encode(with_audio, text)
    start = opening.ids.index(audio_id)
    # The text since the last control token, or the audio, is tokenized with the transcript.
    breaks = [i for i, number in enumerate(opening.ids) if number in controls or i == start]
    cut = breaks[-1] + 1
    lead, lead_ids = text[opening.offsets[cut - 1][1] :], opening.ids[cut:]
    encode_text = TextTokenizer(backend, controls.values())
    continued = encode_text([lead + transcript + trail for transcript in _TRANSCRIPTS])
    lead_ids = lead_ids[: min(_num_shared(lead_ids, ids) for ids in continued)]
    prompt = Prompt(
        tokenizer=backend,
        rendering=rendering,
        before_audio=tuple(opening.ids[:start]),
        after_audio=(*opening.ids[start + 1 : cut], *lead_ids),
        end_of_turn=end_of_turn,
        encode_target=TranscriptEncoder(encode_text, lead, tuple(lead_ids), trail, end_of_turn),
    )
    for transcript in _TRANSCRIPTS:
        target = prompt.encode_target(transcript)
        ours = [*prompt.before_audio, audio_id, *prompt.after_audio, *target]
        if ours != encode(with_audio, text + transcript + end).ids[: len(ours)]:
            raise ValueError(
                f"the tokenizer in {tokenizer.name_or_path} is not supported: it tokenizes the "
                f"transcript {transcript!r} in another way within the prompt than after "
                "a special token"
            )
    return prompt


def _find_end(end: str, tokenizer: Tokenizer, controls: Mapping[int, str]) -> tuple[int, str]:
    """The first control token after the transcript, which ends the turn; and the text before it."""
    closing = encode(tokenizer, AUDIO + end)
    for number, (begins, _) in zip(closing.ids[1:], closing.offsets[1:], strict=True):
        if number in controls:
            return number, end[: begins - len(AUDIO)]
    known = ", ".join(list(controls.values())[:20])
    raise ValueError(
        f"nothing ends the transcript: {end!r} contains none of the tokenizer's special tokens. "
        f"Choose one of them with --prompt.end: {known}"
    )


def remake_prompt(tokenizer: PreTrainedTokenizerFast, config: PromptConfig, saved: str) -> Prompt:
    """The prompt that a run began with, whatever the date is now.

    Args:
      tokenizer: the LLM's.
      config: the run's.
      saved: what `Prompt.to_json` wrote.

    Raises:
      ValueError: showing every difference, if the tokenizer makes another one now.
    """
    before = json.loads(saved)
    date = datetime.fromisoformat(before["date"]) if before["date"] else None
    prompt = make_prompt(tokenizer, config, date=date)
    now = json.loads(prompt.to_json())
    if changed := [name for name in now if before.get(name) != now[name]]:
        lines = [f"  {n}\n    then: {before.get(n)!r}\n    now:  {now[n]!r}" for n in changed]
        listed = "\n".join(lines)
        raise ValueError(
            f"the tokenizer in {tokenizer.name_or_path} makes another prompt than the one that "
            f"the run began with:\n{listed}\nUse the tokenizer and chat template of that time, or "
            "start another run with another --out"
        )
    return prompt


def _num_shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
