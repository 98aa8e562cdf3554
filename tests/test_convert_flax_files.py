"""Flax folders: what is written comes back, and damaged files are refused."""

import os
import signal
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from convert.checkpoint import DTYPES, Checkpoint, TensorInfo, in_memory
from convert.errors import ConversionError
from convert.flax_files import is_flax_folder, load_params, open_flax, write_flax
from convert.trees import flatten, unflatten
from tests.checkpoints import assert_same_arrays, random_tensors, run_script
from tests.tiny import read_all


def write_tree(folder: Path, tree: dict, **kwargs: Any) -> None:
    """A Flax folder of these arrays."""
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}
    write_flax(folder, in_memory(leaves), '{"b": 1}', **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_params_come_back(tmp_path, dtype) -> None:
    tree = unflatten({"a/kernel": random_tensors(DTYPES[dtype])["b.weight"]})
    write_tree(tmp_path / "x", tree)
    assert is_flax_folder(tmp_path / "x")
    checkpoint = open_flax(tmp_path / "x")
    assert checkpoint.infos == {"a/kernel": TensorInfo((3, 5), DTYPES[dtype])}
    assert_same_arrays(read_all(checkpoint), flatten(tree))
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
    assert_same_arrays(loaded, tree)


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
    with pytest.raises(ValueError, match="is not a Flax folder"):
        open_flax(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ocdbt.process_0", None, "is damaged"),
        ("_METADATA", None, "is not a complete Orbax checkpoint"),
        *(
            ("_METADATA", content, "is not a complete Orbax checkpoint")
            for content in (b"junk", b"[]", b"{}", b"\xff", b'{"tree_metadata": {"x": {}}}')
        ),
        ("_METADATA", b"", "/_METADATA is empty: copy"),
        ("manifest.ocdbt", b"", "/manifest.ocdbt is empty: copy"),
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
    with pytest.raises(ValueError, match=rf"x/params *{message}"):
        read_all(open_flax(tmp_path / "x"))


def test_a_leaf_of_an_unknown_type_is_one_clear_error(tmp_path) -> None:
    """Beside one that can be read, whose reading must not be left over."""
    write_tree(tmp_path / "x", {"a": np.ones(3), "b": np.ones(3)})
    file = tmp_path / "x/params/_METADATA"
    text = file.read_text()
    assert text.count("np.ndarray") == 2
    file.write_text("np.ndarrow".join(text.rsplit("np.ndarray", 1)))
    with pytest.raises(ValueError, match="x/params is not a complete Orbax checkpoint"):
        open_flax(tmp_path / "x")


@pytest.mark.parametrize("content", [b"", b"junk", b"\xff"])
def test_damaged_marker_is_not_needed_to_read(tmp_path, content) -> None:
    write_tree(tmp_path / "x", {"a": np.ones(3)})
    (tmp_path / "x/params/_CHECKPOINT_METADATA").write_bytes(content)
    assert_same_arrays(read_all(open_flax(tmp_path / "x")), {"a": np.ones(3)})


def test_existing_folder_is_kept_unless_asked(tmp_path) -> None:
    write_tree(tmp_path / "x", {"a": np.zeros(2)})
    with pytest.raises(ValueError, match=r"x exists: choose another destination or pass --over"):
        write_tree(tmp_path / "x", {"a": np.ones(2)})
    assert_same_arrays(read_all(open_flax(tmp_path / "x")), {"a": np.zeros(2)})
    write_tree(tmp_path / "x", {"a": np.ones(2)}, overwrite=True)
    assert_same_arrays(read_all(open_flax(tmp_path / "x")), {"a": np.ones(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_folder_with_other_files_is_never_overwritten(tmp_path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").touch()
    with pytest.raises(ValueError, match=r"home will not be .* it is a folder with thesis.tex in"):
        write_tree(tmp_path / "home", {"a": np.ones(2)}, overwrite=True)
    assert (tmp_path / "home/thesis.tex").exists()


LEAVES = {f"layer_{i}/kernel": np.full((300, 70), i, np.float32) for i in range(6)}


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def fail_with(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("bad", LEAVES)
@pytest.mark.parametrize(
    "failure",
    [ValueError("too large"), OSError("unreadable"), RuntimeError("of torch"), MemoryError("full")],
    ids=repr,
)
def test_a_leaf_that_cannot_be_read_ends_the_writing_with_its_reason(
    tmp_path, bad, failure
) -> None:
    """While the leaves before it are being written."""

    def read(path: str) -> np.ndarray:
        if path == bad:
            fail_with(failure)
        return LEAVES[path]

    with pytest.raises(type(failure), match=str(failure)):
        write_flax(tmp_path / "x", Checkpoint(in_memory(LEAVES).infos, read), "{}")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def can_be_interrupted():
    """Jobs that a shell starts in the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("can_be_interrupted")
@pytest.mark.parametrize("last", LEAVES)
def test_ctrl_c_ends_the_writing(tmp_path, last) -> None:
    def read(path: str) -> np.ndarray:
        if path == last:
            interrupt()
        return LEAVES[path]

    with pytest.raises(KeyboardInterrupt):
        write_flax(tmp_path / "x", Checkpoint(in_memory(LEAVES).infos, read), "{}")
    assert not list(tmp_path.iterdir())


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from convert.checkpoint import in_memory
from convert.flax_files import write_flax
from convert.paths import replacing
from convert.torch_files import write_safetensors

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing more is then an error, as on a full disk
tensors = in_memory({f"layer_{i}.kernel": np.ones((300, 70)) for i in range(6)})

def write_file(dst, tensors):
    with replacing(dst, overwrite=False) as part:
        write_safetensors(part, tensors)

folder = Path(sys.argv[1])
for limit in (100, 5000, 100_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for write in (lambda dst, tensors: write_flax(dst, tensors, "{}"), write_file):
        try:
            write(folder / "x", tensors)
        except OSError as error:
            print(error)
        assert not list(folder.iterdir())
"""


def test_a_full_disk_is_one_clear_error(tmp_path) -> None:
    reason = f"{tmp_path / 'x'} could not be written: File too large. Nothing was changed"
    assert run_script(FULL_DISK, tmp_path) == [reason] * 6
