"""Of the weights in odd folders, those are taken that transformers takes."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaForCausalLM
from transformers.trainer_utils import get_last_checkpoint

from convert.checkpoint import in_memory
from convert.models import LLAMA, detect
from convert.stored import open_stored
from convert.torch_files import open_torch, write_safetensors
from convert.torch_save import write_torch
from tests.checkpoints import write_weights
from tests.hf_models import tiny_llama
from tests.tiny import make_projector, read_all

pytestmark = pytest.mark.torch

FORMS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
KEY = "model.norm.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A tiny Llama in an HF folder."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(True).save_pretrained(folder)
    return folder


def add(folder: Path, form: str, tensors: dict[str, np.ndarray], value: float) -> None:
    """Adds weights in one of the forms; the value tells them from those in the other forms."""
    tensors = {**tensors, KEY: np.full_like(tensors[KEY], value)}
    write = write_safetensors if "safetensors" in form else write_torch
    if not form.endswith(".index.json"):
        write(folder / form, in_memory(tensors))
        return
    suffix = ".safetensors" if "safetensors" in form else ".bin"
    weight_map = {key: f"part-{i % 2}{suffix}" for i, key in enumerate(tensors)}
    for name in set(weight_map.values()):
        held = {key: x for key, x in tensors.items() if weight_map[key] == name}
        write(folder / name, in_memory(held))
    (folder / form).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def value_in_transformers(folder: Path) -> float | None:
    """The value in the weights that transformers loads; None if it refuses the folder."""
    try:
        model = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    except OSError:
        return None
    return float(model.state_dict()[KEY][0])


def value_here(folder: Path) -> float | None:
    """The same of the converter, which `load_tower` opens folders with as well."""
    try:
        return float(open_stored(folder).checkpoint.read(KEY)[0])
    except ValueError:
        return None


@pytest.mark.parametrize(
    "forms", [forms for n in range(1, 5) for forms in itertools.combinations(FORMS, n)]
)
@pytest.mark.parametrize("oddity", ["", "stale index", "folders"])
def test_the_weights_are_those_of_transformers(tmp_path, llama, forms, oddity) -> None:
    shutil.copy(llama / "config.json", tmp_path)
    tensors = {key: x.copy() for key, x in read_all(open_torch(llama)).items()}
    for form in forms:
        add(tmp_path, form, tensors, FORMS.index(form) + 2)
    if oddity == "stale index":  # its shards are gone
        for shard in tmp_path.glob("part-*"):
            shard.unlink()
    if oddity == "folders":
        for form in set(FORMS) - set(forms):
            (tmp_path / form).mkdir()
    expected = value_in_transformers(tmp_path)
    assert value_here(tmp_path) == expected
    assert (expected is None) == (oddity == "stale index" and forms[0].endswith(".index.json"))


def test_a_tensor_in_two_shards_is_refused_and_both_are_named(tmp_path) -> None:
    for name in ("1.safetensors", "2.safetensors"):
        write_safetensors(tmp_path / name, in_memory({"a": np.ones(3), name: np.ones(2)}))
    for name in ("1.safetensors", "2.safetensors"):
        weight_map = {"a": name, "1.safetensors": "1.safetensors", "2.safetensors": "2.safetensors"}
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=r"2\.safetensors and .*1\.safetensors both hold a"):
            open_torch(tmp_path)


def test_weights_that_the_config_names_are_not_passed_over(tmp_path, llama) -> None:
    """transformers loads these, whatever else is in the folder."""
    folder = tmp_path / "llama"
    shutil.copytree(llama, folder)
    data = json.loads((folder / "config.json").read_text())
    text = json.dumps(data | {"transformers_weights": "other.safetensors"})
    (folder / "config.json").write_text(text)
    tensors = {key: x.copy() for key, x in read_all(open_torch(folder)).items()}
    add(folder, "other.safetensors", tensors, 7)
    assert value_in_transformers(folder) == 7
    with pytest.raises(ValueError, match=r"transformers_weights\): pass .*/other.safetensors"):
        open_stored(folder)
    assert value_here(folder / "other.safetensors") == 7


def test_a_folder_of_both_frameworks_is_refused(tmp_path) -> None:
    from convert import api

    flax = api.to_flax(make_projector(tmp_path / "hf"), tmp_path / "flax", verify=False)
    shutil.copy(tmp_path / "hf/model.safetensors", flax)
    with pytest.raises(ValueError, match="in PyTorch's form and, in params/, one in Flax's"):
        open_stored(flax)


def test_a_model_with_a_folder_of_checkpoints_is_no_training_run(tmp_path, llama) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(llama, folder)
    (folder / "checkpoints/5").mkdir(parents=True)
    assert open_stored(folder).side == "torch"
    assert LLAMA.read_config(folder)
    write_weights(folder, {"model.norm.weight": np.ones(3)})
    with pytest.raises(ValueError, match="has no step 5"):
        open_stored(folder, step=5)


@pytest.mark.parametrize("adapter", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_beside_the_weights_is_not_passed_over(
    tmp_path, llama, adapter, form, caplog
) -> None:
    """transformers with PEFT would add it to them."""
    folder = tmp_path / "llama"
    folder.mkdir()
    shutil.copy(llama / "config.json", folder)
    tensors = {key: x.copy() for key, x in read_all(open_torch(llama)).items()}
    add(folder, form, tensors, 7)
    assert value_here(folder) == 7
    write_safetensors(folder / adapter, in_memory({"x.lora_A.weight": np.ones(3)}))
    with pytest.raises(ValueError, match=rf"an adapter \({adapter}\).*pass .*/{form} to leave it"):
        open_stored(folder)
    assert not caplog.messages
    assert value_here(folder / form) == 7
    assert f"is taken without the adapter beside it, {adapter}" in caplog.text
    shutil.copytree(folder, tmp_path / "out/checkpoint-5")  # as a Trainer saves it
    with pytest.raises(ValueError, match="holds an adapter"):
        open_stored(tmp_path / "out")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_alone_is_named(tmp_path, name) -> None:
    write = write_safetensors if "safetensors" in name else write_torch
    write(tmp_path / name, in_memory({"base_model.model.x.lora_A.weight": np.ones(3)}))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"an adapter .*{name}.*it holds no other model"):
        open_stored(tmp_path)
    with pytest.raises(ValueError, match=r"weights of an adapter \(LoRA\): merge them"):
        detect(open_stored(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-10-backup99", None),
        ("checkpoint-99.bak", None),
        ("checkpoint-99 (copy)", None),
        ("checkpoint-9_9", None),
        ("checkpoint--99", None),
        ("checkpoint-", None),
        ("checkpoint-best", None),
        ("Checkpoint-99", None),
        ("tmp-checkpoint-99", None),
        ("old-checkpoint-99", None),
        ("checkpoint-99", 99),
    ],
)
def test_only_the_names_of_transformers_are_checkpoints(tmp_path, name, step) -> None:
    for place in ("checkpoint-10", name):
        make_projector(tmp_path / place)
    last = get_last_checkpoint(str(tmp_path))
    assert last == str(tmp_path / ("checkpoint-10" if step is None else name))
    assert str(open_stored(tmp_path).path) == last
    if step is None:
        with pytest.raises(ValueError, match="has no checkpoint of step 99, only of 10"):
            open_stored(tmp_path, step=99)


@pytest.mark.parametrize("name", ["checkpoint-99", "checkpoints"])
def test_a_file_with_the_name_of_a_folder_is_no_checkpoint(tmp_path, name) -> None:
    make_projector(tmp_path / "checkpoint-10")
    (tmp_path / name).write_text("")
    assert open_stored(tmp_path).path == tmp_path / "checkpoint-10"


@pytest.mark.parametrize("inside", ["5", "step-5", "notes.txt"])
def test_other_folders_of_checkpoints_make_no_run(tmp_path, inside) -> None:
    folder = make_projector(tmp_path / "hf")
    (folder / "checkpoints" / inside).mkdir(parents=True)
    assert open_stored(folder).path == folder
    with pytest.raises(ValueError, match="has no step 5"):
        open_stored(folder, step=5)
