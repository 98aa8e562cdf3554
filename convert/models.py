"""The models that can be converted: a table, a config and a module each."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from convert import hf_config, tables
from convert.flax_files import is_flax_folder, param_infos
from convert.rules import Table, TensorInfo
from convert.torch_files import open_checkpoint
from convert.trees import flatten
from flax_projector.llama import abstract_decoder
from flax_projector.projector import abstract_projector
from flax_projector.whisper import abstract_encoder


@dataclass(frozen=True)
class ModelKind:
    """All that conversion knows about one model.

    Attributes:
      model_type: of its config.json.
      table: names and transforms.
      parse_config: config.json, and what to call it in messages, -> dataclass.
      abstract_params: dataclass -> nested dict of ShapeDtypeStructs; takes `param_dtype`, `mesh`.
    """

    model_type: str
    table: Table
    parse_config: Callable[[hf_config.Json, str], Any]
    abstract_params: Callable[..., dict]

    @property
    def name(self) -> str:
        """For messages."""
        return self.table.name

    def read_config(self, path: str | Path) -> Any:
        """The dataclass of the config.json in a folder, or beside a file."""
        data = json.loads(hf_config.read_config_text(path))
        return self.parse_config(data, str(path))

    def leaves(self, config: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Every leaf of the model, by flax path."""
        return flatten(self.abstract_params(config))


PROJECTOR = ModelKind("asr_model", tables.PROJECTOR, hf_config.parse_projector, abstract_projector)
WHISPER_ENCODER = ModelKind(
    "whisper", tables.WHISPER_ENCODER, hf_config.parse_whisper, abstract_encoder
)
LLAMA = ModelKind("llama", tables.LLAMA, hf_config.parse_llama, abstract_decoder)

KINDS = (PROJECTOR, WHISPER_ENCODER, LLAMA)


def detect(path: str | Path) -> ModelKind:
    """Finds out what a folder or file holds: by its config.json, or by the names of its tensors.

    Raises:
      ValueError: if it is none of `KINDS`.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if hf_config.config_file(path).exists():
        model_type = json.loads(hf_config.read_config_text(path)).get("model_type")
        found = [kind for kind in KINDS if kind.model_type == model_type]
        evidence = f"its config.json says model_type {model_type!r}"
    else:
        keys = read_infos(path)
        matches = {kind: _num_known(kind.table, keys) for kind in KINDS}
        found = [kind for kind, count in matches.items() if count == max(matches.values()) > 0]
        evidence = f"the names of its {len(keys)} tensors do not tell"
    if len(found) != 1:
        known = ", ".join(f"{kind.name} ({kind.model_type!r})" for kind in KINDS)
        raise ValueError(f"{path} is no model that can be converted: {evidence}; known are {known}")
    return found[0]


def read_infos(path: str | Path) -> dict[str, TensorInfo]:
    """Shape and dtype of every tensor or leaf in a checkpoint of either side, from its headers."""
    return param_infos(path) if is_flax_folder(path) else dict(open_checkpoint(path).infos)


def _num_known(table: Table, keys: dict[str, TensorInfo]) -> int:
    return table.num_known(keys, table.prefix_of(keys))
