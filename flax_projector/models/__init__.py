"""The modules, and the speech LLM that they form.

  projector         the part that is trained
  trained           products with its parameters, whose gradients are summed in f32
  whisper, llama    the frozen towers
  layers            layers that they share
  rotary            positions of the LLM's queries and keys
  attention         one function, which uses the platform's kernel if there is one
  plain_attention   written out: the reference, and for masks that no kernel supports
  cpu_attention     the same function, faster on CPUs
  speech_llm        the whole model, with the audio spliced into the prompt
  reader            prompts and tokens, as the LLM reads them with a cache
  decode            decoding: greedy here, or with beams
  beams             beam search
  limits            what ends a hypothesis before its end of turn

Imports `config`, `lengths`, `batch` and `sharding`; never `data`, `training` or `convert`.
"""
