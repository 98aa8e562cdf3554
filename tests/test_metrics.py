"""What a run writes down, and what is left of it after a restart."""

import json
import logging
import sys

import pytest

from flax_projector.run_folder import RunFolder
from flax_projector.training.evaluate import Scores
from flax_projector.training.metrics import MetricsWriter, samples
from flax_projector.training.score_files import read_scores
from flax_projector.training.scores import summarize
from tests.scored import scored, transcript


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def steps_of(folder: RunFolder) -> list[tuple[int, str]]:
    lines = folder.metrics.read_text().splitlines()
    return [(r["step"], "train" if "grad_norm" in r else "eval") for r in map(json.loads, lines)]


def write_run(folder: RunFolder) -> None:
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
def test_a_restart_drops_what_it_will_write_again(folder, first_step, expected):
    write_run(folder)
    with folder.metrics.open("a") as file:
        file.write('{"step": 1, "lo')  # the process was killed here
    with MetricsWriter(folder, first_step=first_step):
        pass
    assert steps_of(folder) == expected


def test_without_wandb_the_error_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install wandb"):
        MetricsWriter(folder, wandb_project="speech")


def test_wandb_gets_the_scalars(folder, monkeypatch):
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
    with MetricsWriter(folder, wandb_project="speech") as writer:
        writer.write(3, {"loss": 2.0})
    assert logged == [(3, {"loss": 2.0}), "finished"]
    for same_or_other in (folder, RunFolder(folder.path / "other")):
        with MetricsWriter(same_or_other, wandb_project="speech"):
            pass
    assert ids[0] == ids[1] != ids[2]


def test_scores_are_recorded_with_every_transcript_and_shown_with_some(folder, caplog):
    caplog.set_level(logging.INFO)
    pairs = {f"clip{i}": (f"said {i}", "said" if i % 2 else f"said {i}") for i in range(20)}
    transcripts = tuple(scored(pairs, cut={"clip3": "max_new_tokens"}))
    scores = Scores(0.5, summarize(transcripts), transcripts, num_left_out=0)
    with MetricsWriter(folder) as writer:
        writer.write_scores(4, "clips", scores)
    record = json.loads(folder.metrics.read_text())
    assert record.items() >= {"step": 4, "eval/clips/wer": 0.25, "eval/clips/loss": 0.5}.items()
    assert record["eval/clips/cer"] == pytest.approx(27 / 132)  # " one" to " 19"
    assert record["eval/clips/num_cut"] == 1
    lines = folder.transcripts("clips", 4).read_text().splitlines()
    assert [json.loads(line)["reference"] for line in lines] == [f"said {i}" for i in range(20)]
    assert read_scores(str(folder.transcripts("clips", 4))) == list(transcripts)
    assert (
        "step 4, clips: WER 25.0%, loss 0.500 over 20 utterances, cut: 1 by --max-new-tokens"
    ) in caplog.messages
    assert sum("said" in message for message in caplog.messages) == 10


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (3, 3), (10, 10), (60, 10), (64, 10)])
def test_samples_come_from_the_whole_evaluation(count, expected):
    transcripts = [transcript(str(i), "go") for i in range(count)]
    chosen = samples(transcripts)
    assert len(chosen) == expected
    assert not count or count - int(chosen[-1].id) <= 7
