"""Greedy decoding with a KV cache of static length, and word error rate."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import jiwer
from jaxtyping import Array, Float, Int
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from flax_projector.attention import causal_mask
from flax_projector.llama import make_cache
from flax_projector.speech_llm import Params, SpeechLLM, apply
from flax_projector.train_step import Batch, batch_frames


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
    """Transcribes a batch: the most likely token at every step, until all rows have ended.

    The batch may hold the transcripts too (it is the one of training): only the first `prompt_len`
    tokens of a row are looked at.

    Args:
      projector_params: of the projector.
      encoder_params: of the encoder.
      llm_params: of the LLM.
      batch: from `data.BatchSource`.
      model: the modules.
      max_new_tokens: T, tokens at most.
      end_of_turn: id that ends a row and fills its rest.

    Returns:
      i32[B, T] generated ids.
    """
    frames = batch_frames(model, encoder_params, batch)
    audio = model.embed_audio(projector_params, frames, batch["frame_valid"])
    inputs = model.merge(llm_params, batch["tokens"], audio)
    return generate(
        llm_params,
        inputs,
        batch["prompt_len"],
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
    """Continues input embeddings of unequal lengths, padded on the right.

    Row b's new tokens have positions prompt_len[b], prompt_len[b] + 1, ...; all rows write the same
    cache slots L, L + 1, ..., and the mask hides the padding between.
    """
    b, length, _ = inputs.shape
    llm = functools.partial(apply, model.llm, llm_params)
    capacity = length + max_new_tokens
    slots = jnp.arange(capacity)
    prompt_slots = slots[None] < prompt_len[:, None]  # [B, C]

    def most_likely(hidden: Float[Array, "B D"]) -> Int[Array, "B"]:
        logits = llm(hidden, method="logits")
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    hidden, cache = llm(
        inputs,
        positions=jnp.arange(length)[None],
        key_valid=jnp.pad(causal_mask(length), ((0, 0), (0, 0), (0, max_new_tokens))),
        cache=make_cache(model.llm.config, b, capacity, model.llm.dtype),
        method="blocks",
    )
    last = jnp.maximum(prompt_len - 1, 0)[:, None, None]
    token = most_likely(jnp.take_along_axis(hidden, last, axis=1)[:, 0])
    token = jnp.where(prompt_len == 0, end_of_turn, token)  # rows of padding have no prompt
    out = jnp.full((b, max_new_tokens), end_of_turn, jnp.int32).at[:, 0].set(token)
    is_done = token == end_of_turn

    def is_running(carry):
        step, _, is_done, _, _ = carry
        return (step < max_new_tokens) & ~jnp.all(is_done)

    def decode_one(carry):
        step, token, is_done, out, cache = carry
        slot = length + step - 1  # of the token that is read now
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


def make_normalizer(encoder_folder: Path) -> EnglishTextNormalizer:
    """Whisper's English text normaliser, with the spellings of the encoder's folder, if any."""
    path = encoder_folder / "normalizer.json"
    spellings = json.loads(path.read_text()) if path.is_file() else {}
    return EnglishTextNormalizer(spellings)


def word_error_rate(references: list[str], hypotheses: list[str], normalize) -> float:
    """Edits per reference word over all utterances together, after normalisation.

    References that the normaliser empties ("um") are left out with their hypotheses.

    Raises:
      ValueError: if that leaves none.
    """
    pairs = [(normalize(r), normalize(h)) for r, h in zip(references, hypotheses, strict=True)]
    pairs = [(reference, hypothesis) for reference, hypothesis in pairs if reference]
    if not pairs:
        raise ValueError("no reference with a word in it: there is nothing to score")
    return jiwer.wer([r for r, _ in pairs], [h for _, h in pairs])
