"""The frozen encoder's frames, computed once and kept for all runs.

  keys     what names a clip, and how 16-byte keys are looked up
  shards   the files of a store: frames, and an index beside them
  store    reads a clip's frames
  keep     computes those that are missing, on all processes and devices

A store is a folder, on a disk or in a bucket, that is named by all that its frames have in common:
the encoder's weights, the dtype and the window. Any number of runs and processes read and write
it at the same time: they only add files, under names that nobody else has.
"""
