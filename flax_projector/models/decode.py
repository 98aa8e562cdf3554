"""Decoding with a cache of static length: from a batch, or from prompts, to tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_projector.batch import Batch
from flax_projector.config import DecodeConfig
from flax_projector.models.attention import mesh_platform
from flax_projector.models.beams import search
from flax_projector.models.limits import Repeats, cut_by, token_limits
from flax_projector.models.reader import Reader
from flax_projector.models.speech_llm import Params, SpeechLLM
from flax_projector.sharding import num_batch_shards


class Decoded(NamedTuple):
    """What was decoded of each row.

    Attributes:
      tokens: generated ids; the end of turn fills the rest of a row.
      cut_by: which limit cut the row, as a number in `LIMITS` from 1; 0 if none did.
    """

    tokens: Int[Array, "B T"]
    cut_by: Int[Array, "B"]


def decode(
    projector_params: Params,
    encoder_params: Params,
    llm_params: Params,
    batch: Batch,
    *,
    model: SpeechLLM,
    config: DecodeConfig,
    end_of_turn: int,
) -> Decoded:
    """Transcribes a batch.

    As in training, the batch holds the transcripts too, but only the first `prompt_len` tokens of
    each row are used.

    Args:
      projector_params: the projector's parameters.
      encoder_params: the encoder's parameters.
      llm_params: the LLM's parameters.
      batch: the utterances.
      model: the modules.
      config: how to decode, and the limits.
      end_of_turn: token id that ends a row and fills the rest of it.
    """
    audio = model.hear(projector_params, encoder_params, batch)
    return generate(
        llm_params,
        model.merge(llm_params, batch, audio),
        batch.prompt_len,
        jnp.asarray(token_limits(batch.num_frames, config)),
        model=model,
        config=config,
        end_of_turn=end_of_turn,
    )


def generate(
    llm_params: Params,
    inputs: Float[Array, "B L D"],
    prompt_len: Int[Array, "B"],
    limits: Int[Array, "B"] | None = None,
    *,
    model: SpeechLLM,
    config: DecodeConfig,
    end_of_turn: Int[Array, ""] | int,
) -> Decoded:
    """Continues prompts of different lengths, given as input embeddings padded on the right.

    Args:
      llm_params: the LLM's parameters.
      inputs: the prompts.
      prompt_len: their lengths; 0 in a row of padding.
      limits: maximum number of tokens of each row, where that is less than `max_new_tokens`.
      model: the modules.
      config: how to decode, and the limits.
      end_of_turn: token id that ends a row and fills the rest of it.
    """
    if limits is None:
        limits = jnp.full_like(prompt_len, config.max_new_tokens)
    copies = 2 if config.beams == 1 and _is_one_row_on_a_tpu(len(inputs)) else 1
    inputs, prompt_len, limits = (
        jnp.repeat(x, copies, axis=0) for x in (inputs, prompt_len, limits)
    )
    reader = Reader(
        model, llm_params, prompt_len, inputs.shape[1], config.beams, config.max_new_tokens
    )
    find = search if config.beams > 1 else _take_most_likely
    tokens, cut = find(reader, inputs, limits, config, end_of_turn)
    return Decoded(tokens[::copies], cut[::copies])


def _is_one_row_on_a_tpu(num_rows: int) -> bool:
    """Whether each device is a TPU with one row: two take half the time.

    XLA computes the product of one row and a matrix beside the units that multiply matrices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh_platform() == "tpu" and num_rows == (1 if mesh.empty else num_batch_shards(mesh))


def _take_most_likely(
    reader: Reader,
    inputs: Float[Array, "B L D"],
    limits: Int[Array, "B"],
    config: DecodeConfig,
    end_of_turn: Int[Array, ""] | int,
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """Takes the most likely token at each step until all rows have ended."""
    b, num_steps = len(inputs), config.max_new_tokens
    steps = jnp.arange(num_steps)

    def take(logits, step, is_done, cut, out, repeats):
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        token = jnp.where(is_done, end_of_turn, token)
        repeats = repeats.add(token)
        excess = repeats.excess(config)
        is_end = token == end_of_turn  # of rows that are done too
        cut_now = cut_by(is_end, excess, step + 1, limits, config)
        out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], step, axis=1)
        length = step + 1 - jnp.where(is_end, 0, excess)  # what is repeated is said once
        out = jnp.where(steps < length[:, None], out, end_of_turn)
        return token, is_done | is_end | (cut_now > 0), cut + cut_now, out, repeats

    def is_running(carry):
        step, (_, is_done, *_), _ = carry
        return (step < num_steps) & ~jnp.all(is_done)

    def decode_one(carry):
        step, (token, *rest), cache = carry
        logits, cache = reader.read_tokens(
            token[:, None], step - 1, (steps < step)[None, None], cache
        )
        return step + 1, take(logits[:, 0], step, *rest), cache

    logits, cache = reader.read_prompts(inputs)
    out = jnp.full((b, num_steps), end_of_turn, jnp.int32)
    is_padding = reader.prompt_len == 0
    start = (is_padding, jnp.zeros_like(reader.prompt_len), out, Repeats.none((b,), config))
    carry = (jnp.int32(1), take(logits, jnp.int32(0), *start), cache)
    _, (_, _, cut, out, _), _ = jax.lax.while_loop(is_running, decode_one, carry)
    return out, cut
