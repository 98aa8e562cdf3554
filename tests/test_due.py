"""When a run logs, saves and evaluates."""

import dataclasses

import pytest

from flax_projector.config import PRESETS, CTCConfig
from flax_projector.training.due import Due


def make_due(**options) -> Due:
    defaults = {"num_steps": 20, "log_every_steps": 4, "save_every_steps": 6}
    return Due(dataclasses.replace(PRESETS["tiny"][1], **(defaults | options)))


def due_steps(is_due) -> list[int]:
    return [step for step in range(21) if is_due(step)]


def test_without_a_period_only_the_untrained_and_the_final_projector_are_evaluated():
    assert due_steps(make_due(eval_every_steps=0).evaluate) == [0, 20]


def test_evaluations_are_periodic_and_include_both_ends():
    assert due_steps(make_due(eval_every_steps=6).evaluate) == [0, 6, 12, 18, 20]


@pytest.mark.parametrize(
    ("num_warm_steps", "expected"),
    [
        (5, [0, 6, 12, 18, 20]),
        (6, [0, 12, 18, 20]),  # the warm start ends with step 6, before the LLM has learned
        (7, [0, 12, 18, 20]),
    ],
)
def test_a_warm_start_is_not_evaluated(num_warm_steps, expected):
    due = make_due(eval_every_steps=6, ctc=CTCConfig(num_steps=num_warm_steps))
    assert due_steps(due.evaluate) == expected


def test_lines_are_periodic():
    assert due_steps(make_due().log) == [0, 4, 8, 12, 16, 20]


def test_the_last_line_of_a_warm_start_ends_with_it():
    due = make_due(ctc=CTCConfig(num_steps=10))
    assert due_steps(due.log) == [0, 4, 8, 10, 12, 16, 20]


def test_what_is_evaluated_is_saved():
    due = make_due(eval_every_steps=8)
    assert due_steps(due.save) == [0, 6, 8, 12, 16, 18, 20]


def test_the_end_of_a_warm_start_is_not_saved_by_itself():
    due = make_due(eval_every_steps=0, ctc=CTCConfig(num_steps=10))
    assert due_steps(due.save) == [0, 6, 12, 18, 20]
