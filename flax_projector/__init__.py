"""A Flax projector between a frozen Whisper encoder and a frozen Llama-family LLM.

  from flax_projector import ProjectorConfig, ResidualAudioProjector

Folders are layers; each one's docstring says what is in it and what it may import:

  config       every setting and its default
  lengths, chips, storage, files, file_types, logs, run_folder, hosts, batch, sharding
               shared by several layers
  chat         what the LLM reads around the audio
  models       the modules
  data         from a manifest to batches
  training     learning from them, evaluating, saving and logging
  run          from a config to the loaded model
  inference    using a run
  planning     what a run needs and does on a pod that nobody needs to have
  report       a run as a page to look at
  commands     the commands of `python -m flax_projector`
  handover     a training under way, from and to the HF Trainer

Every letter in a shape stands for one thing, in annotations, docstrings and comments:

  B   batch                    N   audio samples            M   mel bins
  F   mel frames, 100 per s    S   encoder frames, 50/s     A   audio tokens, S / k
  k   pool stride              T   text (label) tokens      L   merged length
  E   encoder dim              D   LLM dim                  I   inner width of an MLP
  H   heads                    K   kv heads                 G   heads per kv head, H / K
  X   heads of either kind     d   head dim                 V   vocabulary
  Q   queries                  C   keys, cache length       c   keys of a block
  P   padded length            Z   CTC classes              W   frequencies
  j   samples of half an STFT window
  GQ  queries of the G heads of a kv head
  n   masks of a clip          p   tokens of the prefix
  h   hypotheses of a row      m   those that are continued: h, or the prompt's 1
  hT  tokens that they read    R   tokens of the longest phrase whose repeats are found

Masks are True where VALID and named for it (`frame_valid`, `label_valid`).
"""

import os
from typing import TYPE_CHECKING, Any

# transformers would warn at every start that PyTorch is missing. We only use its mel filters, its
# text normaliser and its tokenizers, which do not need it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

if TYPE_CHECKING:
    from flax_projector.config import ProjectorConfig
    from flax_projector.models.projector import ResidualAudioProjector

__all__ = ["ProjectorConfig", "ResidualAudioProjector"]


def __getattr__(name: str) -> Any:
    # Imported on first use: a PyTorch server needs the configs, but has no JAX.
    if name == "ProjectorConfig":
        from flax_projector.config import ProjectorConfig

        return ProjectorConfig
    if name == "ResidualAudioProjector":
        from flax_projector.models.projector import ResidualAudioProjector

        return ResidualAudioProjector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
