"""Small files that appear whole or not at all, and paths that can be used."""

import os
from pathlib import Path

import pytest

from flax_projector.files import check_orbax_path, local_path, parse_json, write_atomically


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run" / "best.json"
    write_atomically(path, "first")

    def killed(fd):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", killed)
        write_atomically(path, "second")
    assert path.read_text() == "first" and os.listdir(path.parent) == ["best.json"]
    write_atomically(path, "third \u2028")
    assert path.read_text(encoding="utf-8") == "third \u2028"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (100_000 * "[", "it is nested too deeply"),
        (100_000 * '{"a":' + "0" + 100_000 * "}", "it is nested too deeply"),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("1" * 5_000, "Exceeds the limit"),
    ],
)
def test_whatever_is_wrong_with_json_is_a_value_error(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)
    assert parse_json('{"a": [1, NaN]}')["a"][0] == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "the path is empty"),
        ("gs://bucket/run", "is a URL: expected a local or mounted path"),
        ("file:///tmp/run", "is a URL"),
        (Path("s3://bucket/run"), "s3:/bucket/run is a URL"),
        (os.fsdecode(b"run\xff"), r"'run\\udcff' is not UTF-8"),
        ("loop/run", "loop.* cannot be used as a path"),
        ("x" * 300, "cannot be used as a path.*too long"),
        ("a\0b", "'a.*b' cannot be used as a path: embedded null byte"),
    ],
)
def test_paths_that_cannot_be_used_are_named(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(ValueError, match=message):
        local_path(path)


def test_other_paths_are_used_as_they_are_and_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = ["~/run", "run", "/a/~b", "a:b/c", "lr[0.1]", "~nobody-here/x", "x" * 255]
    assert [str(local_path(path)) for path in paths] == ["/home/me/run", *paths[1:]]


@pytest.mark.parametrize("name", ["lr[0.1]", "a[b", "a*b", "a?b", "a\\b", "gs:"])
@pytest.mark.parametrize("below", ["", "run"])
def test_paths_that_orbax_cannot_write_to_are_refused(tmp_path, name, below):
    with pytest.raises(ValueError, match=r"cannot be written to a path with .* in it"):
        check_orbax_path(tmp_path / name / below, is_new=True)
    if name in ("a\\b", "gs:"):
        with pytest.raises(ValueError, match=r"cannot be read from .*Rename the folder"):
            check_orbax_path(tmp_path / name / below, is_new=False)
    else:
        check_orbax_path(tmp_path / name / below, is_new=False)
