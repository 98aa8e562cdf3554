"""A Flax projector between a frozen Whisper encoder and a frozen Llama-family LLM.

Shape legend, used in every docstring and comment of the package:

  B batch                  M mel bins            F mel frames (100 per second)
  N audio samples          S encoder frames (50 per second)
  A audio tokens (S / k)   k pool stride         T text (label) tokens
  L merged length          E encoder dim         D LLM dim
  H heads                  K kv heads            G heads per kv head (H / K)
  d head dim               V vocabulary          C cache length

Masks are True where VALID and named for it (`audio_valid`, `label_valid`).
"""
