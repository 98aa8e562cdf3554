"""Damage in a Flax folder is found, wherever it is."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from convert import api
from convert.__main__ import main
from convert.checkpoint import DTYPES, TensorInfo, in_memory
from convert.flax_files import load_params, open_flax, write_flax
from convert.hf_config import config_text, projector_config_dict
from convert.models import PROJECTOR
from flax_projector.config import ProjectorConfig
from tests.checkpoints import assert_same_arrays, random_bits, write_weights
from tests.tiny import read_all, torch_infos

RNG = np.random.default_rng(0)
LEAVES = {
    "a/kernel": RNG.normal(size=(48, 70)).astype(np.float32),
    "a/bias": RNG.normal(size=7).astype(np.float16),
    "b/scale": np.array(3.0, np.float32),
    "b/table": RNG.normal(size=(16, 33)).astype(ml_dtypes.bfloat16),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A Flax folder."""
    write_flax(tmp_path / "x", in_memory(LEAVES), "{}")
    return tmp_path / "x"


def data_files(folder: Path) -> list[Path]:
    """Files of values."""
    return sorted(path for path in folder.rglob("d/*") if path.is_file())


def place_of(folder: Path, leaf: str) -> tuple[Path, int]:
    """Where the bytes of a leaf begin."""
    data = LEAVES[leaf].tobytes()
    for file in data_files(folder):
        if (position := file.read_bytes().find(data)) >= 0:
            return file, position
    raise AssertionError(leaf)


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def sharded(leaf: np.ndarray, *spec: str | None) -> jax.ShapeDtypeStruct:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


ABSTRACT = {
    "a": {
        "kernel": sharded(LEAVES["a/kernel"], "x", "y"),
        "bias": sharded(LEAVES["a/bias"]),
    },
    "b": {"scale": sharded(LEAVES["b/scale"]), "table": sharded(LEAVES["b/table"], "x")},
}


@pytest.mark.parametrize("leaf", ["a/kernel", "b/table"])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_a_flipped_bit_in_a_value_is_found(folder, leaf, part) -> None:
    """Orbax itself protects only small ones."""
    file, position = place_of(folder, leaf)
    flip(file, position + int(part * LEAVES[leaf].nbytes))
    message = f"x/params is damaged: the checksum of {leaf} is .*, but checksums.json says"
    with pytest.raises(ValueError, match=message):
        open_flax(folder).read(leaf)
    with pytest.raises(ValueError, match=message):
        load_params(folder, ABSTRACT)


def test_what_is_whole_is_loaded_into_shards(folder) -> None:
    loaded = load_params(folder, ABSTRACT)
    assert loaded["a"]["kernel"].sharding == ABSTRACT["a"]["kernel"].sharding
    flat = {f"{x}/{y}": leaf for x, leaves in loaded.items() for y, leaf in leaves.items()}
    assert_same_arrays(flat, LEAVES)


def test_every_bit_counts(folder, capfd, caplog) -> None:
    """Whatever is flipped in any file: the same bytes, or one short error and nothing beside it."""
    files = sorted(path for path in (folder / "params").rglob("*") if path.is_file())
    assert len(files) > 5
    seen = set()
    for file in files:
        original = file.read_bytes()
        for position in np.random.default_rng(1).integers(0, len(original), 6):
            flip(file, position)
            try:
                assert_same_arrays(read_all(open_flax(folder)), LEAVES)
                seen.add("same")
            except ValueError as error:
                assert "x/params" in str(error)
                assert len(str(error)) < 1000 and "\n" not in str(error)
                seen.add("error")
            file.write_bytes(original)
    assert seen == {"same", "error"}
    assert "Traceback" not in capfd.readouterr().err + caplog.text  # of reads that were left over


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_bits_are_kept_and_pass(tmp_path, dtype) -> None:
    leaves = random_bits({"a": TensorInfo((13, 5), DTYPES[dtype])})
    write_flax(tmp_path / "x", in_memory({**leaves, "t": leaves["a"].T}), "{}")
    for name, array in {**leaves, "t": leaves["a"].T}.items():
        assert open_flax(tmp_path / "x").read(name).tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"checksums.json is empty: copy"),
        ("junk", r"checksums.json is damaged: "),
        ("[]", r"checksums.json is damaged: expected an object"),
        ("{}", r"checksums.json is damaged: expected an object"),
        ("[" * 10**5, r"checksums.json is damaged: it is nested too deeply"),
        ('{"a/kernel": 3}', r"x/params is damaged: the checksum of .* says"),
    ],
)
def test_damaged_checksums_are_an_error(folder, content, message) -> None:
    (folder / "params/checksums.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_all(open_flax(folder))
    with pytest.raises(ValueError, match=message):
        load_params(folder, ABSTRACT)


def test_folders_of_earlier_versions_have_no_checksums(folder) -> None:
    (folder / "params/checksums.json").unlink()
    assert_same_arrays(read_all(open_flax(folder)), LEAVES)
    assert load_params(folder, ABSTRACT)["b"]["scale"] == jnp.float32(3)
    write_flax(folder, in_memory(LEAVES), "{}", overwrite=True)
    assert json.loads((folder / "params/checksums.json").read_text()).keys() == LEAVES.keys()


@pytest.mark.torch
def test_the_commands_say_so(tmp_path, caplog) -> None:
    config = ProjectorConfig(5, 31, projector_pool_stride=3, projector_hidden_dim=37)
    tensors = random_bits(torch_infos(PROJECTOR, config))
    hf = write_weights(tmp_path / "hf", tensors)
    (hf / "config.json").write_text(config_text(projector_config_dict(config, dtype="float32")))
    flax = api.to_flax(hf, tmp_path / "flax")
    data = tensors["projector.layers.0.fc1.weight"].T.tobytes()
    (file,) = [path for path in data_files(flax) if data in path.read_bytes()]
    flip(file, file.read_bytes().find(data) + 9)
    for command in (["to-torch", "flax", "x"], ["verify", "hf", "flax"]):
        words = [command[0], *(str(tmp_path / name) for name in command[1:])]
        assert main(words) == 2
        assert "flax/params is damaged: the checksum of layers_0/fc1/kernel is" in caplog.text
        caplog.clear()
    with pytest.raises(ValueError, match=r"the checksum of layers_0/fc1/kernel is"):
        api.load_projector(flax)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flax", "hf"]
