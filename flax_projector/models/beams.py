"""Beam search: several hypotheses of each row at once, and the best of those that ended."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flax_projector.config import DecodeConfig
from flax_projector.models.limits import Repeats, cut_by
from flax_projector.models.reader import Reader
from flax_projector.sharding import by_rows

_NEVER = -1e9  # the score of what must not be chosen, as in transformers


@flax.struct.dataclass
class Beams:
    """The hypotheses of each row that go on, best first, and the best that ended.

    Attributes:
      tokens: of those that go on; the end of turn fills the rest.
      scores: sums of their log-probabilities.
      ancestors: which of the h beams had read the token of each step.
      repeats: what they repeat.
      ended: tokens of those that ended.
      ended_scores: their log-probabilities / length ** length_penalty.
      is_ended: whether there is one.
      ended_cut: which limit cut them, see `cut_by`.
      can_improve: whether a hypothesis that goes on may still become one of the best.
    """

    tokens: Int[Array, "B h T"]
    scores: Float[Array, "B h"]
    ancestors: Int[Array, "B h T"]
    repeats: Repeats
    ended: Int[Array, "B h T"]
    ended_scores: Float[Array, "B h"]
    is_ended: Bool[Array, "B h"]
    ended_cut: Int[Array, "B h"]
    can_improve: Bool[Array, "B"]


def search(
    reader: Reader,
    inputs: Float[Array, "B L D"],
    limits: Int[Array, "B"],
    config: DecodeConfig,
    end_of_turn: Int[Array, ""] | int,
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """Follows the best hypotheses of each row until none can become better than those that ended.

    Args:
      reader: reads the prompts and the beams' tokens.
      inputs: the prompts.
      limits: maximum number of tokens of each row.
      config: how to decode, and the limits.
      end_of_turn: token id that ends a row and fills the rest of it.

    Returns:
      The best hypothesis of each row, and which limit cut it, see `cut_by`.

    Source: `GenerationMixin._beam_search` (transformers) with one token that ends a hypothesis and
    `early_stopping=False`. With inputs_embeds, it counts the generated tokens alone as length.
    """
    b, h, num_steps = len(inputs), config.beams, config.max_new_tokens
    steps = jnp.arange(num_steps)
    grow = by_rows(functools.partial(_grow, config=config, end_of_turn=end_of_turn))

    def is_running(carry):
        step, beams, _ = carry
        return (step < num_steps) & jnp.any(beams.can_improve)

    def search_one(carry):
        step, beams, cache = carry
        # The newest token of each beam was chosen in the last step, and is read by the beam itself.
        tokens = jax.lax.dynamic_index_in_dim(beams.tokens, step - 1, axis=2, keepdims=False)
        is_own = beams.ancestors[..., None] == jnp.arange(h)  # [B, h, T, h]
        is_seen = is_own & (steps < step)[:, None]
        logits, cache = reader.read_tokens(tokens, step - 1, is_seen.reshape(b, h, -1), cache)
        return step + 1, grow(beams, logits, limits, step), cache

    logits, cache = reader.read_prompts(inputs)
    filled = jnp.full((b, h, num_steps), end_of_turn, jnp.int32)
    start = Beams(
        tokens=filled,
        scores=jnp.zeros((b, h), jnp.float32),
        ancestors=jnp.zeros_like(filled),
        repeats=Repeats.none((b, h), config),
        ended=filled,
        ended_scores=jnp.full((b, h), _NEVER, jnp.float32),
        is_ended=jnp.zeros((b, h), bool),
        ended_cut=jnp.zeros((b, h), jnp.int32),
        can_improve=reader.prompt_len > 0,  # padding rows have no prompt
    )
    beams = grow(start, logits[:, None], limits, jnp.int32(0))
    _, beams, _ = jax.lax.while_loop(is_running, search_one, (jnp.int32(1), beams, cache))
    return beams.ended[:, 0], beams.ended_cut[:, 0]


def _grow(
    beams: Beams,
    logits: Float[Array, "B m V"],
    limits: Int[Array, "B"],
    step: Int[Array, ""],
    *,
    config: DecodeConfig,
    end_of_turn: Int[Array, ""] | int,
) -> Beams:
    """The beams after one more token.

    Args:
      beams: the beams before.
      logits: of the next token of each beam, or, of a prompt that has no beams yet, of one.
      limits: maximum number of tokens of each row.
      step: the token's number, from 0.
      config: how to decode, and the limits.
      end_of_turn: token id that ends a hypothesis.
    """
    h = config.beams
    num_tokens = step + 1
    # Twice as many candidates as beams, of which at most every second one ends its turn.
    parent, token, scores = _candidates(beams.scores, logits, 2 * h)  # each [B, 2h]
    tokens = _put(_choose(beams.tokens, parent), token, step)
    repeats = jax.tree.map(lambda x: _choose(x, parent), beams.repeats).add(token)
    excess, is_end = repeats.excess(config), token == end_of_turn
    cut = cut_by(is_end, excess, num_tokens, limits[:, None], config)
    is_over = is_end | (cut > 0)

    open_scores = scores + is_over * _NEVER
    going = jax.lax.top_k(open_scores, h)[1]
    ancestors = _choose(beams.ancestors, _choose(parent, going))
    own = jnp.broadcast_to(jnp.arange(h), going.shape)  # each reads its newest token itself

    # The second half is there to go on, in the place of what ends in the first.
    is_new = is_over & (jnp.arange(2 * h) < h)
    lengths = np.arange(1, config.max_new_tokens + 1, dtype=np.float64)
    divisor = jnp.asarray(lengths**config.length_penalty, jnp.float32)[step]
    new_scores = scores / divisor + ~beams.can_improve[:, None] * _NEVER + ~is_new * _NEVER
    length = num_tokens - jnp.where(is_end, 0, excess)  # what is repeated is said once
    said = jnp.where(jnp.arange(tokens.shape[2]) < length[..., None], tokens, end_of_turn)
    ended_scores = jnp.concatenate([beams.ended_scores, new_scores], axis=1)
    ended_scores, best = jax.lax.top_k(ended_scores, h)

    def best_of(before: Array, now: Array) -> Array:
        return _choose(jnp.concatenate([before, now], axis=1), best)

    is_ended = best_of(beams.is_ended, is_new)
    # What transformers guesses: that what goes on gets no better than if it ended now.
    worst = jnp.where(is_ended, ended_scores[:, -1:], _NEVER)
    may_win = jnp.any(_choose(open_scores, going)[:, :1] / divisor > worst, axis=1)
    return Beams(
        tokens=_choose(tokens, going),
        scores=_choose(open_scores, going),
        ancestors=_put(ancestors, own, step),
        repeats=jax.tree.map(lambda x: _choose(x, going), repeats),
        ended=best_of(beams.ended, said),
        ended_scores=ended_scores,
        is_ended=is_ended,
        ended_cut=best_of(beams.ended_cut, cut),
        can_improve=beams.can_improve & may_win & (num_tokens < limits),
    )


def _candidates(
    scores: Float[Array, "B h"], logits: Float[Array, "B m V"], count: int
) -> tuple[Int[Array, "B 2*h"], Int[Array, "B 2*h"], Float[Array, "B 2*h"]]:
    """The most likely hypotheses with one more token: which they continue, the token, and scores.

    The logits are normalised only where they are among the highest.
    """
    b, m, _ = logits.shape
    best, ids = jax.lax.top_k(logits, count)  # [B, m, 2h]
    highest = jnp.max(logits, axis=-1, keepdims=True)  # a slice of `best` would make it a sort
    total = jnp.sum(jnp.exp(logits - highest), axis=-1, keepdims=True)
    sums = scores[:, :m, None] + (best - highest - jnp.log(total))
    sums, index = jax.lax.top_k(sums.reshape(b, -1), count)
    return index // count, _choose(ids.reshape(b, -1), index), sums


def _choose(x: Array, index: Int[Array, "B h"]) -> Array:
    """The hypotheses of these numbers, in every row of [B, m, ...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def _put(
    x: Int[Array, "B h T"], values: Int[Array, "B h"], step: Int[Array, ""]
) -> Int[Array, "B h T"]:
    """With other values at one step."""
    return jax.lax.dynamic_update_slice_in_dim(x, values[..., None], step, axis=2)
