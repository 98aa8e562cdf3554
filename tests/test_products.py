"""How precisely numbers are multiplied, as a step or an evaluation asks for it.

Read from what is traced: XLA's CPU backend multiplies f32 in f32 whatever it is asked for.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

from flax_projector.config import DecodeConfig
from flax_projector.models import attention
from flax_projector.models.decode import decode
from flax_projector.training.evaluate import eval_step
from flax_projector.training.objectives import CTCObjective, LLMObjective
from flax_projector.training.state import init_state
from flax_projector.training.train_step import train_step
from tests.tiny_model import PROJECTOR, make_batch, make_model, make_params

F32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
CTC = CTCObjective((60, *range(60)), PROJECTOR.projector_pool_stride)


class Product(NamedTuple):
    """A matrix product or convolution.

    Attributes:
      dtypes: of its factors.
      is_exact: whether f32 factors are multiplied as they are.
      where: shapes of its factors, for messages.
    """

    dtypes: tuple[Any, ...]
    is_exact: bool
    where: str


def products(function: Callable[..., Any], *args: Any) -> list[Product]:
    """All products that a function asks for, those in its loops and kernels included."""
    return [
        Product(
            dtypes=tuple(factor.aval.dtype for factor in equation.invars),
            is_exact=equation.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2,
            where=str([factor.aval for factor in equation.invars]),
        )
        for equation in equations(jax.make_jaxpr(function)(*args).jaxpr)
        if equation.primitive.name in ("dot_general", "conv_general_dilated")
    ]


def equations(value: Any) -> Iterator[Any]:
    """Of a program, and of all programs in the parameters of its equations."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from equations(part)
    elif hasattr(value, "eqns"):
        for equation in value.eqns:
            yield equation
            yield from equations(tuple(equation.params.values()))
    elif hasattr(value, "jaxpr"):
        yield from equations(value.jaxpr)


@pytest.fixture(autouse=True)
def default_precision():
    """As outside of tests, which multiply as precisely as they can."""
    with jax.default_matmul_precision(None):
        yield


def trace(use: str, dtype: Any) -> list[Product]:
    """The products of one use of the tiny model, from waveforms."""
    model = make_model(dtype=dtype)
    projector, *towers = make_params()
    towers = jax.tree.map(lambda leaf: leaf.astype(dtype), towers)
    batch = make_batch(2, audio="samples")
    if use == "transcribe":
        config = DecodeConfig(max_new_tokens=2)
        transcribe = functools.partial(decode, model=model, config=config, end_of_turn=0)
        return products(transcribe, projector, *towers, batch)
    if use == "evaluate":
        return products(functools.partial(eval_step, model=model), projector, *towers, batch)
    step = functools.partial(
        train_step,
        model=model,
        optimizer=optax.sgd(1.0),
        seed=0,
        objective={"train": LLMObjective(), "warm start": CTC}[use],
    )
    return products(step, init_state(projector, optax.sgd(1.0)), *towers, batch)


USES = ["train", "warm start", "evaluate", "transcribe"]


@pytest.mark.parametrize("use", USES)
def test_f32_is_multiplied_in_f32(use, monkeypatch):
    """As on a TPU: by the fused attention too."""
    monkeypatch.setattr(attention, "mesh_platform", lambda: "tpu")
    found = trace(use, F32)
    assert len(found) > 10
    assert not [product.where for product in found if not product.is_exact]


@pytest.mark.parametrize("use", USES)
def test_bf16_runs_multiply_in_f32_only_what_is_f32(use):
    """The spectrum of the log-mel, and the log-probabilities of CTC."""
    for product in trace(use, BF16):
        assert product.is_exact == (product.dtypes == (F32, F32)), product.where


def test_products_at_the_default_precision_are_found():
    def scan(x):
        return jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=2)[0]

    x = jnp.ones((3, 3))
    (product,) = products(scan, x)
    assert product.dtypes == (F32, F32) and not product.is_exact
    with jax.default_matmul_precision("highest"):
        assert products(scan, x)[0].is_exact
