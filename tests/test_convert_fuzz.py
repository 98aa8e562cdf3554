"""Whatever is done to a file: one clear error, or the right result; nothing else.

Seeded damage to every form that the converter reads. A result is right if its bytes are those of
the original. safetensors, the older form of torch.save and pickles whose checksums were made anew
protect no values: there, damaged ones cannot be told from others, and only names and shapes are
those of the original.
"""

import json
import pickle
import random
import resource
import shutil
import struct
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convert import api
from convert.checkpoint import Checkpoint
from convert.models import config_text_of, detect
from convert.stored import open_stored
from tests.checkpoints import files_in
from tests.tiny import make_projector, read_all

pytestmark = [pytest.mark.slow, pytest.mark.torch]

MAX_SECONDS = 10.0  # of one input
MAX_MEGABYTES = 500  # that all inputs of a form may add to the process
MAX_MESSAGE = 60_000

Damage = Callable[[random.Random, bytes], bytes]


def flip_bit(rng: random.Random, data: bytes) -> bytes:
    i = rng.randrange(len(data))
    return data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :]


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    i = rng.randrange(len(data))
    new = rng.choice([b"\0", b"\xff", b"\x80\x00\x00\x00", rng.randbytes(rng.randint(1, 9))])
    return data[:i] + new + data[i + len(new) :]


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def remove(rng: random.Random, data: bytes) -> bytes:
    i = rng.randrange(len(data))
    return data[:i] + data[i + rng.randint(1, 40) :]


def insert(rng: random.Random, data: bytes) -> bytes:
    i = rng.randrange(len(data) + 1)
    return data[:i] + rng.randbytes(rng.randint(1, 40)) + data[i:]


def repeat(rng: random.Random, data: bytes) -> bytes:
    i = rng.randrange(len(data))
    j = rng.randrange(i, len(data))
    return data[:j] + data[i:j] + data[j:]


def swap(rng: random.Random, data: bytes) -> bytes:
    i, j, k = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return data[:i] + data[j:k] + data[i:j] + data[k:]


def zero(rng: random.Random, data: bytes) -> bytes:
    i = rng.randrange(len(data))
    size = min(rng.choice([1, 8, 512]), len(data) - i)
    return data[:i] + bytes(size) + data[i + size :]


def append(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice([b"\0", b"\n", b"x" * 50, data])


DAMAGES: tuple[Damage, ...] = (
    flip_bit, flip_bit, change_bytes, change_bytes, cut, remove, insert, repeat, swap, zero, append,
)  # fmt: skip


def damaged(rng: random.Random, data: bytes) -> bytes:
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        data = rng.choice(DAMAGES)(rng, data) if data else data
    return data


VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400,
    0.5, 1e-300, 1e300, float("nan"), float("inf"), "", "x", "F32", "BF16", "F8_E4M3", "..",
    "/etc/passwd", "\0", "\ud800",
    "x" * 300, [], [[]], {}, [0], [-1, 7], [2**40, 2**40], [1.5], {"a": 1}, "model.safetensors",
    "config.json", ".", "llama", "whisper", "asr_model",
)  # fmt: skip


def changed_json(rng: random.Random, data: Any) -> Any:
    """JSON in which a value or a name has been changed, at any depth."""
    if isinstance(data, dict) and data and rng.random() < 0.85:
        key = rng.choice(sorted(data))
        new = dict(data)
        match rng.randrange(8):
            case 0:
                del new[key]
            case 1:
                new[rng.choice(["", "x", key + "x", key[:-1], key.upper()])] = new.pop(key)
            case 2:
                new[rng.choice(sorted(data))] = data[key]
            case _:
                new[key] = changed_json(rng, data[key])
        return new
    if isinstance(data, list) and data and rng.random() < 0.7:
        i = rng.randrange(len(data))
        return [*data[:i], changed_json(rng, data[i]), *data[i + 1 :]]
    if isinstance(data, int) and rng.random() < 0.3:
        return data + rng.choice([-1, 1, 4, 1000])
    return rng.choice(VALUES)


def json_bytes(rng: random.Random, data: bytes) -> bytes:
    new = json.loads(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        new = changed_json(rng, new)
    return json.dumps(new).encode()


def json_or_bytes(rng: random.Random, data: bytes) -> bytes:
    return (json_bytes if rng.random() < 0.7 else damaged)(rng, data)


def safetensors_header(rng: random.Random, data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    text = json_or_bytes(rng, data[8 : 8 + size])
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def in_zip(rng: random.Random, data: bytes, change: Damage, *, mends: bool, path: Path) -> bytes:
    """Damages one entry; `mends` writes the zip anew, with checksums that fit."""
    path.write_bytes(data)
    with zipfile.ZipFile(path) as old:
        entries = {e.filename: old.read(e) for e in old.infolist()}
    name = rng.choice([*entries, *[n for n in entries if n.endswith("data.pkl")] * 6])
    if not mends:
        i = data.find(entries[name])
        return data[:i] + change(rng, entries[name]) + data[i + len(entries[name]) :]
    entries[name] = change(rng, entries[name])
    if rng.random() < 0.1:
        entries[f"{name}{rng.choice(['', 'x', '/y'])}"] = entries.pop(name)
    with zipfile.ZipFile(path, "w") as new:
        for entry, content in entries.items():
            new.writestr(entry, content)
    return path.read_bytes()


def result_of(checkpoint: Checkpoint) -> dict[str, tuple[Any, tuple[int, ...], bytes]]:
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in read_all(checkpoint).items()}


class Fuzz:
    """Damages one file, again and again, and looks at what becomes of it."""

    def __init__(self, folder: Path, root: Path, path: Path) -> None:
        """Remembers the right result.

        Args:
          folder: for results.
          root: what is converted.
          path: the file in it that is damaged.
        """
        self.folder, self.root, self.path = folder, root, path
        self.original = path.read_bytes()
        self.expected = result_of(open_stored(root).checkpoint)
        self.seen: Counter[str] = Counter()
        self.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __call__(self, data: bytes, *, protected: bool, where: str) -> None:
        """Tries one damaged file.

        Args:
          data: its content.
          protected: whether damaged values must be found.
          where: names the input, for a failure.
        """
        self.path.write_bytes(data)
        before = files_in(self.folder)
        begin = time.monotonic()
        try:
            self.seen[self.outcome(protected)] += 1
        except BaseException as error:
            error.add_note(f"{where}: {data[:80]!r}")
            raise
        finally:
            self.path.write_bytes(self.original)
        assert time.monotonic() - begin < MAX_SECONDS, where
        out = self.folder / "out"
        if out.exists():
            shutil.rmtree(out)
        assert files_in(self.folder).keys() == before.keys(), where

    def outcome(self, protected: bool) -> str:
        try:
            stored = open_stored(self.root)
            api.inspect(self.root)
            text = config_text_of(stored, detect(stored), {})
            got = result_of(stored.checkpoint)
            if stored.side == "torch":
                api.to_flax(self.root, self.folder / "out")
            else:
                api.to_torch(self.root, self.folder / "out", verify=False)
        except ValueError as error:
            assert type(error).__module__.startswith(("convert", "builtins")), repr(error)
            assert 0 < len(str(error)) < MAX_MESSAGE
            assert not (self.folder / "out").exists()
            assert not list(self.folder.glob(".*"))
            return "error"
        assert json.loads(text)["model_type"] == "asr_model"
        if got == self.expected:
            return "same"
        shapes, expected = ({k: x[1] for k, x in r.items()} for r in (got, self.expected))
        assert not protected and shapes == expected
        return "other values"

    def check(self, *kinds: str) -> None:
        """Checks that all kinds of outcomes were met, and how much memory that took."""
        assert self.seen.keys() >= set(kinds), self.seen
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.memory
        assert used < MAX_MEGABYTES << 10, f"{used >> 10} MB"


@pytest.fixture
def hf(tmp_path) -> Path:
    """A random projector in an HF folder."""
    return make_projector(tmp_path / "hf")


def as_torch_save(hf: Path, *, is_zip: bool) -> Path:
    tensors = {key: torch.tensor(x) for key, x in read_all(open_stored(hf).checkpoint).items()}
    (hf / "model.safetensors").unlink()
    file = hf / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=is_zip)
    return file


def test_damaged_safetensors(tmp_path, hf, report) -> None:
    fuzz = Fuzz(tmp_path, hf, hf / "model.safetensors")
    rng = random.Random(0)
    for i in range(1600):
        change = rng.choice([damaged, safetensors_header])
        fuzz(change(rng, fuzz.original), protected=False, where=f"{change.__name__} {i}")
    fuzz.check("error", "same", "other values")
    report(f"{fuzz.seen}")


def test_damaged_index(tmp_path, hf, report) -> None:
    names = open_stored(hf).checkpoint.infos
    (hf / "model.safetensors").rename(hf / "one.safetensors")
    index = hf / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "one.safetensors")})
    )
    fuzz = Fuzz(tmp_path, hf, index)
    rng = random.Random(1)
    for i in range(800):
        fuzz(json_or_bytes(rng, fuzz.original), protected=True, where=f"index {i}")
    fuzz.check("error", "same")
    report(f"{fuzz.seen}")


def test_damaged_config(tmp_path, hf, report) -> None:
    fuzz = Fuzz(tmp_path, hf, hf / "config.json")
    rng = random.Random(2)
    for i in range(1200):
        fuzz(json_or_bytes(rng, fuzz.original), protected=True, where=f"config {i}")
    fuzz.check("error", "same")
    report(f"{fuzz.seen}")


@pytest.mark.parametrize("kind", ["bytes", "entries", "pickles", "older"])
def test_damaged_files_of_torch_save(tmp_path, hf, kind, report) -> None:
    fuzz = Fuzz(tmp_path, hf, as_torch_save(hf, is_zip=kind != "older"))
    rng = random.Random(kind)
    scratch = tmp_path / "scratch.zip"
    scratch.touch()
    for i in range(700):
        if kind == "entries":  # in place: the checksums must tell
            data = in_zip(rng, fuzz.original, damaged, mends=False, path=scratch)
        elif kind == "pickles":  # with checksums that fit
            data = in_zip(rng, fuzz.original, damaged, mends=True, path=scratch)
        else:
            data = damaged(rng, fuzz.original)
        fuzz(data, protected=kind in ("bytes", "entries"), where=f"{kind} {i}")
    fuzz.check("error", *(["other values"] if kind in ("pickles", "older") else ["same"]))
    report(f"{fuzz.seen}")


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_others(tmp_path, hf, protocol) -> None:
    fuzz = Fuzz(tmp_path, hf, as_torch_save(hf, is_zip=True))
    rng = random.Random(protocol)
    for i in range(50):
        data = pickle.dumps(rng.choice(VALUES), protocol)
        fuzz(data if i < 20 else damaged(rng, data), protected=True, where=f"pickle {i}")
    assert fuzz.seen.keys() == {"error"}


def test_damaged_flax_folders(tmp_path, hf, report) -> None:
    flax = api.to_flax(hf, tmp_path / "flax")
    files = sorted(path for path in flax.rglob("*") if path.is_file())
    seen: Counter[str] = Counter()
    rng = random.Random(3)
    for path in files:
        fuzz = Fuzz(tmp_path, flax, path)
        is_json = path.suffix == ".json" or path.name == "_METADATA"
        for i in range(120 if is_json or "ocdbt" not in str(path) else 15):
            change = json_or_bytes if is_json else damaged
            where = f"{path.relative_to(flax)} {i}"
            fuzz(change(rng, fuzz.original), protected=True, where=where)
        seen += fuzz.seen
    assert seen.keys() == {"error", "same"}
    report(f"{seen}")
