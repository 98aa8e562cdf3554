"""The models that can be converted, each with a table, a config and a module."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from convert import hf_config, misfits, tables
from convert.bounds import check_sizes
from convert.checkpoint import TensorInfo
from convert.errors import ConversionError, Problem, raise_any
from convert.infer import check_given, infer_projector
from convert.rules import Table
from convert.stored import StoredModel
from convert.trees import flatten
from flax_projector.models.llama import abstract_decoder
from flax_projector.models.projector import abstract_projector
from flax_projector.models.whisper import abstract_encoder


@dataclass(frozen=True)
class ModelKind:
    """Everything that the converter knows about one model.

    Attributes:
      model_types: the values that `model_type` may have in its config.json.
      table: names and transforms.
      parse_config: makes the dataclass from a config.json and the name of it for messages.
      abstract_params: makes a nested dict of ShapeDtypeStructs from the dataclass; also takes
        `param_dtype` and `mesh`.
      infer_config: makes a config.json from headers by torch key without prefix, the fields that
        the user gives, and a name for messages; None if shapes do not show enough.
    """

    model_types: tuple[str, ...]
    table: Table
    parse_config: Callable[[hf_config.Json, str], Any]
    abstract_params: Callable[..., dict]
    infer_config: Callable[[Mapping[str, TensorInfo], hf_config.Json, str], dict] | None = None

    @property
    def name(self) -> str:
        """The model's name, for messages."""
        return self.table.name

    def read_config(self, path: str | Path) -> Any:
        """The dataclass of the config.json in a folder, or beside a file."""
        return self.parse_text(hf_config.read_config_text(path), str(path))

    def parse_text(self, text: str, where: str) -> Any:
        """The dataclass of the text of a config.json."""
        return self.parse_config(json.loads(text), where)

    def leaves_for(self, config: Any, stored: StoredModel) -> dict[str, jax.ShapeDtypeStruct]:
        """Every leaf of the model, by flax path, unless its sizes are beyond the checkpoint's.

        Raises:
          ConversionError: naming the sizes that are.
        """
        check_sizes(config, stored.checkpoint.infos, str(stored.path))
        return self.leaves(config)

    def leaves(self, config: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Every leaf of the model, by flax path."""
        return dict(_leaves(self.abstract_params, config))


@functools.lru_cache(maxsize=8)  # a conversion asks several times, and tracing a module is slow
def _leaves(abstract_params: Callable[..., dict], config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return flatten(abstract_params(config))


PROJECTOR = ModelKind(
    ("asr_model",), tables.PROJECTOR, hf_config.parse_projector, abstract_projector, infer_projector
)
WHISPER_ENCODER = ModelKind(
    ("whisper",), tables.WHISPER_ENCODER, hf_config.parse_whisper, abstract_encoder
)
LLAMA = ModelKind(hf_config.LLAMA_FAMILY, tables.LLAMA, hf_config.parse_llama, abstract_decoder)

KINDS = (PROJECTOR, WHISPER_ENCODER, LLAMA)


def detect(stored: StoredModel) -> ModelKind:
    """Finds out which model it is, by its config.json or else by the names of its tensors.

    Raises:
      ConversionError: if it is none of `KINDS`.
    """
    title = f"{stored.path} is not a model that can be converted"
    raise_any(title, misfits.adapter_weights(stored.checkpoint.infos))
    known = ", ".join(f"{kind.name} ({' or '.join(kind.model_types)})" for kind in KINDS)
    if stored.config_text is not None:
        model_type = json.loads(stored.config_text).get("model_type")
        found = [kind for kind in KINDS if model_type in kind.model_types]
        problem = Problem("unsupported", "model_type", f"= {model_type!r}, supported: {known}")
    else:
        keys = stored.checkpoint.infos
        matches = {kind: kind.table.num_known(keys, kind.table.prefix_of(keys)) for kind in KINDS}
        found = [kind for kind, count in matches.items() if count == max(matches.values()) > 0]
        text = f"of the {len(keys)} tensors fit no single model, supported: {known}"
        problem = Problem("unknown", "names", text)
    if len(found) != 1:
        raise ConversionError(title, [problem])
    return found[0]


def config_text_of(stored: StoredModel, kind: ModelKind, given: hf_config.Json) -> str:
    """The model's config.json, completed with the given fields; or one inferred from its shapes.

    Args:
      stored: the model.
      kind: the result of `detect`.
      given: fields that the user gives.

    Raises:
      ValueError: if it contradicts `given`, if there is none and shapes do not show enough, or if
        `given` names other fields than the config has.
    """
    where = str(stored.path)
    if kind.infer_config is None and given:
        names = ", ".join(given)
        raise ValueError(f"{where} is a {kind.name}, but only projectors have {names}")
    check_given(given)
    if stored.config_text is not None:
        return hf_config.with_fields(stored.config_text, given, where)
    if kind.infer_config is None:
        raise ValueError(
            f"{hf_config.config_file(where)} does not exist: a {kind.name} cannot be converted "
            "without its config.json, put it there"
        )
    infos = stored.checkpoint.infos
    prefix = kind.table.prefix_of(infos)
    bare = {key.removeprefix(prefix): info for key, info in infos.items()}
    return hf_config.config_text(kind.infer_config(bare, given, where))
