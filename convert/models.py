"""The models that can be converted: a table, a config and a module each."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from convert import hf_config, tables
from convert.checkpoint import TensorInfo
from convert.errors import ConversionError, Problem
from convert.infer import infer_projector
from convert.rules import Table
from convert.sources import Source
from convert.trees import flatten
from flax_projector.llama import abstract_decoder
from flax_projector.projector import abstract_projector
from flax_projector.whisper import abstract_encoder


@dataclass(frozen=True)
class ModelKind:
    """All that conversion knows about one model.

    Attributes:
      model_types: that its config.json may have.
      table: names and transforms.
      parse_config: config.json, and what to call it in messages, -> dataclass.
      abstract_params: dataclass -> nested dict of ShapeDtypeStructs; takes `param_dtype`, `mesh`.
      infer_config: shapes without prefix, what the user says, and what to call the file -> what the
        config.json would be; None if shapes do not tell enough.
    """

    model_types: tuple[str, ...]
    table: Table
    parse_config: Callable[[hf_config.Json, str], Any]
    abstract_params: Callable[..., dict]
    infer_config: Callable[[Mapping[str, TensorInfo], hf_config.Json, str], dict] | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return self.table.name

    def read_config(self, path: str | Path) -> Any:
        """The dataclass of the config.json in a folder, or beside a file."""
        return self.parse_text(hf_config.read_config_text(path), str(path))

    def parse_text(self, text: str, where: str) -> Any:
        """The dataclass of the text of a config.json."""
        return self.parse_config(json.loads(text), where)

    def leaves(self, config: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Every leaf of the model, by flax path."""
        return flatten(self.abstract_params(config))


PROJECTOR = ModelKind(
    ("asr_model",), tables.PROJECTOR, hf_config.parse_projector, abstract_projector, infer_projector
)
WHISPER_ENCODER = ModelKind(
    ("whisper",), tables.WHISPER_ENCODER, hf_config.parse_whisper, abstract_encoder
)
LLAMA = ModelKind(hf_config.LLAMA_FAMILY, tables.LLAMA, hf_config.parse_llama, abstract_decoder)

KINDS = (PROJECTOR, WHISPER_ENCODER, LLAMA)


def detect(source: Source) -> ModelKind:
    """Finds out which model it is: by its config.json, or by the names of its tensors.

    Raises:
      ConversionError: if it is none of `KINDS`.
    """
    known = ", ".join(f"{kind.name} ({' or '.join(kind.model_types)})" for kind in KINDS)
    if source.config_text is not None:
        model_type = json.loads(source.config_text).get("model_type")
        found = [kind for kind in KINDS if model_type in kind.model_types]
        problem = Problem("unsupported", "model_type", f"= {model_type!r}, supported: {known}")
    else:
        keys = source.checkpoint.infos
        matches = {kind: kind.table.num_known(keys, kind.table.prefix_of(keys)) for kind in KINDS}
        found = [kind for kind, count in matches.items() if count == max(matches.values()) > 0]
        text = f"of the {len(keys)} tensors do not tell which model it is, supported: {known}"
        problem = Problem("unknown", "names", text)
    if len(found) != 1:
        raise ConversionError(f"{source.path} is no model that can be converted", [problem])
    return found[0]


def config_text_of(source: Source, kind: ModelKind, given: hf_config.Json) -> str:
    """The config.json of a source: its own with what the user adds, or inferred from shapes.

    Args:
      source: of which model.
      kind: that `detect` found.
      given: fields that the user says.

    Raises:
      ValueError: if it contradicts `given`, or if there is none and shapes do not tell enough.
    """
    where = str(source.path)
    if kind.infer_config is None and given:
        raise ValueError(f"{where} is a {kind.name}: {', '.join(given)} belong to projectors")
    if source.config_text is not None:
        return hf_config.with_fields(source.config_text, given, where)
    if kind.infer_config is None:
        raise ValueError(
            f"{hf_config.config_file(where)} does not exist: shapes alone do not describe a "
            f"{kind.name}, put its config.json there"
        )
    prefix = kind.table.prefix_of(source.checkpoint.infos)
    bare = {key.removeprefix(prefix): info for key, info in source.checkpoint.infos.items()}
    return hf_config.config_text(kind.infer_config(bare, given, where))
