"""Models in a bucket: the same bits as from a disk, no byte read twice, errors with the URL."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from jax.sharding import SingleDeviceSharding

from convert import bucket
from convert.bucket import copy_small_files
from convert.checkpoint import in_memory
from convert.load import digest, load_tower, resolve_model
from convert.models import LLAMA
from convert.torch_files import open_torch, write_safetensors
from convert.trees import flatten
from flax_projector.config import LlamaConfig, MeshConfig
from flax_projector.sharding import make_mesh
from tests.checkpoints import REPO, run_script
from tests.ports import free_port
from tests.tiny import torch_infos

# Four devices divide every leaf.
CONFIG = LlamaConfig(24, 12, 20, 3, 4, 2, head_dim=6, tie_word_embeddings=True)
HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": 24,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
MESHES = [MeshConfig(), MeshConfig(data=-1, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=-1)]


def random_bits() -> dict[str, np.ndarray]:
    """A checkpoint in bfloat16 of any bits, numbers that are none among them."""
    rng = np.random.default_rng(0)
    return {
        key: rng.integers(0, 2**16, info.shape, np.uint16).view(info.dtype)
        for key, info in torch_infos(LLAMA, CONFIG, "bfloat16").items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model in two files, with what belongs to it, and something that does not."""
    folder = tmp_path_factory.mktemp("bucket") / "llm"
    folder.mkdir()
    tensors = random_bits()
    parts = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for name, keys in parts.items():
        write_safetensors(folder / name, in_memory({key: tensors[key] for key in keys}))
    index = {"weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "photo.png").write_bytes(b"no part of a model")
    return folder


@pytest.fixture
def fetched(monkeypatch) -> list[int]:
    """The numbers of bytes that were read by URL."""
    sizes = []
    cat_file = LocalFileSystem.cat_file

    def count(self, *args, **kwargs):
        found = cat_file(self, *args, **kwargs)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(LocalFileSystem, "cat_file", count)
    return sizes


def num_bytes(folder: Path) -> int:
    return open_torch(folder).nbytes


def num_header_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) - num_bytes(folder)


def bits_of(params: dict) -> dict[str, bytes]:
    return {path: np.asarray(leaf).tobytes() for path, leaf in flatten(params).items()}


def bits_on_one_device(folder: Path) -> dict[str, bytes]:
    """What a single device loads from the disk."""
    on = SingleDeviceSharding(jax.devices()[0])
    abstract = LLAMA.abstract_params(CONFIG, param_dtype="bfloat16", mesh=make_mesh(MESHES[0]))
    return bits_of(
        load_tower(LLAMA, folder, jax.tree.map(lambda x: x.update(sharding=on), abstract))
    )


def test_small_files_are_copied_and_weights_are_not(folder):
    copy = resolve_model(f"file://{folder}/")
    assert {file.name for file in copy.iterdir()} == {
        *("a.safetensors", "b.safetensors", "chat_template.jinja"),
        *("config.json", "model.safetensors.index.json"),
    }
    for name in ("config.json", "chat_template.jinja"):
        assert (copy / name).read_text() == (folder / name).read_text()
    assert (copy / "a.safetensors").read_text().endswith(f" file://{folder}/a.safetensors")
    assert str(folder) in str(copy)  # so that messages say where it comes from


@pytest.mark.parametrize("num_devices", [1, 4, 8])
@pytest.mark.parametrize("config", MESHES, ids=["data", "all", "fsdp"])
def test_every_byte_is_read_once(folder, fetched, config, num_devices):
    if num_devices == 1 and config is not MESHES[0]:
        pytest.skip("one device divides nothing")
    mesh = make_mesh(config, jax.devices()[:num_devices])
    abstract = LLAMA.abstract_params(CONFIG, param_dtype="bfloat16", mesh=mesh)
    copy = resolve_model(f"file://{folder}")
    fetched.clear()
    params = load_tower(LLAMA, copy, abstract)
    if num_devices == 4:  # eight do not divide all leaves, so that some are read by columns
        assert sum(fetched) == num_bytes(folder) + num_header_bytes(folder)
    for path, leaf in flatten(params).items():
        assert leaf.sharding == flatten(abstract)[path].sharding
    assert bits_of(params) == bits_on_one_device(folder)


def test_the_digest_is_that_of_the_files(folder, tmp_path):
    """So a run that began with a local copy continues with the bucket, and the other way round."""
    copy = resolve_model(f"file://{folder}")
    assert digest(LLAMA, copy) == digest(LLAMA, folder)


def test_large_tensors_are_fetched_in_chunks(folder, fetched, monkeypatch):
    """At most so many bytes at once."""
    monkeypatch.setattr(bucket, "_CHUNK_BYTES", 100)
    copy = resolve_model(f"file://{folder}")
    fetched.clear()
    assert digest(LLAMA, copy) == digest(LLAMA, folder)
    assert sum(fetched) == num_bytes(folder) + num_header_bytes(folder)
    assert len([size for size in fetched if size > 100]) == 2  # the headers


PROCESS = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from pathlib import Path
import numpy as np
from convert import engine
from convert.load import digest, load_tower, resolve_model
from convert.models import LLAMA
from convert.trees import flatten
from fsspec.implementations.local import LocalFileSystem
from flax_projector.sharding import make_mesh
from tests.test_convert_bucket import CONFIG, MESHES

num_read = 0

def counted(function, size_of):
    def count(*args, **kwargs):
        global num_read
        found = function(*args, **kwargs)
        num_read += size_of(found)
        return found
    return count

folder = Path(sys.argv[3])
on_disk = digest(LLAMA, folder)
copy = resolve_model(f"file://{folder}")
read_part, cat_file = engine.read_part, LocalFileSystem.cat_file
whole = np.load(folder.parent / "leaves.npz")

def load(source, meshes):
    global num_read
    for config in meshes:
        num_read = 0
        mesh = make_mesh(config)
        abstract = LLAMA.abstract_params(CONFIG, param_dtype="bfloat16", mesh=mesh)
        for path, array in flatten(load_tower(LLAMA, source, abstract)).items():
            for shard in array.addressable_shards:
                part = np.asarray(shard.data).view(np.uint16)
                np.testing.assert_array_equal(part, whole[path][shard.index])
        print("read", num_read)

engine.read_part = counted(read_part, lambda part: part.nbytes)
load(folder, MESHES[1:2])
engine.read_part = read_part
LocalFileSystem.cat_file = counted(cat_file, len)
load(copy, MESHES[:2])
num_read = 0
assert digest(LLAMA, copy) == on_disk
print("read", num_read)
"""


def test_two_processes_read_half_each(folder):
    """From a disk and from a bucket, however the weights are to lie on the devices."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = LLAMA.abstract_params(CONFIG, param_dtype="bfloat16", mesh=mesh)
    leaves = flatten(load_tower(LLAMA, folder, abstract))
    whole = {path: np.asarray(leaf).view(np.uint16) for path, leaf in leaves.items()}
    np.savez(folder.parent / "leaves.npz", allow_pickle=False, **whole)
    address = f"localhost:{free_port()}"
    flags = "--xla_force_host_platform_device_count=2"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, number, str(folder)],
            cwd=REPO,
            env=os.environ | {"XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in "01"
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    num_read = [
        [int(line.split()[1]) for line in output.splitlines() if line.startswith("read ")]
        for output in outputs
    ]
    half, header = num_bytes(folder) // 2, num_header_bytes(folder)
    for found in num_read:
        assert found[:-1] == [half] + [half + header] * 2
    assert sum(found[-1] for found in num_read) == 2 * (half + header)


BROKEN = {
    "nothing there": (lambda folder: f"{folder}/none", r"none cannot be read: FileNotFoundError"),
    "no weights": (
        lambda folder: f"{folder}/empty",
        r"empty has no .safetensors, only config.json",
    ),
    "cut": (lambda folder: f"{folder}/cut", r"cut/model.safetensors is not a complete safetensors"),
    "no header": (lambda folder: f"{folder}/other", r"other/model.safetensors is not a complete"),
    "no client": (
        lambda folder: "nothing://b/llm",
        r"nothing://b/llm cannot be opened: Protocol not known",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_read_is_named_by_its_url(folder, tmp_path, case):
    for name in ("empty", "cut", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(HF_CONFIG))
    text = (folder / "a.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(text[:-1])
    (tmp_path / "other" / "model.safetensors").write_bytes(b"\xff" * 20)
    url, message = BROKEN[case]
    with pytest.raises(ValueError, match=message):
        digest(LLAMA, resolve_model(url(f"file://{tmp_path}")))


@pytest.mark.parametrize("url", ["gs://runs/models/llm"])
def test_a_real_server_gives_the_same_bits(folder, url):
    server = pytest.importorskip("tests.bucket")
    with server.emulator() as emulator:
        emulator.files().put(str(folder), url, recursive=True)
        copy = resolve_model(url)
        assert digest(LLAMA, copy) == digest(LLAMA, folder)
        mesh = make_mesh(MESHES[1])
        abstract = LLAMA.abstract_params(CONFIG, param_dtype="bfloat16", mesh=mesh)
        assert bits_of(load_tower(LLAMA, copy, abstract)) == bits_on_one_device(folder)
    copy_small_files.cache_clear()
    fsspec.filesystem("gcs").clear_instance_cache()


MEMORY = """
import sys
from pathlib import Path
import jax
import numpy as np
from convert import bucket
from convert.checkpoint import in_memory
from convert.load import load_tower
from convert.models import LLAMA
from convert.torch_files import write_safetensors
from convert.trees import flatten
from flax_projector.config import LlamaConfig, MeshConfig
from flax_projector.sharding import make_mesh
from tests.tiny import torch_infos

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

def load(config, folder):
    infos = torch_infos(LLAMA, config)
    folder.mkdir()
    tensors = in_memory({key: np.ones(info.shape, info.dtype) for key, info in infos.items()})
    write_safetensors(folder / "model.safetensors", tensors)
    del tensors
    abstract = LLAMA.abstract_params(config, mesh=make_mesh(MeshConfig()))
    copy = bucket.copy_small_files(f"file://{folder}")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    params = flatten(load_tower(LLAMA, copy, abstract))
    sizes = [leaf.nbytes for leaf in params.values()]
    return peak() - before, sum(sizes), max(sizes)

folder = Path(sys.argv[1])
load(LlamaConfig(26, 10, 14, 3, 4, 2, head_dim=6), folder / "small")
print(*load(LlamaConfig(2048, 512, 2048, 24, 8, 8, head_dim=64), folder / "large"))
"""


@pytest.mark.slow
def test_loading_holds_the_model_and_two_copies_of_a_leaf(tmp_path):
    """What is fetched, and the same in the order of the leaf, which the device then takes over."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not measure the peak of memory anew")
    (line,) = run_script(MEMORY, tmp_path, XLA_FLAGS="")
    rise, model, leaf = map(int, line.split())
    assert model < rise < model + 2.2 * leaf, (rise, model, leaf)
