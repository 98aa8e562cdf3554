"""A projector's config: inferred from shapes, completed by given fields, or contradicted."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from convert import api
from convert.models import PROJECTOR
from convert.torch_files import open_torch
from tests.checkpoints import write_weights
from tests.tiny import make_projector, read_all


@pytest.fixture
def hf(tmp_path) -> Path:
    """A random projector in an HF folder."""
    return make_projector(tmp_path / "hf")


@pytest.fixture
def bare(tmp_path, hf) -> Path:
    """The weights of the projector alone: E = 5, k = 3, D = 7, I = 11."""
    (tmp_path / "bare").mkdir()
    return Path(shutil.copy(hf / "model.safetensors", tmp_path / "bare"))


REST = {"rms_norm_eps": 1e-8, "projector_dropout": 0.05}


@pytest.mark.parametrize("factor", [{"encoder_dim": 5}, {"projector_pool_stride": 3}])
def test_shapes_show_the_rest_of_the_config(tmp_path, hf, bare, factor) -> None:
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
        ({}, r"has no config.json: pass what .* or, in Python, as `given` \(3 problems\)"),
        ({}, r"encoder_dim +x projector_pool_stride = 15: pass one of them, --encoder-dim or"),
        ({"encoder_dim": 5}, r"projector_dropout  the dropout rate .*: pass --projector-dropout"),
        ({"encoder_dim": 5}, r"rms_norm_eps +the epsilon of .*: pass --rms-norm-eps"),
        ({**REST, "encoder_dim": 4}, r"encoder_dim  = 4 does not divide the 15 inputs"),
        ({**REST, "projector_pool_stride": 0}, r"projector_pool_stride  = 0 does not divide"),
        ({**REST, "encoder_dim": 5, "projector_pool_stride": 4}, r"got \[7, 15\], expected \[7, 2"),
        ({**REST, "encoder_dim": 5, "rms_norm_eps": -1.0}, r"rms_norm_eps = -1.0: must be greater"),
    ],
)
def test_what_shapes_do_not_show_must_be_given(tmp_path, bare, given, message) -> None:
    with pytest.raises(ValueError, match=message):
        api.to_flax(bare, tmp_path / "flax", given=given)
    assert not (tmp_path / "flax").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"encoder_dimension": 5}, "encoder_dimension  is not one of .*did you mean encoder_dim"),
        ({"pool_stride": 3}, "pool_stride  is not .*: did you mean projector_pool_stride"),
        ({"rms-norm-eps": 1e-6}, "rms-norm-eps  is not .*: did you mean rms_norm_eps"),
        ({"x": 1}, "x  is not one of them: its fields are encoder_dim, llm_dim, "),
        ({"encoder_dim": "5"}, "encoder_dim  = '5', expected a number"),
        ({"encoder_dim": None}, "encoder_dim  = None, expected a number"),
        ({"encoder_dim": np.int64(5)}, r"encoder_dim  = np.int64\(5\), expected a number"),
        ({"encoder_dim": True}, "encoder_dim  = True, expected a number"),
    ],
)
@pytest.mark.parametrize("path", ["hf", "bare/model.safetensors"])
def test_misspelt_fields_are_errors_everywhere(tmp_path, hf, bare, given, message, path) -> None:
    for use in (
        lambda **kw: api.to_flax(tmp_path / path, tmp_path / "flax", **kw),
        lambda **kw: api.verify(tmp_path / path, tmp_path / path, **kw),
        lambda **kw: api.load_projector(tmp_path / path, **kw),
    ):
        with pytest.raises(ValueError, match=message):
            use(given={**REST, **given} if path != "hf" else given)
    assert not (tmp_path / "flax").exists()


def test_what_a_config_lacks_may_be_given(tmp_path, hf) -> None:
    api.to_flax(hf, tmp_path / "flax", given={"rms_norm_eps": 1e-8})
    assert PROJECTOR.read_config(tmp_path / "flax").rms_norm_eps == 1e-8


def test_a_config_may_not_be_contradicted(tmp_path, hf) -> None:
    with pytest.raises(ValueError, match=r"projector_pool_stride  is 3 there, but 4 was given"):
        api.to_flax(hf, tmp_path / "flax", given={"projector_pool_stride": 4})


def test_wrong_stride_in_the_config_is_named(tmp_path, hf) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"projector_pool_stride": 4}))
    message = r"got \[7, 15\], expected \[7, 20\] .*\(llm_dim, projector_pool_stride x encoder_dim"
    with pytest.raises(ValueError, match=message):
        api.to_flax(hf, tmp_path / "flax")


def test_wrong_prefix_is_one_problem(tmp_path, hf) -> None:
    tensors = {f"model.{key}": x for key, x in read_all(open_torch(hf)).items()}
    write_weights(hf, tensors)
    message = r"\(1 problem\)\n +prefix +model.projector. +expected 'projector.' or '': rename the"
    with pytest.raises(ValueError, match=message):
        api.to_flax(hf, tmp_path / "flax")


def test_another_model_s_weights_are_one_problem(tmp_path, hf) -> None:
    write_weights(hf, {"w": np.ones(3)})
    with pytest.raises(ValueError, match=r"has no tensor of this model, only others such as 'w'"):
        api.to_flax(hf, tmp_path / "flax")
