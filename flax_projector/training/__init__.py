"""What a run does with batches: learn, evaluate, save.

  losses, objectives   cross-entropy and CTC; what each stage of a run minimises
  state                the trained state and its optimizer, and how both begin
  train_step           one update as a pure function, and its compilation for every bucket
  evaluate, held_out   loss, transcripts and error rates of held-out sets; when a run finds them
  normalizers          what is done to texts before they are compared
  scores, score_files  error rates; the files that keep them, utterance by utterance
  checkpoints, best    what is saved
  handed_over          what a run has to go on with, if another program began it
  due                  when a run logs, saves and evaluates
  metrics, step_log    what is logged, and where
  throughput           speed, FLOP utilisation, compilations, profiles
  start_up             how long a start takes, phase by phase
  compile_cache        keeps compiled programs for the next start
  cluster, roll_call   on several hosts: which process this is, and whether all are there
  agreement            what the hosts must have in common, compared before the first step
  preemption           on SIGTERM: save and exit

Imports everything below it (`models`, `data`, and the files of the package); never `convert`.
"""
