"""The optimizer and its schedule against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import (
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
)

from convert.torch_projector import ResidualAudioProjector as TorchProjector
from convert.trees import flatten
from flax_projector.config import CTCConfig, MeshConfig, OptimizerConfig, ProjectorConfig
from flax_projector.models.projector import ResidualAudioProjector
from flax_projector.sharding import make_mesh, replicated
from flax_projector.training.state import (
    abstract_state,
    make_optimizer,
    make_schedule,
    shardings_of,
)
from tests.models import make_projector_pair, projector_to_flax
from tests.parity import assert_close

pytestmark = pytest.mark.torch


@pytest.mark.parity("PyTorch")
@pytest.mark.parametrize("options", [{}, {"b1": 0.7, "b2": 0.95, "eps": 1e-2}])
def test_twenty_updates_equal_those_of_torch(options) -> None:
    """Clipping, warm-up, cosine and decay of the kernels alone, against PyTorch's own."""
    config = ProjectorConfig(7, 13, projector_pool_stride=3, projector_hidden_dim=29)
    optim = OptimizerConfig(learning_rate=3e-3, warmup_steps=5, weight_decay=0.1, **options)
    num_steps = 20
    module, params = make_projector_pair(TorchProjector, config)
    is_kernel = {name: p.ndim == 2 for name, p in module.named_parameters()}
    groups = [
        {
            "params": [p for name, p in module.named_parameters() if is_kernel[name] == decayed],
            "weight_decay": optim.weight_decay if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    betas = (optim.b1, optim.b2)
    adamw = torch.optim.AdamW(groups, lr=optim.learning_rate, betas=betas, eps=optim.eps)
    schedule = get_cosine_schedule_with_warmup(adamw, optim.warmup_steps, num_steps)
    optimizer = make_optimizer(optim, make_schedule(optim, num_steps, CTCConfig()))

    def loss(params, frames, target):
        audio = ResidualAudioProjector(config).apply({"params": params}, frames)
        return jnp.mean((jnp.asarray(audio) - target) ** 2)

    @jax.jit
    def update(params, state, frames, target):
        updates, state = optimizer.update(jax.grad(loss)(params, frames, target), state, params)
        return optax.apply_updates(params, updates), state

    state, norms = jax.jit(optimizer.init)(params), []
    rng = np.random.default_rng(3)
    for _ in range(num_steps):
        frames = rng.normal(size=(2, 11, 7)).astype(np.float32)
        target = rng.normal(scale=rng.uniform(0, 3), size=(2, 4, 13)).astype(np.float32)
        params, state = update(params, state, frames, target)
        adamw.zero_grad()
        error = module(torch.from_numpy(frames)) - torch.from_numpy(target)
        error.square().mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), optim.clip_norm).item())
        adamw.step()
        schedule.step()
    assert min(norms) < optim.clip_norm < max(norms)  # both sides of clipping were tried
    expected = flatten(projector_to_flax(config, dict(module.named_parameters())))
    for name, leaf in flatten(params).items():
        assert_close(leaf, expected[name], 1e-5, name)


@pytest.mark.parity("transformers")
@pytest.mark.parametrize("final_lr_rate", [0.0, 0.2])
def test_learning_rates_of_warm_start_and_llm_equal_those_of_transformers(final_lr_rate) -> None:
    """Each stage has a schedule of its own."""
    config = OptimizerConfig(learning_rate=0.3, warmup_steps=4, final_lr_rate=final_lr_rate)
    ctc = CTCConfig(num_steps=9, learning_rate=0.7)
    num_steps, expected = 21, []
    for peak, length in ((ctc.learning_rate, 9), (config.learning_rate, 12)):
        sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
        schedule = get_cosine_with_min_lr_schedule_with_warmup(
            sgd, config.warmup_steps, length, min_lr_rate=final_lr_rate
        )
        for _ in range(length):
            expected += schedule.get_last_lr()
            sgd.step()
            schedule.step()
    rates = jax.vmap(make_schedule(config, num_steps, ctc))(jnp.arange(num_steps))
    assert_close(rates, np.array(expected), 1e-6)


def test_a_run_that_ends_within_its_warm_up_is_the_beginning_of_one() -> None:
    config = OptimizerConfig(learning_rate=0.3, warmup_steps=6)
    rates = jax.vmap(make_schedule(config, 4, CTCConfig()))(jnp.arange(4))
    assert_close(rates, np.array([0.0, 0.05, 0.1, 0.15]), 1e-6)


def test_moments_are_sharded_like_their_parameters_and_counts_are_replicated() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    optimizer = make_optimizer(OptimizerConfig(), optax.constant_schedule(1.0))
    state = abstract_state(ProjectorConfig(6, 8), optimizer, mesh)
    expected = shardings_of(state.params)
    assert not all(sharding.is_fully_replicated for sharding in jax.tree.leaves(expected))
    for name in ("mu", "nu"):
        assert shardings_of(optax.tree.get(state.opt_state, name)) == expected
    counts = [leaf for _, leaf in optax.tree.get_all_with_path(state.opt_state, "count")]
    assert counts
    assert {leaf.sharding for leaf in (state.step, *counts)} == {replicated(mesh)}


def test_flax_parameters_share_no_memory_with_torch() -> None:
    """Or an update in place by PyTorch would change them before JAX, which is late, reads them."""
    config = ProjectorConfig(7, 13, projector_pool_stride=3, projector_hidden_dim=29)
    module, params = make_projector_pair(TorchProjector, config)
    theirs = [parameter.detach().numpy() for parameter in module.parameters()]
    assert not any(
        np.shares_memory(leaf, array) for leaf in flatten(params).values() for array in theirs
    )
