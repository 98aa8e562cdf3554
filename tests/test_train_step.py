"""One update: what it learns from, what it changes, and what it counts."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convert.trees import flatten
from flax_projector.batch import AUDIO_TOKEN, Bucket, abstract_batch, to_global
from flax_projector.config import PRESETS, MeshConfig, OptimizerConfig, ProjectorConfig
from flax_projector.models.llama import abstract_decoder, make_cache
from flax_projector.models.whisper import abstract_encoder
from flax_projector.sharding import batch_sharding, make_mesh, replicated, use_mesh
from flax_projector.training.objectives import CTCObjective, LLMObjective, Objective
from flax_projector.training.state import (
    abstract_state,
    begin_with,
    init_state,
    make_optimizer,
    shardings_of,
)
from flax_projector.training.throughput import compilations
from flax_projector.training.train_step import batch_counts, compile_steps, train_step
from tests.parity import assert_relative_l2
from tests.tiny_model import (
    FRAMES,
    LENGTH,
    LLAMA,
    PREFIX,
    PROJECTOR,
    TEXT,
    WHISPER,
    make_batch,
    make_model,
    make_params,
    mesh_of,
    rows_of,
    with_padding,
)

pytestmark = pytest.mark.xdist_group("test_train_step")

LLM = LLMObjective()
CTC = CTCObjective((60, *range(60)), PROJECTOR.projector_pool_stride)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def params():
    return make_params()


@pytest.fixture(scope="module")
def update(model, params):
    """One step on eight rows: what it learned from, and its metrics.

    Plain gradient descent at rate 1 moves by the gradients.
    """

    @functools.cache
    def update(objective: Objective, num_devices: int, accumulation_steps: int) -> Any:
        descent, mesh = optax.sgd(1.0), mesh_of(num_devices)
        place = functools.partial(jax.device_put, device=replicated(mesh))
        state = place(init_state(params[0], descent))
        step = functools.partial(
            train_step,
            model=model,
            optimizer=descent,
            seed=0,
            objective=objective,
            accumulation_steps=accumulation_steps,
        )
        with use_mesh(mesh):
            batch = jax.device_put(make_batch(8), batch_sharding(mesh))
            after, metrics = jax.jit(step)(state, *place(params[1:]), batch)
        gradients = jax.tree.map(
            lambda a, b: np.asarray(a) - np.asarray(b), state.params, after.params
        )
        return gradients, jax.device_get(metrics)

    return update


@pytest.mark.consistency("ours in one part on one device")
@pytest.mark.parametrize("objective", [LLM, CTC], ids=["llm", "ctc"])
@pytest.mark.parametrize(("num_devices", "accumulation_steps"), [(8, 1), (1, 4), (2, 4), (4, 2)])
def test_parts_and_devices_do_not_change_the_gradients(
    update, objective, num_devices, accumulation_steps
):
    """Rows have unequal numbers of labels: a mean of means would weigh them wrongly."""
    expected, whole = update(objective, 1, 1)
    gradients, metrics = update(objective, num_devices, accumulation_steps)
    jax.tree.map(lambda got, want: assert_relative_l2(got, want, 1e-5), gradients, expected)
    assert metrics.keys() == whole.keys()
    for name in set(whole) - {"scale_ratio"}:
        np.testing.assert_allclose(metrics[name], whole[name], rtol=1e-5, err_msg=name)


def test_scale_ratio_is_the_mean_over_micro_batches(model, params, update):
    micro_batches = make_batch(8).split(4)

    @jax.jit
    def ratio_of(params, batch):
        return LLM.summed_loss(model, *params, batch=batch)[1]["scale_ratio"]

    ratios = [float(ratio_of(params, rows_of(micro_batches, i))) for i in range(4)]
    assert max(ratios) > 1.01 * min(ratios)
    _, metrics = update(LLM, 1, 4)
    np.testing.assert_allclose(metrics["scale_ratio"], np.mean(ratios), rtol=1e-5)


@pytest.mark.parametrize("prefix_len", [0, len(PREFIX)])
def test_counts_leave_out_padding_and_the_prefix(model, prefix_len):
    """The prefix is not computed in a step."""
    prefix = make_cache(LLAMA, 1, prefix_len, jnp.float32) if prefix_len else None
    model, batch = dataclasses.replace(model, prefix=prefix), make_batch(8)
    counts, padded_counts = (
        batch_counts(jax.tree.map(jnp.asarray, b), model) for b in (batch, with_padding(batch, 3))
    )
    num_audio = (batch.tokens == AUDIO_TOKEN).sum()
    num_labels = batch.label_valid.sum(axis=1)
    assert counts["num_clips"] == 8
    assert counts["num_audio_tokens"] == num_audio
    assert counts["audio_secs"] == pytest.approx(4 * num_audio * 0.02)
    assert counts["num_tokens"] == (batch.prompt_len + num_labels - 1 - prefix_len).sum()
    capacity = 8 * (LENGTH - prefix_len)
    assert counts["padding_rate"] == pytest.approx(1 - counts["num_tokens"] / capacity)
    for name in set(counts) - {"padding_rate"}:
        assert padded_counts[name] == counts[name], name


def test_a_step_without_the_llm_counts_none_of_its_tokens(model):
    counts = batch_counts(make_batch(8), model)
    without = batch_counts(make_batch(8), model, runs_llm=False)
    assert counts.keys() - without.keys() == {"num_tokens", "padding_rate"}
    assert without == {name: counts[name] for name in without}


def test_dropout_changes_with_the_step_and_not_with_the_run(params):
    model = make_model(
        ProjectorConfig(encoder_dim=12, llm_dim=20, projector_hidden_dim=16, projector_dropout=0.4)
    )
    optimizer = make_optimizer(OptimizerConfig(), optax.constant_schedule(1e-4))
    state, batch = init_state(params[0], optimizer), make_batch(8)

    @jax.jit
    def loss_of(state, frozen, batch):
        step = functools.partial(train_step, model=model, optimizer=optimizer, seed=0)
        return step(state, *frozen, batch=batch)[1]["loss"]

    later = dataclasses.replace(state, step=jnp.int32(1))
    first, again, other = (float(loss_of(s, params[1:], batch)) for s in (state, state, later))
    assert first == again != other


def test_the_loss_of_one_label_is_divided_by_one(model, params):
    batch, optimizer = make_batch(1, seed=5), optax.sgd(1.0)
    assert batch.label_valid.sum() == 1
    step = functools.partial(train_step, model=model, optimizer=optimizer, seed=0)
    state = init_state(params[0], optimizer)

    @jax.jit
    def losses_of(state, batch):
        total = LLM.summed_loss(model, *params, batch=batch)[0]
        return step(state, *params[1:], batch=batch)[1]["loss"], total

    loss, total = losses_of(state, batch)
    assert_relative_l2(loss, total, 1e-6)


def test_micro_batches_have_dropout_of_their_own(params):
    """The same row in both of two micro-batches: alone, it has the first one's dropout."""
    model = make_model(dataclasses.replace(PROJECTOR, projector_dropout=0.4))
    optimizer, row = optax.sgd(1.0), make_batch(1)
    state = init_state(params[0], optimizer)

    @functools.partial(jax.jit, static_argnames="accumulation_steps")
    def loss_of(batch, accumulation_steps):
        step = functools.partial(train_step, model=model, optimizer=optimizer, seed=0)
        _, metrics = step(state, *params[1:], batch=batch, accumulation_steps=accumulation_steps)
        return metrics["loss"]

    alone = loss_of(row, 1)
    both = loss_of(jax.tree.map(lambda x: np.concatenate([x, x]), row), 2)
    assert float(both) != pytest.approx(float(alone), rel=1e-5)


# --- the steps of a run ----------------------------------------------------------------------


def copy(tree: Any) -> Any:
    """On the host; `device_get` may share its memory with a CPU device."""
    return jax.tree.map(np.array, jax.device_get(tree))


@pytest.fixture(scope="module")
def run(model, params):
    """Two steps of CTC and two of the LLM on waveforms, over a mesh that splits all it can.

    Returns:
      The projector and the towers, both before and after; the metrics of the steps; and how many
      programs were compiled while they ran.
    """
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    optimizer = make_optimizer(OptimizerConfig(), optax.constant_schedule(1e-4))
    bucket, rows = Bucket(FRAMES, LENGTH, TEXT), batch_sharding(mesh)
    batch = make_batch(8, audio="samples")
    abstract = abstract_state(PROJECTOR, optimizer, mesh)
    towers = abstract_encoder(WHISPER, mesh=mesh), abstract_decoder(LLAMA, mesh=mesh)
    with use_mesh(mesh):
        frozen = jax.device_put(params[1:], shardings_of(towers))
        projector = jax.device_put(params[0], shardings_of(abstract.params))
        steps = compile_steps(
            [CTC, LLM],
            [(bucket, abstract_batch(batch, 8, rows))],
            abstract,
            frozen,
            optimizer,
            model,
            PRESETS["tiny"][1],
        )
        state = begin_with(projector, optimizer, abstract)
        before, metrics = copy((state.params, frozen)), []
        batch = to_global(batch, 8, rows)
        with compilations() as num_compiled:
            for objective in (CTC, CTC, LLM, LLM):
                state, found = steps[objective, bucket](state, *frozen, batch)
                metrics.append(jax.device_get(found))
            assert int(state.step) == 4
            assert shardings_of(state) == shardings_of(abstract)
            assert all(value.is_fully_replicated for value in found.values())
            return before, copy((state.params, frozen)), metrics, num_compiled()


def changed_leaves(before: Any, after: Any) -> dict[str, bool]:
    changed = jax.tree.map(lambda a, b: a.tobytes() != b.tobytes(), before, after)
    paths = jax.tree_util.tree_leaves_with_path(changed)
    return {jax.tree_util.keystr(path): is_changed for path, is_changed in paths}


def test_towers_stay_bitwise_unchanged_while_every_part_of_the_projector_moves(run):
    (projector, towers), (projector_after, towers_after), _, _ = run
    assert not any(changed_leaves(towers, towers_after).values())
    moved = changed_leaves(projector, projector_after)
    assert all(moved.values()), f"some leaves did not train: {moved}"


def test_the_loss_of_a_sharded_step_is_that_of_one_device(model, params, run):
    """From waveforms, before anything was learned."""
    batch = make_batch(8, audio="samples")

    @jax.jit
    def mean_loss(params, batch):
        return CTC.summed_loss(model, *params, batch=batch)[0] / CTC.num_labels(batch)

    first = run[2][0]
    assert_relative_l2(first["ctc_loss"], mean_loss(params, batch), 1e-5)


def test_steps_name_their_losses_and_counts(run):
    of_both = {"grad_norm", "audio_secs", "num_clips", "num_audio_tokens"}
    of_llm = {"loss", "num_labels", "scale_ratio", "num_tokens", "padding_rate"}
    names = [{name for name in metrics if "/" not in name} for metrics in run[2]]
    assert names == [of_both | {"ctc_loss", "num_ctc_labels"}] * 2 + [of_both | of_llm] * 2


def test_no_step_compiles_while_a_run_trains(run):
    assert run[3] == 0


def test_norms_are_those_of_the_updated_weights(run, params):
    _, (projector, _), metrics, _ = run
    blocks = [f"layers_{i}/{name}" for i in range(2) for name in ("fc1", "fc2")]
    kernels = {f"weight_norm/{name}": name for name in ("input_proj", *blocks)}
    scales = {f"scale_rms/{n}": n for n in ("ln_input", "layer_norms_0", "layer_norms_1")}
    assert {n for n in metrics[-1] if "/" in n} == kernels.keys() | scales.keys()
    leaves = flatten(projector)
    for name, layer in kernels.items():
        expected = np.linalg.norm(leaves[f"{layer}/kernel"])
        np.testing.assert_allclose(metrics[-1][name], expected, rtol=1e-6, err_msg=name)
    for name, layer in scales.items():
        expected = np.sqrt(np.mean(np.square(leaves[f"{layer}/scale"])))
        np.testing.assert_allclose(metrics[-1][name], expected, rtol=1e-6, err_msg=name)
    first = np.linalg.norm(params[0]["input_proj"]["kernel"])
    assert metrics[-1]["weight_norm/input_proj"] != pytest.approx(first, rel=1e-6)
