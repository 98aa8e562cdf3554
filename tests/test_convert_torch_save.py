"""Files of torch.save: what they hold comes back, and everything else is named and refused."""

import errno
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convert.__main__ import main
from convert.checkpoint import DTYPES, in_memory
from convert.torch_files import open_torch
from convert.torch_save import write_torch
from tests.checkpoints import assert_same_tensors, random_tensors, run_script
from tests.tiny import make_projector, read_all

pytestmark = pytest.mark.torch


@pytest.fixture
def hf(tmp_path) -> Path:
    """A random projector in an HF folder."""
    return make_projector(tmp_path / "hf")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_files_come_back(tmp_path, suffix, dtype) -> None:
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


@pytest.mark.parametrize("name", ["x.pt", "weights"])
@pytest.mark.parametrize("protocol", [None, *range(pickle.HIGHEST_PROTOCOL + 1)])
def test_pickled_code_is_refused_and_not_run(tmp_path, name, protocol) -> None:
    bomb = {"x": Bomb(tmp_path / "boom")}
    if protocol is None:
        torch.save({"w": torch.ones(3), **bomb}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(bomb, protocol))
    what = r"contains more than tensors \(posix.mkdir\)"
    what = what if protocol is None else "is a pickle that torch.save did not write"
    with pytest.raises(ValueError, match=rf"{name} {what}\. It is refused, since unpickling"):
        open_torch(tmp_path / name)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello world", "is not a complete file"),
        (None, "is not a complete file"),
        ([1, 2], r"holds a list, expected a dictionary of tensors"),
        (3, r"holds a int, expected a dictionary of tensors"),
        (
            {"epoch": 3},
            r"holds epoch \(int\), expected a dictionary of tensors by name: save model",
        ),
    ],
)
def test_damaged_torch_files_are_refused_by_name(tmp_path, content, message) -> None:
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content or {"a": torch.ones(300)}, path)
    if content is None:
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=rf"x\.pt {message}"):
        open_torch(path)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["best.pt", "weights"])
def test_a_file_is_known_by_its_first_bytes(tmp_path, hf, name, is_zip) -> None:
    tensors = {key: torch.tensor(x) for key, x in read_all(open_torch(hf)).items()}
    torch.save(tensors, hf / name, _use_new_zipfile_serialization=is_zip)
    assert read_all(open_torch(hf / name)).keys() == tensors.keys()
    shutil.copy(hf / "model.safetensors", tmp_path / "without_suffix")
    assert_same_tensors(hf, tmp_path / "without_suffix")


TENSORS = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.arange(3.0)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (TENSORS | {"step": 3}, r"holds step \(int\), expected .*: leave these out, as model"),
        (TENSORS | {"x": None}, r"holds x \(NoneType\), "),
        (TENSORS | {"x": "text"}, r"holds x \(str\), "),
        (TENSORS | {"x": [torch.ones(2)]}, r"holds x \(list\), "),
        (TENSORS | {"x": TENSORS}, r"holds x \(dict\), "),
        ({0: torch.ones(3)}, r"holds 0 \(Tensor\), "),
        ({"state_dict": TENSORS}, r"torch.save\(torch.load\('x.pt'\)\['state_dict'\], NEW\)"),
        ({"epoch": 3, "model": TENSORS}, r"torch.load\('x.pt'\)\['model'\], NEW"),
        ({"a": {"b": {}, "c": TENSORS}}, r"torch.load\('x.pt'\)\['a'\]\['c'\], NEW"),
        ({"state": {0: {}}, "param_groups": []}, "this is the state of an optimizer"),
        (torch.ones(3), r"holds a Tensor, expected a dictionary of tensors by name"),
        (TENSORS | {"x": np.float64(3)}, r"more than tensors \(numpy.*scalar\)\. It is refused"),
        (torch.nn.Linear(2, 3), r"more than tensors \(torch.nn.modules.linear.Linear\)\. It is"),
    ],
)
def test_what_is_not_a_dictionary_of_tensors_is_named(tmp_path, state, message) -> None:
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt .*{message}"):
        open_torch(tmp_path / "x.pt")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_protocol_that_torch_cannot_read_is_named(tmp_path, protocol, is_zip) -> None:
    path = tmp_path / "x.pt"
    torch.save(TENSORS, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    if protocol < 4:
        assert read_all(open_torch(path)).keys() == TENSORS.keys()
        return
    with pytest.raises(ValueError, match=f"was saved with pickle protocol {protocol}, but"):
        open_torch(path)


def write_npz(path: Path) -> None:
    np.savez(path, w=np.ones(3))
    path.with_name(f"{path.name}.npz").rename(path)


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.safetensors", "x")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_npz, r"holds arrays of NumPy \(\.npz\): write them with safetensors"),
        (write_zip, r"is a zip archive of model.safetensors, and was not .* unpack it first"),
        (lambda path: zipfile.ZipFile(path, "w").close(), "is not a (complete file|checkpoint)"),
        (
            lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), path),
            r"is a TorchScript archive, .*torch.jit.load\(path\), and save its state_dict",
        ),
    ],
    ids=["npz", "zip", "empty zip", "TorchScript"],
)
@pytest.mark.parametrize("name", ["x.pt", "x"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_archives_of_others_are_named(tmp_path, write, message, name) -> None:
    write(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        open_torch(tmp_path / name)


def test_a_file_of_torch_save_with_the_name_of_safetensors_is_named(tmp_path) -> None:
    torch.save(TENSORS, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x.safetensors is a file of .*: rename it to x.pt"):
        open_torch(tmp_path / "x.safetensors")


WIDE = torch.arange(12.0).reshape(3, 4)
COMPLEX = (torch.arange(3) * (1 + 2j)).to(torch.complex64)


@pytest.mark.parametrize(
    "tensor",
    [
        WIDE.T,
        WIDE[:, ::2],
        WIDE[1],
        torch.ones(1).expand(3, 4),
        torch.nn.Parameter(WIDE),
        WIDE.clone().requires_grad_(),
        COMPLEX,
        COMPLEX.conj(),
        COMPLEX.conj().imag,
        torch.ones(1, 2, 3, 4).to(memory_format=torch.channels_last),
        torch.ones(0, 3),
    ],
    ids=[
        "transposed", "strided", "shared", "expanded", "parameter", "gradient",
        "complex", "conjugate", "negative", "channels last", "empty",
    ],
)  # fmt: skip
def test_odd_tensors_come_back_as_they_are(tmp_path, tensor) -> None:
    torch.save({"wide": WIDE, "odd": tensor}, tmp_path / "x.pt")
    expected = tensor.detach().resolve_conj().resolve_neg().numpy()
    np.testing.assert_array_equal(open_torch(tmp_path / "x.pt").read("odd"), expected)


def test_attributes_of_a_tensor_are_no_problem(tmp_path) -> None:
    tensor: Any = WIDE.clone()
    tensor.tag = 3
    torch.save({"odd": tensor}, tmp_path / "x.pt")
    np.testing.assert_array_equal(open_torch(tmp_path / "x.pt").read("odd"), WIDE.numpy())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WIDE.to_sparse(), r"is sparse \(torch.sparse_coo\): save tensor.to_dense"),
        (lambda: WIDE.to_sparse_csr(), r"is sparse \(torch.sparse_csr\)"),
        (lambda: WIDE.to_sparse_bsr((1, 2)), r"is sparse \(torch.sparse_bsr\)"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "is nested"),
        (
            lambda: torch.nested.nested_tensor([torch.ones(2)] * 2, layout=torch.jagged),
            "is nested",
        ),
        (lambda: WIDE.to("meta"), r"has no values \(device meta\)"),
        (lambda: torch.quantize_per_tensor(WIDE, 0.1, 0, torch.qint8), r"is quantised \(qint8\)"),
        (lambda: torch.empty(3, dtype=torch.bits8), "has dtype bits8, which numpy does not have"),
    ],
    ids=["coo", "csr", "bsr", "nested", "jagged", "meta", "quantised", "bits"],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_tensors_without_plain_values_are_one_clear_error(
    tmp_path, make, message, capfd, caplog
) -> None:
    torch.save({"odd": make()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x.pt: tensor odd {message}"):
        open_torch(tmp_path / "x.pt")
    for command in (["to-flax", "x.pt", "y"], ["inspect", "x.pt"], ["verify", "x.pt", "x.pt"]):
        paths = [str(tmp_path / word) if len(word) < 5 else word for word in command]
        assert main(paths) == 2
    assert "Traceback" not in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def entry(path: Path, end: str) -> zipfile.ZipInfo:
    with zipfile.ZipFile(path) as archive:
        return next(e for e in archive.infolist() if e.filename.endswith(end))


def start_of_data(path: Path, end: str) -> int:
    start = entry(path, end).header_offset
    lengths = struct.unpack_from("<2H", path.read_bytes(), start + 26)
    return start + 30 + sum(lengths)


def in_directory(path: Path, end: str, offset: int) -> int:
    """A position in the directory at the end of a zip."""
    with zipfile.ZipFile(path) as archive:
        position = archive.start_dir
        for e in archive.infolist():
            if e.filename.endswith(end):
                return position + offset
            position += 46 + len(e.filename) + len(e.extra) + len(e.comment)
    raise AssertionError(end)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (lambda path: start_of_data(path, "data/0") + 1, "is damaged: the checksum of .*/data/0"),
        (lambda path: start_of_data(path, "data/1") + 7, "is damaged: the checksum of .*/data/1"),
        (lambda path: start_of_data(path, "data.pkl") + 9, "is not a complete file of torch.save"),
        (lambda path: start_of_data(path, "byteorder"), "is not a complete file of torch.save"),
        *(
            (lambda path, i=i: entry(path, "data/1").header_offset + i, "is not a complete|is dam")
            for i in (0, 8, 14, 18, 22, 26, 28, 31)  # of its own header
        ),
        *(
            (lambda path, i=i: in_directory(path, "data/1", i), "is not a complete|is damaged")
            for i in (0, 10, 16, 20, 24, 28, 30, 32, 42, 43, 44, 45, 47)
        ),
    ],
)
def test_a_flipped_bit_in_a_zip_is_found(tmp_path, place, message) -> None:
    path = tmp_path / "x.pt"
    torch.save(TENSORS, path)
    data = bytearray(path.read_bytes())
    data[place(path)] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"x\.pt ({message})"):
        read_all(open_torch(path))


def test_data_without_checksums_is_read(tmp_path) -> None:
    """torch can be told to write none."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(TENSORS, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert entry(tmp_path / "x.pt", "data/0").CRC == 0
    np.testing.assert_array_equal(open_torch(tmp_path / "x.pt").read("w"), TENSORS["w"].numpy())


def test_a_zip_that_was_packed_again_is_read(tmp_path) -> None:
    torch.save(TENSORS, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as old,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for e in old.infolist():
            new.writestr(e.filename, old.read(e))
    np.testing.assert_array_equal(open_torch(tmp_path / "y.pt").read("w"), TENSORS["w"].numpy())


def test_data_of_a_machine_with_another_byte_order_is_read(tmp_path) -> None:
    torch.save(TENSORS, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as old,
        zipfile.ZipFile(tmp_path / "y.pt", "w") as new,
    ):
        for e in old.infolist():
            data = old.read(e)
            if "/data/" in e.filename:
                data = np.frombuffer(data, "<f4").astype(">f4").tobytes()
            new.writestr(e.filename, b"big" if e.filename.endswith("byteorder") else data)
    np.testing.assert_array_equal(open_torch(tmp_path / "y.pt").read("w"), TENSORS["w"].numpy())


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from convert.checkpoint import in_memory
from convert.paths import replacing
from convert.torch_save import write_torch

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing more is then an error, as on a full disk
tensors = in_memory({f"layer_{i}.kernel": np.ones((300, 70)) for i in range(6)})
folder = Path(sys.argv[1])
write_torch(folder / "x", tensors)  # imports all of torch
(folder / "x").unlink()
for limit in (0, 100, 5000, 100_000, 1_000_000, 1_008_500):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        with replacing(folder / "x.pt", overwrite=False) as part:
            write_torch(part, tensors)
    except OSError as error:
        print(error)
    assert not list(folder.iterdir())
"""


def test_a_full_disk_is_one_clear_error(tmp_path) -> None:
    reason = f"{tmp_path / 'x.pt'} could not be written: {os.strerror(errno.EFBIG)}"
    assert run_script(FULL_DISK, tmp_path) == [f"{reason}. Nothing was changed"] * 6


def test_an_error_of_torch_alone_is_passed_on(tmp_path, monkeypatch) -> None:
    def fail(*args) -> None:
        raise RuntimeError("of torch")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="of torch"):
        write_torch(tmp_path / "x.pt", in_memory(random_tensors()))
