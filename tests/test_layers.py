"""The layers that projector and towers share, against PyTorch and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from flax_projector.models.layers import RMSNorm, exact_gelu
from tests.models import random_floats
from tests.parity import assert_close, assert_within

pytestmark = pytest.mark.torch

BF16_GRID = np.linspace(-9, 9, 2001).astype(np.float32)


@pytest.mark.parity("PyTorch")
def test_gelu_is_the_exact_one() -> None:
    gelu = torch.nn.functional.gelu
    expected = gelu(torch.from_numpy(BF16_GRID))
    assert_close(exact_gelu(jnp.asarray(BF16_GRID)), expected, 1e-6)
    assert abs(gelu(torch.from_numpy(BF16_GRID), approximate="tanh") - expected).max() > 4e-4


@pytest.mark.parity("PyTorch in f64")
@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 2e-6), (np.float64, 1e-12)])
def test_gelu_is_exact_in_the_negative_tail(dtype, limit) -> None:
    x = np.linspace(-12, 0, 10_001).astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        got = exact_gelu(jnp.asarray(x))
    assert got.dtype == dtype
    assert_within(got, torch.nn.functional.gelu(torch.from_numpy(x).double()), limit)


@pytest.mark.parity("PyTorch in f64")
def test_gelu_rounds_once_in_bf16() -> None:
    x = torch.from_numpy(BF16_GRID).bfloat16()
    got = exact_gelu(jnp.asarray(x.float().numpy(), jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    expected = torch.nn.functional.gelu(x.double()).float()
    assert_close(got, expected, 2**-8)  # half a unit in the last place


def bf16_norms() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Llama's norm in PyTorch, ours and Flax's, of the same bf16 inputs and scale."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(101, 97)).astype(np.float32)).bfloat16()
    theirs = LlamaRMSNorm(97, eps=1e-6)
    scale = rng.normal(1, 0.5, size=97).astype(np.float32)
    theirs.weight.data = torch.from_numpy(scale).bfloat16()
    variables = {"params": {"scale": jnp.asarray(scale)}}
    jax_x = jnp.asarray(x.float().numpy(), jnp.bfloat16)
    ours = RMSNorm(1e-6, jnp.bfloat16).apply(variables, jax_x)
    flax = nn.RMSNorm(epsilon=1e-6, dtype=jnp.bfloat16).apply(variables, jax_x)
    expected = theirs(x).float().detach().numpy()
    return expected, np.asarray(ours), np.asarray(flax)


@pytest.mark.parity("transformers")
def test_norm_rounds_in_the_order_of_llama_bit_for_bit() -> None:
    expected, ours, _ = bf16_norms()
    assert_close(ours, expected, 0)


def test_norm_of_flax_rounds_in_another_order() -> None:
    expected, _, flax = bf16_norms()
    assert np.mean(flax != expected) > 0.05


@pytest.mark.parity("transformers")
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_norm_equals_llama_in_f32(eps) -> None:
    x, scale = random_floats(11, 13), random_floats(13)
    theirs = LlamaRMSNorm(13, eps=eps)
    theirs.weight.data = torch.from_numpy(scale)
    ours = RMSNorm(eps).apply({"params": {"scale": scale}}, jnp.asarray(x))
    assert_close(ours, theirs(torch.from_numpy(x)), 1e-6)
