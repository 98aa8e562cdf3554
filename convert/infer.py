"""Infers the config of a projector that has no config.json, as far as its shapes show it."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from convert.checkpoint import TensorInfo
from convert.errors import Problem, raise_any
from convert.hf_config import Json, projector_config_dict
from flax_projector.config import ProjectorConfig
from flax_projector.config.fields import option


def check_given(given: Json) -> None:
    """Checks that the fields that the user gives are numbers in a `ProjectorConfig`.

    Raises:
      ConversionError: listing those that are not, with what may have been meant.
    """
    known = [field.name for field in fields(ProjectorConfig)]
    problems = []
    for name, value in given.items():
        close = difflib.get_close_matches(name, known, 1)
        if name not in known:
            hint = f"did you mean {close[0]}?" if close else f"its fields are {', '.join(known)}"
            problems.append(Problem("unknown", name, f"is not one of them: {hint}"))
        elif type(value) not in (int, float):
            problems.append(Problem("type", name, f"= {value!r}, expected a number"))
    raise_any("the given fields are not those of a ProjectorConfig", problems)


def infer_projector(infos: Mapping[str, TensorInfo], given: Json, where: str) -> dict[str, Any]:
    """The config.json that belongs to the weights of a projector.

    Shapes show the LLM's width, the hidden width and the depth. They do not show the norms'
    epsilon, the dropout rate, or which factor of `input_proj`'s inputs is the pool stride.

    Args:
      infos: of every tensor, by torch key without prefix.
      given: fields of `ProjectorConfig` that the user gives.
      where: the file, for messages.

    Raises:
      ConversionError: listing the fields that have to be given, and their options.
    """
    try:
        llm_dim, num_inputs = infos["input_proj.weight"].shape
    except (KeyError, ValueError) as error:
        raise ValueError(f"{where} has no config.json and no matrix input_proj.weight") from error
    depth = 1 + max(
        (int(m[1]) for key in infos if (m := re.match(r"layers\.(\d+)\.", key))), default=-1
    )
    hidden = infos.get("layers.0.fc1.bias")
    values = {
        "llm_dim": llm_dim,
        "projector_num_layers": depth,
        "projector_hidden_dim": hidden.shape[0] if hidden else None,
        **given,
    }
    problems = [
        Problem("unknown", name, f"{what}: pass {option(name)}")
        for name, what in (
            ("rms_norm_eps", "the epsilon of the norms (1e-6 in tiny-audio)"),
            ("projector_dropout", "the dropout rate of training (0 if it is only run)"),
        )
        if name not in given
    ]
    factors = ("encoder_dim", "projector_pool_stride")
    known = [name for name in factors if name in given]
    if not known:
        options = " or ".join(option(name) for name in factors)
        text = f"x projector_pool_stride = {num_inputs}: pass one of them, {options}"
        problems.append(Problem("unknown", "encoder_dim", text))
    elif given[known[0]] < 1 or num_inputs % given[known[0]]:
        text = f"= {given[known[0]]} does not divide the {num_inputs} inputs of input_proj"
        problems.append(Problem("wrong", known[0], text))
    raise_any(
        f"{where} has no config.json: pass what its shapes do not show, as options or, in Python, "
        "as `given`",
        problems,
    )
    for name, other in (factors, factors[::-1]):
        if name not in values:
            values[name] = num_inputs // values[other]
    dtype = infos["input_proj.weight"].dtype.name
    return projector_config_dict(ProjectorConfig(**values), dtype=dtype)
