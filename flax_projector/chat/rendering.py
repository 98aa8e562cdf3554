"""Renders the chat template of the LLM's tokenizer, and splits it around audio and transcript."""

import logging
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from flax_projector.config import AUDIO, TINY_AUDIO_SYSTEM, TINY_AUDIO_USER, PromptConfig
from flax_projector.files import parse_json

_log = logging.getLogger(__name__)

# A template changes with the transcript if it changes with one of these. Transcripts reach it
# without surrounding whitespace, so it does not matter that many templates remove that.
_TRANSCRIPTS = (
    "A word or two.",
    "90 DAYS",
    "\u00e9t\u00e9 \u4f60\u597d",
    "a\nb",
    "<a> [b] {{ c }}",
)

# Templates print dates with `strftime_now`. This one takes its place, and marks the format, so that
# a run which began on another day is rendered with the date of its beginning.
_DATE_BEGINS, _DATE_ENDS = "\ufdd1", "\ufdd2"  # not characters: no text contains them
_MARKED_DATE = (
    "{% macro strftime_now(format) %}"
    f"{_DATE_BEGINS}{{{{ format }}}}{_DATE_ENDS}"
    "{% endmacro %}\n"
)

_DATE = re.compile(f"{_DATE_BEGINS}(.*?){_DATE_ENDS}")

_WAY_OUT = (
    "Write the prompt yourself: --prompt.before, --prompt.after (the texts before and after the "
    "audio) and --prompt.end (the token that ends the transcript)"
)


@dataclass(frozen=True)
class Rendering:
    """A conversation as text: before_audio, the audio, after_audio, the transcript, end.

    Attributes:
      system: the system message; "" if there is none.
      user: the user message, with `AUDIO` in the place of the audio.
      date: when it was rendered, in ISO format, if the template prints the date; else "".
      before_audio: everything before the audio.
      after_audio: everything between the audio and the transcript.
      end: everything after the transcript, beginning with what ends the turn.
    """

    system: str
    user: str
    date: str
    before_audio: str
    after_audio: str
    end: str


def render(
    tokenizer: PreTrainedTokenizerFast, config: PromptConfig, *, date: datetime
) -> Rendering:
    """Renders the prompt of a run.

    What precedes a transcript is the template's generation prompt, in training as in decoding.

    Args:
      tokenizer: the LLM's.
      config: the messages and the template's arguments; or the texts, for LLMs without a template.
      date: for templates that print it.

    Raises:
      ValueError: showing what was rendered, if there is no template, or its text does not contain
        the audio and the transcript exactly once, or it changes with the transcript.
    """
    if config.end:
        return Rendering("", AUDIO, "", config.before, config.after, config.end)
    system = TINY_AUDIO_SYSTEM if config.system is None else config.system
    user = TINY_AUDIO_USER if config.user is None else config.user
    user = user if AUDIO in user else user + AUDIO
    messages = [{"role": "user", "content": user}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    template, options = _template_of(tokenizer), _options(config.template_args)

    def conversation(transcript: str | None) -> str:
        turn = [] if transcript is None else [{"role": "assistant", "content": transcript}]
        try:
            text = tokenizer.apply_chat_template(
                messages + turn,
                chat_template=_MARKED_DATE + template,
                tokenize=False,
                add_generation_prompt=transcript is None,
                **options,
            )
            return str(text)
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(
                f"the chat template of {_name(tokenizer)} cannot render the prompt: {error}. Some "
                f'templates allow no system message: pass --prompt.system "". {_WAY_OUT}'
            ) from error

    transcript = _TRANSCRIPTS[0]
    whole, prompt = conversation(transcript), conversation(None)
    _check_once(prompt, AUDIO, "the audio", tokenizer)
    _check_once(whole, transcript, f"the transcript, here {transcript!r},", tokenizer)
    turn, _, end = whole.partition(transcript)
    for other in _TRANSCRIPTS[1:]:
        if (text := conversation(other)) != turn + other + end:
            raise ValueError(
                f"the chat template of {_name(tokenizer)} changes with the transcript. With "
                f"{other!r}:\n{_shown(text)}\nexpected:\n{_shown(turn + other + end)}\n{_WAY_OUT}"
            )
    if turn != prompt:
        _log.warning(
            "the chat template begins a finished turn in another way than the turn that the LLM is "
            "to continue, which is used for both. Finished:\n%s\nto continue:\n%s\n"
            "For Qwen3, --prompt.template-args enable_thinking=false makes them the same",
            _shown(turn),
            _shown(prompt),
        )
    at = date.isoformat(timespec="seconds") if _DATE_BEGINS in prompt else ""
    parts = (*prompt.split(AUDIO), end)
    before, after, end = (_DATE.sub(lambda match: date.strftime(match[1]), x) for x in parts)
    return Rendering(system, user, at, before, after, end)


def _template_of(tokenizer: PreTrainedTokenizerFast) -> str:
    """The tokenizer's template for chats; it may have others, for tools."""
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        named = tokenizer.chat_template
        has = (
            f"none called 'default', only {', '.join(named)}" if named else "none, like base models"
        )
        raise ValueError(
            f"{_name(tokenizer)} needs a chat template, and has {has}. {_WAY_OUT}"
        ) from error


def _options(args: tuple[str, ...]) -> dict[str, Any]:
    """The template's arguments from texts like `enable_thinking=false`, whose values are JSON."""
    options = {}
    for name, _, value in (arg.partition("=") for arg in args):
        try:
            options[name] = parse_json(value)
        except ValueError:
            options[name] = value
    return options


def _check_once(text: str, part: str, what: str, tokenizer: PreTrainedTokenizerFast) -> None:
    if (count := text.count(part)) != 1:
        where = "nowhere" if count == 0 else f"in {count} places"
        raise ValueError(
            f"the chat template of {_name(tokenizer)} puts {what} {where}:\n{_shown(text)}\n"
            f"{_WAY_OUT}"
        )


def _name(tokenizer: PreTrainedTokenizerFast) -> str:
    return f"the tokenizer in {tokenizer.name_or_path}"


def _shown(text: str) -> str:
    """A rendering as an error shows it: its own lines, indented."""
    return "\n".join(f"  | {line}" for line in text.split("\n"))
