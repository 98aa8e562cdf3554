"""Files of both sides: what is written comes back, and what is damaged is refused."""

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from convert.checkpoint import DTYPES, TensorInfo, in_memory
from convert.errors import ConversionError
from convert.flax_files import is_flax_folder, load_params, open_flax, write_flax
from convert.load import load_projector, load_tower, resolve_model
from convert.models import LLAMA, PROJECTOR, detect
from convert.paths import replacing
from convert.sources import open_source
from convert.torch_files import open_torch, write_safetensors
from convert.trees import flatten, unflatten
from flax_projector.config import LlamaConfig, ProjectorConfig
from tests.tiny import read_all

REPO = Path(__file__).parents[1]
PROJECTOR_CONFIG = ProjectorConfig(5, 8, projector_pool_stride=3, projector_hidden_dim=11)


def random_tensors(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "b.weight": rng.normal(size=(3, 5)).astype(dtype),
        "a.bias": rng.normal(size=7).astype(dtype),
    }


def assert_same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(np.asarray(got[name]), array, name)


def write_projector(folder: Path, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """A random projector as an HF folder; returns its tensors."""
    c = PROJECTOR_CONFIG
    shapes = {
        "input_proj.weight": (c.llm_dim, 3 * c.encoder_dim),
        "input_proj.bias": (c.llm_dim,),
        "ln_input.weight": (c.llm_dim,),
    }
    for i in range(c.projector_num_layers):
        shapes |= {
            f"layers.{i}.fc1.weight": (c.hidden_dim, c.llm_dim),
            f"layers.{i}.fc1.bias": (c.hidden_dim,),
            f"layers.{i}.fc2.weight": (c.llm_dim, c.hidden_dim),
            f"layers.{i}.fc2.bias": (c.llm_dim,),
            f"layer_norms.{i}.weight": (c.llm_dim,),
        }
    rng = np.random.default_rng(1)
    tensors = {f"projector.{k}": rng.normal(size=s).astype(dtype) for k, s in shapes.items()}
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", in_memory(tensors))
    return tensors


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_come_back(tmp_path, dtype) -> None:
    tensors = random_tensors(DTYPES[dtype])
    write_safetensors(tmp_path / "x.safetensors", in_memory(tensors))
    checkpoint = open_torch(tmp_path / "x.safetensors")
    assert checkpoint.infos == {k: TensorInfo(t.shape, t.dtype) for k, t in tensors.items()}
    assert checkpoint.metadata == {"format": "pt"}
    assert_same(read_all(open_torch(tmp_path / "x.safetensors")), tensors)


def test_views_are_written_in_order(tmp_path) -> None:
    kernel = np.arange(15, dtype=np.float32).reshape(3, 5)
    write_safetensors(tmp_path / "x.safetensors", in_memory({"a": kernel.T, "b": kernel[:, ::2]}))
    assert_same(load_file(tmp_path / "x.safetensors"), {"a": kernel.T, "b": kernel[:, ::2]})


def test_order_of_tensors_does_not_change_the_file(tmp_path) -> None:
    tensors = random_tensors()
    write_safetensors(tmp_path / "1.safetensors", in_memory(tensors))
    write_safetensors(tmp_path / "2.safetensors", in_memory(dict(reversed(tensors.items()))))
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_written_file_is_as_readable_as_any_other(tmp_path) -> None:
    write_safetensors(tmp_path / "x.safetensors", in_memory(random_tensors()))
    (tmp_path / "other").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def write_tree(folder: Path, tree: dict, **kwargs: Any) -> None:
    """A Flax folder of these arrays."""
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}
    write_flax(folder, in_memory(leaves), '{"b": 1}', **kwargs)


def write_sharded(folder: Path) -> dict[str, np.ndarray]:
    tensors = random_tensors(ml_dtypes.bfloat16)
    weight_map = {}
    for number, (key, tensor) in enumerate(tensors.items()):
        weight_map[key] = f"model-{number}.safetensors"
        save_file({key: tensor}, folder / weight_map[key])
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    return tensors


def test_sharded_set_reads_as_one(tmp_path) -> None:
    tensors = write_sharded(tmp_path)
    assert_same(read_all(open_torch(tmp_path)), tensors)
    assert_same(read_all(open_torch(tmp_path / "model.safetensors.index.json")), tensors)


def test_missing_shard_is_named(tmp_path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-1.safetensors does not exist"):
        open_torch(tmp_path)


def test_index_that_disagrees_with_its_files_is_an_error(tmp_path) -> None:
    write_sharded(tmp_path)
    save_file({"c": np.ones(3)}, tmp_path / "model-1.safetensors")
    with pytest.raises(ValueError, match=r"index.json and its files disagree about a.bias, c"):
        open_torch(tmp_path)


def test_broken_index_is_an_error(tmp_path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index.json is not the index of a checkpoint"):
        open_torch(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:40],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: b"this is no checkpoint",
        lambda data: struct.pack("<Q", 2**40) + data[8:],
    ],
)
def test_damaged_safetensors_are_refused_by_name(tmp_path, damage) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, in_memory(random_tensors()))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"x\.safetensors is not a complete safetensors file"):
        open_torch(path)


def test_tensor_of_unknown_dtype_is_named(tmp_path) -> None:
    save_file({"a": np.ones(3, ml_dtypes.float8_e4m3fn)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="tensor a has dtype F8_E4M3"):
        open_torch(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "does not exist"),
        ("notes.txt", "is not a checkpoint"),
        (".", "is not a PyTorch"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, name, message) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=message):
        open_torch(tmp_path / name)


def test_folder_with_one_safetensors_of_any_name_is_a_checkpoint(tmp_path) -> None:
    write_safetensors(tmp_path / "projector.safetensors", in_memory(random_tensors()))
    assert_same(read_all(open_torch(tmp_path)), random_tensors())
    write_safetensors(tmp_path / "other.safetensors", in_memory(random_tensors()))
    with pytest.raises(ValueError, match=r"found other\.safetensors, projector\.safetensors"):
        open_torch(tmp_path)


@pytest.mark.torch
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_files_come_back(tmp_path, suffix, dtype) -> None:
    import torch

    weight = torch.randn(3, 5).to(getattr(torch, dtype))
    state = {"w": weight, "view": weight.T, "scalar": weight[1, 2]}
    torch.save(state, tmp_path / f"x{suffix}")
    got = read_all(open_torch(tmp_path / f"x{suffix}"))
    assert {t.dtype for t in got.values()} == {DTYPES[dtype]}
    for key, tensor in state.items():
        np.testing.assert_array_equal(got[key].astype(np.float32), tensor.float().numpy())


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.torch
def test_pickled_code_is_refused_and_not_run(tmp_path) -> None:
    import torch

    torch.save({"w": torch.ones(3), "x": Bomb(tmp_path / "boom")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt needs unpickling, which .*: refused"):
        open_torch(tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(pickle.dumps({"x": Bomb(tmp_path / "boom")}))
    with pytest.raises(ValueError, match=r"y\.pt needs unpickling"):
        open_torch(tmp_path / "y.pt")
    assert not (tmp_path / "boom").exists()


@pytest.mark.torch
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a complete file"),
        (b"hello world", "is not a complete file"),
        (None, "is not a complete file"),
        ([1, 2], r"holds list, expected a dictionary of tensors"),
        ({"epoch": 3}, r"holds dict of epoch, expected a dictionary of tensors"),
    ],
)
def test_damaged_torch_files_are_refused_by_name(tmp_path, content, message) -> None:
    import torch

    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content or {"a": torch.ones(300)}, path)
    if content is None:
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=rf"x\.pt {message}"):
        open_torch(path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_params_come_back(tmp_path, dtype) -> None:
    tree = unflatten({"a/kernel": random_tensors(DTYPES[dtype])["b.weight"]})
    write_tree(tmp_path / "x", tree)
    assert is_flax_folder(tmp_path / "x")
    checkpoint = open_flax(tmp_path / "x")
    assert checkpoint.infos == {"a/kernel": TensorInfo((3, 5), DTYPES[dtype])}
    assert_same(read_all(checkpoint), flatten(tree))
    assert (tmp_path / "x/config.json").read_text() == '{"b": 1}'
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def sharded(tree, *spec):
    """Abstract arrays like those of `tree`, sharded over all devices."""
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def test_params_come_back_sharded(tmp_path) -> None:
    tree = {"a": np.arange(48, dtype=ml_dtypes.bfloat16).reshape(16, 3)}
    write_tree(tmp_path / "x", jax.tree.map(jax.numpy.asarray, tree))
    abstract = sharded(tree, "x")
    loaded = load_params(tmp_path / "x", abstract)
    assert loaded["a"].sharding == abstract["a"].sharding
    assert_same(loaded, tree)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"a": np.zeros((3, 2))}, r"a  got float32\[2, 3\], expected float64\[3, 2\]"),
        ({"a": np.zeros((2, 3), np.float16)}, r"a  got float32\[2, 3\], expected float16\[2, 3\]"),
        ({"b": np.zeros(2)}, r"a  got float32\[2, 3\], expected nothing"),
    ],
)
def test_other_params_than_asked_for_are_an_error(tmp_path, asked, message) -> None:
    write_tree(tmp_path / "x", {"a": np.zeros((2, 3), np.float32)})
    with pytest.raises(ConversionError, match=message):
        load_params(tmp_path / "x", asked)


def test_folder_without_params_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="is not a converted checkpoint"):
        open_flax(tmp_path)


@pytest.mark.parametrize(
    ("lost", "message"),
    [("_METADATA", "is not a complete Orbax checkpoint"), ("ocdbt.process_0", "is damaged")],
)
def test_incomplete_folder_is_refused(tmp_path, lost, message) -> None:
    rng = np.random.default_rng(0)
    write_tree(tmp_path / "x", {"a": rng.normal(size=(300, 70))})
    (tmp_path / "x/params" / lost).rename(tmp_path / "lost")
    with pytest.raises(ValueError, match=rf"x/params {message}"):
        read_all(open_flax(tmp_path / "x"))


def test_existing_folder_is_kept_unless_asked(tmp_path) -> None:
    write_tree(tmp_path / "x", {"a": np.zeros(2)})
    with pytest.raises(ValueError, match=r"x exists: choose another destination or pass --over"):
        write_tree(tmp_path / "x", {"a": np.ones(2)})
    assert_same(read_all(open_flax(tmp_path / "x")), {"a": np.zeros(2)})
    write_tree(tmp_path / "x", {"a": np.ones(2)}, overwrite=True)
    assert_same(read_all(open_flax(tmp_path / "x")), {"a": np.ones(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_folder_with_other_files_is_never_overwritten(tmp_path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").touch()
    with pytest.raises(ValueError, match=r"it also holds thesis.tex"):
        write_tree(tmp_path / "home", {"a": np.ones(2)}, overwrite=True)
    assert (tmp_path / "home/thesis.tex").exists()


@pytest.mark.parametrize("is_folder", [True, False])
def test_failed_write_leaves_the_old_one(tmp_path, is_folder) -> None:
    dst = tmp_path / "model.safetensors"
    if is_folder:
        dst.mkdir()
    else:
        dst.write_text("old")
    with pytest.raises(OSError, match="disk full"), replacing(dst, overwrite=True) as part:
        part.write_text("new")
        raise OSError("disk full")
    assert dst.is_dir() if is_folder else dst.read_text() == "old"
    assert list(tmp_path.iterdir()) == [dst]


def abstract_of(kind, config, dtype="float32"):
    return sharded(kind.abstract_params(config, param_dtype=DTYPES[dtype]))


def test_load_projector_from_either_side_gives_the_same_arrays(tmp_path, caplog) -> None:
    tensors = write_projector(tmp_path / "hf", ml_dtypes.bfloat16)
    abstract = abstract_of(PROJECTOR, PROJECTOR_CONFIG)
    with caplog.at_level("INFO", logger="convert"):
        from_hf = load_projector(tmp_path / "hf/model.safetensors", PROJECTOR_CONFIG, abstract)
    assert "casting bfloat16 -> float32" in caplog.text
    kernel = tensors["projector.layers.1.fc1.weight"].T.astype(np.float32)
    np.testing.assert_array_equal(from_hf["layers_1"]["fc1"]["kernel"], kernel)
    assert from_hf["layers_1"]["fc1"]["kernel"].sharding == jax.tree.leaves(abstract)[0].sharding

    stored = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), from_hf)
    write_tree(tmp_path / "flax", stored)
    assert_same(flatten(load_tower(PROJECTOR, tmp_path / "flax", abstract)), flatten(from_hf))


def test_load_tower_shards_every_leaf(tmp_path) -> None:
    config = LlamaConfig(16, 8, 24, 2, 4, 2, head_dim=4, tie_word_embeddings=True)
    leaves = LLAMA.abstract_params(config)
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), leaves)
    write_tree(tmp_path / "x", tree)
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))

    def shard(leaf):  # along the last axis
        spec = PartitionSpec(*[None] * (leaf.ndim - 1), "x")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    abstract = jax.tree.map(shard, leaves)
    loaded = load_tower(LLAMA, tmp_path / "x", abstract)
    assert jax.tree.map(lambda x: x.sharding, loaded) == jax.tree.map(
        lambda x: x.sharding, abstract
    )
    assert_same(flatten(loaded), flatten(tree))


def test_load_refuses_another_shape(tmp_path) -> None:
    write_projector(tmp_path / "hf")
    other = ProjectorConfig(5, 8, projector_pool_stride=4, projector_hidden_dim=11)
    with pytest.raises(ConversionError, match=r"got \[8, 15\], expected \[8, 20\]"):
        load_projector(tmp_path / "hf", other, abstract_of(PROJECTOR, other))


def test_loading_never_imports_torch(tmp_path) -> None:
    write_projector(tmp_path / "hf")
    code = f"""
import sys
import jax
from convert.load import load_projector, resolve_model
from convert.models import PROJECTOR
from flax_projector.config import ProjectorConfig
device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
config = {PROJECTOR_CONFIG!r}
abstract = PROJECTOR.abstract_params(config)
abstract = jax.tree.map(lambda x: x.update(sharding=device), abstract)
load_projector(resolve_model({str(tmp_path / "hf")!r}), config, abstract)
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True, timeout=120)


def test_model_that_is_nowhere_is_an_error(monkeypatch) -> None:
    def no_network(*args, **kwargs):
        raise ConnectionError

    monkeypatch.setattr("convert.load.snapshot_download", no_network)
    with pytest.raises(ValueError, match=r"'some/model' is neither a folder here nor .* network"):
        resolve_model("some/model")


def test_detect_by_the_names_of_tensors(tmp_path) -> None:
    write_projector(tmp_path)
    assert detect(open_source(tmp_path / "model.safetensors")) is PROJECTOR


@pytest.mark.parametrize("config", [None, {"model_type": "gpt2"}])
def test_unknown_model_is_an_error(tmp_path, config) -> None:
    write_safetensors(tmp_path / "model.safetensors", in_memory(random_tensors()))
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no model that can be converted: .*known are projector"):
        detect(open_source(tmp_path))
