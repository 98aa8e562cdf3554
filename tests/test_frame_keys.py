"""What names a clip whose frames are kept, and how it is found."""

import dataclasses
from pathlib import Path

import numpy as np

from flax_projector.data.frames.keys import find, sort_order
from flax_projector.data.rows import ManifestRow, Rows
from tests.frames import make_utterances, write_other


def clip_digest(row: ManifestRow) -> bytes:
    return Rows.of([row]).table["clip"][0].as_py()


def test_the_digest_of_a_clip_changes_with_its_samples_only(tmp_path, monkeypatch):
    (utterance,) = make_utterances(tmp_path, 1)
    row, path = utterance.row, str(utterance.row.audio)
    (tmp_path / "there").mkdir()
    digest = clip_digest(row)
    assert len(digest) == 16
    monkeypatch.chdir(tmp_path)
    same = [{"id": "x"}, {"text": "x"}, {"source": "x"}, {"audio": "0.wav"}]
    same += [{"audio": f"{tmp_path}/there/../0.wav"}, {"duration": np.float64(row.duration)}]
    for changes in same:
        assert clip_digest(dataclasses.replace(row, **changes)) == digest, changes
    (tmp_path / "1.wav").write_bytes(Path(path).read_bytes())
    for changes in [{"audio": "1.wav"}, {"offset": 0.0}, {"duration": 1.0}]:
        assert clip_digest(dataclasses.replace(row, **changes)) != digest, changes
    write_other(path)
    assert clip_digest(row) != digest


def test_keys_are_found_even_if_half_of_them_are_the_same():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 5, (2, 60), dtype=np.uint64)  # 25 different ones, most of them twice
    keys, rank = keys[:, :40], rng.integers(0, 2, 40)
    order = sort_order(keys, rank)
    keys, rank = keys[:, order], rank[order]
    wanted = np.stack(np.meshgrid(np.arange(6), np.arange(6))).reshape(2, -1).astype(np.uint64)
    for key, at in zip(wanted.T, find(keys, wanted), strict=True):
        same = np.flatnonzero((keys == key[:, None]).all(axis=0))
        assert at == (same[0] if len(same) else -1)
        assert at == -1 or rank[at] == rank[same].min()
    assert find(keys[:, :0], wanted).tolist() == [-1] * 36
