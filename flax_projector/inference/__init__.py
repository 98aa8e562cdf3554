"""Using a run, or a projector from elsewhere.

  listen                 the loaded towers and projector, ready to transcribe and score
  projectors             what a user names: a run, or a projector from elsewhere
  sound_files            files of any length, in pieces; in the files' order
  pieces, queues         sound cut where nobody speaks; pieces in batches of similar lengths
  formats                what was heard, as text, JSON or subtitles
  score_table, compare   scores as texts; the difference between two results

Imports everything below it, including `run` and `convert`.
"""
