"""Beam search against transformers' `generate`."""

import dataclasses
import functools
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flax_projector.config import LIMITS, DecodeConfig, MeshConfig
from flax_projector.models.decode import generate
from flax_projector.models.llama import abstract_decoder
from flax_projector.models.speech_llm import SpeechLLM
from flax_projector.sharding import batch_sharding, make_mesh, use_mesh
from tests.models import DECODERS, VOCAB, around, make_decoder_pair, random_floats

pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("beams")]

SEEDS = (1, 2, 3)
LENGTHS = (4, 9, 1, 6)
MAX_NEW_TOKENS = 8
NO_TOKEN = VOCAB  # as end of turn: nothing ends a hypothesis
SEARCHES = [
    DecodeConfig(
        beams=beams,
        length_penalty=penalty,
        max_new_tokens=MAX_NEW_TOKENS,
        tokens_per_sec=0.0,
        max_repeats=0,
    )
    for beams in (2, 4)
    for penalty in (0.5, 1.0, 2.0)
]


def name_of(search: DecodeConfig) -> str:
    return f"{search.beams} beams, penalty {search.length_penalty}"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For PyTorch, whose threads wait for each other far longer than these products take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> list[Any]:
    """Tiny Llamas with other parameters on both sides, in Flax as part of a whole model."""
    found = []
    for seed in SEEDS:
        folder = tmp_path_factory.mktemp("llama")
        llama = make_decoder_pair(
            folder, **DECODERS["tied, 3 heads per kv head"], gain=2, seed=seed
        )
        model = around(llama.config)
        inputs = seed * random_floats(len(LENGTHS), max(LENGTHS), llama.config.hidden_size)
        parts = {"torch": llama.torch, "params": llama.params, "model": model, "inputs": inputs}
        found.append(SimpleNamespace(**parts))
    return found


@functools.partial(jax.jit, static_argnames=("model", "config"))
def jit_generate(params, inputs, prompt_len, end_of_turn, limits, *, model: SpeechLLM, config):
    return generate(
        params, inputs, prompt_len, limits, model=model, config=config, end_of_turn=end_of_turn
    )


def run(pair, search, end_of_turn: int = NO_TOKEN, lengths=LENGTHS, limits=None):
    limits = (search.max_new_tokens,) * len(lengths) if limits is None else limits
    decoded = jit_generate(
        pair.params,
        jnp.asarray(pair.inputs),
        jnp.asarray(lengths),
        jnp.int32(end_of_turn),
        jnp.asarray(limits),
        model=pair.model,
        config=search,
    )
    return [np.asarray(part) for part in decoded]


def torch_generate(pair, search: DecodeConfig, end_of_turn: int) -> np.ndarray:
    """All rows at once, padded on the left; what follows the end of turn is filled with it."""
    width = max(LENGTHS)
    inputs, mask = np.zeros_like(pair.inputs), np.zeros((len(LENGTHS), width), np.int64)
    for row, length in enumerate(LENGTHS):
        inputs[row, width - length :] = pair.inputs[row, :length]
        mask[row, width - length :] = 1
    out = pair.torch.generate(
        inputs_embeds=torch.from_numpy(inputs),
        attention_mask=torch.from_numpy(mask),
        num_beams=search.beams,
        length_penalty=search.length_penalty,
        max_new_tokens=search.max_new_tokens,
        do_sample=False,
        eos_token_id=None if end_of_turn == NO_TOKEN else end_of_turn,
        pad_token_id=end_of_turn,
    ).numpy()
    filled = np.full((len(LENGTHS), search.max_new_tokens), end_of_turn)
    filled[:, : out.shape[1]] = out
    return filled


@pytest.mark.parametrize("search", SEARCHES, ids=name_of)
def test_padded_batches_give_the_tokens_of_transformers(pairs, search) -> None:
    """Of several models, with rows that end at once, later or never."""
    num_said = set()
    for pair in pairs:
        endless = torch_generate(pair, search, NO_TOKEN)
        tokens, cut = run(pair, search)
        np.testing.assert_array_equal(tokens, endless)
        assert (cut == 1).all()  # by max_new_tokens
        for end_of_turn in np.unique(endless[:2, [0, 4]]).tolist():
            expected = torch_generate(pair, search, end_of_turn)
            tokens, cut = run(pair, search, end_of_turn)
            np.testing.assert_array_equal(tokens, expected)
            np.testing.assert_array_equal(cut, ~(expected == end_of_turn).any(axis=1))
            num_said |= set((expected != end_of_turn).sum(axis=1).tolist())
    # Of the shortest, of those in between and of the longest; a high penalty wants long ones.
    assert num_said >= ({0, 8} if search.length_penalty < 2 else {8}) and len(num_said) > 1


SEARCH = SEARCHES[4]


def test_rows_end_at_their_own_limits(pairs) -> None:
    """As if each were searched alone, with a lower `max_new_tokens`."""
    pair, limits = pairs[0], (3, 8, 1, 5)
    tokens, cut = run(pair, SEARCH, limits=limits)
    for row, limit in enumerate(limits):
        alone = dataclasses.replace(SEARCH, max_new_tokens=limit)
        expected = run(pair, alone)[0][row]
        assert tokens[row].tolist() == [*expected.tolist(), *[NO_TOKEN] * (8 - limit)]
    assert [LIMITS[code - 1] for code in cut] == [
        "max_new_tokens" if limit == 8 else "tokens_per_sec" for limit in limits
    ]


def test_rows_of_padding_give_only_end_of_turn(pairs) -> None:
    whole, _ = run(pairs[0], SEARCH)
    tokens, cut = run(pairs[0], SEARCH, lengths=(0, LENGTHS[1], LENGTHS[2], 0))
    assert (tokens[[0, 3]] == NO_TOKEN).all() and (cut[[0, 3]] == 0).all()
    np.testing.assert_array_equal(tokens[1:3], whole[1:3])


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(2, 2, 2)], ids=str)
def test_rows_on_eight_devices_give_the_tokens_of_one(pairs, mesh) -> None:
    """And no row goes from one device to another."""
    pair, copies = pairs[0], 2
    lengths = jnp.tile(jnp.asarray(LENGTHS), copies)
    limits = jnp.full(len(lengths), SEARCH.max_new_tokens)
    end_of_turn = int(run(pair, SEARCH)[0][1, 4])
    expected, _ = run(pair, SEARCH, end_of_turn)
    devices = make_mesh(mesh)
    rows = batch_sharding(devices)
    shardings = jax.tree.map(
        lambda leaf: leaf.sharding, abstract_decoder(pair.model.llm.config, mesh=devices)
    )
    with use_mesh(devices):
        decode = functools.partial(generate, model=pair.model, config=SEARCH)
        jitted = jax.jit(
            functools.partial(decode, end_of_turn=end_of_turn),
            in_shardings=(shardings, rows, rows, rows),
            out_shardings=rows,
        )
        args = (pair.params, jnp.tile(pair.inputs, (copies, 1, 1)), lengths, limits)
        args = jax.device_put(jax.device_get(args), (shardings, rows, rows, rows))
        compiled = jitted.lower(*args).compile()
        tokens, _ = compiled(*args)
    np.testing.assert_array_equal(tokens, np.tile(expected, (copies, 1)))
    if mesh.tensor == 1:
        program = compiled.as_text() or ""
        sent = re.findall(r" = (\S+) (?:all-gather|all-to-all|collective-permute)", program)
        assert not [shape for shape in sent if not shape.startswith("pred")]
