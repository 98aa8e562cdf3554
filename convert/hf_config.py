"""The config.json of Hugging Face, read into config dataclasses and written from them.

A value that our modules cannot express is an error that names the field. It is never replaced by a
default: the right weights with another activation are a wrong model.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from convert.bounds import too_large
from convert.errors import ConversionError, Problem, raise_any
from flax_projector.config import (
    TINY_AUDIO_USER,
    Llama3RopeScaling,
    LlamaConfig,
    ProjectorConfig,
    TrainConfig,
    WhisperConfig,
)
from flax_projector.file_types import recognise
from flax_projector.files import parse_json
from flax_projector.lengths import SAMPLE_RATE

CONFIG = "config.json"

Json = Mapping[str, Any]
_Config = TypeVar("_Config", ProjectorConfig, WhisperConfig, LlamaConfig)
_Made = TypeVar("_Made")

_DTYPE_FIELDS = ("dtype", "torch_dtype", "model_dtype")


@dataclass(frozen=True)
class _Only:
    """The values of a field that our modules can express.

    Attributes:
      values: the first is Hugging Face's default.
      is_required: whether the field must be present.
    """

    values: tuple[Any, ...]
    is_required: bool = False


_PROJECTOR_ONLY = {
    "model_type": _Only(("asr_model",), is_required=True),
    "projector_type": _Only(("residual", None)),
}
_WHISPER_ONLY = {
    "model_type": _Only(("whisper",), is_required=True),
    "activation_function": _Only(("gelu",)),
    "scale_embedding": _Only((False,)),
    "quantization_config": _Only((None,)),
}
_LLAMA_ONLY = {
    "model_type": _Only(("llama", "qwen2", "qwen3", "smollm3"), is_required=True),
    "hidden_act": _Only(("silu",)),
    "mlp_bias": _Only((False,)),
    "rope_type": _Only(("default", "llama3")),
    "partial_rotary_factor": _Only((1.0,)),
    "sliding_window": _Only((None,)),
    "is_causal": _Only((True,)),
    "layer_types": _Only(("full_attention",)),
    "quantization_config": _Only((None,)),
}
LLAMA_FAMILY = _LLAMA_ONLY["model_type"].values
_LLAMA_TYPES = {  # of the fields that `parse_llama` reads itself; the dataclass checks the others
    "model_type": str,
    "hidden_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "attention_bias": bool,
    "use_sliding_window": bool,
    "layer_types": list,
    "no_rope_layers": list,
    "no_rope_layer_interval": int,
    "rope_parameters": dict,
    "rope_scaling": dict,
}
_JSON_NAMES = {
    str: "a string",
    int: "an integer",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
_LLAMA_DEFAULTS = {  # of transformers, for absent fields
    "llama": {},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
    "smollm3": {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2e6},
}


def parse_projector(data: Json, where: str = CONFIG) -> ProjectorConfig:
    """Reads the projector's part of a tiny-audio config.

    tiny-audio has the norms' epsilon in its code, so `rms_norm_eps` may be absent.
    """
    return _parse(
        ProjectorConfig,
        data,
        _PROJECTOR_ONLY,
        where,
        may_be_null={"projector_hidden_dim"},
        may_be_absent={"rms_norm_eps"},
    )


def parse_whisper(data: Json, where: str = CONFIG) -> WhisperConfig:
    """Reads the encoder's part of a Whisper config."""
    return _parse(WhisperConfig, data, _WHISPER_ONLY, where)


def parse_llama(data: Json, where: str = CONFIG) -> LlamaConfig:
    """Reads the config of a decoder of the Llama family: Llama, Qwen2, Qwen3 or SmolLM3.

    transformers 5 keeps everything about rotary positions in `rope_parameters`, earlier versions in
    `rope_theta` and `rope_scaling`. Absent fields get the defaults of transformers.
    """
    title = _title(LlamaConfig, where)
    raise_any(title, _wrong_types(data, _LLAMA_TYPES) + too_large(LlamaConfig, data))
    family = data.get("model_type", "")
    flat: dict[str, Any] = {
        "tie_word_embeddings": False,
        "rope_theta": 1e4,
        **_LLAMA_DEFAULTS.get(family, {}),
        **data,
    }
    heads, width = flat.get("num_attention_heads"), flat.get("hidden_size")
    if heads:
        _set_absent(flat, "num_key_value_heads", heads)
        if width:
            _set_absent(flat, "head_dim", width // heads)

    rope: Json = data.get("rope_scaling") or data.get("rope_parameters") or {}
    flat["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    flat["partial_rotary_factor"] = rope.get(
        "partial_rotary_factor", data.get("partial_rotary_factor", 1.0)
    )
    if "rope_theta" in rope:
        flat["rope_theta"] = rope["rope_theta"]
    flat["rope_scaling"] = None
    if flat["rope_type"] == "llama3":
        length = "original_max_position_embeddings"
        if length in data:
            rope = {**rope, length: data[length]}
        names = [field.name for field in fields(Llama3RopeScaling)]
        missing = [Problem("missing", name, "of rope_type llama3") for name in names]
        raise_any(title, [problem for problem in missing if problem.name not in rope])
        flat["rope_scaling"] = _make(Llama3RopeScaling, {name: rope[name] for name in names}, where)

    flat["no_rope_layers"] = _layers_without_rope(data, title) if family == "smollm3" else ()
    others = [kind for kind in data.get("layer_types") or () if kind != "full_attention"]
    flat["layer_types"] = others[0] if others else "full_attention"
    if family != "llama" and not data.get("use_sliding_window"):
        flat["sliding_window"] = None  # present, but not used

    bias = bool(data.get("attention_bias"))
    is_qwen2 = family == "qwen2"  # its code always has these biases
    flat |= {"qkv_bias": is_qwen2 or bias, "o_bias": bias and not is_qwen2}
    flat["qk_norm"] = family == "qwen3"
    return _parse(LlamaConfig, flat, _LLAMA_ONLY, where, may_be_null={"rope_scaling"})


def _layers_without_rope(data: Json, title: str) -> tuple[int, ...]:
    """The layers of SmolLM3 that are marked with 0; every fourth if there are no marks."""
    layers = range(data.get("num_hidden_layers") or 0)
    marks = data.get("no_rope_layers")
    if marks is None:
        interval = data.get("no_rope_layer_interval", 4)
        if interval is None or interval < 1:
            text = f"= {interval}, expected at least 1"
            raise ConversionError(title, [Problem("wrong", "no_rope_layer_interval", text)])
        return tuple(layer for layer in layers if (layer + 1) % interval == 0)
    problems = []
    if layers and len(marks) != len(layers):
        problems.append(f"has {len(marks)} marks for {len(layers)} layers")
    if any(mark not in (0, 1) for mark in marks):
        problems.append(f"= {marks}, expected marks of 0 or 1")
    raise_any(title, [Problem("wrong", "no_rope_layers", text) for text in problems])
    return tuple(i for i, is_rotated in enumerate(marks) if not is_rotated)


def _wrong_types(data: Json, types: Mapping[str, type]) -> list[Problem]:
    """Fields that are present, not null, and of another JSON type."""
    return [
        Problem("type", name, f"= {data[name]!r}, expected {_JSON_NAMES[kind]}")
        for name, kind in types.items()
        if data.get(name) is not None and type(data[name]) is not kind
    ]


def _set_absent(data: dict[str, Any], name: str, value: Any) -> None:
    if data.get(name) is None:
        data[name] = value


def projector_config_dict(config: ProjectorConfig, *, dtype: str) -> dict[str, Any]:
    """A config.json for a projector alone, with tiny-audio's field names.

    Args:
      config: of the projector. Its `rms_norm_eps` is written, although tiny-audio does not read
        it.
      dtype: of the projector's weights.
    """
    return {
        "model_type": "asr_model",
        "architectures": ["ASRModel"],
        "audio_sample_rate": SAMPLE_RATE,
        "model_dtype": dtype,
        "projector_type": "residual",
        **asdict(config),
    }


def run_config_dict(config: TrainConfig, prompt: str | None) -> dict[str, Any]:
    """A config.json for the projector of a training run, with the run's towers and prompt.

    Args:
      config: of the run; resolved.
      prompt: the run's prompt, as it keeps it; None leaves it out. tiny-audio renders its messages
        with the chat template of the LLM, as it is and on that day; "needs" lists what else there
        is to it.
    """
    data = {
        **projector_config_dict(config.projector, dtype="float32"),
        "audio_model_id": config.encoder,
        "text_model_id": config.llm,
        "audio_tokens": config.data.audio_tokens,
        "window_secs": config.data.window_secs,
        "max_clip_secs": config.data.bucket_secs[-1],
        "max_new_tokens": config.max_new_tokens,
    }
    if prompt is None:
        return data
    texts = json.loads(prompt)
    args = config.prompt.template_args
    needs = {
        f"the date {texts['date']}": texts["date"],
        f"--prompt.template-args {' '.join(args)}": args,
        f"the user message {texts['user']!r}": texts["user"] != TINY_AUDIO_USER,
        "--prompt.end": config.prompt.end,
    }
    rendered = {name: texts[name] for name in _RENDERED}
    return {
        **data,
        "system_prompt": texts["system"],
        "user_prompt": texts["user"],
        "rendered_prompt": {**rendered, "needs": [what for what, is_so in needs.items() if is_so]},
    }


_RENDERED = (
    *("before_audio", "after_audio", "end"),
    *("before_audio_ids", "after_audio_ids", "end_of_turn_id"),
)


def training(text: str) -> dict[str, str]:
    """What a projector's config.json says of its training, by the names of our options.

    A projector that tiny-audio saved has heard the whole window.

    Returns:
      "prompt.system", "prompt.user" and "data.audio_tokens", as far as it says them.
    """
    data = json.loads(text)
    is_tiny_audios = "text_config" in data  # which ours leave out
    found = {
        "prompt.system": data.get("system_prompt"),
        "prompt.user": data.get("user_prompt"),
        "data.audio_tokens": data.get("audio_tokens", "window" if is_tiny_audios else None),
    }
    if "system_prompt" in data and data["system_prompt"] is None:
        found["prompt.system"] = ""  # tiny-audio's null: no system turn
    return {name: value for name, value in found.items() if value is not None}


def rendered_prompt(text: str) -> dict[str, Any] | None:
    """The prompt in a config.json of `run_config_dict`, if any."""
    return json.loads(text).get("rendered_prompt")


def config_file(path: str | Path) -> Path:
    """The place of the config.json that belongs to a folder, or to a file in it."""
    path = Path(path)
    return (path if path.is_dir() else path.parent) / CONFIG


def read_config_text(path: str | Path) -> str:
    """The text of the config.json in a folder, or beside a file.

    Raises:
      ValueError: if there is none, or it is not a JSON object.
    """
    file = config_file(path)
    if not file.exists():
        raise ValueError(f"{file} does not exist")
    try:
        text = file.read_text("utf-8")
        is_object = isinstance(parse_json(text), dict)
    except ValueError as error:
        raise ValueError(f"{file} {recognise(file) or f'is not JSON: {error}'}") from error
    if not is_object:
        raise ValueError(f"{file} does not hold a JSON object")
    return text


def architecture(text: str) -> str:
    """The name of the model in a config.json: "llama (LlamaForCausalLM)", or "unknown"."""
    data = json.loads(text)
    model_type, classes = data.get("model_type") or "unknown", data.get("architectures")
    names = ", ".join(map(str, classes)) if isinstance(classes, list) else ""
    return f"{model_type} ({names})" if names else str(model_type)


def config_text(config: Json | str) -> str:
    """The text of a config.json: as it is, or a dict in the form that Hugging Face writes."""
    if isinstance(config, str):
        return config
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def with_dtype(text: str, dtype: str) -> str:
    """The text of a config.json, for weights that were cast to `dtype`; unchanged if it says so."""
    data = json.loads(text)
    changes = {name: dtype for name in _DTYPE_FIELDS if data.get(name) not in (None, dtype)}
    return config_text({**data, **changes}) if changes else text


def with_fields(text: str, given: Json, where: str) -> str:
    """The text of a config.json, with the given fields added; unchanged if it has them all.

    Raises:
      ConversionError: if it has another value for one of them.
    """
    data = json.loads(text)
    raise_any(
        f"{where} has other values than the given ones",
        [
            Problem("conflict", name, f"is {data[name]!r} there, but {value!r} was given")
            for name, value in given.items()
            if data.get(name) not in (None, value)
        ],
    )
    new = {name: value for name, value in given.items() if data.get(name) is None}
    return config_text({**data, **new}) if new else text


def _parse(
    cls: type[_Config],
    data: Json,
    only: Mapping[str, _Only],
    where: str,
    *,
    may_be_null: Collection[str] = (),
    may_be_absent: Collection[str] = (),
) -> _Config:
    """Makes a dataclass from the fields that it knows, after checking the others."""
    names = {field.name for field in fields(cls)}
    missing = names - data.keys() - set(may_be_absent)
    missing |= {name for name, rule in only.items() if rule.is_required} - data.keys()
    null = {name for name in names & data.keys() - set(may_be_null) if data[name] is None}
    wrong = {
        name: rule for name, rule in only.items() if name in data and data[name] not in rule.values
    }
    raise_any(
        _title(cls, where),
        too_large(cls, data)
        + [Problem("missing", name, "is not in the file") for name in missing]
        + [Problem("missing", name, "is null") for name in null]
        + [
            Problem("unsupported", name, f"= {data[name]!r}, supported: {_listed(rule.values)}")
            for name, rule in wrong.items()
        ],
    )
    return _make(cls, {name: data[name] for name in names & data.keys()}, where)


def _make(cls: type[_Made], values: Json, where: str) -> _Made:
    try:
        return cls(**values)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _title(cls: type, where: str) -> str:
    return f"{where} cannot be read as a {cls.__name__}"


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(map(repr, values))
