"""What a run needs and does on a pod, by the compilers of its chips; nobody needs to have one.

  topology   pods by name, and their absent devices
  speech     the utterances that a plan is made for
  compiled   compiles the steps, and how many rows fit on a chip
  hlo        the text of a compiled program, as computations of instructions
  program    where a program's time goes, what it moves, and what chips exchange
  estimate   how long a step takes, what limits it, and what it needs of a host
  plan       all of it, as one object and as JSON
  report     the same as text

Only `train_tpu.py` and benchmarks import it.
"""
