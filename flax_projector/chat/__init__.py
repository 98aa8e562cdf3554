"""What the LLM reads around the audio: its own chat template, as text and as token ids.

  rendering    the conversation as text, split around the audio and the transcript
  tokenizer    the LLM's tokenizer; transcripts as token ids
  prompt       the conversation as token ids, in static lengths; kept with the run

Imports only `config` and `batch`.
"""
