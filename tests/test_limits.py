"""What cuts hypotheses: too many tokens, and the same ones again and again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_projector.config import LIMITS, DecodeConfig
from flax_projector.models.decode import generate
from flax_projector.models.limits import Repeats, token_limits
from tests.models import DECODERS, VOCAB, around, make_decoder_pair, random_floats

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [8, 8, 9, 24, 96, 96]),
        ({"tokens_per_sec": 0.5}, [8, 8, 8, 8, 11, 23]),
        ({"max_new_tokens": 5}, [5, 5, 5, 5, 5, 5]),
        ({"max_new_tokens": 20}, [8, 8, 9, 20, 20, 20]),
        ({"tokens_per_sec": 0.0}, [96] * 6),
        ({"tokens_per_sec": 0.0, "max_new_tokens": 7}, [7] * 6),
    ],
    ids=str,
)
def test_a_clip_may_have_as_many_tokens_as_its_length_allows(options, expected) -> None:
    """Of clips of 0, 0.02, 0.08, 1, 6 and 30 seconds."""
    frames = np.array([0, 1, 4, 50, 300, 1500], np.int32)
    config = DecodeConfig(**options)
    assert token_limits(frames, config).tolist() == expected
    limits = jax.jit(functools.partial(token_limits, config=config))(frames)
    assert np.asarray(limits).tolist() == expected


def excess_of(tokens: list[int], max_repeats: int) -> int:
    """How much of the end is repeated, written out."""
    for length in range(1, 17):
        run = length
        while run < len(tokens) and tokens[-run - 1] == tokens[-run - 1 + length]:
            run += 1
        if run <= len(tokens) and run >= max(16, max_repeats * length):
            return run - length
    return 0


@pytest.mark.parametrize("max_repeats", [0, 2, 3, 4])
def test_repeats_are_found_where_they_are(max_repeats) -> None:
    """In texts of few words, with and without a phrase that is repeated at their end."""
    config, rng = DecodeConfig(max_repeats=max_repeats), np.random.default_rng(0)
    texts = rng.integers(0, 9, (60, 80))
    for row, text in enumerate(texts[:50]):
        phrase = rng.integers(0, 9, row % 18 + 1)
        start = rng.integers(0, 30)
        text[start:] = np.resize(phrase, 80 - start)
    found = []

    def add(repeats, tokens):
        repeats = repeats.add(tokens)
        return repeats, repeats.excess(config)

    _, found = jax.lax.scan(add, Repeats.none((60,), config), jnp.asarray(texts.T, jnp.int32))
    expected = [
        [excess_of(text[: n + 1].tolist(), max_repeats) if max_repeats else 0 for n in range(80)]
        for text in texts
    ]
    np.testing.assert_array_equal(np.asarray(found).T, expected)
    assert (np.max(expected, axis=1) > 0).sum() > 20 or not max_repeats


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny Llama that soon says the same again and again."""
    llama = make_decoder_pair(
        tmp_path_factory.mktemp("llama"), **DECODERS["tied, 3 heads per kv head"], gain=1.2
    )
    model = around(llama.config)
    return model, llama.params, random_floats(6, 5, llama.config.hidden_size)


def run(pair, config: DecodeConfig, limits=None):
    model, params, inputs = pair
    decode = functools.partial(generate, model=model, config=config, end_of_turn=VOCAB)
    lengths = jnp.full(len(inputs), inputs.shape[1])
    return map(np.asarray, jax.jit(decode)(params, jnp.asarray(inputs), lengths, limits))


def test_what_greedy_decoding_repeats_is_said_once(pair) -> None:
    config = DecodeConfig(max_new_tokens=48, max_repeats=0)
    endless, _ = run(pair, config)
    tokens, cut = run(pair, dataclasses.replace(config, max_repeats=2))
    expected, limits = [], []
    for text in endless.tolist():
        lengths = range(1, len(text) + 1)
        over = [(n, excess_of(text[:n], 2)) for n in lengths if excess_of(text[:n], 2)]
        kept = over[0][0] - over[0][1] if over else len(text)
        expected.append(text[:kept] + [VOCAB] * (len(text) - kept))
        limits.append("max_repeats" if over else "max_new_tokens")
    assert tokens.tolist() == expected
    assert [LIMITS[code - 1] for code in cut] == limits
    assert set(limits) == {"max_repeats", "max_new_tokens"} or limits.count("max_repeats") > 2


def test_beams_end_where_they_repeat(pair) -> None:
    config = DecodeConfig(beams=3, max_new_tokens=48, max_repeats=2)
    tokens, cut = run(pair, config)
    assert (cut == LIMITS.index("max_repeats") + 1).any()
    for text, code in zip(tokens.tolist(), cut, strict=True):
        said = [token for token in text if token != VOCAB]
        assert not any(excess_of(said[:n], 2) for n in range(1, len(said)))
        assert (len(said) < 48) == (LIMITS[code - 1] == "max_repeats")


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_are_cut_at_their_own_limits(pair, beams) -> None:
    config = DecodeConfig(beams=beams, max_new_tokens=8, max_repeats=0)
    limits = (1, 3, 8, 5, 8, 2)
    tokens, cut = run(pair, config, jnp.asarray(limits))
    assert [(row != VOCAB).sum() for row in tokens] == list(limits)
    named = ["max_new_tokens" if limit == 8 else "tokens_per_sec" for limit in limits]
    assert [LIMITS[code - 1] for code in cut] == named
    if beams == 1:
        whole, _ = run(pair, config)
        rest = np.arange(8) >= np.array(limits)[:, None]
        np.testing.assert_array_equal(tokens, np.where(rest, VOCAB, whole))
