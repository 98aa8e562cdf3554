"""A folder with everything that tiny-audio's loader and a server in PyTorch want."""

import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from convert.api import check_apart, to_torch
from convert.hf_config import CONFIG, config_text, read_config_text
from convert.load import resolve_model
from convert.models import LLAMA, PROJECTOR, WHISPER_ENCODER, detect
from convert.paths import replacing
from convert.stored import open_stored
from convert.torch_files import WEIGHTS
from flax_projector.chat.tokenizer import load_tokenizer
from flax_projector.config import AUDIO
from flax_projector.files import any_path, is_url, local_path
from flax_projector.run_folder import find_from_projector

_log = logging.getLogger(__name__)

_GENERATION, _PREPROCESSOR = "generation_config.json", "preprocessor_config.json"


@dataclass(frozen=True)
class _Tower:
    """A frozen tower that a projector was trained with.

    Attributes:
      folder: where it is now.
      config: its config.json.
      name: for the config.json of the folder: a hub id, or a path.
    """

    folder: Path
    config: Mapping[str, Any]
    name: str


def to_hf_folder(
    src: str | Path,
    dst: str | Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    audio_model_id: str | None = None,
    text_model_id: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> Path:
    """Converts a trained projector into a folder as tiny-audio saves it.

    Args:
      src: the folder of a run, or a projector that a run wrote.
      dst: the new folder.
      step: which checkpoint of a run; None takes the latest.
      dtype: cast the weights to it first; None keeps every bit.
      audio_model_id: what the folder calls the encoder, which a server loads: a hub id, or a path
        there. None takes what the run was given.
      text_model_id: the same for the LLM.
      overwrite: replace what an earlier conversion wrote.
      verify: read the weights, convert them back and compare every byte.

    Returns:
      `dst`.

    Raises:
      ValueError: if it is no projector that was trained here, or its towers are not found; nothing
        is written then.
    """
    stored, dst = open_stored(src, step=step), local_path(dst)
    if stored.side == "torch" or detect(stored) is not PROJECTOR:
        raise ValueError(f"{src} is not a projector in Flax's form: --hf-folder needs one")
    data = json.loads(stored.config_text or "{}")
    if "end_of_turn_id" not in data.get("rendered_prompt", {}):
        raise ValueError(
            f"{src} was not trained by train_tpu.py, so that its prompt and limits are not known: "
            "use the HF folder that it was converted from"
        )
    encoder = _find_tower(src, data["audio_model_id"], audio_model_id, "--audio-model-id")
    llm = _find_tower(src, data["text_model_id"], text_model_id, "--text-model-id")
    _check_fit(data, encoder, llm)
    check_apart(stored, dst)
    with tempfile.TemporaryDirectory(prefix="flax-projector-") as temporary:
        folder = Path(temporary)
        length = _write_tokenizer(folder, load_tokenizer(llm.folder))
        _write_rest(folder, data, encoder)
        beside = {file.name: file.read_bytes() for file in folder.iterdir()}
    names = {CONFIG, WEIGHTS, *beside}
    with replacing(dst, names=names, overwrite=overwrite) as part:
        to_torch(src, part, step=step, dtype=dtype, verify=verify)
        for name, content in beside.items():
            (part / name).write_bytes(content)
        written = json.loads((part / CONFIG).read_text("utf-8"))
        (part / CONFIG).write_text(_complete(written, encoder, llm, length), "utf-8")
    for option, tower in (("--audio-model-id", encoder), ("--text-model-id", llm)):
        if Path(tower.name).is_absolute():
            _log.warning(
                "WARNING: config.json names %s, which is on this machine alone: pass its hub id "
                "with %s",
                tower.name,
                option,
            )
    return dst


def _find_tower(src: str | Path, name: str, given: str | None, option: str) -> _Tower:
    """The tower that a run names, or of the given name where that is not found."""
    found = find_from_projector(any_path(src), name)
    try:
        folder = resolve_model(found)
    except ValueError as error:
        if given is None:
            raise ValueError(f"{error}, or name another one with {option}") from error
        folder = resolve_model(given)
    is_path = is_url(found) or Path(found).expanduser().exists()
    path = found if is_url(found) else str(Path(found).expanduser().absolute())
    known = given or (path if is_path else name)
    return _Tower(folder, json.loads(read_config_text(folder)), known)


def _check_fit(data: Mapping[str, Any], encoder: _Tower, llm: _Tower) -> None:
    """Checks that the towers are those of the projector, as far as their widths show."""
    theirs = {
        "encoder_dim": WHISPER_ENCODER.parse_config(encoder.config, str(encoder.folder)).d_model,
        "llm_dim": LLAMA.parse_config(llm.config, str(llm.folder)).hidden_size,
    }
    folders = {"encoder_dim": encoder.folder, "llm_dim": llm.folder}
    for name, width in theirs.items():
        if data[name] != width:
            raise ValueError(
                f"{folders[name]} is {width} wide, but the projector was trained for {name} "
                f"{data[name]}: it is another model"
            )


def _write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> int:
    """Writes the LLM's tokenizer with the audio token, and its chat template; returns its size."""
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [AUDIO]}, replace_extra_special_tokens=False
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def _write_rest(folder: Path, data: Mapping[str, Any], encoder: _Tower) -> None:
    """Writes how clips are read, and how texts are generated."""
    end = data["rendered_prompt"]["end_of_turn_id"]
    generation = {
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": data["max_new_tokens"],
        "eos_token_id": end,
        "pad_token_id": end,
    }
    (folder / _GENERATION).write_text(config_text(generation), "utf-8")
    secs = data["window_secs"]
    features = WhisperFeatureExtractor(
        feature_size=encoder.config["num_mel_bins"],
        chunk_length=int(secs) if secs == int(secs) else secs,
    )
    text = config_text({**features.to_dict(), "processor_class": "ASRProcessor"})
    (folder / _PREPROCESSOR).write_text(text, "utf-8")


def _complete(data: Mapping[str, Any], encoder: _Tower, llm: _Tower, vocab_size: int) -> str:
    """The config.json with what tiny-audio's has besides."""
    more = {
        "attn_implementation": "eager",  # its default needs a package for GPUs
        "audio_config": encoder.config,
        "audio_model_id": encoder.name,
        "do_sample": False,
        "dtype": data["model_dtype"],
        "num_beams": 1,
        "pipeline_tag": "automatic-speech-recognition",
        "text_config": {**llm.config, "vocab_size": vocab_size},
        "text_model_id": llm.name,
        "vocab_size": vocab_size,
    }
    return config_text({**data, **more})
