"""`load_projector` gives module and parameters, whatever form the projector is stored in."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import api, load_projector
from convert.models import PROJECTOR
from convert.trees import flatten
from flax_projector.models.projector import ResidualAudioProjector
from tests.checkpoints import UPSTREAM, write_run, write_weights
from tests.tiny import make_projector, read_params


@pytest.fixture
def hf(tmp_path) -> Path:
    """A random projector in an HF folder: E = 5, k = 3, D = 7, I = 11."""
    return make_projector(tmp_path / "hf")


@pytest.fixture
def flax(tmp_path, hf) -> Path:
    """The same as a Flax folder."""
    return api.to_flax(hf, tmp_path / "flax", verify=False)


def test_it_computes_what_tiny_audio_computes() -> None:
    projector, params = load_projector(UPSTREAM)
    with np.load(UPSTREAM / "io.npz") as io, jax.default_matmul_precision("highest"):
        tokens = projector.apply({"params": params}, jnp.asarray(io["x"]))
        np.testing.assert_allclose(np.asarray(tokens), io["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("form", ["hf", "flax", "file", "pt", "run", "hub"])
def test_every_form_is_loaded(tmp_path, hf, flax, form, monkeypatch) -> None:
    expected = read_params(flax)
    path: str | Path = tmp_path / form
    if form == "file":
        path = hf / "model.safetensors"  # beside its config.json
    elif form == "pt":
        path = api.to_torch(flax, hf / "best.pt", verify=False)
    elif form == "run":
        write_run(tmp_path / "run", PROJECTOR.read_config(flax), expected, steps=[2, 4])
    elif form == "hub":
        path = "some/projector"
        monkeypatch.setattr("convert.load.snapshot_download", lambda *args, **kwargs: str(hf))
    projector, params = load_projector(path)
    assert isinstance(projector, ResidualAudioProjector)
    assert projector.config == PROJECTOR.read_config(flax)
    assert (projector.dtype, projector.config.hidden_dim) == ("float32", 11)
    assert flatten(params).keys() == flatten(expected).keys()
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_step_of_a_run_is_loaded(tmp_path, flax) -> None:
    write_run(tmp_path / "run", PROJECTOR.read_config(flax), read_params(flax), steps=[2, 4])
    load_projector(tmp_path / "run", step=2)
    with pytest.raises(ValueError, match=r"run has no checkpoint of step 3, only of 2, 4"):
        load_projector(tmp_path / "run", step=3)


def test_parameters_keep_their_dtype_and_the_module_computes_in_another(tmp_path, hf) -> None:
    half = api.to_flax(hf, tmp_path / "half", dtype="bfloat16", verify=False)
    frames = jnp.ones((1, 4, 5))
    for dtype in ("float32", "bfloat16"):
        projector, params = load_projector(half, dtype=dtype)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
        tokens: Any = jax.eval_shape(projector.apply, {"params": params}, frames)
        assert (tokens.dtype, tokens.shape) == (dtype, (1, 2, 7))


def test_without_config_the_missing_fields_are_named_or_given(tmp_path, hf) -> None:
    bare = shutil.copy(hf / "model.safetensors", tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=r"bare.safetensors has no config.json: .* as `given`"):
        load_projector(bare)
    given = {"encoder_dim": 5, "rms_norm_eps": 1e-8, "projector_dropout": 0.1}
    projector, _ = load_projector(bare, given=given)
    config = projector.config
    assert (config.projector_pool_stride, config.llm_dim, config.hidden_dim) == (3, 7, 11)
    assert (config.rms_norm_eps, config.projector_dropout) == (1e-8, 0.1)


@pytest.mark.parametrize("form", ["hf", "flax"])
def test_a_checkpoint_that_does_not_fit_its_config_is_an_error(request, form) -> None:
    folder = request.getfixturevalue(form)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"projector_num_layers": 2}))
    with pytest.raises(ValueError, match=r"missing +(projector.layers.1.fc1.bias|layers_1/fc1/bi)"):
        load_projector(folder)


def test_another_model_is_an_error(tmp_path) -> None:
    folder = write_weights(tmp_path / "llm", {"model.norm.weight": np.ones(3, np.float32)})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"llm is a llama, not a projector"):
        load_projector(folder)
