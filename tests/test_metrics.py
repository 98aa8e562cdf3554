"""What a run writes down, and what is left of it after a restart."""

import json
import sys

import pytest

from flax_projector.evaluate import Transcript
from flax_projector.metrics import MetricsWriter, samples


def steps_of(folder) -> list[tuple[int, str]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], "train" if "grad_norm" in r else "eval") for r in map(json.loads, lines)]


def write_run(folder) -> None:
    with MetricsWriter(folder) as writer:
        for step in (2, 4, 6):
            writer.write(step, {"loss": 1.0, "grad_norm": 0.5})
            writer.write(step, {"eval/clips/wer": 0.3})


@pytest.mark.parametrize(
    ("first_step", "expected"),
    [
        (6, [(2, "train"), (2, "eval"), (4, "train"), (4, "eval"), (6, "train")]),
        (4, [(2, "train"), (2, "eval"), (4, "train")]),
        (3, [(2, "train"), (2, "eval")]),
        (0, []),
    ],
)
def test_a_restart_drops_what_it_will_write_again(tmp_path, first_step, expected):
    write_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')  # the process was killed here
    with MetricsWriter(tmp_path, first_step=first_step):
        pass
    assert steps_of(tmp_path) == expected


def test_without_wandb_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install wandb"):
        MetricsWriter(tmp_path, wandb_project="speech")


def test_wandb_gets_the_scalars(tmp_path, monkeypatch):
    logged, ids = [], []

    class Run:
        def log(self, scalars, step):
            logged.append((step, scalars))

        def finish(self):
            logged.append("finished")

    class Wandb:
        @staticmethod
        def init(**kwargs):
            ids.append(kwargs["id"])
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    with MetricsWriter(tmp_path, wandb_project="speech") as writer:
        writer.write(3, {"loss": 2.0})
    assert logged == [(3, {"loss": 2.0}), "finished"]
    for folder in (tmp_path, tmp_path / "other"):
        with MetricsWriter(folder, wandb_project="speech"):
            pass
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (3, 3), (10, 10), (60, 10), (64, 10)])
def test_samples_come_from_the_whole_evaluation(count, expected):
    transcripts = [Transcript(str(i), "", "", ()) for i in range(count)]
    chosen = samples(transcripts)
    assert len(chosen) == expected
    assert not count or count - int(chosen[-1].id) <= 7
