"""Checkpoints of PyTorch and of Flax, converted into each other bit for bit.

  from convert import inspect, to_flax, to_torch, verify

The mapping between the two is data (`tables.py`), run in both directions by one engine. Three forms
of a name appear everywhere:

  torch key   a tensor of a PyTorch checkpoint, with the prefix that Hugging Face gives it:
              "model.encoder.layers.3.fc1.weight"
  flax path   a leaf of our parameter tree, its nested keys joined with "/": "layers/fc1/kernel"
  template    either of the two in a table, without the prefix; "{i}" is a layer number:
              "layers.{i}.fc1.weight"

Modules import downwards only: checkpoint, errors, paths, rules <- trees, tables, engine, hf_config
<- torch_files, flax_files, infer <- sources <- models <- compare, load <- api <- __main__. Training
uses `load` and `flax_files`, which never import torch.
"""

from convert.api import inspect, to_flax, to_torch, verify

__all__ = ["inspect", "to_flax", "to_torch", "verify"]
