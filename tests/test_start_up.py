"""How long a start takes, and what share of a run's time went into its steps."""

import json
import logging
import time
from types import SimpleNamespace

import jax

import train_tpu
from flax_projector.run_folder import RunFolder
from flax_projector.training.start_up import StartUp
from flax_projector.training.train_step import compile_steps
from tests.tiny import killed_at, tiny_config

PHASES = ["connect", "towers", "data", "state", "compile", "files", "evaluation", "first step"]


def test_every_phase_has_its_time(monkeypatch, caplog):
    clock = SimpleNamespace(secs=100.0)
    monkeypatch.setattr("flax_projector.training.start_up.time.monotonic", lambda: clock.secs)
    start_up = StartUp("connect")
    for secs, phase in ((1.5, "towers"), (20.25, "first step")):
        clock.secs += secs
        start_up.enter(phase)
    clock.secs += 0.25
    with caplog.at_level(logging.INFO, "flax_projector"):
        secs = start_up.finish()
    phases = {"connect": 1.5, "towers": 20.25, "first_step": 0.25}
    assert secs == {f"start_secs/{phase}": secs for phase, secs in phases.items()}
    assert caplog.messages == [
        "the first step is done after 22.0 s: connect 1.5, towers 20.2, first step 0.2"
    ]


def test_a_run_logs_its_starts_and_goodput(tmp_path, tiny_towers, monkeypatch, caplog):
    """Killed after four of six steps, of which two are saved: these two count only once."""
    config = tiny_config(
        tmp_path,
        tiny_towers,
        num_steps=6,
        log_every_steps=1,
        save_every_steps=2,
        eval_every_steps=0,
        data={"eval": (), "bucket_secs": (2.0,)},
    )

    def compile_slowly(*args):
        time.sleep(0.5)
        return compile_steps(*args)

    monkeypatch.setattr(train_tpu, "compile_steps", compile_slowly)
    before = time.time()
    with killed_at(4, monkeypatch):
        train_tpu.main(config, devices=jax.devices()[:1])
    with caplog.at_level(logging.INFO, "flax_projector"):
        train_tpu.main(config, devices=jax.devices()[:1])

    (said,) = [m for m in caplog.messages if m.startswith("the first step is done after")]
    assert [phase.rpartition(" ")[0] for phase in said.partition(": ")[2].split(", ")] == PHASES
    lines = map(json.loads, RunFolder(tmp_path / "run").metrics.read_text().splitlines())
    records = [record for record in lines if "grad_norm" in record]
    starts = [r["step"] for r in records if "start_secs/towers" in r]
    assert starts == [1, 3]
    assert all(r["start_secs/compile"] >= 0.5 for r in records if r["step"] in starts)

    began, step_secs = RunFolder(tmp_path / "run").read_origin().began, 0.0
    assert before <= began <= records[0]["time"] - 0.5  # before the first program is compiled
    times = [began, *(record["time"] for record in records)]
    for record, earliest, latest in zip(records, times, times[1:], strict=False):
        step_secs += record["num_steps"] * record["step_secs"]
        run_secs = step_secs / record["goodput"]
        assert earliest - began - 0.01 <= run_secs <= latest - began + 0.01  # times are rounded
