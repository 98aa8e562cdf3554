"""Parity with Hugging Face on the real whisper-base and SmolLM2-135M-Instruct."""

import copy
import dataclasses
import functools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings

import train_tpu
from convert.load import load_tower
from convert.models import LLAMA, WHISPER_ENCODER
from flax_projector.chat.prompt import make_prompt
from flax_projector.chat.tokenizer import load_tokenizer
from flax_projector.config import PRESETS, CTCConfig, DecodeConfig, MeshConfig, PromptConfig
from flax_projector.data.audio import load_audio
from flax_projector.data.manifest import read_manifest
from flax_projector.lengths import num_audio_tokens, num_encoder_frames
from flax_projector.models.decode import generate
from flax_projector.models.llama import LlamaDecoder, abstract_decoder, embedding_rms
from flax_projector.models.speech_llm import make_speech_llm, rms
from flax_projector.models.whisper import WhisperEncoder, abstract_encoder, log_mel
from flax_projector.sharding import make_mesh, replicated
from flax_projector.training.metrics import MetricsWriter
from tests.chat import Reference, ids_of, transcripts
from tests.parity import assert_close, assert_relative_l2, assert_within
from tests.tiny import read_losses

ROOT = Path(__file__).parents[1]
MODELS = Path(os.environ.get("FLAX_PROJECTOR_MODELS", ROOT / "models"))
SPEECH = ROOT / "examples/demo/speech/heldout_seen_voices.jsonl"
EAGER = {"attn_implementation": "eager", "dtype": torch.float32}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.torch,
    pytest.mark.skipif(
        not (MODELS / "whisper-base").is_dir(),
        reason="no real weights: run `make models`, or set FLAX_PROJECTOR_MODELS",
    ),
]


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def load(kind, name: str, abstract, mesh):
    folder = MODELS / name
    config = kind.read_config(folder)
    return config, load_tower(kind, folder, abstract(config, mesh=mesh))


@pytest.fixture(scope="module")
def encoder(mesh) -> Any:
    """Both encoders, two clips and what Hugging Face's feature extractor makes of them."""
    config, params = load(WHISPER_ENCODER, "whisper-base", abstract_encoder, mesh)
    hf = transformers.WhisperModel.from_pretrained(MODELS / "whisper-base", **EAGER).encoder.eval()
    extractor = transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    clips = [load_audio(row.audio) for row in read_manifest(SPEECH)[0][:2]]
    mel = extractor(clips, sampling_rate=16_000, return_tensors="pt").input_features
    samples = np.stack([np.pad(clip, (0, 480_000 - len(clip))) for clip in clips])
    return SimpleNamespace(config=config, params=params, hf=hf, mel=mel, samples=samples)


@pytest.mark.parity("transformers")
def test_encoder_equals_hugging_face_on_speech(encoder):
    mel = log_mel(jnp.asarray(encoder.samples), encoder.config.num_mel_bins)
    assert_within(mel, encoder.mel, 1e-4, what="log-mel")
    with torch.no_grad():
        expected = encoder.hf(encoder.mel).last_hidden_state
    encode = jax.jit(
        lambda mel: WhisperEncoder(encoder.config).apply({"params": encoder.params}, mel)
    )
    assert_relative_l2(encode(mel), expected, 1e-5, what="frames")
    # The encoder alone, on the same features. Frames reach 24: PyTorch's f32 is 0.7e-3 from f64.
    ours = encode(jnp.asarray(encoder.mel.numpy()))
    assert_within(ours, expected, 1e-3, what="frames of the same log-mel")


@pytest.mark.parity("transformers")
def test_encoder_equals_hugging_face_in_f64(encoder):
    """What is left in f32 is rounding."""
    with torch.no_grad():
        expected = copy.deepcopy(encoder.hf).double()(encoder.mel.double()).last_hidden_state
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), encoder.params)
        module = WhisperEncoder(encoder.config, jnp.float64, jnp.float64)
        mel = jnp.asarray(encoder.mel.numpy(), jnp.float64)
        ours = module.apply({"params": params}, mel)
    assert_within(ours, expected, 1e-10)


@pytest.mark.parity("transformers")
def test_llm_logits_equal_hugging_face(mesh):
    config, params = load(LLAMA, "smollm2-135m-instruct", abstract_decoder, mesh)
    folder = MODELS / "smollm2-135m-instruct"
    hf: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, **EAGER)
    hf.eval()
    prompt = make_prompt(load_tokenizer(folder), PromptConfig())
    text = "<|im_start|>user\nName three rivers.<|im_end|>\n<|im_start|>assistant\n"
    ids = np.array([prompt.tokenizer.encode(text, add_special_tokens=False).ids])
    with torch.no_grad():
        expected = hf(torch.from_numpy(ids)).logits
    logits = LlamaDecoder(config).apply({"params": params}, jnp.asarray(ids))
    assert_within(logits, expected, 1e-4)


PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Count from one to ten.",
    "Explain in one sentence why the sky is blue.",
    "Name three fruits.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes.",
    "Is seven a prime number? Answer shortly.",
    "Tell a story about a robot that learns to hear.",
]


@pytest.mark.parity("transformers")
def test_greedy_tokens_of_ten_prompts_equal_hugging_face(mesh):
    """64 tokens each, ours as one batch of unequal lengths, theirs one by one."""
    folder, num_tokens = MODELS / "smollm2-135m-instruct", 64
    hf: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, **EAGER)
    hf.eval().generation_config.eos_token_id = None  # goes on after the end of its turn, as ours
    tokenizer = load_tokenizer(folder).backend_tokenizer
    prompts = [
        tokenizer.encode(f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n").ids
        for p in PROMPTS
    ]
    lengths = np.array([len(ids) for ids in prompts])
    padded = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, ids in zip(padded, prompts, strict=True):
        row[: len(ids)] = ids

    config, params = load(LLAMA, folder.name, abstract_decoder, mesh)
    model = make_speech_llm(
        WHISPER_ENCODER.read_config(MODELS / "whisper-base"),
        PRESETS["demo"][1].projector,
        config,
        dtype=jnp.float32,
        remat="none",
    )
    inputs = model.llm.apply({"params": params}, jnp.asarray(padded), method="embed")
    ours = jax.jit(
        lambda params, inputs: (
            generate(
                params,
                inputs,
                jnp.asarray(lengths),
                model=model,
                config=DecodeConfig(max_new_tokens=num_tokens, max_repeats=0),
                end_of_turn=-2,  # never: all 64 tokens are compared
            ).tokens
        ),
        out_shardings=replicated(mesh),
    )(params, inputs)
    for row, ids, prompt in zip(np.asarray(ours), prompts, PROMPTS, strict=True):
        theirs = hf.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),  # it takes <|im_end|> for padding otherwise
            do_sample=False,
            max_new_tokens=num_tokens,
        )
        assert_close(row, theirs[0, len(ids) :], 0, prompt)


@pytest.mark.parametrize("beams", [1, 4])
def test_tokens_of_ten_utterances_equal_hugging_face(mesh, beams):
    """From waveforms, with a projector that has learnt nothing; theirs padded on the left."""
    folder, num_tokens = MODELS / "smollm2-135m-instruct", 24
    whisper, encoder = load(WHISPER_ENCODER, "whisper-base", abstract_encoder, mesh)
    llama, params = load(LLAMA, folder.name, abstract_decoder, mesh)
    prompt, config = make_prompt(load_tokenizer(folder), PromptConfig()), PRESETS["demo"][1]
    model = make_speech_llm(whisper, config.projector, llama, dtype=jnp.float32, remat=config.remat)
    clips = [load_audio(row.audio) for row in read_manifest(SPEECH)[0][:10]]
    num_frames = num_encoder_frames(np.array([len(clip) for clip in clips]))
    samples = np.stack([np.pad(clip, (0, 480_000 - len(clip))) for clip in clips])
    frames = jax.jit(model.encode)(encoder, samples)
    projector = model.projector.init(jax.random.key(0), frames[:1])["params"]
    audio = model.embed_audio(projector, frames, jnp.arange(1500) < num_frames[:, None])
    audio *= embedding_rms(params, mesh) / rms(audio, jnp.ones(audio.shape[:2], bool))
    table = np.asarray(params["embed_tokens"]["embedding"])
    lengths = num_audio_tokens(num_frames, config.projector.projector_pool_stride)
    rows = [
        np.concatenate(
            [table[[*prompt.before_audio]], tokens[:length], table[[*prompt.after_audio]]]
        )
        for tokens, length in zip(np.asarray(audio), lengths, strict=True)
    ]
    lengths = np.array([len(row) for row in rows])
    on_right, on_left = np.zeros((2, len(rows), lengths.max(), table.shape[1]), np.float32)
    for i, row in enumerate(rows):
        on_right[i, : len(row)] = on_left[i, lengths.max() - len(row) :] = row

    decoding = DecodeConfig(beams=beams, max_new_tokens=num_tokens, max_repeats=0)
    end = prompt.end_of_turn
    decode = functools.partial(generate, model=model, config=decoding, end_of_turn=end)
    ours = jax.jit(decode)(params, jnp.asarray(on_right), jnp.asarray(lengths)).tokens
    hf: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, **EAGER)
    theirs = hf.eval().generate(
        inputs_embeds=torch.from_numpy(on_left),
        attention_mask=torch.from_numpy(
            np.arange(lengths.max()) >= lengths.max() - lengths[:, None]
        ).long(),
        do_sample=False,
        num_beams=beams,
        max_new_tokens=num_tokens,
        eos_token_id=end,
        pad_token_id=end,
    )
    assert theirs.unique().numel() > 20  # varied texts show more
    assert_close(ours[:, : theirs.shape[1]], theirs, 0, f"{beams} beams")


@pytest.mark.parametrize("system", [None, "", "Be brief."], ids=repr)
def test_ids_are_those_of_the_whole_conversation(system):
    """Of tiny-audio's messages, of the user's alone, and of others; with 3 x 500 transcripts."""
    folder = MODELS / "smollm2-135m-instruct"
    prompt = make_prompt(load_tokenizer(folder), PromptConfig(system))
    reference = Reference(folder)

    @given(transcript=transcripts(reference))
    @settings(max_examples=500, deadline=None)
    def check(transcript: str) -> None:
        texts, newline = prompt.rendering, prompt.tokenizer.encode("\n").ids
        expected = reference.ids(texts.system, texts.user, transcript)
        assert ids_of(prompt, transcript) + newline == expected

    check()


class EnoughError(Exception):
    """Ends a run in the middle."""


@pytest.mark.parametrize("has_warm_start", [True, False], ids=["as it is", "llm from the start"])
def test_demo_losses_do_not_depend_on_the_number_of_devices(
    tmp_path, monkeypatch, report, has_warm_start
):
    """The first 20 steps of the demo on 1 and on 8 devices, with its warm start and without.

    Rounding parts the runs by 1e-6 at step 2, and every step amplifies it the more the higher its
    learning rate is: a warm-up of 20 steps instead of 40 ended 40 times further apart.
    """
    monkeypatch.chdir(ROOT)  # the preset names the speech of the repository
    write = MetricsWriter.write

    def write_twenty(self, step, scalars):
        write(self, step, scalars)
        if step == 20:
            raise EnoughError

    monkeypatch.setattr(MetricsWriter, "write", write_twenty)
    losses = {}
    for count in (1, 8):
        demo = PRESETS["demo"][1]
        config = dataclasses.replace(
            demo,
            encoder=str(MODELS / "whisper-base"),
            llm=str(MODELS / "smollm2-135m-instruct"),
            out=str(tmp_path / str(count)),
            # The training is compared: both runs read the same frames.
            data=dataclasses.replace(demo.data, eval=(), cache_dir=str(tmp_path / "cache")),
            ctc=demo.ctc if has_warm_start else CTCConfig(),
            log_every_steps=1,
        )
        with pytest.raises(EnoughError):
            train_tpu.main(config, devices=jax.devices()[:count])
        losses[count] = read_losses(config)
    assert len(losses[1]) == 20
    difference = np.abs(np.subtract(losses[1], losses[8])).max()
    report(f"largest difference of a loss on 8 devices: {difference:.1e}")
    assert difference < 1e-4
