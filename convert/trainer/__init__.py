"""What the HF Trainer saves of a running training beside the weights: `checkpoint-N`.

  groups   the projector's parameters as an optimizer of PyTorch numbers them
  files    optimizer.pt, scheduler.pt and trainer_state.json, read and written

They need torch. `flax_projector.handover` makes runs of them, and them of runs.
"""
