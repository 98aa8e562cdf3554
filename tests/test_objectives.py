"""What each stage of a run minimises: what it normalises by, and what does not change it."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import torch

from flax_projector.config import SpecAugmentConfig
from flax_projector.training.objectives import CTCObjective, LLMObjective, Stages, ctc_classes
from flax_projector.training.train_step import batch_counts
from tests.parity import assert_relative_l2
from tests.tiny_model import make_batch, make_model, make_params, rows_of, with_padding

pytestmark = pytest.mark.xdist_group("test_objectives")

# --- the LLM's cross-entropy -----------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def params():
    return make_params()


@pytest.fixture(scope="module")
def loss_of(model, params):
    """Batch -> (summed loss, metrics), compiled."""
    objective = LLMObjective()

    def loss(params, batch):
        total, metrics = objective.summed_loss(model, *params, batch=batch)
        counts = batch_counts(batch, model)
        return total, metrics | counts | {"num_labels": objective.num_labels(batch)}

    jitted: Any = jax.jit(loss)
    return lambda batch: jitted(params, batch)


@pytest.mark.consistency("ours by halves of the batch")
def test_loss_is_the_mean_over_label_tokens(loss_of):
    """Halves of a batch with unequal label counts weigh by their labels."""
    batch = make_batch(8)
    whole, metrics = loss_of(batch)
    halves = [loss_of(rows_of(batch, part)) for part in (slice(0, 4), slice(4, 8))]
    assert float(metrics["num_labels"]) == batch.label_valid.sum()
    assert_relative_l2(whole, sum(float(h[0]) for h in halves), 1e-5)


@pytest.mark.consistency("ours without the rows")
def test_padding_rows_change_nothing(loss_of):
    batch = make_batch(8, audio="samples")
    loss, metrics = loss_of(batch)
    padded_loss, padded_metrics = loss_of(with_padding(batch, 3))
    assert_relative_l2(padded_loss, loss, 1e-6)
    for name in ("num_labels", "audio_secs", "scale_ratio"):
        np.testing.assert_allclose(float(padded_metrics[name]), float(metrics[name]), rtol=1e-6)


@pytest.mark.parametrize("count", [1, 7, 20])
@pytest.mark.parametrize("what", ["tokens", "labels", "frames"])
@pytest.mark.consistency("ours without the padding")
def test_padding_at_the_end_of_a_row_changes_nothing(model, params, what, count):
    """Neither the loss nor its gradient nor what is measured: buckets may have any lengths."""
    batch = make_batch(8)
    last = {name: getattr(batch, name)[:, -1:] for name in ("label_positions", "labels")}
    longer = {
        "tokens": {"tokens": (batch.tokens, 60)},
        "labels": {
            "label_valid": (batch.label_valid, False),
            **{name: (getattr(batch, name), last[name].max()) for name in last},
        },
        "frames": {"frames": (batch.frames, 9.0)},
    }[what]
    padded: Any = {
        name: np.pad(
            array, [(0, 0), (0, count)] + [(0, 0)] * (array.ndim - 2), constant_values=fill
        )
        for name, (array, fill) in longer.items()
    }
    max_frames = batch.max_frames + count * (what == "frames")
    padded = dataclasses.replace(batch, **padded, max_frames=max_frames)

    def loss(projector_params, batch):
        return LLMObjective().summed_loss(model, projector_params, *params[1:], batch=batch)

    measure: Any = jax.jit(jax.value_and_grad(loss, has_aux=True))
    found, expected = (measure(params[0], b) for b in (padded, batch))
    jax.tree.map(lambda x, y: assert_relative_l2(x, y, 1e-5), found, expected)


def test_spec_augment_changes_with_the_step_and_never_in_evaluation(params, model, loss_of):
    batch = make_batch(8, audio="samples")
    augmented = dataclasses.replace(model, augmentation=SpecAugmentConfig(mask_time_prob=0.3))

    def losses_of(model, keys):
        def loss(params, batch, key):
            return LLMObjective().summed_loss(model, *params, batch=batch, key=key)[0]

        jitted = jax.jit(loss)
        return [float(jitted(params, batch, key)) for key in keys]

    keys = [jax.random.key(i) for i in range(2)]
    first, again, other = losses_of(augmented, [keys[0], keys[0], keys[1]])
    assert first == again != other
    plain = float(loss_of(batch)[0])
    assert losses_of(augmented, [None]) == losses_of(model, keys[:1]) == [plain] != [first]


# --- CTC -------------------------------------------------------------------------------------


def test_ctc_classes_are_the_blank_and_the_spoken_tokens():
    spoken = np.array([4, 9, 17], np.int32)
    assert ctc_classes(spoken, blank=3) == (3, 4, 9, 17)
    with pytest.raises(ValueError, match=r"token 17 occurs in a transcript: choose another"):
        ctc_classes(spoken, blank=17)


@pytest.mark.torch
@pytest.mark.parity("PyTorch")
def test_ctc_of_a_batch_is_that_of_its_clips_one_by_one(model, params):
    """The valid audio tokens of each clip against its transcript without the end, by torch."""
    batch = make_batch(8)
    batch.num_frames[1] = 4  # one audio token for several labels
    assert batch.label_valid[0].all()  # a row without padding
    targets = [
        labels[valid].tolist()
        for labels, valid in zip(batch.labels, batch.label_valid, strict=True)
    ]
    spoken = np.unique([label for target in targets for label in target[:-1]])
    classes, k = ctc_classes(spoken, blank=60), model.projector.config.projector_pool_stride
    objective = CTCObjective(classes, k)

    @jax.jit
    def run(params, batch):
        total, _ = objective.summed_loss(model, *params, batch=batch)
        return total, objective.num_labels(batch), model.hear(*params[:2], batch=batch)

    total, num_labels, audio = run(params, batch)
    embedding = np.asarray(params[2]["embed_tokens"]["embedding"])[list(classes)]
    losses = []
    for clip, num_frames, target in zip(np.asarray(audio), batch.num_frames, targets, strict=True):
        logits = torch.from_numpy(clip[: -(-int(num_frames) // k)] @ embedding.T)
        labels = torch.tensor([[classes.index(token) for token in target[:-1]]])
        loss = torch.nn.functional.ctc_loss(
            logits.log_softmax(-1)[:, None],
            labels,
            torch.tensor([len(logits)]),
            torch.tensor([labels.shape[1]]),
            reduction="sum",
        )
        if labels.shape[1] and torch.isfinite(loss):
            losses.append((float(loss), labels.shape[1]))
    assert len(losses) == 7
    assert float(num_labels) == sum(count for _, count in losses)
    assert_relative_l2(total, sum(loss for loss, _ in losses), 1e-4)


# --- stages ----------------------------------------------------------------------------------

CTC, LLM = CTCObjective((0, 1), 4), LLMObjective()


def test_the_warm_start_ends_after_its_last_step():
    stages = Stages(CTC, 3)
    assert [stages.objective(step) for step in range(5)] == [CTC, CTC, CTC, LLM, LLM]
    assert [Stages().objective(step) for step in range(2)] == [LLM, LLM]


@pytest.mark.parametrize(
    ("first", "end", "expected"),
    [
        (0, 5, [CTC, LLM]),
        (2, 5, [CTC, LLM]),  # one step of the warm start is left
        (2, 4, [CTC, LLM]),  # and one of the LLM's
        (3, 5, [LLM]),  # resumed right after the warm start
        (4, 5, [LLM]),
        (0, 3, [CTC]),
        (2, 3, [CTC]),
        (5, 5, []),  # a finished run has nothing to compile
        (3, 3, []),
    ],
)
def test_objectives_are_those_of_the_steps_that_are_left(first, end, expected):
    stages = Stages(CTC, 3)
    assert stages.objectives(first, end) == expected
    assert expected == list(dict.fromkeys(stages.objective(step) for step in range(first, end)))


@pytest.mark.parametrize(("first", "end", "expected"), [(0, 5, [LLM]), (4, 5, [LLM]), (5, 5, [])])
def test_without_a_warm_start_there_is_one_objective(first, end, expected):
    assert Stages().objectives(first, end) == expected
