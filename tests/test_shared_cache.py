"""What several processes keep for themselves and for other runs: frames, and rows of streams."""

import dataclasses
import json
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile

import train_tpu
from flax_projector.config import TrainConfig
from flax_projector.data.frames import keep
from tests.bucket import BUCKET
from tests.parity import assert_within
from tests.processes import start
from tests.tiny import make_speech, read_losses, tiny_config

pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("processes")]


def make_data_set(folder: Path, num_rows: int, num_shards: int) -> str:
    """A source of clips in parquet files."""
    manifest = Path(make_speech(folder / "clips", num_rows, seed=2))
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    clips = [{"bytes": manifest.with_name(row["audio"]).read_bytes(), "path": None} for row in rows]
    table = datasets.Dataset.from_dict({"audio": clips, "text": [row["text"] for row in rows]})
    for shard in range(num_shards):
        name = f"train-{shard:05d}-of-{num_shards:05d}.parquet"
        part = table.cast_column("audio", datasets.Audio(decode=False))
        part.shard(num_shards, shard, contiguous=True).to_parquet(folder / "set" / name)
    return f"hf:{folder / 'set'}:train"


@pytest.fixture
def config(tmp_path, tiny_towers) -> TrainConfig:
    """A run on clips and a stream of 3 shards, with kept frames."""
    config = tiny_config(tmp_path / "several", tiny_towers, num_steps=4, eval_every_steps=0)
    data = dataclasses.replace(
        config.data,
        train=(*config.data.train, make_data_set(tmp_path, 8, 3)),
        eval=(),
        bucket_secs=(2.0,),
        hf_streaming=True,
        cache_features=True,
        cache_dir=str(tmp_path / "cache"),
    )
    return dataclasses.replace(config, data=data)


def other(config: TrainConfig, name: str, **data) -> TrainConfig:
    """Another run."""
    data = dataclasses.replace(config.data, **data)
    return dataclasses.replace(config, data=data, out=str(Path(config.out).with_name(name)))


def no_encoder(monkeypatch) -> None:
    def fail(*args, **kwargs):
        pytest.fail("encodes")

    monkeypatch.setattr(keep, "_own_rows", fail)


def assert_same_losses(config: TrainConfig, expected: TrainConfig) -> None:
    assert_within(np.array(read_losses(config), np.float32), read_losses(expected), 1e-4)


def test_one_process_uses_what_two_have_kept(config, tmp_path, monkeypatch, caplog):
    """Frames of a clip that cannot be read are not computed; the others' are, once."""
    clip = Path(config.data.train[0]).with_name("3.wav")
    samples, rate = soundfile.read(clip)
    soundfile.write(clip, np.full(len(samples), np.nan), rate, subtype="FLOAT")
    config = other(config, "run", max_bad_rate=1.0)
    text = start(config).finish()
    assert (
        "encoder frames of 21 utterances in" in text and " those of 21 clips computed now" in text
    )
    assert "trying" not in text and len(read_losses(config)) == 4
    lengths = [
        np.load(index)["num_frames"] for index in (tmp_path / "cache").glob("frames/*/*.npz")
    ]
    assert len(lengths) == 2, "each process has written a shard"
    assert sum(map(len, lengths)) == 21 and np.count_nonzero(np.concatenate(lengths)) == 20
    assert len(list((tmp_path / "cache").glob("hf-*/part-*/rows.jsonl"))) == 3
    assert not list((tmp_path / "cache").rglob("*.shared"))
    no_encoder(monkeypatch)
    monkeypatch.setattr("flax_projector.data.hf_stream.open_hf", lambda *_, **__: pytest.fail(""))
    alone = other(config, "alone")
    train_tpu.main(alone)
    assert_same_losses(alone, config)


@pytest.mark.slow
def test_two_processes_use_what_one_and_two_have_kept(config, monkeypatch, tmp_path):
    """And the run with the encoder in the step has the same losses."""
    train_tpu.main(other(config, "first", hf_max_rows=4))
    text = start(config).finish()
    assert "21 utterances in" in text and " those of 4 clips computed now" in text
    assert " those of 0 clips computed now" in start(other(config, "third")).finish()
    live = other(config, "live", cache_features=False)
    train_tpu.main(live)
    assert_same_losses(config, live)
    with_fsdp = dataclasses.replace(config.mesh, fsdp=2, tensor=2, data=1)
    cut = dataclasses.replace(other(config, "cut", cache_dir=""), mesh=with_fsdp)
    assert " those of 21 clips computed now" in start(cut).finish()
    assert_same_losses(cut, live)


@pytest.mark.slow
def test_processes_that_are_killed_while_they_compute_go_on(config):
    slowly = (
        "from flax_projector.data.frames import keep, shards\n"
        "shards._MAX_BYTES = 1\n"
        "at(shards.ShardWriter, 'close_if_due', 3, lambda: time.sleep(300))\n"
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_batch_size=4))
    processes = start(config, patch=slowly)
    for process in (0, 1):
        processes.wait_for("NOW", process)
    processes.send(signal.SIGKILL)
    processes.end()
    kept = Path(config.data.cache_dir) / "frames"
    num_kept = sum(len(np.load(path)["num_frames"]) for path in kept.glob("*/*.npz"))
    assert num_kept == 8, "two batches of 4"
    assert " those of 13 clips computed now" in start(config).finish()
    live = other(config, "live", cache_features=False)
    train_tpu.main(live)
    assert_same_losses(config, live)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["frames", "rows"])
def test_hosts_that_share_no_folder_are_told_what_to_name(config, tmp_path, what):
    if what == "frames":
        config = other(config, "run", train=config.data.train[:1])
    options = {1: ["--data.cache-dir", str(tmp_path / "of another host")]}
    ends = start(config, options=options).end()
    assert len({end.last_line for end in ends}) == 1
    for end in ends:
        assert end.code == 1 and "let --data.cache-dir name a folder" in end.text
        assert f"but not in {tmp_path}" in end.last_line and "process 1" in end.last_line
    assert not list(tmp_path.rglob("*.shared"))


@pytest.mark.slow
def test_frames_in_a_bucket(bucket_server, config, monkeypatch):
    """Of two processes, without a disk that they share; and worker processes read them."""
    data = {"train": config.data.train[:1], "hf_streaming": False}
    in_bucket = {**data, "cache_dir": f"gs://{BUCKET}/frames of all"}
    config, live = other(config, "a", **in_bucket), other(config, "live", **data)
    assert " those of 13 clips computed now" in start(config).finish()
    no_encoder(monkeypatch)
    alone = other(config, "b", num_workers=1)
    train_tpu.main(alone)
    live = other(live, "live", cache_features=False)
    train_tpu.main(live)
    assert_same_losses(config, live)
    assert_same_losses(alone, live)
    assert not [name for name in bucket_server.files().find(BUCKET) if name.endswith(".shared")]
