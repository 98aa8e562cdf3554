"""Data in whole runs: bad clips, mixtures, data sets, workers; the towers are tiny.

All runs compile the same few programs: the sets have the same lengths, and runs as many steps.
"""

import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile

import train_tpu
from flax_projector import __main__ as program
from flax_projector.config import TrainConfig, to_json
from flax_projector.data.bad_rows import BadRowLog
from flax_projector.data.batches import Batches
from flax_projector.inference.listen import Listener
from flax_projector.logs import printable
from flax_projector.run_folder import RunFolder
from flax_projector.sharding import use_mesh
from flax_projector.training.evaluate import Scores
from flax_projector.training.metrics import MetricsWriter
from flax_projector.training.scores import summarize
from tests.clips import spoil
from tests.parity import assert_within
from tests.tiny import final_params, make_speech, read_losses, tiny_config

pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("test_data_run")]


@pytest.fixture
def make_config(tmp_path, tiny_towers):
    """Tiny configs, without an evaluation set unless they are given one."""

    def make(**data) -> TrainConfig:
        return tiny_config(tmp_path / "a", tiny_towers, data={"eval": (), **data})

    return make


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, tiny_towers) -> TrainConfig:
    """A run on two manifests x and y. Three rows of x and one to evaluate on are defective."""
    folder = tmp_path_factory.mktemp("mixture")
    x, y = make_speech(folder / "x", 13), make_speech(folder / "y", 10)
    data = {"train": (x, y), "train_weights": (1.0, 0.5), "max_bad_rate": 0.3}
    config = tiny_config(folder, tiny_towers, data=data)
    spoil(x, 2, 5)
    spoil(config.data.eval[0], 1)
    with Path(x).open("a") as manifest:
        manifest.write(json.dumps({"id": "gone", "audio": "gone.wav", "text": "go"}) + "\n")
    return config


def run(config: TrainConfig, name: str, **data) -> TrainConfig:
    """Trains with other data options, in a folder of its own; or continues there."""
    out = str(Path(config.out).with_name(name))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data), out=out)
    train_tpu.main(config)
    return config


@pytest.fixture(scope="module")
def live(mixture) -> TrainConfig:
    """The finished run."""
    return run(mixture, "live")


@pytest.fixture(scope="module")
def kept(mixture) -> TrainConfig:
    """The same with kept features."""
    return run(mixture, "kept", cache_features=True)


@pytest.fixture(scope="module")
def listener(live) -> Listener:
    """The projector of the finished run, and the loaded towers."""
    return Listener(live.out)


def bad_entries(config: TrainConfig) -> list[tuple[str, str, str]]:
    """Set, id and reason of every row that is listed."""
    path = RunFolder.of(config).bad_rows
    entries = map(json.loads, path.read_text().splitlines() if path.is_file() else ())
    return sorted((entry["set"], entry["id"], entry["reason"]) for entry in entries)


BAD_IN_X = [
    ("train", "clip2", "not_finite"),
    ("train", "clip5", "not_finite"),
    ("train", "gone", "missing_file"),
]


@pytest.mark.parametrize("name", ["live", "kept"])
def test_a_run_survives_bad_clips_and_lists_them(request, name):
    config = request.getfixturevalue(name)
    losses = read_losses(config)
    assert len(losses) == 6 and np.isfinite(losses).all()
    assert bad_entries(config) == [("clips", "clip1", "not_finite"), *BAD_IN_X]


@pytest.mark.consistency("ours with live features")
def test_kept_features_leave_out_the_same_clips(live, kept):
    assert_within(np.array(read_losses(kept), np.float32), read_losses(live), 1e-5)


def test_a_killed_run_over_a_mixture_with_bad_clips_ends_with_the_same_bytes(
    mixture, live, monkeypatch, caplog
):
    write = MetricsWriter.write

    def write_until_killed(self, step, scalars):
        if step == 4:
            raise KeyboardInterrupt
        write(self, step, scalars)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetricsWriter, "write", write_until_killed)
        run(mixture, "killed", eval=())
    with caplog.at_level(logging.INFO, logger="train"):
        killed = run(mixture, "killed", eval=())
    assert "resumed at step 2" in caplog.text
    assert read_losses(killed) == read_losses(live)
    expected = final_params(live)
    for name, leaf in final_params(killed).items():
        assert leaf.tobytes() == expected[name].tobytes(), name
    assert bad_entries(killed) == BAD_IN_X


def test_a_batch_without_a_clip_gives_no_nan(make_config):
    config = make_config(max_bad_rate=1.0)
    spoil(config.data.train[0], *range(13))
    train_tpu.main(config)
    assert read_losses(config) == [0.0] * 6
    assert all(np.isfinite(leaf).all() for leaf in final_params(config).values())


def start(listener: Listener, config: TrainConfig) -> Batches:
    """The training batches of a start, which lists its bad rows."""
    folder = RunFolder.of(config)
    bad_rows = BadRowLog(folder.bad_rows, max_rate=config.data.max_bad_rate)
    loaded = dataclasses.replace(listener.loaded, config=config)
    with use_mesh(loaded.mesh):
        return loaded.make_batch_maker(folder, bad_rows).train()


def test_too_many_bad_clips_stop_a_run_until_they_are_repaired(listener, make_config):
    config = make_config()
    clip = Path(config.data.train[0]).with_name("3.wav")
    clip.rename(clip.with_suffix(".away"))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"(?s)train: 1 of 13 rows .*clip3: .*3.wav does not"):
            train_tpu.main(config)
        assert bad_entries(config) == [("train", "clip3", "missing_file")]
    assert not RunFolder.of(config).config.exists()
    clip.with_suffix(".away").rename(clip)
    start(listener, config)
    assert not bad_entries(config)


@pytest.mark.parametrize("cache_features", [False, True])
def test_clips_that_could_not_be_read_count_until_they_are_repaired(
    listener, make_config, cache_features
):
    config = make_config(max_bad_rate=0.1, cache_features=cache_features)
    spoil(config.data.train[0], 2, 5)
    with pytest.raises(
        ValueError, match=r"(?s)2 of 13 rows .*clip[25]: .* not finite\n.*clip[25]: "
    ):
        train_tpu.main(config)
    with pytest.raises(ValueError, match=r"(?s)2 of 13 rows .*clip2: .* not finite\n.*clip5: "):
        start(listener, config)  # before it trains
    whole = Path(make_speech(Path(config.out) / "again", 13)).with_name("5.wav")
    Path(config.data.train[0]).with_name("5.wav").write_bytes(whole.read_bytes())
    batches = start(listener, config)
    assert bad_entries(config) == [("train", "clip2", "not_finite")]
    assert {row.id for i in range(len(batches)) for row in batches[i].bad} == {"clip2"}


@pytest.fixture
def evaluate(listener, tmp_path):
    """Scores a manifest in batches of 4, which 8 devices pad, and lists its bad rows."""
    data = dataclasses.replace(
        listener.config.data, bucket_secs=(2.0,), eval_batch_size=4, max_bad_rate=1.0
    )
    config = dataclasses.replace(listener.config, data=data, out=str(tmp_path / "scored"))
    loaded = dataclasses.replace(listener.loaded, config=config)
    folder = RunFolder.of(config)
    bad_rows = BadRowLog(folder.bad_rows, max_rate=data.max_bad_rate)
    maker, evaluator = loaded.make_batch_maker(folder, bad_rows), loaded.make_evaluator(bad_rows)

    def evaluate(manifest: str) -> tuple[Scores, list[tuple[str, str, str]]]:
        with use_mesh(loaded.mesh):
            batches = maker.make("dev", [maker.read(manifest)], batch_size=data.eval_batch_size)
            params = (listener.projector_params, *loaded.frozen)
            scores = evaluator(params, batches, name="dev", normalizer="english")
            return scores, bad_entries(config)

    return evaluate


def repeat_speech(folder: Path, count: int) -> str:
    """A manifest of clips which repeat the 5 of the evaluation set, so that lengths are theirs."""
    manifest = Path(make_speech(folder, 5, seed=1))
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for i in range(5, count):
        shutil.copy(folder / f"{i % 5}.wav", folder / f"{i}.wav")
        rows.append({"id": f"clip{i}", "audio": f"{i}.wav", "text": rows[i % 5]["text"]})
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(manifest)


def test_a_bad_clip_never_improves_the_word_error_rate(evaluate, tmp_path):
    """Each of 13 is scored once: those that cannot be heard as if nothing had been understood."""
    manifest = repeat_speech(tmp_path / "dev", 13)
    whole, bad = evaluate(manifest)
    ids = [f"clip{i}" for i in range(13)]
    assert sorted(t.id for t in whole.transcripts) == sorted(ids)
    assert (whole.summary.num_bad, whole.num_left_out, bad) == (0, 0, [])

    spoil(manifest, 4, 7)
    Path(manifest).with_name("9.wav").unlink()
    soundfile.write(Path(manifest).with_name("long.wav"), np.full(40_000, 0.1), 16_000)
    with Path(manifest).open("a") as file:
        file.write(json.dumps({"id": "mute", "audio": "1.wav", "text": ""}) + "\n")
        file.write(json.dumps({"id": "long", "audio": "long.wav", "text": "go left"}) + "\n")
    scores, bad = evaluate(manifest)
    assert sorted(t.id for t in scores.transcripts) == sorted(ids)
    unheard = {t.id for t in scores.transcripts if t.is_bad}
    assert unheard == {"clip4", "clip7", "clip9"}
    assert {t.hypothesis for t in scores.transcripts if t.id in unheard} == {""}
    before = {t.id: t.hypothesis for t in whole.transcripts}
    assert all(t.hypothesis == before[t.id] for t in scores.transcripts if t.id not in unheard)
    # The row without a transcript, and the clip that is longer than the run's limit.
    assert (scores.summary.num_bad, scores.num_left_out) == (3, 2)
    assert {id for _, id, _ in bad} == {"clip4", "clip7", "clip9", "mute", "long"}
    words = scores.summary.words
    assert words.length == sum(len(t.reference.split()) for t in scores.transcripts)
    deleted = sum(len(t.reference.split()) for t in scores.transcripts if t.id in unheard)
    assert words.deletions >= deleted > 0
    heard = summarize(scores.transcripts, bad_clips="exclude").words
    assert heard.length == words.length - deleted and heard.deletions == words.deletions - deleted


def test_a_small_set_with_bad_clips_is_evaluated_and_lists_them(live, tmp_path, capsys):
    """Whatever share of bad rows the training data may have. Too long a clip is no defect."""
    manifest = Path(repeat_speech(tmp_path / "small", 6))
    for i in (1, 2):
        manifest.with_name(f"{i}.wav").unlink()
    soundfile.write(manifest.with_name("3.wav"), np.full(32_480, 0.1), 16_000)  # 2.03 s
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[3]["duration"] = 2.0
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    program.cli(["evaluate", live.out, str(manifest)])
    out, err = capsys.readouterr()
    assert "over 5 utterances" in out and "1 row left out" in out
    assert "2 clips that could not be read, counted as wrong" in out
    for listed in ("clip1: missing file: ", "clip2: missing file: ", "clip3: too long: 2.030 s"):
        assert listed in err


def test_an_evaluation_that_is_impossible_advises_no_option_that_evaluate_lacks(live, tmp_path):
    manifest = Path(make_speech(tmp_path / "long", 1))
    soundfile.write(manifest.with_name("0.wav"), np.full(48_000, 0.1), 16_000)
    with pytest.raises(SystemExit, match=r"none of 1 .* fits the run: all are longer") as caught:
        program.cli(["evaluate", live.out, str(manifest)])
    assert not re.search("raise|pass|turn|lower", str(caught.value))


def test_an_evaluation_set_of_bad_clips_only_is_an_error(evaluate, tmp_path):
    manifest = make_speech(tmp_path / "dev", 5, seed=1)
    spoil(manifest, *range(5))
    with pytest.raises(ValueError, match="no clip could be read"):
        evaluate(manifest)


def test_a_loss_that_is_not_finite_names_the_clip(evaluate, tmp_path, monkeypatch):
    """Such a clip is a bad row by now: here, it is let through."""
    monkeypatch.setattr("flax_projector.data.audio._IMPOSSIBLE_PEAK", np.inf)
    manifest = make_speech(tmp_path / "dev", 5, seed=1)
    clip = Path(manifest).with_name("3.wav")
    samples, rate = soundfile.read(clip)
    soundfile.write(clip, 1e21 * samples, rate, subtype="FLOAT")
    message = rf"dev: the loss of 1 of \d clips in a batch is not finite: clip3 \({clip}\)\. If"
    with pytest.raises(FloatingPointError, match=message):
        evaluate(manifest)


def save_data_set(manifest: str, folder: Path, text: str) -> str:
    """The clips of a manifest as a data set."""
    rows = [json.loads(line) for line in Path(manifest).read_text().splitlines()]
    clips = [
        {"bytes": Path(manifest).with_name(row["audio"]).read_bytes(), "path": row["audio"]}
        for row in rows
    ]
    table = datasets.Dataset.from_dict({"audio": clips, text: [row["text"] for row in rows]})
    table = table.cast_column("audio", datasets.Audio(decode=False))
    datasets.DatasetDict({"train": table}).save_to_disk(str(folder))
    return f"hf:{folder}:train:text={text}"


@pytest.fixture(scope="module")
def on_data_sets(mixture, tmp_path_factory) -> tuple[TrainConfig, subprocess.CompletedProcess]:
    """The same run with y and the evaluation set streamed from data sets, read by workers.

    In a process of its own, which fails if it has imported torch.
    """
    folder = tmp_path_factory.mktemp("data_sets")
    x, y = mixture.data.train
    data = dataclasses.replace(
        mixture.data,
        train=(x, save_data_set(y, folder / "y", "text")),
        eval=(save_data_set(mixture.data.eval[0], folder / "eval", "sentence"),),
        hf_streaming=True,
        num_workers=2,
    )
    config = dataclasses.replace(mixture, data=data, out=str(folder / "run"))
    script = (
        "import sys, train_tpu\n"
        "from flax_projector.config import from_json\n"
        "if __name__ == '__main__':\n"
        "    train_tpu.main(from_json(open(sys.argv[1]).read()))\n"
        "    assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    (folder / "go.py").write_text(script)
    (folder / "config.json").write_text(to_json(config))
    precision = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}  # as in this process
    result = subprocess.run(
        [sys.executable, str(folder / "go.py"), str(folder / "config.json")],
        text=True,
        capture_output=True,
        env={**os.environ, **precision, "PYTHONPATH": str(Path(train_tpu.__file__).parent)},
    )
    return config, result


def test_a_run_on_data_sets_and_manifests_never_imports_torch(on_data_sets):
    config, result = on_data_sets
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(read_losses(config)) == 6
    folder = RunFolder.of(config)
    assert len(list(folder.data_cache.glob("*/part-0000/audio/00000/*.wav"))) == 15
    (transcripts,) = folder.path.glob("transcripts/*-000006.jsonl")
    assert len(transcripts.read_text().splitlines()) == 5


def test_data_sets_and_worker_processes_change_nothing(on_data_sets, live):
    config, _ = on_data_sets
    assert read_losses(config) == read_losses(live)
    expected = final_params(live)
    for name, leaf in final_params(config).items():
        assert leaf.tobytes() == expected[name].tobytes(), name
    assert [row for row in bad_entries(config) if row[0] == "train"] == BAD_IN_X


def test_transcribe_says_what_is_wrong_with_a_file(live, tmp_path, capsys):
    clips = live.data.eval[0]
    clip = str(Path(clips).with_name("0.wav"))
    soundfile.write(tmp_path / "long.wav", np.zeros(40_000), 16_000)
    (tmp_path / "bad.wav").write_bytes(b"not audio")
    files = [str(tmp_path / name) for name in ("gone.wav", "bad.wav", "long.wav")]
    odd = [str(tmp_path / os.fsdecode(name)) for name in (b"\xff.wav", b"a\tb\x1b[2J\n.wav")]
    with pytest.raises(SystemExit, match=r"^1$"):
        program.cli(["transcribe", live.out, clip, *files, *odd])
    out, errors = capsys.readouterr()
    (out + errors).encode()
    assert [line.split("\t")[0] for line in out.splitlines()] == [clip]
    assert f"{files[0]} does not exist" in errors
    assert f"{files[1]} is not a readable audio file" in errors
    assert f"{files[2]}: no speech was found in its 2.5 s" in errors
    assert all(f"{printable(path)} does not exist" in errors for path in odd)
    whole = make_speech(tmp_path / "whole", 5, seed=1)
    program.cli(["evaluate", live.out, clips, whole])
    out = capsys.readouterr().out
    assert out.count("over 5 utterances") == 2
    assert out.count("1 clip that could not be read, counted as wrong") == 1
