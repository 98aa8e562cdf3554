"""Files of both sides: what is written comes back, and what is damaged is refused."""

import json
import os
import pickle
import re
import struct
import subprocess
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
from convert.models import PROJECTOR, detect
from convert.paths import replacing
from convert.sources import open_source
from convert.torch_files import open_torch, write_safetensors
from convert.trees import flatten, unflatten
from tests.tiny import make_projector, read_all


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_come_back(tmp_path, dtype) -> None:
    tensors = random_tensors(DTYPES[dtype])
    write_safetensors(tmp_path / "x.safetensors", in_memory(tensors))
    checkpoint = open_torch(tmp_path / "x.safetensors")
    assert checkpoint.infos == {k: TensorInfo(t.shape, t.dtype) for k, t in tensors.items()}
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


@pytest.mark.parametrize(
    "content",
    [
        *("{}", "[]", "", '{"weight_map": 3}', '{"weight_map": ["a"]}', '{"weight_map": {}}'),
        *('{"weight_map": {"a": 3}}', '{"weight_map": {"a": null}}'),
    ],
)
def test_broken_index_is_an_error(tmp_path, content) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index.json is not the index of a checkpoint"):
        open_torch(tmp_path)


@pytest.mark.parametrize("name", [".", "model.safetensors.index.json"])
def test_index_that_names_no_file_of_weights_is_an_error(tmp_path, name) -> None:
    index = json.dumps({"weight_map": {"a": name}})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
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
@pytest.mark.parametrize("name", ["x.pt", "weights"])
@pytest.mark.parametrize("protocol", [None, *range(pickle.HIGHEST_PROTOCOL + 1)])
def test_pickled_code_is_refused_and_not_run(tmp_path, name, protocol) -> None:
    import torch

    bomb = {"x": Bomb(tmp_path / "boom")}
    if protocol is None:
        torch.save({"w": torch.ones(3), **bomb}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(bomb, protocol))
    with pytest.raises(ValueError, match=rf"{name} needs unpickling, which .*: refused"):
        open_torch(tmp_path / name)
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
    ("name", "content", "message"),
    [
        ("ocdbt.process_0", None, "is damaged"),
        ("_METADATA", None, "is not a complete Orbax checkpoint"),
        *(
            ("_METADATA", content, "is not a complete Orbax checkpoint")
            for content in (b"", b"junk", b"[]", b"{}", b"\xff", b'{"tree_metadata": {"x": {}}}')
        ),
        ("manifest.ocdbt", b"", "is not a complete Orbax checkpoint"),
        ("manifest.ocdbt", b"junk", "is not a complete Orbax checkpoint"),
    ],
)
def test_damaged_folder_is_refused(tmp_path, name, content, message) -> None:
    rng = np.random.default_rng(0)
    write_tree(tmp_path / "x", {"a": rng.normal(size=(300, 70))})
    file = tmp_path / "x/params" / name
    file.rename(tmp_path / "lost")
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"x/params {message}"):
        read_all(open_flax(tmp_path / "x"))


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff"])
def test_damaged_marker_is_not_needed_to_read(tmp_path, content) -> None:
    write_tree(tmp_path / "x", {"a": np.ones(3)})
    (tmp_path / "x/params/_CHECKPOINT_METADATA").write_bytes(content)
    assert_same(read_all(open_flax(tmp_path / "x")), {"a": np.ones(3)})


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
    with pytest.raises(ValueError, match=r"home will not be .* it is a folder with thesis.tex in"):
        write_tree(tmp_path / "home", {"a": np.ones(2)}, overwrite=True)
    assert (tmp_path / "home/thesis.tex").exists()


def make_old(dst: Path, is_folder: bool) -> list[str]:
    """What an earlier conversion wrote; returns the names in it, none for a file."""
    if not is_folder:
        dst.write_text("old")
        return []
    dst.mkdir()
    (dst / "config.json").write_text("old")
    return ["config.json"]


def read_text(dst: Path) -> str:
    return (dst / "config.json" if dst.is_dir() else dst).read_text()


def write_new(part: Path, names: list[str]) -> None:
    if names:
        part.mkdir()
    (part / names[0] if names else part).write_text("new")


either_form = pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "file"])


@either_form
@pytest.mark.parametrize("moment", ["while writing", "while moving"])
def test_failed_write_leaves_the_old_one(tmp_path, monkeypatch, is_folder, moment) -> None:
    def fail(*args):
        raise OSError("disk full")

    dst = tmp_path / "x"
    names = make_old(dst, is_folder)
    if moment == "while moving":
        monkeypatch.setattr(Path, "replace", fail)
    with (
        pytest.raises(OSError, match="disk full"),
        replacing(dst, names=names, overwrite=True) as part,
    ):
        write_new(part, names)
        if moment == "while writing":
            fail()
    assert read_text(dst) == "old"
    assert list(tmp_path.iterdir()) == [dst]


@either_form
def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path, is_folder) -> None:
    names = make_old(tmp_path / "x", is_folder)
    (tmp_path / "link").symlink_to("x")
    (tmp_path / "broken").symlink_to("y")
    for link in ("link", "broken"):
        with replacing(tmp_path / link, names=names, overwrite=True) as part:
            write_new(part, names)
        assert (tmp_path / link).is_symlink()
    assert read_text(tmp_path / "x") == read_text(tmp_path / "y") == "new"
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("is_folder", "names", "message"),
    [
        (False, ["config.json"], "it is a file, and an earlier .* left a folder with config.json"),
        (True, [], "it is a folder with config.json in it, and an earlier .* left a file"),
        (True, ["config.json", "params"], "would have left a folder with config.json, params in"),
    ],
)
def test_what_no_conversion_wrote_is_refused_before_any_work(
    tmp_path, is_folder, names, message
) -> None:
    make_old(tmp_path / "x", is_folder)
    with (
        pytest.raises(ValueError, match=rf"x will not be overwritten: .*{message}"),
        replacing(tmp_path / "x", names=names, overwrite=True),
    ):
        raise AssertionError("the conversion began")
    assert read_text(tmp_path / "x") == "old"


def test_an_empty_folder_may_be_filled(tmp_path) -> None:
    (tmp_path / "x").mkdir()
    with replacing(tmp_path / "x", names=["config.json"], overwrite=True) as part:
        write_new(part, ["config.json"])
    assert read_text(tmp_path / "x") == "new"


def test_what_killed_processes_left_behind_is_removed(tmp_path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    mine, others = f".x.{dead.pid}.part", {f".x.{os.getppid()}.part", f".x.y.{dead.pid}.part"}
    for name in (mine, *others):
        (tmp_path / name / "x").mkdir(parents=True)
    with replacing(tmp_path / "x", overwrite=False) as part:
        part.write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {"x", *others}


def test_detect_by_the_names_of_tensors(tmp_path) -> None:
    folder = make_projector(tmp_path)
    (folder / "config.json").unlink()
    assert detect(open_source(folder)) is PROJECTOR


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "unknown  names  of the 2 tensors do not tell which model it is, supported: "),
        ({"model_type": "gpt2"}, "unsupported  model_type  = 'gpt2', supported: "),
    ],
)
def test_unknown_model_is_an_error(tmp_path, config, message) -> None:
    write_safetensors(tmp_path / "model.safetensors", in_memory(random_tensors()))
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"is no model that can be converted") as caught:
        detect(open_source(tmp_path))
    assert f"{message}projector (asr_model), whisper encoder (whisper), ll" in str(caught.value)
