"""The program that a step compiles to: what devices send each other, and what they hold.

It is read with regular expressions, so each of them is also tried on a program that does wrong.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from flax_projector.config import MeshConfig, OptimizerConfig
from flax_projector.models.speech_llm import apply
from flax_projector.sharding import batch_sharding, make_mesh, replicated, use_mesh
from flax_projector.training.state import init_state, make_optimizer
from flax_projector.training.train_step import train_step
from tests.tiny_model import LENGTH, LLAMA, SAMPLES, TEXT, make_batch, make_model, make_params

pytestmark = pytest.mark.xdist_group("test_step_program")

ROWS = 16  # two for each device
D, V = LLAMA.hidden_size, LLAMA.vocab_size


def compile_for_all_devices(function: Any, *args: Any, in_shardings: Any = None) -> str:
    """The program of every device, as text; arguments are batches unless `in_shardings` says."""
    mesh = make_mesh(MeshConfig())
    shardings = batch_sharding(mesh) if in_shardings is None else in_shardings(mesh)
    with use_mesh(mesh):
        compiled = jax.jit(function, in_shardings=shardings).lower(*args).compile()
    return compiled.as_text() or ""


def compile_step(**options: Any) -> str:
    """A training step, data-parallel over all devices."""
    model, params = make_model(), make_params()
    optimizer = make_optimizer(OptimizerConfig(), optax.constant_schedule(1e-4))
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), params[0])
    step = functools.partial(train_step, model=model, optimizer=optimizer, seed=0, **options)

    def in_shardings(mesh):
        return replicated(mesh), replicated(mesh), replicated(mesh), batch_sharding(mesh)

    batch = make_batch(ROWS, audio="samples")
    return compile_for_all_devices(step, state, *params[1:], batch, in_shardings=in_shardings)


def collectives(program: str) -> set[str]:
    """How devices communicate."""
    names = "all-gather|all-to-all|collective-permute|all-reduce"
    return set(re.findall(rf"= .*? ({names})", program))


def whole_batches(program: str) -> set[str]:
    """Arrays of all rows: waveforms, windows of the log-mel, embeddings."""
    return set(re.findall(rf"\[{ROWS},(?:16000|16400|100,400|\d+,{D})\]", program))


def logits_everywhere(program: str) -> set[str]:
    """Arrays with an axis of the vocabulary and one of all positions."""
    shapes = set(re.findall(r"f32\[([\d,]+)\]", program))
    return {shape for shape in shapes if {str(LENGTH), str(V)} <= set(shape.split(","))}


@pytest.fixture(scope="module")
def program():
    return compile_step()


def test_data_parallel_step_only_sums_gradients(program):
    """No device computes another's share: the batch is never gathered."""
    assert f"f32[2,{SAMPLES}]" in program  # of a device
    assert collectives(program) == {"all-reduce"}
    assert not whole_batches(program)


def test_logits_of_all_positions_are_never_computed(program):
    """Of a [B, L, V] array the step holds nothing, in either direction."""
    assert f"f32[2,{TEXT},{V}]" in program  # of a device
    assert not logits_everywhere(program)


def test_parts_take_their_rows_from_every_device():
    """So that accumulating moves no row to another device."""
    program = compile_step(accumulation_steps=2)
    assert f"f32[1,{SAMPLES}]" in program  # of a device
    assert collectives(program) == {"all-reduce"}


# --- programs that do wrong ------------------------------------------------------------------

WAVEFORMS = jax.ShapeDtypeStruct((ROWS, SAMPLES), jnp.float32)
INPUTS = jax.ShapeDtypeStruct((ROWS, LENGTH, D), jnp.float32)


def spectrum(samples):
    """XLA gathers the batch for an FFT; that is why the log-mel has none."""
    return jnp.sum(jnp.abs(jnp.fft.rfft(samples)))


def split_in_order(samples):
    """Micro-batches of neighbouring rows, which all lie on the same devices."""
    parts = samples.reshape(2, -1, SAMPLES)
    return jax.lax.map(lambda part: jnp.sum(jnp.sin(part)), parts)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (spectrum, "all-gather"),
        (split_in_order, "all-gather"),
        (lambda samples: jnp.sum(samples * samples[::-1]), "collective-permute"),
        (lambda samples: jnp.sum(samples * jnp.sort(samples, axis=0)), "all-to-all"),
    ],
    ids=["fft", "parts of neighbours", "rows in reverse", "rows sorted"],
)
def test_rows_that_move_between_devices_are_found(wrong, expected):
    assert expected in collectives(compile_for_all_devices(wrong, WAVEFORMS))


def test_a_whole_batch_on_one_device_is_found():
    assert whole_batches(compile_for_all_devices(spectrum, WAVEFORMS)) == {f"[{ROWS},{SAMPLES}]"}

    def scan_over_rows(inputs):
        everywhere = jax.lax.with_sharding_constraint(inputs, replicated(make_mesh(MeshConfig())))
        return jax.lax.map(lambda row: jnp.sum(jnp.sin(row)), everywhere)

    found = whole_batches(compile_for_all_devices(scan_over_rows, INPUTS))
    assert f"[{ROWS},{LENGTH},{D}]" in found


def test_logits_of_all_positions_are_found():
    model, llm_params = make_model(), make_params()[2]

    def loss_everywhere(hidden):
        logits = apply(model.llm, llm_params, hidden, method="logits")
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])

    program = compile_for_all_devices(jax.grad(loss_everywhere), INPUTS)
    assert logits_everywhere(program) >= {f"2,{LENGTH},{V}"}
