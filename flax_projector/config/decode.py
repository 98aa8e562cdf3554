"""Settings of decoding, and the limits that end a hypothesis."""

import typing
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from flax_projector.config.fields import MAY_CHANGE, Count, PositiveInt, check

LimitName = Literal["max_new_tokens", "tokens_per_sec", "max_repeats"]
"""The limits that cut a hypothesis, named as the options that set them."""
LIMITS: tuple[LimitName, ...] = typing.get_args(LimitName)


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How transcripts are decoded; the rules for beams are those of transformers' `generate`."""

    beams: Annotated[PositiveInt, MAY_CHANGE] = 1
    """Hypotheses that are followed at once; 1 always takes the most likely token (greedy)."""
    length_penalty: Annotated[float, Ge(0), MAY_CHANGE] = 1.0
    """With several beams: hypotheses are compared by log-probability / length ** length_penalty.
    Higher values favour longer ones; 0 compares log-probabilities."""
    max_new_tokens: Annotated[PositiveInt, MAY_CHANGE] = 96
    """Maximum number of tokens decoded per utterance, with its end of turn."""
    tokens_per_sec: Annotated[float, Ge(0), MAY_CHANGE] = 16.0
    """Tokens that a second of audio may hold, beside 8 for any clip: no utterance is given more,
    and never more than `max_new_tokens`. English takes up to 6, in capitals 14. 0 turns it off."""
    max_repeats: Annotated[Count, MAY_CHANGE] = 4
    """How often a hypothesis may end in the same 1 to 16 tokens: then it ends, with what is
    repeated said once. Nothing is cut that repeats over less than 16 tokens. 0 turns it off."""

    def __post_init__(self) -> None:
        check(self, prefix="")
