"""Weights go from a file straight into their shards: the same bits, each part read once."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from huggingface_hub.errors import HTTPError
from jax.sharding import SingleDeviceSharding

from convert import engine
from convert.checkpoint import DTYPES, Checkpoint, TensorInfo, in_memory
from convert.errors import ConversionError
from convert.flax_files import write_flax
from convert.hf_config import projector_config_dict
from convert.load import load_projector_params, load_tower, resolve_model
from convert.models import LLAMA, PROJECTOR, WHISPER_ENCODER, ModelKind
from convert.plan import LeafPlan
from convert.rules import IDENTITY, Rule, transpose
from convert.torch_save import write_torch
from convert.trees import flatten, unflatten
from flax_projector.config import (
    LlamaConfig,
    MeshConfig,
    ProjectorConfig,
    WhisperConfig,
)
from flax_projector.sharding import make_mesh
from tests.checkpoints import REPO, write_run, write_weights
from tests.tiny import read_all, torch_infos

MODELS = Path(os.environ.get("FLAX_PROJECTOR_MODELS", REPO / "models"))

# Two divides most sizes, so that leaves are split along two axes; few sizes are alike.
CONFIGS = {
    PROJECTOR: ProjectorConfig(5, 8, projector_pool_stride=3, projector_hidden_dim=14),
    WHISPER_ENCODER: WhisperConfig(5, 6, 3, 2, 14, max_source_positions=13),
    LLAMA: LlamaConfig(26, 10, 14, 3, 4, 2, head_dim=6, tie_word_embeddings=True),
}
all_kinds = pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.name)


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def on_one_device(abstract: dict) -> dict:
    device = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: leaf.update(sharding=device), abstract)


def random_tensors(kind: ModelKind, dtype: str = "float32") -> dict[str, np.ndarray]:
    """A torch checkpoint of the model in `CONFIGS`."""
    infos = torch_infos(kind, CONFIGS[kind], dtype)
    rng = np.random.default_rng(0)
    return {key: rng.normal(size=info.shape).astype(info.dtype) for key, info in infos.items()}


def flax_side(kind: ModelKind, tensors: dict[str, np.ndarray]) -> Checkpoint:
    checkpoint = in_memory(tensors)
    plan = engine.plan_to_flax(kind.table, checkpoint.infos, kind.leaves(CONFIGS[kind]))
    return engine.as_flax(plan, checkpoint)


def assert_same(got: dict, expected: dict) -> None:
    """The same leaves, bit for bit."""
    assert got.keys() == expected.keys()
    for path, array in expected.items():
        assert got[path].dtype == array.dtype, path
        assert np.asarray(got[path]).tobytes() == np.asarray(array).tobytes(), path


def assert_sharded_as(params: dict, abstract: dict, kind: ModelKind) -> None:
    """Every array lies as it was asked for; some are split along two axes, of an encoder none."""
    loaded, asked = flatten(params), flatten(abstract)
    assert {p: x.sharding for p, x in loaded.items()} == {p: x.sharding for p, x in asked.items()}
    are_split = [{"fsdp", "tensor"} <= set(leaf.sharding.spec) for leaf in asked.values()]
    assert any(are_split) == (kind is not WHISPER_ENCODER)


@all_kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_sharded_load_equals_the_unsharded_one(tmp_path, mesh, kind, dtype, caplog) -> None:
    tensors = random_tensors(kind, dtype)
    folder = write_weights(tmp_path / "hf", tensors)
    abstract = kind.abstract_params(CONFIGS[kind], mesh=mesh)
    with caplog.at_level("INFO", logger="convert"):
        params = load_tower(kind, folder, abstract)
    assert (f"casting {dtype} -> float32" in caplog.text) == (dtype != "float32")
    assert_sharded_as(params, abstract, kind)
    whole = load_tower(kind, folder, on_one_device(abstract))
    assert_same(flatten(params), flatten(whole))
    leaves = read_all(flax_side(kind, tensors))
    assert_same(flatten(params), {path: x.astype(np.float32) for path, x in leaves.items()})


@all_kinds
def test_flax_folder_is_loaded_into_its_shards(tmp_path, mesh, kind) -> None:
    leaves = flax_side(kind, random_tensors(kind, "bfloat16"))
    write_flax(tmp_path / "flax", leaves, "{}")
    abstract = kind.abstract_params(CONFIGS[kind], mesh=mesh)
    params = load_tower(kind, tmp_path / "flax", abstract)
    assert_sharded_as(params, abstract, kind)
    expected = {path: x.astype(np.float32) for path, x in read_all(leaves).items()}
    assert_same(flatten(params), expected)


@all_kinds
def test_a_part_is_that_of_the_leaf_and_has_its_own_memory(kind) -> None:
    tensors = random_tensors(kind)
    plan = engine.plan_to_flax(kind.table, in_memory(tensors).infos, kind.leaves(CONFIGS[kind]))
    whole = read_all(flax_side(kind, tensors))
    for leaf in plan.leaves:
        halves = [(slice(n // 2), slice(n // 2, n)) for n in leaf.info.shape]
        for index in (*zip(*halves, strict=True), (slice(None),) * len(halves)):
            part = engine.read_part(leaf, in_memory(tensors), index)
            np.testing.assert_array_equal(part, whole[leaf.path][index], leaf.path)
            assert part.flags.c_contiguous
            assert not any(np.shares_memory(part, tensors[key]) for key in leaf.keys)


@pytest.mark.parametrize("transform", [IDENTITY, transpose()], ids=lambda x: x.name)
def test_nothing_but_the_part_is_copied(transform) -> None:
    """Of three layers of 2 MB: half of one, then a quarter of two."""
    tensor = np.random.default_rng(0).normal(size=(512, 1024)).astype(np.float32)
    shape = (3, *transform.forward_shape(tensor.shape))
    keys = ("layers.0.w", "layers.1.w", "layers.2.w")
    rule = Rule("layers.{i}.w", "layers/w", transform)
    leaf = LeafPlan("layers/w", TensorInfo(shape, tensor.dtype), keys, rule)
    read = []

    def read_tensor(key: str) -> np.ndarray:
        read.append(key)
        return tensor

    tensors = Checkpoint(dict.fromkeys(keys, leaf.tensor_info), read_tensor)
    _, rows, columns = (slice(n // 2) for n in shape)
    for index, asked in (
        ((slice(1, 2), rows, slice(None)), keys[1:2]),
        ((slice(0, 2), rows, columns), keys[:2]),
    ):
        read.clear()
        tracemalloc.start()  # knows the memory of arrays
        part = engine.read_part(leaf, tensors, index)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert tuple(read) == asked
        assert part.nbytes <= peak < part.nbytes + 50_000


def test_every_part_is_read_once(tmp_path, mesh, monkeypatch) -> None:
    folder = write_weights(tmp_path / "hf", random_tensors(LLAMA))
    parts: dict[str, list[tuple[str, int]]] = {}
    read_part = engine.read_part

    def record(leaf, tensors, index):
        part = read_part(leaf, tensors, index)
        parts.setdefault(leaf.path, []).append((str(index), part.size))
        return part

    monkeypatch.setattr(engine, "read_part", record)
    abstract = LLAMA.abstract_params(CONFIGS[LLAMA], mesh=mesh)
    params = flatten(load_tower(LLAMA, folder, abstract))
    assert parts.keys() == params.keys()
    for path, read in parts.items():
        assert len(set(read)) == len(read), f"{path}: a replica was read again"
        assert sum(size for _, size in read) == params[path].size, path
    assert max(map(len, parts.values())) == 4  # 8 devices, of which pairs hold the same


def test_tied_tensors_that_differ_are_refused(tmp_path, mesh) -> None:
    abstract = LLAMA.abstract_params(CONFIGS[LLAMA], mesh=mesh)
    tensors = random_tensors(LLAMA)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    folder = write_weights(tmp_path / "equal", tensors)
    assert "lm_head" not in load_tower(LLAMA, folder, abstract)

    tensors["lm_head.weight"][3, 2] += 1
    folder = write_weights(tmp_path / "different", tensors)
    with pytest.raises(ConversionError, match=r"lm_head.weight  differs from model.embed_tokens"):
        load_tower(LLAMA, folder, abstract)


@pytest.mark.torch
@pytest.mark.parametrize("form", ["hf", "hf/model.safetensors", "x.pt", "flax", "run"])
def test_a_projector_is_loaded_from_any_form(tmp_path, mesh, form, caplog) -> None:
    kind, config = PROJECTOR, CONFIGS[PROJECTOR]
    tensors = random_tensors(kind, "bfloat16")
    leaves = read_all(flax_side(kind, tensors))
    text = json.dumps(projector_config_dict(config, dtype="bfloat16"))
    if form == "x.pt":
        write_torch(tmp_path / form, in_memory(tensors))
    elif form == "flax":
        write_flax(tmp_path / form, in_memory(leaves), text)
    elif form == "run":
        write_run(tmp_path / form, config, unflatten(leaves), steps=[4])
    else:
        (write_weights(tmp_path / "hf", tensors) / "config.json").write_text(text)

    abstract = kind.abstract_params(config, mesh=mesh)
    with caplog.at_level("INFO", logger="convert"):
        params = load_projector_params(tmp_path / form, config, abstract)
    assert "casting bfloat16 -> float32" in caplog.text
    assert_sharded_as(params, abstract, PROJECTOR)
    assert_same(flatten(params), {path: x.astype(np.float32) for path, x in leaves.items()})


def test_load_refuses_another_shape(tmp_path, mesh) -> None:
    folder = write_weights(tmp_path / "hf", random_tensors(PROJECTOR))
    other = ProjectorConfig(5, 8, projector_pool_stride=4, projector_hidden_dim=14)
    with pytest.raises(ConversionError, match=r"got \[8, 15\], expected \[8, 20\]"):
        load_projector_params(folder, other, PROJECTOR.abstract_params(other, mesh=mesh))


def test_loading_never_imports_torch(tmp_path) -> None:
    for kind in CONFIGS:
        write_weights(tmp_path / kind.name, random_tensors(kind))
    code = f"""
import sys
import jax
from convert.hf_config import projector_config_dict
from convert.load import load_projector_params, load_tower, resolve_model
from convert.models import LLAMA, PROJECTOR, WHISPER_ENCODER
from flax_projector.config import LlamaConfig, MeshConfig, ProjectorConfig, WhisperConfig
from flax_projector.sharding import make_mesh
mesh = make_mesh(MeshConfig())
for kind, config in zip((PROJECTOR, WHISPER_ENCODER, LLAMA), {list(CONFIGS.values())!r}):
    folder = resolve_model({str(tmp_path)!r} + "/" + kind.name)
    abstract = kind.abstract_params(config, mesh=mesh)
    if kind is PROJECTOR:
        load_projector_params(folder, config, abstract)
    else:
        load_tower(kind, folder, abstract)
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True, timeout=120)


@pytest.mark.parametrize("error", [ConnectionError, HTTPError("read timed out")])
def test_model_that_is_nowhere_is_an_error(monkeypatch, error) -> None:
    def no_network(*args, **kwargs):
        raise error

    monkeypatch.setattr("convert.load.snapshot_download", no_network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"'some/model' is not a folder, .* without a network, c"):
        resolve_model("some/model")


def test_hub_that_may_not_be_asked_is_named() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE forbids downloads: unset it, or copy"):
        resolve_model("some/model-that-is-not-cached")


def test_hub_model_without_safetensors_is_an_error(tmp_path, monkeypatch) -> None:
    (tmp_path / "config.json").touch()
    monkeypatch.setattr("convert.load.snapshot_download", lambda *args, **kwargs: str(tmp_path))
    with pytest.raises(
        ValueError, match=r"'some/model' has no .safetensors on the hub, only weights in other"
    ):
        resolve_model("some/model")
    write_weights(tmp_path, {})
    assert resolve_model("some/model") == tmp_path


@pytest.mark.slow
@pytest.mark.skipif(
    not (MODELS / "whisper-base").is_dir(),
    reason="no real weights: run `make models`, or set FLAX_PROJECTOR_MODELS",
)
@pytest.mark.parametrize(
    ("kind", "name"),
    [(WHISPER_ENCODER, "whisper-base"), (LLAMA, "smollm2-135m-instruct")],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_real_weights_are_the_same_in_shards(mesh, kind, name, dtype) -> None:
    config = kind.read_config(MODELS / name)
    abstract = kind.abstract_params(config, param_dtype=DTYPES[dtype], mesh=mesh)
    params = load_tower(kind, MODELS / name, abstract)
    assert_sharded_as(params, abstract, kind)
    whole = load_tower(kind, MODELS / name, on_one_device(abstract))
    assert_same(flatten(params), flatten(whole))
