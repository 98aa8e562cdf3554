"""Converts checkpoints between PyTorch and Flax, bit for bit.

  from convert import inspect, load_projector, to_flax, to_torch, verify

The mapping between the two frameworks is data; one engine runs it in both directions. The modules,
each of which imports only what stands above it:

  errors           lists every problem in one exception
  extras           imports torch, or says which extra to install
  rules            what a mapping consists of: names, and transforms that move elements
  tables           the mapping of each model, one row per kind of tensor
  checkpoint       named tensors that are read one at a time
  bounds           refuses numbers and texts that would grow beyond any memory
  bucket           reads models in a bucket
  wrappers         takes what wrappers add out of the names of tensors
  plan             which torch tensors belong to which Flax leaf
  misfits          finds what is missing, unexpected or of another shape
  engine           makes plans, and applies them in both directions
  round_trip       compares tensors byte for byte
  paths            output files and folders that appear complete or not at all
  trees            nested dicts of parameters and their flat form
  hf_config        config.json of Hugging Face <-> config dataclasses
  infer            the config of a projector that has no config.json
  torch_save       reads and writes files of torch.save
  torch_files      opens PyTorch checkpoints of every form; reads and writes safetensors
  checksums        of the leaves in a Flax folder
  orbax_readers    of Orbax, which leave no read running when another one fails
  flax_files       reads and writes Orbax checkpoints
  stored           recognises and opens whatever is stored at a path
  models           the models that can be converted
  published        the configs of published models, by hub id
  spread           divides the reading of a leaf among all devices
  load             loads weights into sharded device arrays, for training
  compare          decides whether two checkpoints hold the same model
  api              the public functions
  hf_folder        all that tiny-audio's loader and a server want of a trained projector
  trainer          the training state that the HF Trainer saves beside the weights
  report           the text that the commands print
  __main__         the command line
  torch_projector  the projector in PyTorch; stands alone, for a server

Of `flax_projector` they may import chat, config, file_types, files, lengths, logs, run_folder and
models; never data or training. `__main__` is a program, and may import everything.

Importing this package, or `torch_projector`, imports neither JAX nor Orbax, and only what reads or
runs PyTorch's own formats imports torch.

Three kinds of names appear everywhere:

  torch key   a tensor of a PyTorch checkpoint, with the prefix that Hugging Face gives it:
              "model.encoder.layers.3.fc1.weight"
  flax path   a leaf of our parameter tree, its nested keys joined with "/": "layers/fc1/kernel"
  template    either of the two in a table, without the prefix; "{i}" is a layer number:
              "layers.{i}.fc1.weight"
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.api import inspect, load_projector, to_flax, to_torch, verify

__all__ = ["inspect", "load_projector", "to_flax", "to_torch", "verify"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from convert import api  # takes JAX and Orbax with it

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
