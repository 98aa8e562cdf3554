"""The compiled step: what it communicates, what it normalises by, what it differentiates."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from flax_projector.config import (
    LlamaConfig,
    MeshConfig,
    OptimizerConfig,
    ProjectorConfig,
    SpecAugmentConfig,
    WhisperConfig,
)
from flax_projector.prompt import AUDIO_TOKEN
from flax_projector.sharding import (
    batch_sharding,
    make_mesh,
    replicated,
    strip_axes,
    use_mesh,
)
from flax_projector.speech_llm import encode_prefix, make_speech_llm
from flax_projector.train_step import (
    TrainState,
    batch_counts,
    ctc_classes,
    init_state,
    make_optimizer,
    num_labels,
    summed_loss,
    train_step,
)
from tests.parity import assert_relative_l2

WHISPER = WhisperConfig(
    num_mel_bins=80, d_model=12, encoder_layers=2, encoder_attention_heads=3, encoder_ffn_dim=20
)
LLAMA = LlamaConfig(
    vocab_size=61,
    hidden_size=20,
    intermediate_size=28,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)
FRAMES, LENGTH, TEXT = 24, 19, 5
PREFIX = (4, 31, 7)  # begins every row


@pytest.fixture(scope="module")
def model():
    projector = ProjectorConfig(encoder_dim=12, llm_dim=20, projector_hidden_dim=16)
    return make_speech_llm(WHISPER, projector, LLAMA, dtype=jnp.float32, remat="products")


@pytest.fixture(scope="module")
def params(model):
    """(projector, encoder, llm), all random."""
    modules = (model.projector, model.encoder, model.llm)
    inputs = (jnp.zeros((1, 4, 12)), jnp.zeros((1, 80, 4)), jnp.zeros((1, 2), jnp.int32))
    trees = [
        strip_axes(module.init(jax.random.key(i), x)["params"])
        for i, (module, x) in enumerate(zip(modules, inputs, strict=True))
    ]
    leaves, treedef = jax.tree.flatten(trees)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    noise = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return tuple(jax.tree.unflatten(treedef, [a + b for a, b in zip(leaves, noise, strict=True)]))


@pytest.fixture(scope="module")
def loss_of(model, params):
    """Batch -> (summed loss, metrics), compiled."""

    def loss(batch):
        total, metrics = summed_loss(model, params[0], params[1], params[2], batch)
        counts = batch_counts(batch, model.projector.config.projector_pool_stride)
        return total, metrics | counts | {"num_labels": num_labels(model, batch)}

    return jax.jit(loss)


def make_batch(batch_size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random rows with 2 to 6 audio tokens and 1 to 5 labels."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 61, (batch_size, LENGTH), dtype=np.int32)
    tokens[:, : len(PREFIX)] = PREFIX
    num_audio = rng.integers(2, 7, batch_size)
    for row, count in enumerate(num_audio):
        tokens[row, 3 : 3 + count] = AUDIO_TOKEN
    starts = 3 + num_audio[:, None] + 2
    num_labels = rng.integers(1, TEXT + 1, batch_size)
    return {
        "samples": 0.1 * rng.standard_normal((batch_size, 16_000)).astype(np.float32),
        "frame_valid": np.arange(FRAMES) < 4 * num_audio[:, None],
        "tokens": tokens,
        "prompt_len": (starts[:, 0] + 1).astype(np.int32),
        "label_positions": (starts + np.arange(TEXT)).astype(np.int32),
        "labels": rng.integers(0, 61, (batch_size, TEXT), dtype=np.int32),
        "label_valid": np.arange(TEXT) < num_labels[:, None],
    }


def compile_step(model, params, mesh: Mesh, batch):
    optimizer = make_optimizer(OptimizerConfig(), optax.constant_schedule(1e-4))
    state = jax.jit(functools.partial(init_state, optimizer=optimizer))(params[0])
    step = functools.partial(train_step, model=model, optimizer=optimizer, seed=0)
    everywhere = replicated(mesh)
    jitted = jax.jit(
        step,
        in_shardings=(everywhere, everywhere, everywhere, batch_sharding(mesh)),
        out_shardings=(everywhere, everywhere),
    )
    with use_mesh(mesh):
        return jitted.lower(state, *params[1:], batch).compile(), state


def test_data_parallel_step_only_sums_gradients(model, params):
    """No device computes another's share: the batch is never gathered."""
    compiled, _ = compile_step(model, params, make_mesh(MeshConfig()), make_batch(8))
    hlo = compiled.as_text() or ""
    collectives = re.findall(r"= .*? (all-gather|all-to-all|collective-permute|all-reduce)", hlo)
    assert set(collectives) == {"all-reduce"}
    assert not re.search(r"\[8,(16000|16400|100,400|\d+,20)\]", hlo), "a whole batch on one device"


@pytest.mark.consistency("ours with the prefix in every row")
@pytest.mark.parametrize("mesh_config", [MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_a_shared_prefix_changes_neither_loss_nor_gradients(model, params, mesh_config):
    mesh, arrays = make_mesh(mesh_config), make_batch(8)
    arrays["tokens"][5], arrays["label_valid"][5] = 60, False  # a row of padding has no prefix
    arrays["label_positions"][5] = 0
    batch = {name: jnp.asarray(x) for name, x in arrays.items()}
    with use_mesh(mesh):
        prefix = encode_prefix(model, params[2], PREFIX, mesh)

        def value_and_grad(model):
            def loss(projector_params):
                total, _ = summed_loss(model, projector_params, params[1], params[2], batch)
                return total

            return jax.jit(jax.value_and_grad(loss))(params[0])

        expected = value_and_grad(model)
        got = value_and_grad(dataclasses.replace(model, prefix=prefix))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_relative_l2(a, b, 1e-5)


def test_without_tokens_there_is_no_prefix(model, params):
    assert encode_prefix(model, params[2], (), make_mesh(MeshConfig())) is None


@pytest.mark.consistency("ours by halves of the batch")
def test_loss_is_the_mean_over_label_tokens(loss_of):
    """Halves of a batch with unequal label counts weigh by their labels."""
    batch = make_batch(8)
    whole, metrics = loss_of(batch)
    halves = [
        loss_of({name: rows[part] for name, rows in batch.items()})
        for part in (slice(0, 4), slice(4, 8))
    ]
    assert float(metrics["num_labels"]) == batch["label_valid"].sum()
    assert_relative_l2(whole, sum(float(h[0]) for h in halves), 1e-5)


@pytest.mark.consistency("ours without the rows")
def test_padding_rows_change_nothing(loss_of):
    batch = make_batch(8)
    padding = {name: np.zeros_like(rows[:3]) for name, rows in batch.items()}
    padded = {name: np.concatenate([rows, padding[name]]) for name, rows in batch.items()}
    loss, metrics = loss_of(batch)
    padded_loss, padded_metrics = loss_of(padded)
    assert_relative_l2(padded_loss, loss, 1e-6)
    for name in ("num_labels", "audio_secs", "scale_ratio"):
        np.testing.assert_allclose(float(padded_metrics[name]), float(metrics[name]), rtol=1e-6)


def test_padding_at_the_end_of_a_row_does_not_change_the_scale_ratio(loss_of):
    batch = make_batch(8)
    longer = {**batch, "tokens": np.pad(batch["tokens"], ((0, 0), (0, 20)), constant_values=60)}
    ratios = [float(loss_of(rows)[1]["scale_ratio"]) for rows in (batch, longer)]
    np.testing.assert_allclose(ratios[1], ratios[0], rtol=1e-6)


def test_logits_of_all_positions_are_never_computed(model, params):
    """Of a [B, L, V] array the step holds nothing, in either direction."""
    compiled, _ = compile_step(model, params, make_mesh(MeshConfig()), make_batch(16))
    shapes = set(re.findall(r"f32\[([\d,]+)\]", compiled.as_text() or ""))
    assert f"2,{TEXT},{LLAMA.vocab_size}" in shapes  # of a device
    assert not [s for s in shapes if str(LENGTH) in s.split(",") and "61" in s.split(",")]


def test_sound_after_the_clip_does_not_reach_the_llm(loss_of):
    """Frames beyond `frame_valid` are zeroed; audio tokens beyond the clip are not spliced in."""
    batch = make_batch(8)
    rng = np.random.default_rng(1)
    frames = rng.standard_normal((8, FRAMES, 12)).astype(np.float32)
    noise = rng.standard_normal(frames.shape).astype(np.float32)
    other = np.where(batch["frame_valid"][..., None], frames, noise)
    rest = {name: rows for name, rows in batch.items() if name != "samples"}
    losses = [float(loss_of({**rest, "frames": f})[0]) for f in (frames, other)]
    assert losses[0] == losses[1]


def test_each_row_hears_its_own_audio(loss_of):
    """The splice of one row does not leak into another."""
    batch = make_batch(8)
    changed = {**batch, "samples": batch["samples"].copy()}
    changed["samples"][3] *= -0.5

    def row_losses(batch):
        return [
            float(loss_of({name: x[i : i + 1] for name, x in batch.items()})[0]) for i in range(8)
        ]

    whole = [float(loss_of(b)[0]) for b in (batch, changed)]
    rows = [row_losses(b) for b in (batch, changed)]
    np.testing.assert_allclose([sum(r) for r in rows], whole, rtol=1e-5)
    differs = [a != b for a, b in zip(*rows, strict=True)]
    assert differs == [i == 3 for i in range(8)]


def test_merge_puts_audio_tokens_in_order(model, params):
    tokens = jnp.array([[5, AUDIO_TOKEN, AUDIO_TOKEN, 7], [AUDIO_TOKEN, 6, 5, 5]])
    audio = jnp.arange(2 * 3 * 20, dtype=jnp.float32).reshape(2, 3, 20)
    merged = model.merge(params[2], tokens, audio)
    embedding = params[2]["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(merged[0, 1:3], audio[0, :2])
    np.testing.assert_array_equal(merged[1, 0], audio[1, 0])
    np.testing.assert_array_equal(merged[0, 3], embedding[7])
    np.testing.assert_array_equal(merged[1, 1:], embedding[jnp.array([6, 5, 5])])


def test_dropout_changes_with_the_step_and_not_with_the_run(params):
    projector = ProjectorConfig(
        encoder_dim=12, llm_dim=20, projector_hidden_dim=16, projector_dropout=0.4
    )
    model = make_speech_llm(WHISPER, projector, LLAMA, dtype=jnp.float32, remat="products")
    optimizer = make_optimizer(OptimizerConfig(), optax.constant_schedule(1e-4))
    state = init_state(params[0], optimizer)
    batch = make_batch(8)
    step = jax.jit(functools.partial(train_step, model=model, optimizer=optimizer, seed=0))
    later = TrainState(jnp.int32(1), state.params, state.opt_state)
    first, again, other = (
        float(step(s, *params[1:], batch)[1]["loss"]) for s in (state, state, later)
    )
    assert first == again != other


def test_ctc_classes_are_the_blank_and_the_spoken_tokens():
    targets = [(9, 4, 60), (4, 17, 60)]
    assert ctc_classes(targets, blank=3) == (3, 4, 9, 17)
    with pytest.raises(ValueError, match=r"token 17 occurs in a transcript: choose another"):
        ctc_classes(targets, blank=17)


@pytest.mark.torch
@pytest.mark.parity("PyTorch")
def test_ctc_of_a_batch_is_that_of_its_clips_one_by_one(model, params):
    """The valid audio tokens of each clip against its transcript without the end, by torch."""
    import torch

    arrays = make_batch(8)
    arrays["frame_valid"][0, 4:] = False  # one audio token for several labels
    batch = {name: jnp.asarray(x) for name, x in arrays.items()}
    rows = zip(np.asarray(batch["labels"]), np.asarray(batch["label_valid"]), strict=True)
    targets = [labels[valid].tolist() for labels, valid in rows]
    classes = ctc_classes(targets, blank=60)
    total, _ = summed_loss(model, params[0], params[1], params[2], batch, classes=classes)

    frames = model.encode(params[1], batch["samples"])[0][:, :FRAMES]
    audio = np.asarray(model.embed_audio(params[0], frames, batch["frame_valid"]))
    embedding = np.asarray(params[2]["embed_tokens"]["embedding"])[list(classes)]
    losses, k = [], model.projector.config.projector_pool_stride
    for clip, valid, target in zip(audio, batch["frame_valid"], targets, strict=True):
        logits = torch.from_numpy(clip[: -(-int(valid.sum()) // k)] @ embedding.T)
        labels = torch.tensor([[classes.index(token) for token in target[:-1]]])
        loss = torch.nn.functional.ctc_loss(
            logits.log_softmax(-1)[:, None],
            labels,
            torch.tensor([len(logits)]),
            torch.tensor([labels.shape[1]]),
            reduction="sum",
        )
        if labels.shape[1] and torch.isfinite(loss):
            losses.append((float(loss), labels.shape[1]))
    assert len(losses) == 7
    assert float(num_labels(model, batch, classes)) == sum(count for _, count in losses)
    assert_relative_l2(total, sum(loss for loss, _ in losses), 1e-4)


def mesh_of(num_devices: int) -> Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:num_devices])


def gradients_and_losses(model, params, batch, *, num_devices=1, **kwargs):
    """What one step learns from: plain gradient descent at rate 1 moves by the gradients."""
    descent = optax.sgd(1.0)
    mesh = mesh_of(num_devices)
    place = functools.partial(jax.device_put, device=replicated(mesh))
    state = place(init_state(params[0], descent))
    step = functools.partial(train_step, model=model, optimizer=descent, seed=0, **kwargs)
    with use_mesh(mesh):
        rows = jax.device_put(batch, batch_sharding(mesh))
        after, metrics = jax.jit(step)(state, *place(params[1:]), rows)
    moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), state.params, after.params)
    return moved, jax.device_get(metrics)


CLASSES = (60, *range(60))


@pytest.mark.consistency("ours in one part on one device")
@pytest.mark.parametrize("classes", [None, CLASSES], ids=["llm", "ctc"])
@pytest.mark.parametrize(("num_devices", "accumulation_steps"), [(8, 1), (1, 4), (2, 4), (4, 2)])
def test_parts_and_devices_do_not_change_the_gradients(
    model, params, classes, num_devices, accumulation_steps
):
    """Rows have unequal numbers of labels: a mean of means would weigh them wrongly."""
    batch = make_batch(8)
    expected, whole = gradients_and_losses(model, params, batch, classes=classes)
    grads, metrics = gradients_and_losses(
        *(model, params, batch),
        num_devices=num_devices,
        accumulation_steps=accumulation_steps,
        classes=classes,
    )
    jax.tree.map(lambda got, want: assert_relative_l2(got, want, 1e-5), grads, expected)
    for name in set(whole) - {"scale_ratio"}:
        np.testing.assert_allclose(metrics[name], whole[name], rtol=1e-5, err_msg=name)


def test_parts_take_their_rows_from_every_device(model, params):
    """So that accumulating moves no row to another device."""
    mesh, batch = make_mesh(MeshConfig()), make_batch(16)
    optimizer = make_optimizer(OptimizerConfig(), optax.constant_schedule(1e-4))
    state = init_state(params[0], optimizer)
    step = functools.partial(
        train_step, model=model, optimizer=optimizer, seed=0, accumulation_steps=2
    )
    everywhere = replicated(mesh)
    in_shardings = (everywhere, everywhere, everywhere, batch_sharding(mesh))
    with use_mesh(mesh):
        lowered = jax.jit(step, in_shardings=in_shardings).lower(state, *params[1:], batch)
        hlo = lowered.compile().as_text() or ""
    assert set(re.findall(r"= .*? (all-gather|all-to-all|collective-permute)", hlo)) == set()


def test_counts_leave_padding_out(model, params):
    batch = make_batch(8)
    padding = {name: np.zeros_like(rows[:3]) for name, rows in batch.items()}
    padded = {name: np.concatenate([rows, padding[name]]) for name, rows in batch.items()}
    counts, padded_counts = (
        batch_counts(jax.tree.map(jnp.asarray, rows), 4) for rows in (batch, padded)
    )
    num_audio = (batch["tokens"] == AUDIO_TOKEN).sum()
    num_labels = batch["label_valid"].sum(axis=1)
    assert counts["num_clips"] == 8
    assert counts["num_audio_tokens"] == num_audio
    assert counts["audio_secs"] == pytest.approx(4 * num_audio * 0.02)
    assert counts["num_tokens"] == (batch["prompt_len"] + num_labels - 1).sum()
    assert counts["padding_rate"] == pytest.approx(1 - counts["num_tokens"] / (8 * LENGTH))
    for name in set(counts) - {"padding_rate"}:
        assert padded_counts[name] == counts[name], name


def test_spec_augment_changes_with_the_step_and_never_in_evaluation(params):
    config = SpecAugmentConfig(mask_time_prob=0.3)
    projector = ProjectorConfig(encoder_dim=12, llm_dim=20, projector_hidden_dim=16)
    plain, augmented = (
        make_speech_llm(
            *(WHISPER, projector, LLAMA), dtype=jnp.float32, remat="none", augmentation=augmentation
        )
        for augmentation in (None, config)
    )
    batch = make_batch(8)

    def loss(model, key):
        total, _ = jax.jit(functools.partial(summed_loss, model))(*params, batch, key=key)
        return float(total)

    keys = [jax.random.key(i) for i in range(2)]
    first, again, other = (loss(augmented, key) for key in (keys[0], keys[0], keys[1]))
    assert first == again != other
    assert loss(augmented, None) == loss(plain, None) == loss(plain, keys[0])
