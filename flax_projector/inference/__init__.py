"""Using a run.

  listen    the loaded towers and projector, ready to transcribe and score

Imports everything below it, including `run` and `convert`.
"""
