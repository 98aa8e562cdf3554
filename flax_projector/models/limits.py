"""What ends a hypothesis before its end of turn: too many tokens, or the same ones repeated."""

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from flax_projector.config import LIMITS, DecodeConfig
from flax_projector.lengths import FRAME_SECS

TOKENS_OF_ANY_CLIP = 8
"""What a clip may hold beside the tokens of its seconds: the shortest say a few words too."""

_LONGEST = 16  # tokens of a phrase that is looked for
_SHORTEST_RUN = 16  # tokens; over fewer, people repeat themselves too ("no no no")


def token_limits(
    num_frames: Int[Array | np.ndarray, "B"], config: DecodeConfig
) -> Int[Array | np.ndarray, "B"]:
    """Maximum number of tokens of each clip, with its end of turn.

    Args:
      num_frames: number of encoder frames that contain part of the clip.
      config: has the limits.
    """
    if not config.tokens_per_sec:
        return num_frames * 0 + config.max_new_tokens
    limits = TOKENS_OF_ANY_CLIP + num_frames * (config.tokens_per_sec * FRAME_SECS)
    return limits.clip(max=config.max_new_tokens).astype(np.int32)


@flax.struct.dataclass
class Repeats:
    """What the ends of hypotheses repeat.

    Attributes:
      last: the last R tokens, the newest first; -1 where there is none.
      runs: for every r <= R, how many tokens at the end are the same as the r-th before them.
    """

    last: Int[Array, "*B R"]
    runs: Int[Array, "*B R"]

    @classmethod
    def none(cls, shape: tuple[int, ...], config: DecodeConfig) -> "Repeats":
        """Of hypotheses without tokens."""
        shape = (*shape, _LONGEST if config.max_repeats else 0)
        return cls(last=jnp.full(shape, -1, jnp.int32), runs=jnp.zeros(shape, jnp.int32))

    def add(self, tokens: Int[Array, "*B"]) -> "Repeats":
        """With one more token."""
        newest = tokens[..., None]
        runs = jnp.where(self.last == newest, self.runs + 1, 0)
        last = jnp.concatenate([newest, self.last], axis=-1)[..., : runs.shape[-1]]
        return Repeats(last=last, runs=runs)

    def excess(self, config: DecodeConfig) -> Int[Array, "*B"]:
        """How many tokens at the end say again what was said; 0 where that is no reason to stop."""
        lengths = jnp.arange(1, self.runs.shape[-1] + 1)  # of the phrase
        longest = jnp.maximum(config.max_repeats * lengths, _SHORTEST_RUN) - lengths
        is_over = self.runs >= longest
        return jnp.max(jnp.where(is_over, self.runs, 0), axis=-1, initial=0)


def cut_by(
    is_ended: Bool[Array, "*B"],
    excess: Int[Array, "*B"],
    num_tokens: Int[Array, ""] | int,
    limits: Int[Array, "#*B"],
    config: DecodeConfig,
) -> Int[Array, "*B"]:
    """Which limit ends each hypothesis: its number in `LIMITS`, from 1, or 0 if none does.

    Args:
      is_ended: whether the hypothesis has come to the end of its turn.
      excess: see `Repeats`.
      num_tokens: length of the hypotheses.
      limits: their maximum lengths.
      config: has the limits.
    """
    code = {name: number for number, name in enumerate(LIMITS, start=1)}
    by_length = jnp.where(
        limits < config.max_new_tokens, code["tokens_per_sec"], code["max_new_tokens"]
    )
    cut = jnp.where(num_tokens >= limits, by_length, 0)
    return jnp.where(is_ended, 0, jnp.where(excess > 0, code["max_repeats"], cut))
