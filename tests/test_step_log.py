"""The log of training steps: what is written when, and what stops a run."""

import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_projector.chat.prompt import make_prompt
from flax_projector.config import DataConfig, MeshConfig, PromptConfig
from flax_projector.data.bad_rows import BadRowLog
from flax_projector.data.batches import Batches
from flax_projector.data.inputs import Waveforms
from flax_projector.data.rows import ManifestRow, Rows
from flax_projector.data.utterances import prepare
from flax_projector.run_folder import RunFolder
from flax_projector.sharding import make_mesh
from flax_projector.training.metrics import MetricsWriter
from flax_projector.training.start_up import StartUp
from flax_projector.training.step_log import StepLog, Totals, progress_postfix
from flax_projector.training.throughput import FlopCounter
from tests.tiny import make_tokenizer

NOTHING = Totals()


def metrics_of(step: int, **changes: float) -> dict[str, Any]:
    """What a step returns: the loss is the number of the step."""
    metrics = {
        "loss": float(step),
        "num_labels": 10.0,
        "grad_norm": 0.5,
        "audio_secs": 60.0,
        "num_clips": 2.0,
        "num_audio_tokens": 70.0,
        "num_tokens": 100.0,
        "padding_rate": 0.25,
        **changes,
    }
    return {name: jnp.float32(value) for name, value in metrics.items()}


@pytest.fixture(scope="module")
def batches() -> Batches:
    """Twenty batches: batch i holds the clips 2i and 2i + 1. No sound is read."""
    config = DataConfig(window_secs=2.0, bucket_secs=(2.0,))
    rows = [ManifestRow(f"clip{i}", f"{i}.wav", "go", 1.0) for i in range(40)]
    prompt = make_prompt(make_tokenizer(), PromptConfig())
    return Batches(
        prepare([Rows.of(rows)], prompt, config)[0],
        inputs=Waveforms(config.window_samples),
        prompt=prompt,
        config=config,
        pool_stride=4,
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
        batch_size=2,
    )


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


@pytest.fixture
def make_log(folder, batches):
    """Makes the log of a start of a run; `folder.metrics` gets its lines."""
    writers, logs = [], []

    def make(first_step: int = 0, totals: Totals = NOTHING, began: float = 0.0) -> StepLog:
        writers.append(MetricsWriter(folder, first_step=first_step))
        logs.append(
            StepLog(
                writers[-1],
                batches,
                BadRowLog(None, max_rate=1.0),
                first_step=first_step,
                num_steps=20,
                totals=totals,
                began=began,
                start_up=StartUp("connect"),
                schedule=lambda step: 0.001 * step,
                count_flops=FlopCounter(encoder=1000, projector=100, layers=10, head=1),
                num_compiled=lambda: 3,
            )
        )
        return logs[-1]

    yield make
    for log in logs:
        log.close()
    for writer in writers:
        writer.__exit__(None, None, None)


def lines_of(folder: RunFolder) -> list[dict[str, float]]:
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


def test_a_line_is_about_the_steps_since_the_last_one(make_log, folder):
    log = make_log()
    for step in range(1, 6):
        log.add(metrics_of(step))
        if step in (3, 5):
            log.flush(step)
    log.flush(5)  # nothing has happened since
    first, second = lines_of(folder)
    assert (first["step"], first["num_steps"], first["loss"]) == (3, 3, 2.0)
    assert (second["step"], second["num_steps"], second["loss"]) == (5, 2, 4.5)
    assert second["learning_rate"] == pytest.approx(0.004)  # of the last update
    assert second["num_compiled"] == 3


def test_speech_adds_up_over_all_starts_of_a_run(make_log, folder):
    log = make_log(first_step=10, totals=Totals(audio_secs=3600.0))
    log.add(metrics_of(11))
    log.add(metrics_of(12))
    log.flush(12)
    assert log.totals.audio_secs == 3600 + 2 * 60
    assert lines_of(folder)[0]["audio_hours"] == pytest.approx(1 + 2 / 60)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_metric_that_is_not_finite_names_its_step_and_that_batch_alone(make_log, name, value):
    """Not the step of the line, and not the clips of all steps since the last one."""
    log = make_log(first_step=10)
    log.add(metrics_of(11))
    log.flush(11)
    for step in (12, 13, 14):
        log.add(metrics_of(step, **({name: value} if step == 13 else {})))
    with pytest.raises(FloatingPointError) as error:
        log.flush(14)
    ids = ["clip24", "clip25"]  # of batch 12: they count from 0
    expected = f"{name} is {value} at step 13; utterances of the batch: {ids}."
    assert str(error.value).startswith(expected)


def test_nothing_is_written_about_steps_that_went_wrong(make_log, folder):
    log = make_log()
    log.add(metrics_of(1, loss=np.nan))
    with pytest.raises(FloatingPointError):
        log.flush(1)
    assert not lines_of(folder)


@pytest.fixture
def clock(monkeypatch):
    """Time passes only when told so."""
    clock = SimpleNamespace(secs=100.0)
    monkeypatch.setattr("flax_projector.training.step_log.time.monotonic", lambda: clock.secs)
    return clock


def test_rates_leave_pauses_out_and_tell_waiting_apart(make_log, folder, clock):
    log = make_log()

    def wait(secs: float) -> None:
        clock.secs += secs

    with log.waiting():
        wait(1.0)
    wait(3.0)
    log.add(metrics_of(1))
    log.flush(1)
    with log.paused():
        wait(1000.0)  # an evaluation
    wait(2.0)
    log.add(metrics_of(2))
    log.flush(2)
    first, second = lines_of(folder)
    assert (first["step_secs"], first["data_wait_rate"]) == (4.0, 0.25)
    assert first["audio_secs_per_sec"] == pytest.approx(60 / 4)
    assert (second["step_secs"], second["data_wait_rate"]) == (2.0, 0.0)


@pytest.mark.parametrize(
    ("now", "goodput"), [(2000.0, 0.3), (1000.0, 1.0)], ids=["", "clock behind"]
)
def test_goodput_is_the_time_of_steps_over_that_of_the_run(
    make_log, folder, clock, monkeypatch, now, goodput
):
    """The hosts of two starts need not agree about the time."""
    monkeypatch.setattr("flax_projector.training.step_log.time.time", lambda: now)
    log = make_log(first_step=10, totals=Totals(step_secs=290.0), began=1000.0)
    clock.secs += 10.0
    log.add(metrics_of(11))
    log.flush(11)
    assert lines_of(folder)[0]["goodput"] == goodput
    assert log.totals.step_secs == 300


def test_the_first_line_of_a_start_says_what_the_start_took(make_log, folder):
    log = make_log()
    for step in (1, 2, 3):
        log.add(metrics_of(step))
        if step > 1:
            log.flush(step)
    assert ["start_secs/connect" in line for line in lines_of(folder)] == [True, False]


def test_the_progress_bar_shows_the_losses_that_there_are():
    shown = {
        "learning_rate": 1e-4,
        "audio_hours": 1.25,
        "audio_secs_per_sec": 80.4,
        "step_secs": 0.5,
        "data_wait_rate": 0.031,
    }
    expected = {"lr": "1.0e-04", "audio": "1.25h", "speed": "80s/s", "step": "0.50s", "wait": "3%"}
    assert progress_postfix({"loss": 2.0, **shown}) == {"loss": "2.000", **expected}
    ctc = progress_postfix({"ctc_loss": 3.0, "mfu": 0.4, **shown})
    assert ctc == {"ctc_loss": "3.000", **expected, "mfu": "40%"}
