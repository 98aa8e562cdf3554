"""What a run learns from is known by its contents: paths may change, contents may not."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import train_tpu
from convert.load import digest
from convert.models import LLAMA, PROJECTOR, WHISPER_ENCODER
from convert.torch_files import open_torch
from flax_projector.config import TrainConfig
from tests.checkpoints import change_tensor, write_weights
from tests.clips import make_batches, read_speech
from tests.tiny import final_params, killed_at, make_projector, tiny_config, torch_infos

pytestmark = pytest.mark.torch


@pytest.fixture
def start(tmp_path, tiny_towers):
    """A config whose towers, projector and data are in a folder of their own."""
    config = tiny_config(
        tmp_path, tiny_towers, num_steps=4, data={"eval": (), "bucket_secs": (2.0,)}
    )
    rng = np.random.default_rng(0)
    shapes = {n: x.shape for n, x in torch_infos(PROJECTOR, config.projector).items()}
    weights = {n: 0.1 * rng.normal(size=x).astype(np.float32) for n, x in shapes.items()}
    write_weights(tmp_path / "projector", weights)
    for name, folder in tiny_towers.items():
        shutil.copytree(folder, tmp_path / name)
    paths = {name: str(tmp_path / name) for name in ("encoder", "llm")}
    return dataclasses.replace(config, init_projector=str(tmp_path / "projector"), **paths)


def moved(config: TrainConfig, folder: Path, monkeypatch) -> TrainConfig:
    """The same data by a copy, the encoder by a URL, the LLM by a link, the projector relative."""
    shutil.copytree(folder / "speech", folder / "elsewhere/speech")
    (folder / "link").symlink_to(folder / "llm")
    monkeypatch.chdir(folder / "elsewhere")
    return dataclasses.replace(
        config,
        encoder=f"file://{folder}/encoder",
        llm="../link",
        init_projector="../projector",
        data=dataclasses.replace(config.data, train=("speech/clips.jsonl",)),
    )


def test_a_run_continues_with_the_same_contents_under_other_paths(
    start, tmp_path, tiny_towers, monkeypatch, caplog
):
    whole = dataclasses.replace(start, out=str(tmp_path / "whole"))
    train_tpu.main(whole)
    with killed_at(3, monkeypatch):
        train_tpu.main(start)
    config = moved(start, tmp_path, monkeypatch)
    train_tpu.main(config)
    expected = final_params(whole)
    for name, leaf in final_params(config).items():
        assert leaf.tobytes() == expected[name].tobytes(), name
    assert "the rows are not those" not in caplog.text

    # Other contents, under the same path or another one, are refused, and named.
    change_tensor(tmp_path / "encoder", "encoder.layers.0.fc1.bias", (3,), 7.0)
    with pytest.raises(ValueError, match=r"began with other contents of --encoder .*/encoder: "):
        train_tpu.main(start)
    with pytest.raises(ValueError, match=r"--encoder"):
        train_tpu.main(config)
    shutil.copytree(tmp_path / "llm", tmp_path / "other")
    llm = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps(llm | {"rms_norm_eps": 1e-3}))
    with pytest.raises(ValueError, match=r"of --encoder .*/encoder and --llm .*/llm: "):
        train_tpu.main(dataclasses.replace(config, llm=str(tmp_path / "other")))
    config = dataclasses.replace(config, encoder=tiny_towers["encoder"])
    name, info = next(iter(open_torch(tmp_path / "projector").infos.items()))
    change_tensor(tmp_path / "projector", name, (0,) * len(info.shape), 7.0)
    with pytest.raises(ValueError, match=r"other contents of --init-projector"):
        train_tpu.main(config)
    config = dataclasses.replace(config, init_projector=start.init_projector)
    rows = Path("speech/clips.jsonl").read_text().splitlines(keepends=True)
    Path("speech/clips.jsonl").write_text("".join(rows[:-1]))
    with pytest.raises(ValueError, match=r"--data.train names other rows than those"):
        train_tpu.main(config)


@pytest.mark.parametrize("kind", [WHISPER_ENCODER, LLAMA, PROJECTOR], ids=lambda kind: kind.name)
def test_a_digest_is_of_every_weight_used_and_of_the_config(tmp_path, tiny_towers, kind):
    names = {WHISPER_ENCODER: "encoder", LLAMA: "llm"}
    source = tiny_towers[names[kind]] if kind in names else make_projector(tmp_path / "random")
    folder = tmp_path / "copy"
    shutil.copytree(source, folder)
    before = digest(kind, source)
    assert digest(kind, folder) == digest(kind, folder / "model.safetensors") == before
    assert len(before) == 16
    seen = {before}
    for name, info in open_torch(source).infos.items():
        last = tuple(size - 1 for size in info.shape)
        value = open_torch(folder).read(name)[last]
        change_tensor(folder, name, last, np.nextafter(value, np.inf, dtype=value.dtype))
        changed = digest(kind, folder)
        assert (changed in seen) == name.startswith("decoder."), name
        seen.add(changed)
    config = json.loads((folder / "config.json").read_text())
    field = {LLAMA: {"rms_norm_eps": 0.5}, WHISPER_ENCODER: {"max_source_positions": 8}}.get(kind)
    if field:
        (folder / "config.json").write_text(json.dumps(config | field))
        assert digest(kind, folder) not in seen


def test_batches_are_the_same_wherever_their_clips_are(tmp_path):
    rows = read_speech(tmp_path, 13)
    batches = make_batches(rows)
    elsewhere = [
        dataclasses.replace(
            row, audio=f"/b/{row.id}.wav", source="/b/clips.jsonl", id=f"/b/{row.id}"
        )
        for row in rows
    ]
    assert make_batches(elsewhere).fingerprint == batches.fingerprint


@pytest.mark.parametrize(
    "change",
    [{"id": "another"}, {"text": "stop"}, {"duration": 1.51}, {"offset": 0.1}, {"source": "b"}],
    ids=lambda change: next(iter(change)),
)
def test_batches_of_other_clips_differ(tmp_path, change):
    rows = read_speech(tmp_path, 13)
    other = [dataclasses.replace(rows[0], text="no", duration=1.5), *rows[1:]]
    changed = [dataclasses.replace(other[0], **change), *rows[1:]]
    assert make_batches(changed).fingerprint != make_batches(other).fingerprint
