"""Destinations appear complete or not at all, and nothing else is ever replaced."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convert import api
from convert.paths import replacing
from convert.torch_files import open_torch
from tests.checkpoints import REPO, assert_same_tensors, files_in
from tests.tiny import make_projector


@pytest.fixture
def projector(tmp_path) -> Path:
    """A random projector in an HF folder."""
    return make_projector(tmp_path / "projector")


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
        (False, ["config.json"], "it is a file, but an earlier .* left a folder with config.json"),
        (True, [], "it is a folder with config.json in it, but an earlier .* left a file"),
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
    """On other hosts, whose processes may have the same numbers, it is what is older than a day."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    here = socket.gethostname()
    left, alive = f".x.{dead.pid}@{here}.part", f".x.{os.getppid()}@{here}.part"
    other, old, of_y = (f".x{end}@other.host.part" for end in (".7", ".8", ".y.8"))
    for name in (left, alive, other, old, of_y):
        (tmp_path / name / "x").mkdir(parents=True)
    long_ago = time.time() - 90_000
    for name in (old, of_y):
        os.utime(tmp_path / name, (long_ago, long_ago))
    with replacing(tmp_path / "x", overwrite=False) as part:
        part.write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {"x", alive, other, of_y}


@pytest.mark.parametrize(
    ("src", "dst"),
    [
        ("hf/model.safetensors", "hf"),
        ("hf", "link"),
        ("link/model.safetensors", "hf"),
        ("linked_weights", "hf"),
        ("shards", "hf"),
        ("trainer", "trainer/checkpoint-7"),
        ("trainer", "trainer"),
    ],
)
def test_what_is_converted_is_never_replaced(tmp_path, projector, src, dst) -> None:
    """Wherever the weights really are."""
    projector.rename(tmp_path / "hf")
    (tmp_path / "link").symlink_to(tmp_path / "hf")
    keys = open_torch(tmp_path / "hf").infos
    for name in ("linked_weights", "shards", "trainer"):
        (tmp_path / name).mkdir()
    weights = Path("../hf/model.safetensors")
    (tmp_path / "linked_weights/model.safetensors").symlink_to(weights)
    index = {"weight_map": dict.fromkeys(keys, str(weights))}
    (tmp_path / "shards/model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copytree(tmp_path / "hf", tmp_path / "trainer/checkpoint-7")
    before = files_in(tmp_path)
    for is_overwritten in (False, True):
        with pytest.raises(ValueError, match=f"{dst} overlaps with .*, which is being converted"):
            api.to_flax(tmp_path / src, tmp_path / dst, overwrite=is_overwritten)
    assert files_in(tmp_path) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from convert import api

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

src, dst, moment = sys.argv[1:]
if moment == "verifying":
    api.check_round_trip = die
else:
    Path.replace = die  # the old folder has been moved aside
api.to_flax(src, dst, overwrite=True)
"""


@pytest.mark.parametrize("moment", ["verifying", "replacing"])
def test_killed_conversion_leaves_the_earlier_result(tmp_path, projector, moment) -> None:
    dst = api.to_flax(projector, tmp_path / "flax", verify=False)
    before = files_in(dst)
    arguments = [sys.executable, "-c", KILLED, str(projector), str(dst), moment]
    killed = subprocess.run(arguments, cwd=REPO, timeout=120, stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".flax.*"))) == 1  # what it was writing
    assert dst.exists() == (moment == "verifying")

    with pytest.raises(ValueError, match="flax exists"):  # nobody asked for another
        api.to_flax(projector, dst)
    assert files_in(dst) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flax", "projector"]


@pytest.mark.torch
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_file_is_not_overwritten_unless_asked(tmp_path, projector, name) -> None:
    file = api.to_torch(api.to_flax(projector, tmp_path / "1"), tmp_path / name)
    before = file.read_bytes()
    other = api.to_flax(make_projector(tmp_path / "other", seed=1), tmp_path / "2")
    with pytest.raises(ValueError, match=f"{name} exists: choose another destination or pass --o"):
        api.to_torch(other, file)
    assert file.read_bytes() == before
    api.to_torch(other, file, overwrite=True)
    assert_same_tensors(tmp_path / "other", file)


@pytest.mark.parametrize("name", ["lr[0.1]", "a*b", "a?b", "a\\b", "gs:"])
def test_a_flax_folder_is_refused_where_orbax_cannot_write(tmp_path, projector, name) -> None:
    for dst in (tmp_path / name, tmp_path / name / "flax"):
        with pytest.raises(ValueError, match="parameters cannot be written to a path with"):
            api.to_flax(projector, dst)
    assert [path.name for path in tmp_path.iterdir()] == ["projector"]


@pytest.mark.parametrize("name", ["lr[0.1]", "a*b", "a?b", "a b", "ä", "%41", "a#b"])
def test_a_flax_folder_that_was_moved_converts_anywhere(tmp_path, projector, name) -> None:
    moved = tmp_path / name
    api.to_flax(projector, tmp_path / "flax").rename(moved)
    api.to_torch(moved, tmp_path / f"{name}.safetensors")
    assert_same_tensors(tmp_path / f"{name}.safetensors", projector)


@pytest.mark.parametrize("dst", ["", "s3://bucket/x", "file:///tmp/x", "loop", "loop/x"])
def test_a_destination_that_is_no_local_path_is_refused(
    tmp_path, projector, monkeypatch, dst
) -> None:
    flax = api.to_flax(projector, tmp_path / "flax")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("loop").symlink_to("loop")
    message = "the path is empty|is a URL|cannot be used as a path"
    for convert, src in ((api.to_flax, projector), (api.to_torch, flax)):
        with pytest.raises(ValueError, match=message):
            convert(src, dst)
        with pytest.raises(ValueError, match=message):
            convert(dst, "x")
    assert [path.name for path in Path().iterdir()] == ["loop"]


def test_a_tilde_is_the_home_folder(tmp_path, projector, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert api.to_flax("~/projector", "~/flax") == tmp_path / "flax"
    assert api.to_torch("~/flax", "~/hf") == tmp_path / "hf"


@pytest.mark.parametrize("length", [64, 65, 255])
def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path, projector, length) -> None:
    for _ in range(2):
        dst = api.to_flax(projector, tmp_path / ("x" * length), overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {dst.name, "projector"}


def test_a_failure_leaves_no_folder_above_the_destination(tmp_path) -> None:
    (tmp_path / "old").mkdir()
    with (
        pytest.raises(ValueError, match="stop"),
        replacing(tmp_path / "old/new/deep/x", overwrite=False) as part,
    ):
        part.write_text("new")
        raise ValueError("stop")
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]


def test_a_destination_below_a_file_is_one_clear_error(tmp_path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match=r"file/x could not be written: Not a directory"),
        replacing(tmp_path / "file/x", overwrite=False),
    ):
        pass
