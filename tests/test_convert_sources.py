"""Every form of checkpoint is told by its content, and a projector without a config is inferred."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from convert import api
from convert.checkpoint import in_memory
from convert.models import PROJECTOR
from convert.sources import open_source
from convert.torch_files import open_torch, write_safetensors, write_torch
from tests.tiny import make_projector, read_all


@pytest.fixture
def hf(tmp_path) -> Path:
    """A random projector in an HF folder."""
    return make_projector(tmp_path / "hf")


def rewrite(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Other tensors in place of the folder's."""
    (folder / "model.safetensors").unlink()
    write_safetensors(folder / "model.safetensors", in_memory(tensors))


def same(a: Path, b: Path) -> None:
    one, two = read_all(open_torch(a)), read_all(open_torch(b))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert tensor.tobytes() == two[key].tobytes(), key


@pytest.mark.torch
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["best.pt", "weights"])
def test_a_file_is_known_by_its_first_bytes(tmp_path, hf, name, is_zip) -> None:
    import torch

    tensors = {key: torch.tensor(x) for key, x in read_all(open_torch(hf)).items()}
    torch.save(tensors, hf / name, _use_new_zipfile_serialization=is_zip)
    assert read_all(open_torch(hf / name)).keys() == tensors.keys()
    shutil.copy(hf / "model.safetensors", tmp_path / "without_suffix")
    same(hf, tmp_path / "without_suffix")


@pytest.mark.torch
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("prefix", [None, ""])
def test_torch_file_is_written_for_torch(tmp_path, hf, suffix, prefix) -> None:
    import torch

    api.to_flax(hf, tmp_path / "flax", dtype="bfloat16")
    file = api.to_torch(tmp_path / "flax", tmp_path / f"x{suffix}", prefix=prefix)
    state = torch.load(file, weights_only=True)
    expected = {key: torch.tensor(x).bfloat16() for key, x in read_all(open_torch(hf)).items()}
    assert list(state) == sorted(state)
    assert len(state) == len(expected)
    for key, tensor in state.items():
        full = key if prefix is None else f"projector.{key}"
        assert torch.equal(tensor, expected[full]), key


def test_unknown_prefix_is_an_error(tmp_path, hf) -> None:
    api.to_flax(hf, tmp_path / "flax")
    with pytest.raises(ValueError, match=r"prefix 'proj' of a projector is not one of 'projector."):
        api.to_torch(tmp_path / "flax", tmp_path / "x.safetensors", prefix="proj")


@pytest.mark.torch
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_sharded_projector_converts(tmp_path, hf, suffix) -> None:
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    shutil.copy(hf / "config.json", sharded)
    tensors = {key: tensor.copy() for key, tensor in read_all(open_torch(hf)).items()}
    weight_map = {key: f"weights-{number % 3}{suffix}" for number, key in enumerate(tensors)}
    write = write_torch if suffix == ".bin" else write_safetensors
    for name in set(weight_map.values()):
        write(
            sharded / name, in_memory({k: t for k, t in tensors.items() if weight_map[k] == name})
        )
    stem = "pytorch_model.bin" if suffix == ".bin" else "model.safetensors"
    (sharded / f"{stem}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    api.to_torch(api.to_flax(sharded, tmp_path / "flax"), tmp_path / "back")
    same(hf, tmp_path / "back")


@pytest.fixture
def trainer(tmp_path) -> Path:
    """The output folder of an HF Trainer: checkpoint-10, -100 and -9, each another projector."""
    for step in (10, 100, 9):
        folder = make_projector(tmp_path / "out" / f"checkpoint-{step}", seed=step)
        (folder / "optimizer.pt").write_bytes(b"moments")
    (tmp_path / "out" / "checkpoint-tmp").mkdir()
    return tmp_path / "out"


def test_the_latest_checkpoint_of_a_trainer_is_taken(tmp_path, trainer) -> None:
    api.to_flax(trainer, tmp_path / "flax")
    api.to_torch(tmp_path / "flax", tmp_path / "hf")
    same(trainer / "checkpoint-100", tmp_path / "hf")


def test_a_step_of_a_trainer_is_taken(tmp_path, trainer) -> None:
    api.to_flax(trainer, tmp_path / "flax", step=9)
    api.to_torch(tmp_path / "flax", tmp_path / "hf")
    same(trainer / "checkpoint-9", tmp_path / "hf")
    with pytest.raises(ValueError, match=r"out has no checkpoint of step 11; it has 9, 10, 100"):
        api.to_flax(trainer, tmp_path / "x", step=11)


def test_the_model_that_a_trainer_saved_last_comes_before_its_checkpoints(trainer) -> None:
    make_projector(trainer, seed=3)
    assert open_source(trainer).path == trainer
    assert open_source(trainer, step=10).path == trainer / "checkpoint-10"


def test_one_config_may_serve_all_checkpoints(trainer) -> None:
    shutil.copy(trainer / "checkpoint-9/config.json", trainer)
    for folder in trainer.glob("checkpoint-1*"):
        (folder / "config.json").unlink()
    assert open_source(trainer).config_text == (trainer / "config.json").read_text()


def test_a_step_of_what_has_no_steps_is_an_error(hf) -> None:
    with pytest.raises(ValueError, match=r"hf has no step 3: it is not a folder of checkpoint-N"):
        open_source(hf, step=3)


@pytest.mark.parametrize("text", [None, '{"data": ["train"]}', '{"data": 3}'])
def test_a_folder_with_another_config_is_no_run(hf, text) -> None:
    (hf / "checkpoints/5").mkdir(parents=True)
    if text is not None:
        (hf / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json is not the config of a training run"):
        open_source(hf)


@pytest.mark.parametrize("held", ["flax_model.msgpack", "checkpoints", None])
def test_a_folder_of_another_form_names_the_forms_that_exist(tmp_path, held) -> None:
    if held:
        (tmp_path / held).mkdir()
    with pytest.raises(ValueError, match=rf"holds {held or 'nothing'}, expected one of") as caught:
        open_source(tmp_path)
    for form in ("pytorch_model.bin.index.json", "checkpoint-N/", "params/", "checkpoints/N/"):
        assert form in str(caught.value)


@pytest.fixture
def bare(tmp_path, hf) -> Path:
    """The weights of the projector alone: E = 5, k = 3, D = 7, F = 11."""
    (tmp_path / "bare").mkdir()
    return Path(shutil.copy(hf / "model.safetensors", tmp_path / "bare"))


REST = {"rms_norm_eps": 1e-8, "projector_dropout": 0.05}


@pytest.mark.parametrize("factor", [{"encoder_dim": 5}, {"projector_pool_stride": 3}])
def test_shapes_tell_the_rest_of_the_config(tmp_path, hf, bare, factor) -> None:
    api.to_flax(bare, tmp_path / "flax", given=REST | factor)
    config = PROJECTOR.read_config(tmp_path / "flax")
    expected = json.loads((hf / "config.json").read_text())
    for name in ("encoder_dim", "llm_dim", "projector_pool_stride", "projector_num_layers"):
        assert getattr(config, name) == expected[name], name
    assert (config.hidden_dim, config.rms_norm_eps, config.projector_dropout) == (11, 1e-8, 0.05)
    api.to_torch(tmp_path / "flax", tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == bare.read_bytes()


def test_a_projector_without_blocks_has_no_hidden_width(tmp_path) -> None:
    folder = make_projector(tmp_path / "x", num_layers=0)
    (folder / "config.json").unlink()
    api.to_flax(folder, tmp_path / "flax", given={**REST, "encoder_dim": 5})
    config = PROJECTOR.read_config(tmp_path / "flax")
    assert (config.projector_num_layers, config.projector_hidden_dim) == (0, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"\(3 problems\)"),
        ({}, r"encoder_dim +x projector_pool_stride is 15: pass one of the two, --encoder-dim or"),
        ({"encoder_dim": 5}, r"projector_dropout  shapes do not tell .*: pass --projector-dropout"),
        ({"encoder_dim": 5}, r"rms_norm_eps +shapes do not tell .*: pass --rms-norm-eps"),
        ({**REST, "encoder_dim": 4}, r"encoder_dim  = 4 does not divide the 15 inputs"),
        ({**REST, "projector_pool_stride": 0}, r"projector_pool_stride  = 0 does not divide"),
        ({**REST, "encoder_dim": 5, "projector_pool_stride": 4}, r"got \[7, 15\], expected \[7, 2"),
        ({**REST, "encoder_dim": 5, "rms_norm_eps": -1.0}, r"rms_norm_eps = -1.0: must be greater"),
    ],
)
def test_what_shapes_do_not_tell_must_be_said(tmp_path, bare, given, message) -> None:
    with pytest.raises(ValueError, match=message):
        api.to_flax(bare, tmp_path / "flax", given=given)
    assert not (tmp_path / "flax").exists()


def test_what_a_config_lacks_may_be_said(tmp_path, hf) -> None:
    api.to_flax(hf, tmp_path / "flax", given={"rms_norm_eps": 1e-8})
    assert PROJECTOR.read_config(tmp_path / "flax").rms_norm_eps == 1e-8


def test_a_config_may_not_be_contradicted(tmp_path, hf) -> None:
    with pytest.raises(ValueError, match=r"projector_pool_stride  it says 3, you say 4"):
        api.to_flax(hf, tmp_path / "flax", given={"projector_pool_stride": 4})


def test_wrong_stride_in_the_config_is_named(tmp_path, hf) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"projector_pool_stride": 4}))
    message = r"got \[7, 15\], expected \[7, 20\] .*\(llm_dim, projector_pool_stride x encoder_dim"
    with pytest.raises(ValueError, match=message):
        api.to_flax(hf, tmp_path / "flax")


def test_wrong_prefix_is_one_problem(tmp_path, hf) -> None:
    tensors = {f"model.{key}": x for key, x in read_all(open_torch(hf)).items()}
    rewrite(hf, tensors)
    message = r"\(1 problem\)\n +prefix +model.projector. +of the keys should be 'projector.' or ''"
    with pytest.raises(ValueError, match=message):
        api.to_flax(hf, tmp_path / "flax")


def test_another_model_s_weights_are_one_problem(tmp_path, hf) -> None:
    rewrite(hf, {"w": np.ones(3)})
    with pytest.raises(ValueError, match=r"no key of this model is in the checkpoint, but 'w'"):
        api.to_flax(hf, tmp_path / "flax")


@pytest.mark.torch
def test_state_inside_a_dictionary_is_named(tmp_path) -> None:
    import torch

    torch.save({"epoch": 3, "model": {"w": torch.ones(3)}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"holds dict of epoch, model, expected a dictionary of"):
        open_torch(tmp_path / "x.pt")
    torch.save({0: torch.ones(3)}, tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match=r"holds dict of 0, expected a dictionary of tensors by na"
    ):
        open_torch(tmp_path / "x.pt")


@pytest.mark.torch
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_file_is_not_overwritten_unless_asked(tmp_path, hf, name) -> None:
    file = api.to_torch(api.to_flax(hf, tmp_path / "1"), tmp_path / name)
    before = file.read_bytes()
    other = api.to_flax(make_projector(tmp_path / "other", seed=1), tmp_path / "2")
    with pytest.raises(ValueError, match=f"{name} exists: choose another destination or pass --o"):
        api.to_torch(other, file)
    assert file.read_bytes() == before
    api.to_torch(other, file, overwrite=True)
    same(tmp_path / "other", file)
