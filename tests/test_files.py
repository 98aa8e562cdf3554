"""Small files that appear whole or not at all."""

import os

import pytest

from flax_projector.files import write_atomically


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
