"""Prompts, and the tokens that follow them, as the LLM reads them with a cache."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_projector.models.llama import KVCache, make_cache
from flax_projector.models.speech_llm import Params, SpeechLLM, apply


@dataclass(frozen=True)
class Reader:
    """Reads a batch of prompts, and then h tokens of each row at every step: one for each beam.

    The beams of a row are to the LLM further tokens of one sequence, with the same position, and
    the mask says which keys each of them descends from. So they share the keys of their prompt, and
    no key is moved when a beam takes the place of another.

    Prompts have different lengths and are padded on the right. Row b's new tokens have positions
    prompt_len[b], prompt_len[b] + 1, ...; those of all rows are written to the same slots of the
    cache, h at a step from slot L on, and the mask hides the padding in between.

    Attributes:
      model: the modules.
      llm_params: the LLM's parameters.
      prompt_len: length of each prompt; 0 in a row of padding.
      length: L, the length of the padded prompts.
      num_beams: h.
      num_steps: T, the most tokens that follow a prompt.
    """

    model: SpeechLLM
    llm_params: Params
    prompt_len: Int[Array, "B"]
    length: int
    num_beams: int
    num_steps: int

    def read_prompts(self, inputs: Float[Array, "B L D"]) -> tuple[Float[Array, "B V"], KVCache]:
        """Logits of the first new token, and the cache.

        The prefix is not computed again, as in `SpeechLLM.label_logits`; every prompt is longer.
        """
        start, prefix = self.model.prefix_len, self.model.prefix
        hidden, cache = self._llm(
            inputs[:, start:],
            positions=jnp.arange(start, self.length)[None],
            cache=make_cache(
                self.model.llm.config,
                len(inputs),
                self.length + self.num_beams * self.num_steps,
                self.model.llm.dtype,
                prefix=prefix,
            ),
            cache_index=start,
            prefix=prefix,
            method="blocks",
        )
        last = jnp.maximum(self.prompt_len - 1 - start, 0)[:, None, None]
        return self._logits(jnp.take_along_axis(hidden, last, axis=1)[:, 0]), cache

    def read_tokens(
        self,
        tokens: Int[Array, "B h"],
        step: Int[Array, ""],
        is_seen: Bool[Array, "#B h hT"],
        cache: KVCache,
    ) -> tuple[Float[Array, "B h V"], KVCache]:
        """Logits of the next tokens, and the cache.

        Args:
          tokens: the tokens to read, which follow `step` others.
          step: their number in the row, from 0.
          is_seen: True where a beam sees what was written: h slots for each step, those of this one
            included.
          cache: as the last call returned it.
        """
        b, h = tokens.shape
        is_prompt = jnp.arange(self.length) < self.prompt_len[:, None, None]  # [B, 1, L]
        hidden, cache = self._llm(
            self._llm(tokens, method="embed"),
            positions=jnp.broadcast_to((self.prompt_len + step)[:, None], (b, h)),
            key_valid=jnp.concatenate(
                [
                    jnp.broadcast_to(is_prompt, (b, h, self.length)),
                    jnp.broadcast_to(is_seen, (b, h, is_seen.shape[-1])),
                ],
                axis=-1,
            ),
            cache=cache,
            cache_index=self.length + step * h,
            method="blocks",
        )
        logits = self._logits(hidden.reshape(b * h, -1))
        return logits.reshape(b, h, -1), cache

    def _llm(self, *args: Any, **kwargs: Any) -> Any:
        return apply(self.model.llm, self.llm_params, *args, **kwargs)

    def _logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        return self._llm(hidden, method="logits")
