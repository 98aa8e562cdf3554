"""Importing the converter costs little, and torch is needed only for PyTorch's own formats."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import convert
from convert import api
from convert.checkpoint import in_memory
from convert.extras import MissingExtraError
from convert.torch_files import open_torch
from convert.torch_save import write_torch
from tests.checkpoints import REPO, assert_same_tensors, is_same_file
from tests.tiny import make_projector, read_all


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


IMPORT = """
import json, sys
loaded = {}
for name in sys.argv[1:]:
    __import__(name)
    loaded[name] = sorted({module.partition(".")[0] for module in sys.modules})
print(json.dumps(loaded))
"""


@pytest.mark.torch
def test_importing_takes_in_neither_jax_nor_orbax() -> None:
    loaded = json.loads(run(IMPORT, "convert", "convert.torch_projector", "jax").stdout)
    heavy = {"jax", "orbax", "flax", "torch", "transformers"}
    assert heavy & set(loaded["convert"]) == set()
    assert heavy & set(loaded["convert.torch_projector"]) == {"torch"}
    assert "jax" in loaded["jax"]  # the test can fail


def test_public_names_are_listed_and_others_are_an_error() -> None:
    assert set(convert.__all__) <= set(dir(convert))
    for name in convert.__all__:
        assert getattr(convert, name) is getattr(api, name)
    with pytest.raises(AttributeError, match="module 'convert' has no attribute 'nothing'"):
        _ = convert.nothing  # pyright: ignore[reportAttributeAccessIssue]


WITHOUT_TORCH = """
import json, sys
from importlib.machinery import PathFinder
from pathlib import Path

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        is_hidden = name.partition(".")[0] == "torch"
        return None if is_hidden else super().find_spec(name, path, target)

sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
folder = Path(sys.argv[1])
from convert.__main__ import main

def command(text):
    name, *paths = text.split()
    return main([name, *(str(folder / path) for path in paths)])

codes = {text: command(text) for text in sys.argv[2:]}
try:
    import convert.torch_projector
except ImportError as error:
    codes["import"] = str(error)
assert "torch" not in sys.modules
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory) -> tuple[Path, dict[str, object], str]:
    """A folder in which commands ran in a process without torch; their codes, and its log."""
    folder = tmp_path_factory.mktemp("without_torch")
    tensors = read_all(open_torch(make_projector(folder / "hf")))
    (folder / "pickled").mkdir()
    copies = {key: tensor.copy() for key, tensor in tensors.items()}
    write_torch(folder / "pickled/pytorch_model.bin", in_memory(copies))
    commands = [
        "to-flax hf flax",
        "to-torch flax back",
        "inspect hf",
        "to-flax pickled x",
        "to-torch flax x.pt",
        "verify hf flax",
    ]
    done = run(WITHOUT_TORCH, str(folder), *commands)
    return folder, json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.torch
def test_safetensors_convert_without_torch(without_torch) -> None:
    folder, codes, _ = without_torch
    assert [codes[c] for c in ("to-flax hf flax", "to-torch flax back", "inspect hf")] == [0, 0, 0]
    assert_same_tensors(folder / "hf", folder / "back")
    assert is_same_file(folder / "hf/config.json", folder / "back/config.json")


@pytest.mark.torch
@pytest.mark.parametrize(
    ("command", "purpose"),
    [
        ("to-flax pickled x", "reading {}/pickled/pytorch_model.bin"),
        ("to-torch flax x.pt", "writing {}/x.pt"),
        ("verify hf flax", "comparing the outputs of two projectors"),
    ],
)
def test_what_needs_torch_says_which_extra_to_install(without_torch, command, purpose) -> None:
    folder, codes, log = without_torch
    assert codes[command] == 2
    message = "needs PyTorch, which is not installed: pip install 'flax-projector[torch]'"
    assert f"error: {purpose.format(folder)} {message}\n" in log
    assert not [path for path in folder.iterdir() if "x" in path.name.split(".")]
    assert codes["import"] == f"convert.torch_projector {message}"


def test_missing_torch_is_an_import_error_and_a_value_error(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04 of a checkpoint")
    with pytest.raises(MissingExtraError, match=r"reading .*x.pt needs PyTorch") as caught:
        api.inspect(tmp_path / "x.pt")
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, ValueError)
