"""Data in a whole run: bad clips, mixtures, data sets, workers; the towers are tiny."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

import train_tpu
from flax_projector import __main__ as program
from flax_projector import run as runs
from flax_projector.bad_rows import BadRowLog
from flax_projector.config import DataConfig, TrainConfig, to_json
from flax_projector.sharding import make_mesh, use_mesh
from tests.parity import assert_within
from tests.tiny import make_speech, read_losses, read_params, tiny_config

pytestmark = pytest.mark.torch


@pytest.fixture
def make_config(tmp_path, tiny_towers):
    """Tiny configs in folders of their own."""

    def make(name: str = "a", **overrides) -> TrainConfig:
        return tiny_config(tmp_path / name, tiny_towers, **overrides)

    return make


def bad_entries(config: TrainConfig) -> list[dict]:
    path = Path(config.out) / "bad_rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def silence(manifest: str, *numbers: int) -> None:
    """Overwrites clips with NaN of the same length: it shows only when they are read."""
    for number in numbers:
        path = Path(manifest).parent / f"{number}.wav"
        samples = np.full(soundfile.info(path).frames, np.nan)
        soundfile.write(path, samples, 16_000, subtype="FLOAT")


@pytest.mark.parametrize("cache_features", [False, True])
def test_a_run_survives_bad_clips_and_lists_them(make_config, cache_features):
    data = {"max_bad_rate": 0.3, "cache_features": cache_features}
    config = make_config(data=data)
    silence(config.data.train[0], 2, 5)
    silence(config.data.eval[0], 1)
    with Path(config.data.train[0]).open("a") as manifest:
        manifest.write(json.dumps({"id": "gone", "audio": "gone.wav", "text": "go"}) + "\n")
    train_tpu.main(config)
    assert np.isfinite(read_losses(config)).all()
    entries = [(e["set"], e["id"], e["reason"]) for e in bad_entries(config)]
    assert sorted(entries) == [
        ("clips", "clip1", "not_finite"),
        ("train", "clip2", "not_finite"),
        ("train", "clip5", "not_finite"),
        ("train", "gone", "missing_file"),
    ]


@pytest.mark.consistency("ours with live features")
def test_kept_features_leave_out_the_same_clips(make_config):
    configs = [
        make_config(name, data={"cache_features": name == "kept", "max_bad_rate": 0.5})
        for name in ("live", "kept")
    ]
    for config in configs:
        silence(config.data.train[0], 0, 3)
        train_tpu.main(config)
    live, kept = map(read_losses, configs)
    assert_within(np.array(kept, np.float32), live, 1e-5)


def make_source(config: TrainConfig):
    """The training batches of a start, which lists its bad rows."""
    loaded = runs.load_model(config, make_mesh(config.mesh))
    return runs.make_train_source(loaded, config, runs.open_bad_rows(config))


def test_too_many_bad_clips_stop_a_run_until_they_are_repaired(make_config):
    config = make_config()
    clip = Path(config.data.train[0]).with_name("3.wav")
    clip.rename(clip.with_suffix(".away"))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"(?s)train: 1 of 13 rows .*clip3: .*3.wav does not"):
            train_tpu.main(config)
        assert [e["id"] for e in bad_entries(config)] == ["clip3"]
    assert not (Path(config.out) / "config.json").exists()
    clip.with_suffix(".away").rename(clip)
    make_source(config)
    assert not bad_entries(config)


@pytest.mark.parametrize("cache_features", [False, True])
def test_clips_that_could_not_be_read_count_until_they_are_repaired(make_config, cache_features):
    config = make_config(data={"max_bad_rate": 0.1, "cache_features": cache_features})
    silence(config.data.train[0], 2, 5)
    with pytest.raises(
        ValueError, match=r"(?s)2 of 13 rows .*clip[25]: .* not finite\n.*clip[25]: "
    ):
        train_tpu.main(config)
    with pytest.raises(ValueError, match=r"(?s)2 of 13 rows .*clip2: .* not finite\n.*clip5: "):
        make_source(config)  # before it trains
    whole = Path(make_speech(Path(config.out) / "again", 13)).with_name("5.wav")
    Path(config.data.train[0]).with_name("5.wav").write_bytes(whole.read_bytes())
    source = make_source(config)
    assert [e["id"] for e in bad_entries(config)] == ["clip2"]
    problems = [(i, row) for i in range(len(source)) for row in source[i]["problem"].nonzero()[0]]
    assert {u.row.id for i, row in problems if (u := source.members(i)[row])} == {"clip2"}


def test_a_batch_without_a_clip_gives_no_nan(make_config):
    config = make_config(num_steps=4, data={"max_bad_rate": 1.0})
    silence(config.data.train[0], *range(13))
    train_tpu.main(config)
    assert read_losses(config) == [0.0] * 4


def evaluate(config: TrainConfig):
    """Scores of the untrained projector."""
    loaded = runs.load_model(config, make_mesh(config.mesh))
    bad_rows = runs.open_bad_rows(config)
    with use_mesh(loaded.mesh):
        ((name, source),) = runs.make_eval_sources(loaded, config, bad_rows).items()
        projector = loaded.model.projector
        frames = jnp.zeros((1, 1, config.projector.encoder_dim))
        params = train_tpu.strip_axes(projector.init(jax.random.key(0), frames)["params"])
        evaluator = runs.make_evaluator(loaded, config, bad_rows)
        return evaluator((params, *loaded.frozen), source, name=name)


def test_a_bad_clip_never_improves_the_word_error_rate(make_config):
    """Each of 13 is scored once: those that cannot be heard as if nothing had been understood."""
    config = make_config(data={"max_bad_rate": 0.4})
    manifest = make_speech(Path(config.out) / "dev", 13)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, eval=(manifest,), eval_batch_size=4)
    )
    whole = evaluate(config)
    ids = [f"clip{i}" for i in range(13)]
    assert sorted(t.id for t in whole.transcripts) == sorted(ids)
    assert (whole.num_unheard, whole.num_left_out) == (0, 0)

    silence(manifest, 4, 7)
    Path(manifest).with_name("9.wav").unlink()
    with Path(manifest).open("a") as file:
        file.write(json.dumps({"id": "mute", "audio": "1.wav", "text": ""}) + "\n")
    scores = evaluate(config)
    assert sorted(t.id for t in scores.transcripts) == sorted(ids)
    unheard = {t.id for t in scores.transcripts if not t.tokens}
    assert unheard == {"clip4", "clip7", "clip9"}
    assert {t.hypothesis for t in scores.transcripts if t.id in unheard} == {""}
    before = {t.id: t.hypothesis for t in whole.transcripts}
    assert all(t.hypothesis == before[t.id] for t in scores.transcripts if t.id not in unheard)
    assert (scores.num_unheard, scores.num_left_out) == (3, 1)
    assert {e["id"] for e in bad_entries(config)} == {"clip4", "clip7", "clip9", "mute"}
    edits = scores.wer * sum(len(t.reference.split()) for t in scores.transcripts)
    assert edits >= sum(len(t.reference.split()) for t in scores.transcripts if t.id in unheard)


def test_an_evaluation_set_of_bad_clips_only_is_an_error(make_config):
    config = make_config(data={"max_bad_rate": 1.0})
    silence(config.data.eval[0], *range(5))
    with pytest.raises(ValueError, match="no clip could be read"):
        evaluate(config)


def test_worker_processes_change_nothing(make_config):
    threads = make_config("threads", num_steps=3)
    workers = make_config("workers", num_steps=3, data={"num_workers": 2})
    for config in (threads, workers):
        train_tpu.main(config)
    assert read_losses(workers) == read_losses(threads)


def test_a_killed_run_over_a_mixture_with_bad_clips_ends_with_the_same_bytes(
    make_config, tmp_path, monkeypatch
):
    manifests = (make_speech(tmp_path / "x", 13), make_speech(tmp_path / "y", 10, seed=4))
    silence(manifests[0], 1, 8)
    data = {"train": manifests, "train_weights": (1.0, 0.5), "max_bad_rate": 0.5}
    whole, killed = (make_config(name, data=data) for name in ("whole", "killed"))
    train_tpu.main(whole)
    take = train_tpu.take_problems

    def take_until_killed(batch, source, index, bad_rows):
        if index == 3:
            raise KeyboardInterrupt
        return take(batch, source, index, bad_rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_tpu, "take_problems", take_until_killed)
        train_tpu.main(killed)
    train_tpu.main(killed)
    assert read_losses(killed)[-2:] == read_losses(whole)[-2:]
    expected, actual = (read_params(Path(c.out) / "projector") for c in (whole, killed))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert sorted(e["id"] for e in bad_entries(killed)) == ["clip1", "clip8"]


def save_data_set(folder: Path, count: int, seed: int, text: str = "text") -> str:
    manifest = Path(make_speech(folder / "wav", count, seed=seed))
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    clips = [
        {"bytes": (manifest.parent / row["audio"]).read_bytes(), "path": row["audio"]}
        for row in rows
    ]
    table = datasets.Dataset.from_dict({"audio": clips, text: [row["text"] for row in rows]})
    table = table.cast_column("audio", datasets.Audio(decode=False))
    datasets.DatasetDict({"train": table}).save_to_disk(str(folder / "set"))
    return f"hf:{folder / 'set'}:train:text={text}"


def test_a_run_on_data_sets_and_manifests_never_imports_torch(tmp_path, make_config):
    train = (make_speech(tmp_path / "speech", 5), save_data_set(tmp_path / "x", 9, seed=2))
    data = {
        "train": train,
        "train_weights": (1.0, 2.0),
        "eval": (save_data_set(tmp_path / "y", 3, seed=3, text="sentence"),),
        "hf_streaming": True,
        "num_workers": 1,
    }
    config = make_config(num_steps=3, data=data)
    script = (
        "import sys, train_tpu\n"
        "from flax_projector.config import from_json\n"
        "if __name__ == '__main__':\n"
        "    train_tpu.main(from_json(open(sys.argv[1]).read()))\n"
        "    assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    (tmp_path / "go.py").write_text(script)
    (tmp_path / "config.json").write_text(to_json(config))
    root = Path(train_tpu.__file__).parent
    cache = {"JAX_COMPILATION_CACHE_DIR": str(root / ".jax_cache")}
    result = subprocess.run(
        [sys.executable, str(tmp_path / "go.py"), str(tmp_path / "config.json")],
        text=True,
        capture_output=True,
        env={**os.environ, **cache, "PYTHONPATH": str(root)},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(read_losses(config)) == 3
    assert len(list((Path(config.out) / "data").glob("*/audio/00000/*.wav"))) == 12
    (transcripts,) = (Path(config.out) / "transcripts").glob("*-000003.jsonl")
    assert len(transcripts.read_text().splitlines()) == 3


def test_transcribe_says_what_is_wrong_with_a_file(make_config, tmp_path, capsys):
    config = make_config(num_steps=1)
    train_tpu.main(config)
    clip = str(Path(config.data.eval[0]).with_name("0.wav"))
    soundfile.write(tmp_path / "long.wav", np.zeros(40_000), 16_000)
    (tmp_path / "bad.wav").write_bytes(b"not audio")
    files = [str(tmp_path / name) for name in ("gone.wav", "bad.wav", "long.wav")]
    program.cli(["transcribe", config.out, clip, *files])
    lines = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert list(lines) == [clip, *files]
    assert not lines[clip].startswith("[")
    assert lines[files[0]].startswith("[missing file: ")
    assert lines[files[1]].startswith("[undecodable: ")
    assert lines[files[2]] == "[longer than 2.0 s]"
    program.cli(["evaluate", config.out, config.data.eval[0]])
    assert "over 5 utterances (0 defective, 0 left out)" in capsys.readouterr().out


def test_hosts_that_see_different_rows_do_not_start(make_config, monkeypatch):
    config = make_config()
    loaded = runs.load_model(config, make_mesh(config.mesh))
    bad_rows = BadRowLog(None, max_rate=0.0)
    runs.make_train_source(loaded, config, bad_rows)
    monkeypatch.setattr(runs.multihost_utils, "process_allgather", lambda x: np.stack([x, x[::-1]]))
    with pytest.raises(ValueError, match="train: the hosts see different rows"):
        runs.make_train_source(loaded, config, bad_rows)


def test_two_evaluation_sets_of_one_name_are_an_error(make_config, tmp_path):
    config = make_config()
    names = tuple(make_speech(tmp_path / part, 2) for part in "xy")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval=names))
    loaded = runs.load_model(config, make_mesh(config.mesh))
    with pytest.raises(ValueError, match="names must differ"):
        runs.make_eval_sources(loaded, config, BadRowLog(None, max_rate=0.0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": ("a", "b"), "train_weights": (1.0,)}, "a weight above 0 for each of the 2"),
        ({"train": ("a",), "train_weights": (0.0,)}, "a weight above 0 for each of the 1"),
        ({"train": ("a", "a")}, "must not name anything twice"),
        ({"max_bad_rate": 1.5}, r"must be in \[0, 1\]"),
        ({"num_workers": -1}, "must be at least 0"),
    ],
)
def test_a_data_config_that_makes_no_sense_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)
