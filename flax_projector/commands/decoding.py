"""What the commands take that decode."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

_Whole = Annotated[int | None, tyro.conf.arg(metavar="INT")]
_Number = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The fields of `DecodeConfig`; those that are not given are as in the run."""

    beams: _Whole = None
    """Hypotheses that are followed at once; 1 is greedy. If not given, as for the next four: what
    the run does."""
    length_penalty: _Number = None
    """With several beams: higher values favour longer hypotheses."""
    max_new_tokens: _Whole = None
    """Maximum number of tokens per utterance."""
    tokens_per_sec: _Number = None
    """Tokens that a second of audio may hold, beside 8 for any clip. 0 turns it off."""
    max_repeats: _Whole = None
    """How often a hypothesis may end in the same tokens. 0 turns it off."""

    def decoding(self) -> dict[str, Any]:
        """Those that are given."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(Decoding)}
        return {name: value for name, value in values.items() if value is not None}
