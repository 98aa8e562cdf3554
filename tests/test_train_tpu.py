"""`train_tpu.py` from end to end on tiny towers, on 8 fake devices."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile

import train_tpu
from convert import api
from convert.torch_files import open_torch
from flax_projector import __main__ as program
from flax_projector.config import (
    PRESETS,
    CTCConfig,
    MeshConfig,
    OptimizerConfig,
    ProjectorConfig,
    from_json,
    to_json,
)
from flax_projector.data.bad_rows import BadRowLog
from flax_projector.logs import printable
from flax_projector.run import load_model, resolve_config
from flax_projector.run_folder import RunFolder
from flax_projector.sharding import make_mesh
from flax_projector.training.evaluate import Evaluator
from flax_projector.training.step_log import StepLog
from tests.parity import assert_within
from tests.scored import scores_of
from tests.tiny import final_params, killed_at, read_losses, tiny_config

pytestmark = pytest.mark.torch


@pytest.fixture
def run(tmp_path, tiny_towers):
    """Runs a tiny config, on one device unless told otherwise, and returns it."""

    def run(*, name: str = "a", num_devices: int = 1, **overrides):
        config = tiny_config(tmp_path / name, tiny_towers, **overrides)
        train_tpu.main(config, devices=jax.devices()[:num_devices])
        return config

    return run


def test_a_run_learns_and_leaves_everything_behind(run):
    config = run(num_steps=12)
    losses, folder = read_losses(config), Path(config.out)
    assert len(losses) == 12
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.3
    assert from_json((folder / "config.json").read_text()) == resolve_config(config)
    assert list((folder / "tensorboard").iterdir())
    transcripts = (folder / "transcripts" / "clips-000012.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"] for line in transcripts} == {f"clip{i}" for i in range(5)}
    assert "step 12 of 12, finished" in (folder / "report.html").read_text()
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"10", "12"}
    saved = json.loads((folder / "projector" / "config.json").read_text())
    assert saved["projector_pool_stride"] == 4 and saved["audio_model_id"] == config.encoder


LEAN = {"data": {"eval": (), "bucket_secs": (2.0,)}}  # where other lengths would show nothing more
WARM_START = {"ctc": CTCConfig(num_steps=10, learning_rate=1e-2, blank="<|endoftext|>")}


@pytest.mark.consistency("ours on one device")
@pytest.mark.parametrize("stages", [{}, WARM_START], ids=["llm", "ctc, then llm"])
def test_losses_do_not_depend_on_the_mesh(run, stages):
    sharded = [
        run(name=f"mesh{i}", num_devices=8, num_steps=20, mesh=mesh, **stages, **LEAN)
        for i, mesh in enumerate([MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)])
    ]
    single = read_losses(run(name="single", num_steps=20, **stages, **LEAN))
    assert len(single) == 20
    for config in sharded:
        assert_within(np.array(read_losses(config), np.float32), single, 1e-4)


def test_warm_start_learns_to_spell_before_the_llm_reads(run):
    config = run(num_steps=21, log_every_steps=4, save_every_steps=100, **WARM_START, **LEAN)
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if "num_steps" in r]
    assert [(r["step"], r["num_steps"], "ctc_loss" in r) for r in records] == [
        *((4, 4, True), (8, 4, True), (10, 2, True)),
        *((12, 2, False), (16, 4, False), (20, 4, False), (21, 1, False)),
    ]
    assert records[2]["ctc_loss"] < records[0]["ctc_loss"]
    assert all(("loss" in r) != ("ctc_loss" in r) for r in records)


@pytest.mark.parametrize("stages", [{}, {"ctc": CTCConfig(4, 1e-2)}], ids=["llm", "ctc first"])
def test_a_killed_run_ends_with_the_same_bytes(run, monkeypatch, stages):
    whole = run(name="whole", **stages)
    with killed_at(3, monkeypatch):
        run(name="killed", **stages)
    resumed = run(name="killed", **stages)
    assert read_losses(resumed)[-2:] == read_losses(whole)[-2:]
    expected = final_params(whole)
    for name, leaf in final_params(resumed).items():
        assert leaf.tobytes() == expected[name].tobytes(), name


def test_resume_refuses_another_config(run):
    config = run(num_steps=2)
    changed = dataclasses.replace(config, seed=7)
    with pytest.raises(ValueError, match=r"--seed: 0 -> 7"):
        train_tpu.main(changed)
    with pytest.raises(ValueError, match="holds a run"):
        train_tpu.main(dataclasses.replace(config, resume=False))


def test_a_run_may_start_from_a_converted_projector(run):
    first = run(name="first", num_steps=2, **LEAN)
    given = str(Path(first.out) / "projector")
    second = run(name="second", num_steps=1, init_projector=given, init_output_scale="auto", **LEAN)
    # Update 1 runs at learning rate 0: the parameters are still those of the first run.
    expected = final_params(first)
    for name, leaf in final_params(second).items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_the_last_norm_may_start_at_the_scale_of_the_embeddings(run, caplog, mesh):
    with caplog.at_level(logging.INFO, logger="train"):
        config = run(num_devices=8, mesh=mesh, num_steps=1, init_output_scale="auto", **LEAN)
    table = open_torch(config.llm).read("model.embed_tokens.weight").astype(np.float64)
    rms = np.sqrt(np.mean(np.square(table)))
    # Update 1 runs at learning rate 0.
    scale = final_params(config)["['layer_norms_1']['scale']"]
    np.testing.assert_allclose(scale, np.full(40, rms), rtol=1e-6)
    assert f"the last norm starts at {rms:.4f}, the RMS of the LLM's embeddings" in caplog.text


def test_any_checkpoint_of_a_run_converts(run, tmp_path):
    config = run(num_steps=6, keep_checkpoints=3)
    last = api.to_torch(config.out, tmp_path / "last")
    assert api.verify(last, config.out).is_same
    assert api.verify(last, Path(config.out) / "projector").is_same
    earlier = api.to_torch(config.out, tmp_path / "earlier.pt", step=4)
    assert not api.verify(earlier, config.out, step=None).is_same
    with pytest.raises(ValueError, match=r"run has no checkpoint of step 5, only of 2, 4, 6"):
        api.to_torch(config.out, tmp_path / "x", step=5)
    # Saved by eight devices, read on a machine with one.
    command = [sys.executable, "-m", "convert", "verify", str(last), config.out]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        command, cwd=Path(train_tpu.__file__).parent, env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, f"{config.out}: step 6 of 3 checkpoints\n")
    described = json.loads((tmp_path / "last/config.json").read_text())
    assert described["audio_model_id"] == config.encoder


def test_a_run_refuses_a_projector_that_computes_something_else(run):
    first = run(name="first", num_steps=1)
    other = dataclasses.replace(first.projector, rms_norm_eps=1e-8)
    with pytest.raises(
        ValueError, match=r"rms_norm_eps  the checkpoint has 1e-06, the run has 1e-08"
    ):
        run(name="second", projector=other, init_projector=str(Path(first.out) / "projector"))


@pytest.mark.consistency("ours with live features")
def test_kept_features_give_the_losses_of_live_ones(run):
    live = run(name="live", **LEAN)
    kept = run(name="kept", data={"cache_features": True, **LEAN["data"]})
    assert_within(np.array(read_losses(kept), np.float32), read_losses(live), 1e-5)


def test_a_projector_of_other_widths_is_refused(run):
    with pytest.raises(ValueError, match=r"--projector.llm-dim 40"):
        run(projector=ProjectorConfig(encoder_dim=24, llm_dim=41))


def test_a_start_that_fails_may_be_corrected(run):
    with pytest.raises(
        ValueError, match="'/no/such/folder' is not a folder, and could not be downloaded"
    ):
        run(num_steps=1, encoder="/no/such/folder")
    run(num_steps=1)


def test_a_warm_start_needs_a_blank_that_is_there(run):
    with pytest.raises(ValueError, match=r"tokenizer has no token '<none>'"):
        run(ctc=CTCConfig(num_steps=2, blank="<none>"))
    with pytest.raises(ValueError, match=r"--ctc.num-steps 6 must be less than --num-steps 6"):
        run(ctc=CTCConfig(num_steps=6))


def test_missing_data_is_an_error_that_names_the_option(run):
    with pytest.raises(ValueError, match=r"--data.train"):
        run(data={"train": ()})


def test_non_finite_loss_stops_with_its_step_and_clips(run, tmp_path, tiny_towers):
    """The step where it happened, not all since the last line of the log."""
    options = {"num_steps": 6, "log_every_steps": 5, "save_every_steps": 100}
    huge = OptimizerConfig(learning_rate=1e15, warmup_steps=2)  # rates 0, 5e14, 1e15, ...
    with pytest.raises(FloatingPointError) as error:
        run(name="huge", optimizer=huge, **options)
    config = tiny_config(tmp_path / "huge", tiny_towers, optimizer=huge, **options)
    loaded = load_model(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    maker = loaded.make_batch_maker(RunFolder.of(config), BadRowLog(None, max_rate=0.0))
    ids = [u.row.id for u in maker.train().members(2) if u is not None]
    assert f"grad_norm is nan at step 3; utterances of the batch: {ids}." in str(error.value)


@pytest.mark.parametrize("cache_features", [False, True], ids=["live", "kept"])
def test_a_run_on_whole_windows_trains_scores_transcribes_and_resumes(
    run, monkeypatch, capsys, cache_features
):
    """Every clip has the audio tokens of the window, and its own seconds of speech."""
    data = {"audio_tokens": "window", "cache_features": cache_features}
    add, steps = StepLog.add, []
    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "add", lambda self, m: (steps.append(m), add(self, m)))
        config = run(num_steps=4, data=data)
    assert all(m["num_audio_tokens"] == 25 * m["num_clips"] for m in steps)
    first_epoch = steps[:2]  # 13 clips in batches of 8
    assert sum(m["num_clips"] for m in first_epoch) == 13
    clips = Path(config.data.train[0]).parent.glob("*.wav")
    secs = sum(soundfile.info(str(clip)).duration for clip in clips)
    assert sum(m["audio_secs"] for m in first_epoch) == pytest.approx(secs, abs=13 * 0.02)

    with killed_at(3, monkeypatch):
        run(name="killed", num_steps=4, data=data)
    resumed = run(name="killed", num_steps=4, data=data)
    expected = final_params(config)
    for name, leaf in final_params(resumed).items():
        assert leaf.tobytes() == expected[name].tobytes(), name

    lines = (Path(config.out) / "transcripts" / "clips-000004.jsonl").read_text().splitlines()
    heard = {t["id"]: t["hypothesis"] for t in map(json.loads, lines)}
    program.cli(["transcribe", config.out, str(Path(config.data.eval[0]).parent / "0.wav")])
    assert capsys.readouterr().out.strip("\n").partition("\t")[2] == printable(heard["clip0"])
    of_clips = dataclasses.replace(
        config, data=dataclasses.replace(config.data, audio_tokens="clip")
    )
    with pytest.raises(ValueError, match=r"--data.audio-tokens: 'window' -> 'clip'"):
        train_tpu.main(of_clips)


def test_nothing_is_compiled_once_every_length_was_seen(run):
    config = run(num_steps=8, eval_every_steps=2)
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    counts = [r["num_compiled"] for r in map(json.loads, lines) if "num_compiled" in r]
    assert len(counts) == 8 and counts[0] > 0
    assert counts[2:] == [counts[2]] * 6, "step 2 was evaluated, and its projector kept"


def test_the_command_line_overrides_a_preset():
    options = ("--data.train", "a.jsonl", "b.tsv", "--optimizer.learning-rate", "0.5")
    config = train_tpu.read_config(["demo", *options, "--mesh.fsdp", "2"])
    preset = PRESETS["demo"][1]
    assert config == dataclasses.replace(
        preset,
        data=dataclasses.replace(preset.data, train=("a.jsonl", "b.tsv")),
        optimizer=dataclasses.replace(preset.optimizer, learning_rate=0.5),
        mesh=MeshConfig(fsdp=2),
    )


def test_a_misspelt_option_is_an_error_with_a_suggestion(capsys):
    with pytest.raises(SystemExit) as error:
        train_tpu.read_config(["demo", "--data.batch-sizes", "4"])
    assert error.value.code == 2
    assert "--data.batch-size" in capsys.readouterr().err


def test_what_stops_a_run_is_one_line(tmp_path):
    options = ["--out", str(tmp_path / "run"), "--data.train", str(tmp_path / "none.jsonl")]
    with pytest.raises(SystemExit, match=r"^error: manifest /.*/none\.jsonl does not exist$"):
        train_tpu.cli(["tiny", *options])
    assert not (tmp_path / "run").exists()


def test_finished_run_transcribes_files(run, capsys):
    config = run(num_steps=2)
    clip = Path(config.data.eval[0]).parent / "0.wav"
    program.cli(["transcribe", config.out, str(clip)])
    path, _, text = capsys.readouterr().out.strip("\n").partition("\t")
    assert path == str(clip)
    lines = (Path(config.out) / "transcripts" / "clips-000002.jsonl").read_text().splitlines()
    heard = {t["id"]: t["hypothesis"] for t in map(json.loads, lines)}
    assert text == printable(heard["clip0"])


def test_training_never_imports_torch(tmp_path, tiny_towers):
    config = tiny_config(tmp_path, tiny_towers, num_steps=1)
    script = (
        "import sys, train_tpu\n"
        "from flax_projector.config import from_json\n"
        "train_tpu.main(from_json(sys.stdin.read()))\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        input=to_json(config),
        text=True,
        capture_output=True,
        cwd=Path(train_tpu.__file__).parent,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert (Path(config.out) / "projector").is_dir()


def test_the_best_checkpoint_is_kept_whatever_comes_after(run, monkeypatch):
    evaluate = Evaluator.__call__
    scores = iter(
        [(0.9, 4.0), (0.2, 3.0), (0.2, 1.0), (0.7, 0.5), (0.2, 2.0)]
    )  # of steps 0, 2, 4, 6, 8

    def scored(self, *args, **kwargs):
        wer, loss = next(scores)
        summary = scores_of(wer, loss).summary
        return dataclasses.replace(evaluate(self, *args, **kwargs), summary=summary, loss=loss)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", scored)
        config = run(num_steps=8, eval_every_steps=2, keep_checkpoints=1)
    folder = Path(config.out)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"8"}
    assert json.loads((folder / "best.json").read_text()) == {
        "step": 4,
        "error_rate": 0.2,
        "loss": 1.0,
    }
    best = api.to_torch(folder / "best", folder / "for-the-server")
    assert not api.verify(best, folder / "projector").is_same
    four = run(name="four", num_steps=8, eval_every_steps=2, keep_checkpoints=3)
    of_four = api.to_torch(four.out, folder / "four", step=4)
    assert api.verify(best, of_four).is_same


def test_parts_of_a_batch_train_as_the_whole(run):
    whole, parts = (
        run(name=name, num_steps=4, accumulation_steps=steps, **more)
        for name, steps in (("whole", 1), ("parts", 2))
        for more in [{"data": {"batch_size": 16, **LEAN["data"]}, "ctc": CTCConfig(2)}]
    )
    np.testing.assert_allclose(read_losses(parts), read_losses(whole), atol=1e-4)
    lines = (Path(parts.out) / "metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if "grad_norm" in r]
    hours = [r["audio_hours"] for r in records]
    assert hours == sorted(hours) and hours[0] > 0


def test_a_checkpoint_is_written_when_its_minutes_have_passed(run):
    config = run(
        num_steps=4, save_every_steps=100, save_every_mins=1e-9, keep_checkpoints=9, **LEAN
    )
    saved = {int(path.name) for path in (Path(config.out) / "checkpoints").iterdir()}
    assert saved == {1, 2, 3, 4}
