"""The commands of `python -m flax_projector`, with their options.

  use          what all have in common that use a projector
  decoding     what all have in common that decode
  output       the files that a command is to write, checked before anything slow
  transcribe   words of sound files
  evaluate     scores of data sets
  scores       scores as tables, and the difference between two
  report       a run as a page to look at
  shards       makes tar shards, and manifests of them

A command imports what it needs when it runs, so that `--help` is quick.
"""
