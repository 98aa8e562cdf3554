"""Inputs that only have the right sizes."""

from collections.abc import Iterable
from typing import Any, cast

from flax_projector.chat.prompt import Prompt

END_OF_TURN = 2


def prompt_of_ids(before_audio: Iterable[int], after_audio: Iterable[int]) -> Prompt:
    """Returns a prompt of token ids alone: it lays utterances out, but encodes no text."""
    unused = cast(Any, None)
    return Prompt(
        tokenizer=unused,
        rendering=unused,
        before_audio=tuple(before_audio),
        after_audio=tuple(after_audio),
        end_of_turn=END_OF_TURN,
        encode_target=unused,
    )
