"""Which projector of a run is kept as the best."""

import json
import logging
from pathlib import Path

import pytest

from flax_projector.models.speech_llm import Params
from flax_projector.run_folder import RunFolder
from flax_projector.storage import AnyPath
from flax_projector.training.best import Best
from tests.scored import scores_of


class Run:
    """A run folder, and a `Best` of each of its starts; a projector is the text of its step."""

    def __init__(self, path: Path):
        self.folder = RunFolder(path)
        self.start()

    def start(self) -> None:
        def write(path: AnyPath, params: Params) -> None:
            path.write_text(params)

        self.best = Best(self.folder, write)

    def offer(self, step: int, *scores: tuple[float, float]) -> None:
        self.best.offer(step, [scores_of(wer, loss) for wer, loss in scores], f"step {step}")

    @property
    def kept(self) -> str | None:
        return self.folder.best.read_text() if self.folder.best.exists() else None


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


@pytest.mark.parametrize(
    ("wer", "loss", "is_better"),
    [
        (0.2, 9.0, True),  # a lower word error rate, whatever the loss
        (0.3, 1.9, True),  # among equals the lower loss
        (0.3, 2.0, False),  # no better: the earlier one stays
        (0.3, 2.1, False),
        (0.4, 0.1, False),
    ],
)
def test_the_lower_word_error_rate_is_kept_and_among_equals_the_lower_loss(
    run, wer, loss, is_better
):
    run.offer(2, (0.3, 2.0))
    assert run.kept == "step 2"
    run.offer(4, (wer, loss))
    assert run.kept == ("step 4" if is_better else "step 2")
    expected = {"step": 4, "error_rate": wer, "loss": loss}
    if not is_better:
        expected = {"step": 2, "error_rate": 0.3}
    assert json.loads(run.folder.best_scores.read_text()).items() >= expected.items()


def test_sets_count_by_their_mean(run):
    run.offer(2, (0.3, 2.0), (0.5, 2.0))
    run.offer(4, (0.1, 2.0), (0.8, 2.0))  # the best of one set, but worse on the whole
    assert run.kept == "step 2"
    run.offer(6, (0.7, 1.0), (0.0, 2.0))
    assert run.kept == "step 6"
    assert json.loads(run.folder.best_scores.read_text()) == {
        "step": 6,
        "error_rate": 0.35,
        "loss": 1.5,
    }


def test_an_untrained_projector_is_never_kept(run):
    run.offer(0, (0.0, 0.0))
    assert run.kept is None and not run.folder.best_scores.exists()
    run.offer(2, (0.9, 9.0))
    assert run.kept == "step 2"


def test_without_evaluation_sets_nothing_is_kept(run):
    run.offer(2)
    assert run.kept is None and not run.folder.best_scores.exists()


def test_a_restart_compares_with_what_was_kept_before(run):
    run.offer(2, (0.3, 2.0))
    run.start()
    run.offer(4, (0.4, 1.0))
    assert run.kept == "step 2"
    run.offer(6, (0.3, 1.0))
    assert run.kept == "step 6"


@pytest.mark.parametrize(("last_step", "says_so"), [(8, True), (2, False)])
def test_a_best_step_that_is_not_the_last_is_reported(run, caplog, last_step, says_so):
    caplog.set_level(logging.INFO)
    run.offer(2, (0.25, 2.0))
    run.best.report(last_step)
    text = f"step 2 had the lowest error rate, 25.0%: its projector is in {run.folder.best}"
    assert (text in caplog.text) == says_so


def test_a_run_without_evaluations_reports_no_best_step(run, caplog):
    caplog.set_level(logging.INFO)
    run.best.report(8)
    assert not caplog.text
