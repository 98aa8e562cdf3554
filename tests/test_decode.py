"""Decoding against transformers' `generate`."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert.torch_projector import ResidualAudioProjector as TorchProjector
from flax_projector.batch import AUDIO_TOKEN, Batch
from flax_projector.config import DecodeConfig, MeshConfig, ProjectorConfig, WhisperConfig
from flax_projector.models import decode as decode_module
from flax_projector.models.decode import decode, generate
from flax_projector.models.reader import Reader
from flax_projector.models.speech_llm import SpeechLLM, encode_prefix, make_speech_llm
from flax_projector.sharding import batch_sharding, make_mesh, replicated, use_mesh
from tests.models import (
    DECODERS,
    VOCAB,
    make_decoder_pair,
    projector_to_flax,
    random_floats,
)
from tests.tiny import randomize

oracle = pytest.mark.torch

LENGTHS = (4, 9, 1, 6)
MAX_NEW_TOKENS = 8
NO_TOKEN = VOCAB  # as end of turn: nothing ends a row
ENCODER_DIM = 7


PAIRS = [
    pytest.param(name, marks=pytest.mark.xdist_group(f"decode, {name}"))
    for name in ("tied, 3 heads per kv head", "untied, 4 heads per kv head")
]


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, tmp_path_factory) -> Any:
    """A tiny Llama on both sides, in Flax as part of a whole model."""
    llama = make_decoder_pair(tmp_path_factory.mktemp("llama"), **DECODERS[request.param], gain=2)
    projector = ProjectorConfig(ENCODER_DIM, llama.config.hidden_size, projector_pool_stride=3)
    model = make_speech_llm(
        WhisperConfig(5, ENCODER_DIM, 1, 1, 3),
        projector,
        llama.config,
        dtype=jnp.float32,
        remat="none",
    )
    inputs = random_floats(len(LENGTHS), max(LENGTHS), llama.config.hidden_size)
    return SimpleNamespace(torch=llama.torch, params=llama.params, model=model, inputs=inputs)


@functools.partial(jax.jit, static_argnames=("model", "end_of_turn", "max_new_tokens"))
def jit_generate(
    params, inputs, prompt_len, *, model: SpeechLLM, end_of_turn: int, max_new_tokens: int
):
    return generate(
        params,
        inputs,
        prompt_len,
        model=model,
        config=DecodeConfig(max_new_tokens=max_new_tokens),
        end_of_turn=end_of_turn,
    ).tokens


def run(pair, end_of_turn: int, lengths=LENGTHS, max_new_tokens: int = MAX_NEW_TOKENS):
    tokens = jit_generate(
        pair.params,
        pair.inputs,
        jnp.asarray(lengths),
        model=pair.model,
        end_of_turn=end_of_turn,
        max_new_tokens=max_new_tokens,
    )
    return np.asarray(tokens)


def torch_generate(llm: Any, prompt: np.ndarray, end_of_turn: int | None = None) -> list[int]:
    """One row without any padding; checks that no choice was a close one."""
    out = llm.generate(
        inputs_embeds=torch.from_numpy(prompt)[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=end_of_turn,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best, second = torch.cat(out.logits).topk(2).values.T
    assert (best - second).min() > 1e-2, "a close choice: take another seed"
    return out.sequences[0].tolist()


@pytest.fixture(scope="module")
def endless(pair) -> np.ndarray:
    """What transformers generates when no token ends a row."""
    prompts = [row[:length] for row, length in zip(pair.inputs, LENGTHS, strict=True)]
    return np.array([torch_generate(pair.torch, prompt) for prompt in prompts])


@oracle
def test_padded_batch_gives_the_tokens_of_transformers(pair, endless) -> None:
    assert len(np.unique(endless)) > MAX_NEW_TOKENS  # a varied text shows more
    np.testing.assert_array_equal(run(pair, NO_TOKEN), endless)


@oracle
@pytest.mark.parametrize(("row", "step"), [(0, 0), (1, 3)])
def test_rows_stop_at_their_end_of_turn(pair, endless, row, step) -> None:
    end_of_turn = int(endless[row, step])
    length = LENGTHS[row]
    stopped = torch_generate(pair.torch, pair.inputs[row, :length], end_of_turn)
    tokens = run(pair, end_of_turn)
    assert tokens[row].tolist() == stopped + [end_of_turn] * (MAX_NEW_TOKENS - len(stopped))
    has_ended = np.cumsum(endless == end_of_turn, axis=1) > 0
    np.testing.assert_array_equal(tokens, np.where(has_ended, end_of_turn, endless))


@oracle
def test_one_new_token_is_the_first_of_many(pair, endless) -> None:
    tokens = run(pair, NO_TOKEN, max_new_tokens=1)
    np.testing.assert_array_equal(tokens, endless[:, :1])


@oracle
@pytest.mark.parametrize("max_new_tokens", [1, MAX_NEW_TOKENS])
def test_rows_of_padding_give_only_end_of_turn(pair, endless, max_new_tokens) -> None:
    tokens = run(pair, NO_TOKEN, (0, LENGTHS[1], LENGTHS[2], 0), max_new_tokens)
    assert (tokens[[0, 3]] == NO_TOKEN).all()
    np.testing.assert_array_equal(tokens[1:3], endless[1:3, :max_new_tokens])


@oracle
def test_what_follows_the_prompt_is_not_looked_at(pair, endless) -> None:
    follows = np.arange(max(LENGTHS)) >= np.array(LENGTHS)[:, None]
    inputs = np.where(follows[..., None], 7.0, pair.inputs)
    changed = SimpleNamespace(**{**vars(pair), "inputs": inputs})
    np.testing.assert_array_equal(run(changed, NO_TOKEN), endless)


@oracle
@pytest.mark.parametrize("platform", ["tpu", "cpu"])
@pytest.mark.parametrize("ways", [1, 4], ids=lambda n: f"{n} devices")
def test_the_only_row_of_a_tpu_is_computed_twice(
    pair, endless, platform, ways, monkeypatch
) -> None:
    numbers = []

    def reader(model, llm_params, prompt_len, *args):
        numbers.append(len(prompt_len))
        return Reader(model, llm_params, prompt_len, *args)

    monkeypatch.setattr(decode_module, "mesh_platform", lambda: platform)
    monkeypatch.setattr(decode_module, "Reader", reader)
    mesh = make_mesh(MeshConfig(data=ways), jax.devices()[:ways])
    config = DecodeConfig(max_new_tokens=MAX_NEW_TOKENS)
    with use_mesh(mesh):
        run = jax.jit(functools.partial(generate, model=pair.model, config=config, end_of_turn=-1))
        put = functools.partial(jax.device_put, device=batch_sharding(mesh))
        found = run(
            jax.device_put(pair.params, replicated(mesh)),
            put(pair.inputs[:ways]),
            put(jnp.asarray(LENGTHS[:ways])),
        )
    np.testing.assert_array_equal(found.tokens, endless[:ways])
    assert found.cut_by.tolist() == [1] * ways
    assert numbers == [2 * ways if platform == "tpu" else ways]


@pytest.mark.parametrize("prefix_len", [1, 4])
def test_the_prefix_is_not_computed_again(pair, prefix_len) -> None:
    """The tokens that every prompt begins with are known, so nobody looks at their embeddings."""
    prefix, lengths = list(range(20, 20 + prefix_len)), (6, 9, 5, 0)
    table = pair.params["embed_tokens"]["embedding"]
    inputs = np.array(pair.inputs)
    inputs[:, :prefix_len] = table[jnp.array(prefix)]
    expected = run(SimpleNamespace(**{**vars(pair), "inputs": inputs}), NO_TOKEN, lengths)

    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with use_mesh(mesh):
        known = encode_prefix(pair.model, pair.params, prefix, mesh)
    # Models are equal whatever their prefix is, so `jit_generate` would not compile another one.
    model = dataclasses.replace(pair.model, prefix=known)
    decode = functools.partial(
        generate,
        model=model,
        config=DecodeConfig(max_new_tokens=MAX_NEW_TOKENS),
        end_of_turn=NO_TOKEN,
    )
    inputs[:, :prefix_len] = 7.0
    tokens = jax.jit(decode)(pair.params, jnp.asarray(inputs), jnp.asarray(lengths)).tokens
    np.testing.assert_array_equal(tokens, expected)


@oracle
def test_transcription_equals_that_of_pytorch(pair) -> None:
    """Frames to tokens: projector, splice and decoding together, transcripts in the batch."""
    config = pair.model.projector.config
    projector = randomize(TorchProjector(config), seed=2).eval()
    frames, num_frames = random_floats(2, 14, ENCODER_DIM), (14, 5)
    before, after, transcript = [3, 41, 8], [17, 5], [1, 2, 30]

    rows, lengths, expected = [], [], []
    for row, valid in zip(frames, num_frames, strict=True):
        with torch.no_grad():
            audio = projector(torch.from_numpy(row[None, :valid]))[0]
            embed = pair.torch.get_input_embeddings()
            parts = (embed(torch.tensor(before)), audio, embed(torch.tensor(after)))
        prompt = [*before, *[AUDIO_TOKEN] * len(audio), *after]
        rows.append([*prompt, *transcript] + [0] * (14 - len(prompt) - len(transcript)))
        lengths.append(len(prompt))
        expected.append(torch_generate(pair.torch, torch.cat(parts).numpy()))

    labels = np.tile(np.array(transcript, np.int32), (2, 1))
    batch = Batch(
        num_frames=np.array(num_frames, np.int32),
        tokens=np.array(rows, np.int32),
        prompt_len=np.array(lengths, np.int32),
        label_positions=np.array(lengths, np.int32)[:, None] - 1 + np.arange(3, dtype=np.int32),
        labels=labels,
        label_valid=np.ones_like(labels, bool),
        frames=frames,
        max_frames=14,
    )
    transcribe = functools.partial(
        decode,
        model=pair.model,
        config=DecodeConfig(max_new_tokens=MAX_NEW_TOKENS),
        end_of_turn=NO_TOKEN,
    )
    params = projector_to_flax(config, projector.state_dict())
    tokens = jax.jit(transcribe)(params, {}, pair.params, batch).tokens
    np.testing.assert_array_equal(np.asarray(tokens), expected)
    assert expected[0] != expected[1]
