"""What wrappers add to names is taken off, and nothing else is guessed."""

import logging
from pathlib import Path

import numpy as np
import pytest

from convert import api
from convert.checkpoint import in_memory
from convert.errors import ConversionError
from convert.models import PROJECTOR, detect
from convert.stored import open_stored
from convert.tables import WRAPPERS
from convert.torch_files import open_torch
from convert.wrappers import without_wrappers
from tests.checkpoints import assert_same_tensors, write_weights
from tests.hf_models import tiny_whisper
from tests.tiny import make_projector, read_all

pytestmark = pytest.mark.torch


@pytest.fixture
def hf(tmp_path) -> Path:
    """A random projector in an HF folder."""
    return make_projector(tmp_path / "hf", num_layers=2)


def rename(folder: Path, new_name) -> Path:
    """The tensors of a folder by other names, in another folder with the same config."""
    tensors = {new_name(key): x.copy() for key, x in read_all(open_torch(folder)).items()}
    renamed = write_weights(folder.parent / "renamed", tensors)
    (renamed / "config.json").write_bytes((folder / "config.json").read_bytes())
    return renamed


@pytest.mark.parametrize(
    "new_name",
    [
        *(lambda key, p=p: p + key for p in WRAPPERS),
        lambda key: "module._orig_mod." + key,
        lambda key: "_orig_mod.module." + key,
        lambda key: "base_model.model._orig_mod.module." + key,
        lambda key: key.replace("projector.", "projector.module."),
        lambda key: key.replace("projector.", "module."),
        lambda key: key.replace("layers.1.", "layers.1._orig_mod."),
        lambda key: "_fsdp_wrapped_module." + key.replace("fc", "_checkpoint_wrapped_module.fc"),
    ],
)
def test_what_wrappers_add_is_left_out_and_logged(tmp_path, hf, new_name, caplog) -> None:
    caplog.set_level(logging.INFO, logger="convert")
    renamed = rename(hf, new_name)
    api.to_torch(api.to_flax(renamed, tmp_path / "flax"), tmp_path / "back")
    assert_same_tensors(hf, tmp_path / "back")
    assert api.verify(renamed, hf).is_same
    assert any("renamed: left " in message for message in caplog.messages)


def test_a_mixture_is_an_error(hf) -> None:
    some = rename(hf, lambda key: key if "fc1" in key else "module." + key)
    with pytest.raises(ConversionError, match="holds tensors of several models") as caught:
        open_stored(some)
    assert "mixture  module.projector.input_proj.bias" in str(caught.value)
    assert "begins with no prefix of a wrapper" in str(caught.value)
    names = ("a", "module.a", "_orig_mod.a")
    with pytest.raises(ConversionError, match=r"twice  *module\.a  *without module\. it is a, as"):
        without_wrappers(in_memory({name: np.ones(3) for name in names}), "x")
    with pytest.raises(ConversionError, match=r"twice  *b\.module\.a"):
        without_wrappers(in_memory({name: np.ones(3) for name in ("b.a", "b.module.a")}), "x")


def test_a_mixture_of_the_models_own_prefixes_is_named(tmp_path, hf) -> None:
    some = rename(hf, lambda key: key.removeprefix("projector.") if "fc1" in key else key)
    with pytest.raises(ConversionError, match=r"does not begin with 'projector.', as others"):
        api.to_flax(some, tmp_path / "x")


@pytest.mark.parametrize("outer", ["", "base_model.model."])
@pytest.mark.parametrize("has_config", [True, False])
def test_lora_weights_are_named_as_what_they_are(tmp_path, hf, outer, has_config) -> None:
    def new_name(key: str) -> str:
        return outer + key.replace("fc1.weight", "fc1.lora_A.default.weight")

    renamed = rename(hf, new_name)
    if not has_config:
        (renamed / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"of an adapter \(LoRA\): merge them") as caught:
        api.to_flax(renamed, tmp_path / "x")
    assert "--ignore" not in str(caught.value)
    assert "and 1 others are" in str(caught.value)
    assert "weights of an adapter" in str(api.inspect(renamed).problem)


def test_real_weights_are_not_to_be_ignored(tmp_path, hf) -> None:
    tensors = {key: x.copy() for key, x in read_all(open_torch(hf)).items()}
    more = ("projector.layers.0.fc1.weight_scale", "projector.layers.0.gate.weight")
    write_weights(hf, tensors | {key: np.ones(3, np.float32) for key in more})
    with pytest.raises(ConversionError, match="would compute something else without it") as caught:
        api.to_flax(hf, tmp_path / "x")
    assert len(caught.value.problems) == 2
    assert "--ignore" not in str(caught.value)


def test_a_decoder_is_not_to_be_renamed_to_an_encoder(tmp_path) -> None:
    tiny_whisper("WhisperModel").save_pretrained(tmp_path / "hf")
    tensors = {key: x.copy() for key, x in read_all(open_torch(tmp_path / "hf")).items()}
    for prefix in ("", "model.", "speech."):
        decoder = {prefix + key: x for key, x in tensors.items() if "decoder" in key}
        write_weights(tmp_path / "hf", decoder)
        with pytest.raises(ConversionError, match="has no tensor of this model") as caught:
            api.to_flax(tmp_path / "hf", tmp_path / "x")
        assert "rename" not in str(caught.value)


def test_a_prefix_of_nobody_is_still_refused(hf) -> None:
    assert detect(open_stored(hf)) is PROJECTOR
    with pytest.raises(ConversionError, match=r"prefix  audio\.projector\.  expected"):
        api.to_flax(rename(hf, lambda key: "audio." + key), hf.parent / "x")
