"""The Llama decoder against transformers."""

import copy
import dataclasses
import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flax_projector.config import RematName
from flax_projector.models.layers import RMSNorm
from flax_projector.models.llama import (
    KVCache,
    LlamaDecoder,
    LlamaLayer,
    make_cache,
)
from flax_projector.models.plain_attention import causal_mask
from flax_projector.models.rotary import rotary_angles
from tests.models import DECODERS, NUM_LAYERS, VOCAB, make_decoder_pair, random_floats
from tests.parity import assert_close, assert_relative_l2, relative_l2

pytestmark = pytest.mark.torch

LENGTH = 11

PAIRS = [
    pytest.param(
        options,
        id=name,
        marks=[
            pytest.mark.variant(options.get("family", "llama")),
            pytest.mark.xdist_group(f"llama, {name}"),
        ],
    )
    for name, options in DECODERS.items()
]


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, tmp_path_factory) -> Any:
    return make_decoder_pair(tmp_path_factory.mktemp("llama"), **request.param)


def random_tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(VOCAB, size=shape, dtype=np.int32)


@functools.partial(jax.jit, static_argnums=0)
def run(module: Any, params: dict, *args: Any) -> Any:
    return module.apply({"params": params}, *args)


run_rotary: Any = jax.jit(rotary_angles, static_argnums=1)


@functools.partial(jax.jit, static_argnums=0)
def run_embeddings(module: LlamaDecoder, params: dict, x: Any, weights: Any) -> Any:
    """Logits of input embeddings, and the gradient of sum(logits * weights)."""
    positions = jnp.arange(x.shape[1])[None]

    def weighted_sum(x):
        apply = functools.partial(module.apply, {"params": params})
        hidden: Any = apply(x, positions=positions, method="blocks")
        logits = jnp.asarray(apply(hidden[0], method="logits"))
        return jnp.sum(logits * weights), logits

    grad, logits = jax.grad(weighted_sum, has_aux=True)(x)
    return logits, grad


@functools.partial(jax.jit, static_argnums=0)
def run_cached(
    module: LlamaDecoder, params: dict, tokens: Any, positions: Any, cache: KVCache, start: Any
) -> Any:
    """Logits of the next tokens, and the cache with them in it."""
    apply = functools.partial(module.apply, {"params": params})
    hidden, cache = apply(  # pyright: ignore[reportAssignmentType]
        apply(tokens, method="embed"),
        positions=positions,
        key_valid=jnp.arange(cache.k.shape[3]) <= positions[..., None],
        cache=cache,
        cache_index=start,
        method="blocks",
    )
    return apply(hidden, method="logits"), cache


@pytest.mark.parity("transformers")
def test_logits_equal_transformers(pair) -> None:
    tokens = random_tokens(3, LENGTH)
    with torch.no_grad():
        expected = pair.torch(torch.from_numpy(tokens).long()).logits
    assert_close(run(pair.module, pair.params, tokens), expected, 1e-4)


def test_config_survives_its_folder(pair) -> None:
    theirs = pair.torch.config
    assert pair.config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ("lm_head" in pair.params) != theirs.tie_word_embeddings
    attention = pair.torch.model.layers[0].self_attn
    assert pair.config.head_dim == attention.head_dim
    assert pair.config.qkv_bias == (attention.q_proj.bias is not None)
    assert pair.config.qk_norm == hasattr(attention, "q_norm")


def test_families_differ_in_what_they_compute(pair) -> None:
    """A config whose extras are dropped computes something else: none of them is idle."""
    extras = {"rope_scaling": None, "no_rope_layers": ()}
    plain = dataclasses.replace(pair.config, **extras)
    tokens = random_tokens(3, LENGTH)
    same = np.allclose(
        run(pair.module, pair.params, tokens), run(LlamaDecoder(plain), pair.params, tokens)
    )
    assert same == (plain == pair.config)


@pytest.mark.parity("transformers")
@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_layer_equals_transformers(pair, layer) -> None:
    x = random_floats(2, LENGTH, pair.config.hidden_size)
    positions = np.arange(LENGTH)[None]
    params = jax.tree.map(lambda leaf: leaf[layer], pair.params["layers"])
    module = LlamaLayer(pair.config, jnp.float32, jnp.float32)
    rotary = run_rotary(positions, pair.config)
    is_rotated = layer not in pair.config.no_rope_layers
    mask = causal_mask(LENGTH)
    (y, _), _ = run(module, params, (x, None), rotary, is_rotated, 0, mask, None, 0)

    torch_x = torch.from_numpy(x)
    hidden = torch.from_numpy(np.array(mask))[:, None]
    expected = pair.torch.model.layers[layer](
        torch_x,
        attention_mask=torch.where(hidden, 0.0, torch.finfo(torch.float32).min),
        position_embeddings=pair.torch.model.rotary_emb(torch_x, torch.from_numpy(positions)),
    )
    assert_close(y, expected, 1e-5)


@pytest.mark.consistency("ours without the scan")
def test_scan_equals_the_layers_one_by_one(pair) -> None:
    x = jnp.asarray(random_floats(2, LENGTH, pair.config.hidden_size))
    scanned, _ = run_embeddings(pair.module, pair.params, x, random_floats(2, LENGTH, VOCAB))
    layer = LlamaLayer(pair.config, jnp.float32, jnp.float32)
    rotary = run_rotary(np.arange(LENGTH)[None], pair.config)
    for i in range(NUM_LAYERS):
        params = jax.tree.map(lambda leaf, i=i: leaf[i], pair.params["layers"])
        is_rotated = i not in pair.config.no_rope_layers
        carry = (x, None)
        (x, _), _ = run(layer, params, carry, rotary, is_rotated, i, causal_mask(LENGTH), None, 0)
    x = run(RMSNorm(pair.config.rms_norm_eps), pair.params["norm"], x)
    apply_logits = jax.jit(functools.partial(pair.module.apply, method="logits"))
    assert_close(scanned, apply_logits({"params": pair.params}, x), 1e-5)


@pytest.mark.parity("transformers")
def test_rotary_angles_equal_transformers_at_every_position(pair) -> None:
    positions = np.arange(900)[None]  # 30 s of audio at 25 tokens per second, and its texts
    cos_sin = run_rotary(positions, pair.config)
    expected = pair.torch.model.rotary_emb(torch.zeros(1), torch.from_numpy(positions))
    for got, theirs in zip(cos_sin, expected, strict=True):
        assert_close(got[:, 0], theirs, 1e-5)


@pytest.mark.consistency("ours without padding")
def test_right_padding_changes_nothing(pair) -> None:
    tokens = random_tokens(3, LENGTH)
    padded = run(pair.module, pair.params, tokens)
    assert_close(padded[:, :7], run(pair.module, pair.params, tokens[:, :7]), 1e-5)


@pytest.mark.parity("transformers")
def test_padded_batch_equals_transformers_with_its_mask(pair) -> None:
    tokens, lengths = random_tokens(3, LENGTH), np.array([4, LENGTH, 7])
    is_text = np.arange(LENGTH) < lengths[:, None]
    with torch.no_grad():
        expected = pair.torch(
            torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(is_text).long()
        ).logits.numpy()
    got = np.asarray(run(pair.module, pair.params, tokens))
    assert_close(got[is_text], expected[is_text], 1e-4)


@functools.partial(jax.jit, static_argnums=0)
def run_masked(module: LlamaDecoder, params: dict, tokens: Any, positions: Any, key_valid: Any):
    """Logits under any positions and mask."""
    apply = functools.partial(module.apply, {"params": params})
    embedded = apply(tokens, method="embed")
    hidden: Any = apply(embedded, positions=positions, key_valid=key_valid, method="blocks")
    return apply(hidden[0], method="logits")


@pytest.mark.parity("transformers")
def test_left_padding_equals_transformers_with_its_mask(pair) -> None:
    tokens, lengths = random_tokens(3, LENGTH), np.array([4, LENGTH, 7])
    is_text = np.arange(LENGTH) >= LENGTH - lengths[:, None]
    positions = np.maximum(np.cumsum(is_text, axis=1) - 1, 0)
    with torch.no_grad():
        expected = pair.torch(
            torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(is_text).long(),
            position_ids=torch.from_numpy(positions),
        ).logits.numpy()
    key_valid = np.asarray(causal_mask(LENGTH)) & is_text[:, None]
    got = np.asarray(run_masked(pair.module, pair.params, tokens, positions, key_valid))
    assert_close(got[is_text], expected[is_text], 1e-4)


@pytest.mark.consistency("ours in rows of their own")
def test_packed_texts_do_not_see_each_other(pair) -> None:
    """Every row holds two texts, of other lengths than the next row's."""
    tokens, first = random_tokens(3, LENGTH), np.array([4, 1, 9])[:, None]
    slots = np.arange(LENGTH)
    is_second = slots >= first
    positions = np.where(is_second, slots - first, slots)
    key_valid = np.asarray(causal_mask(LENGTH)) & (is_second[:, :, None] == is_second[:, None])
    packed = run_masked(pair.module, pair.params, tokens, positions, key_valid)
    seconds = np.take_along_axis(tokens, (slots + first) % LENGTH, axis=1)  # each at the start
    firsts_alone, seconds_alone = (run(pair.module, pair.params, t) for t in (tokens, seconds))
    for row, length in enumerate(first[:, 0]):
        assert_close(packed[row, :length], firsts_alone[row, :length], 1e-5)
        assert_close(packed[row, length:], seconds_alone[row, : LENGTH - length], 1e-5)


@pytest.mark.parity("transformers")
def test_gradient_of_input_embeddings_equals_transformers(pair) -> None:
    x = random_floats(2, LENGTH, pair.config.hidden_size)
    weights = random_floats(2, LENGTH, VOCAB)
    torch_x = torch.from_numpy(x).requires_grad_()
    (pair.torch(inputs_embeds=torch_x).logits * torch.from_numpy(weights)).sum().backward()
    _, grad = run_embeddings(pair.module, pair.params, x, weights)
    assert_relative_l2(grad, torch_x.grad, 1e-4)


@pytest.mark.consistency("ours without remat")
@pytest.mark.parametrize("remat", ["products", "attention", "layers"])
@pytest.mark.parametrize("pair", [DECODERS["untied, 4 heads per kv head"]], indirect=True)
def test_remat_changes_no_value(pair, remat) -> None:
    x = random_floats(2, LENGTH, pair.config.hidden_size)
    weights = random_floats(2, LENGTH, VOCAB)
    results = [
        run_embeddings(LlamaDecoder(pair.config, remat=name), pair.params, x, weights)
        for name in (remat, "none")
    ]
    for got, expected in zip(*results, strict=True):
        assert_relative_l2(got, expected, 1e-6)


@pytest.mark.consistency("ours without a cache")
@pytest.mark.parametrize("chunks", [(1,) * LENGTH, (4, 1, 1, 4, 1)], ids=["1 by 1", "by chunks"])
def test_cached_decoding_equals_the_full_forward(pair, chunks) -> None:
    tokens = random_tokens(3, LENGTH)
    expected = run(pair.module, pair.params, tokens)
    cache = make_cache(pair.config, 3, LENGTH + 3)  # three slots stay empty
    start = 0
    for size in chunks:
        here = slice(start, start + size)
        positions = np.arange(LENGTH)[None, here]
        args = (tokens[:, here], positions, cache, start)
        logits, cache = run_cached(pair.module, pair.params, *args)
        assert_close(logits, expected[:, here], 1e-5, f"from position {start}")
        start += size
    assert start == LENGTH
    assert not cache.k[:, :, :, LENGTH:].any()


@pytest.mark.consistency("ours in f32")
def test_bf16_decoder_is_near_f32_with_f32_logits(pair) -> None:
    tokens = random_tokens(3, LENGTH)
    stored = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), pair.params)
    same = jax.tree.map(lambda leaf: leaf.astype(np.float32), stored)  # compare the arithmetic
    logits = run(LlamaDecoder(pair.config, jnp.bfloat16, jnp.bfloat16), stored, tokens)
    assert logits.dtype == jnp.float32
    with torch.no_grad():
        torch_bf16 = copy.deepcopy(pair.torch).bfloat16()
        theirs = torch_bf16(torch.from_numpy(tokens).long()).logits.float()
        expected = torch_bf16.float()(torch.from_numpy(tokens).long()).logits
    # Norms of queries and keys round more: then PyTorch's own bf16 is the measure.
    limit = max(1e-2, 1.1 * relative_l2(theirs, expected))
    assert_relative_l2(logits, run(pair.module, same, tokens), limit)


@pytest.mark.parametrize("pair", [DECODERS["untied, 4 heads per kv head"]], indirect=True)
def test_attention_scores_are_not_kept_for_the_backward_pass(pair) -> None:
    def kept_sizes(length: int, remat: RematName) -> list[int]:
        module = LlamaDecoder(pair.config, remat=remat)

        def total(x):
            positions = jnp.arange(length)[None]
            hidden: Any = module.apply(
                {"params": pair.params}, x, positions=positions, method="blocks"
            )
            return jnp.sum(hidden[0])

        x = jax.ShapeDtypeStruct((1, length, pair.config.hidden_size), jnp.float32)
        _, pullback = jax.eval_shape(lambda x: jax.vjp(total, x), x)
        kept = [leaf for leaf in jax.tree.leaves(pullback) if leaf.dtype == jnp.float32]
        return [leaf.size for leaf in kept]

    for remat in get_args(RematName):
        short, long = kept_sizes(64, remat), kept_sizes(128, remat)
        assert max(long) <= 2 * max(short)  # scores would grow with the square of the length
    sizes = [sum(kept_sizes(128, remat)) for remat in get_args(RematName)]  # most first
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
