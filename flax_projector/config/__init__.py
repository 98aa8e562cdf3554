"""The configs: frozen dataclasses, and the only place where defaults are set.

  fields    the rules in fields' annotations, and the function that checks them
  models    shapes of the projector and the towers, with the field names of PyTorch's configs
  optimizer settings of the optimizer
  decode    settings of decoding
  train     all other settings of a run
  saved     configs as JSON: writing, reading back, comparing
  presets   the named configs that `train_tpu.py` starts from

Imports only `flax_projector.lengths`; needs no JAX. Modules receive only their own sub-config,
never a whole `TrainConfig`.
"""

from flax_projector.config.decode import LIMITS, DecodeConfig, LimitName
from flax_projector.config.fields import option
from flax_projector.config.models import (
    AudioTokensName,
    BadClipsName,
    DTypeName,
    Llama3RopeScaling,
    LlamaConfig,
    NormalizerName,
    ProjectorConfig,
    RematName,
    TextCaseName,
    TranscriptFormat,
    WhisperConfig,
)
from flax_projector.config.presets import PRESETS
from flax_projector.config.saved import Changes, changes, from_json, shared_options, to_json
from flax_projector.config.train import (
    AUDIO,
    TINY_AUDIO_SYSTEM,
    TINY_AUDIO_USER,
    CTCConfig,
    DataConfig,
    DistributedConfig,
    MeshConfig,
    OptimizerConfig,
    PromptConfig,
    SpecAugmentConfig,
    TrainConfig,
)

__all__ = [
    "AUDIO",
    "LIMITS",
    "PRESETS",
    "TINY_AUDIO_SYSTEM",
    "TINY_AUDIO_USER",
    "AudioTokensName",
    "BadClipsName",
    "CTCConfig",
    "Changes",
    "DTypeName",
    "DataConfig",
    "DecodeConfig",
    "DistributedConfig",
    "LimitName",
    "Llama3RopeScaling",
    "LlamaConfig",
    "MeshConfig",
    "NormalizerName",
    "OptimizerConfig",
    "ProjectorConfig",
    "PromptConfig",
    "RematName",
    "SpecAugmentConfig",
    "TextCaseName",
    "TrainConfig",
    "TranscriptFormat",
    "WhisperConfig",
    "changes",
    "from_json",
    "option",
    "shared_options",
    "to_json",
]
