"""Using a run.

  listen                 the loaded towers and projector, ready to transcribe and score
  score_table, compare   scores as texts; the difference between two results

Imports everything below it, including `run` and `convert`.
"""
