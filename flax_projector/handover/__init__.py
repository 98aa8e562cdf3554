"""A running training goes from the HF Trainer to a run of ours, or back, with its optimizer.

to_run      from a `checkpoint-N` to a run folder that `train_tpu.py` continues
to_trainer  from a run folder to a `checkpoint-N` that the HF Trainer continues
states      the trained state in a checkpoint of a run, as the converter sees tensors

May import everything below the programs but `inference`.
"""
