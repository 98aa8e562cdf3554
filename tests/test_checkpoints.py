"""Saving and restoring the state of a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from flax_projector.config import MeshConfig
from flax_projector.sharding import make_mesh
from flax_projector.training.checkpoints import open_manager, restore, save
from flax_projector.training.state import TrainState


def make_state(dtype=jnp.float32) -> TrainState:
    kernel = jax.random.normal(jax.random.key(0), (16, 6)).astype(dtype)
    moments = {"mu": {"a": {"kernel": kernel + 1}}, "count": jnp.int32(3)}
    return TrainState(jnp.int32(3), {"a": {"kernel": kernel}}, moments)


def abstract(state: TrainState, mesh, spec: PartitionSpec) -> TrainState:
    def place(leaf):
        sharding = NamedSharding(mesh, spec if leaf.ndim else PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, state)


@pytest.fixture
def saved(tmp_path):
    with open_manager(tmp_path / "checkpoints", keep=2) as manager:
        for step in (1, 2, 3):
            save(manager, step, make_state(), {"next_index": step})
    return tmp_path / "checkpoints"


def test_saving_leaves_the_preemption_service_alone(tmp_path, monkeypatch):
    """Its one answer is for the guard."""
    polls = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", polls.append)
    with open_manager(tmp_path / "checkpoints", keep=2) as manager:
        save(manager, 1, make_state(), {"next_index": 1})
        manager.wait_until_finished()
        assert manager.latest_step() == 1
    assert polls == []


@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec("fsdp", "tensor")])
def test_restores_the_same_bytes_into_other_shardings(saved, spec):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with open_manager(saved, keep=2) as manager:
        state, data_state = restore(manager, 3, abstract(make_state(), mesh, spec))
    assert data_state == {"next_index": 3}
    assert state.params["a"]["kernel"].sharding.spec == spec
    jax.tree.map(np.testing.assert_array_equal, state, make_state())


def test_keeps_the_newest(saved):
    with open_manager(saved, keep=2) as manager:
        assert list(manager.all_steps()) == [2, 3]


def test_another_dtype_is_an_error_that_names_the_leaf(saved):
    wanted = abstract(make_state(jnp.bfloat16), make_mesh(MeshConfig()), PartitionSpec())
    with (
        open_manager(saved, keep=2) as manager,
        pytest.raises(ValueError, match=r"params/a/kernel: saved as float32, .* bfloat16"),
    ):
        restore(manager, 3, wanted)
