"""Greedy decoding with a KV cache of static length."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flax_projector.batch import Batch
from flax_projector.models.llama import make_cache
from flax_projector.models.speech_llm import Params, SpeechLLM, apply


def greedy_decode(
    projector_params: Params,
    encoder_params: Params,
    llm_params: Params,
    batch: Batch,
    *,
    model: SpeechLLM,
    max_new_tokens: int,
    end_of_turn: int,
) -> Int[Array, "B T"]:
    """Transcribes a batch, taking the most likely token at each step until all rows have ended.

    As in training, the batch holds the transcripts too, but only the first `prompt_len` tokens of
    each row are used.

    Args:
      projector_params: the projector's parameters.
      encoder_params: the encoder's parameters.
      llm_params: the LLM's parameters.
      batch: the utterances.
      model: the modules.
      max_new_tokens: T, the maximum number of tokens per row.
      end_of_turn: token id that ends a row and fills the rest of it.

    Returns:
      i32[B, T] generated ids.
    """
    audio = model.hear(projector_params, encoder_params, batch)
    return generate(
        llm_params,
        model.merge(llm_params, batch, audio),
        batch.prompt_len,
        model=model,
        max_new_tokens=max_new_tokens,
        end_of_turn=end_of_turn,
    )


def generate(
    llm_params: Params,
    inputs: Float[Array, "B L D"],
    prompt_len: Int[Array, "B"],
    *,
    model: SpeechLLM,
    max_new_tokens: int,
    end_of_turn: int,
) -> Int[Array, "B T"]:
    """Continues prompts of different lengths, given as input embeddings padded on the right.

    The prefix is not computed again, as in `SpeechLLM.label_logits`; every prompt is longer.

    Row b's new tokens have positions prompt_len[b], prompt_len[b] + 1, ...; all rows write to the
    same cache slots L, L + 1, ..., and the mask hides the padding in between.
    """
    b, length, _ = inputs.shape
    llm = functools.partial(apply, model.llm, llm_params)
    capacity = length + max_new_tokens
    slots = jnp.arange(capacity)
    prompt_slots = slots[None] < prompt_len[:, None]  # [B, C]

    def most_likely(hidden: Float[Array, "B D"]) -> Int[Array, "B"]:
        logits = llm(hidden, method="logits")
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    start = model.prefix_len
    hidden, cache = llm(
        inputs[:, start:],
        positions=jnp.arange(start, length)[None],
        cache=make_cache(model.llm.config, b, capacity, model.llm.dtype, prefix=model.prefix),
        cache_index=start,
        prefix=model.prefix,
        method="blocks",
    )
    last = jnp.maximum(prompt_len - 1 - start, 0)[:, None, None]
    token = most_likely(jnp.take_along_axis(hidden, last, axis=1)[:, 0])
    token = jnp.where(prompt_len == 0, end_of_turn, token)  # padding rows have no prompt
    out = jnp.full((b, max_new_tokens), end_of_turn, jnp.int32).at[:, 0].set(token)
    is_done = token == end_of_turn

    def is_running(carry):
        step, _, is_done, _, _ = carry
        return (step < max_new_tokens) & ~jnp.all(is_done)

    def decode_one(carry):
        step, token, is_done, out, cache = carry
        slot = length + step - 1  # of the token being read
        generated = (slots >= length) & (slots <= slot)
        hidden, cache = llm(
            llm(token[:, None], method="embed"),
            positions=(prompt_len + step - 1)[:, None],
            key_valid=(prompt_slots | generated)[:, None],
            cache=cache,
            cache_index=slot,
            method="blocks",
        )
        token = jnp.where(is_done, end_of_turn, most_likely(hidden[:, 0]))
        out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], step, axis=1)
        return step + 1, token, is_done | (token == end_of_turn), out, cache

    carry = (jnp.int32(1), token, is_done, out, cache)
    return jax.lax.while_loop(is_running, decode_one, carry)[3]
