"""What is logged of a run's speed."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from flax_projector.chips import peak_flops
from flax_projector.config import LlamaConfig, ProjectorConfig, WhisperConfig
from flax_projector.models.llama import abstract_decoder
from flax_projector.models.projector import abstract_projector
from flax_projector.models.whisper import abstract_encoder
from flax_projector.training.throughput import (
    FlopCounter,
    check_profile,
    compilations,
    make_flop_counter,
    profiled,
    summarize,
)

COUNTER = FlopCounter(encoder=1000, projector=100, layers=10, head=1)
V5E = SimpleNamespace(device_kind="TPU v5 lite")
CPU = SimpleNamespace(device_kind="cpu")


def step(loss: float, num_labels: float, **more: float) -> dict[str, np.ndarray]:
    metrics = {
        "loss": loss,
        "num_labels": num_labels,
        "audio_secs": 6.0,
        "num_clips": 2.0,
        "num_audio_tokens": 70.0,
        "num_tokens": 100.0,
        "padding_rate": 0.25,
        **more,
    }
    return {name: np.array(value, np.float32) for name, value in metrics.items()}


def summary(steps, devices) -> dict[str, float]:
    return summarize(steps, secs=4.0, wait_secs=1.0, count_flops=COUNTER, devices=devices)


def test_losses_are_means_per_label_and_the_rest_per_step():
    got = summary([step(1.0, 10), step(4.0, 30, padding_rate=0.75)], [CPU])
    assert got["loss"] == pytest.approx((1.0 * 10 + 4.0 * 30) / 40)
    assert got["padding_rate"] == pytest.approx(0.5)
    assert got["num_steps"] == 2 and got["step_secs"] == 2.0
    assert got["audio_secs"] == 12.0 and got["audio_secs_per_sec"] == 3.0
    assert got["data_wait_rate"] == 0.25


def test_utilisation_is_the_models_flops_over_the_devices_peak():
    got = summary([step(1.0, 10), step(1.0, 30)], [V5E] * 2)
    flops = 2 * 1000 * 4 + 6 * 100 * 140 + 4 * 10 * 200 + 4 * 1 * 40
    assert got["mfu"] == pytest.approx(flops / (4.0 * 197e12 * 2))
    assert "mfu" not in summary([step(1.0, 10)], [CPU])


def test_a_step_without_the_llm_counts_none_of_its_flops():
    ctc = step(1.0, 10, ctc_loss=2.0, num_ctc_labels=10)
    for name in ("loss", "num_labels", "num_tokens", "padding_rate"):
        del ctc[name]
    got = summary([ctc], [V5E])
    assert got["ctc_loss"] == 2.0
    assert got["mfu"] == pytest.approx((2 * 1000 * 2 + 6 * 100 * 70) / (4.0 * 197e12))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("TPU v5p", 459e12),
        ("TPU v5 lite", 197e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_the_longest_name_of_a_device_counts(kind, expected):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == expected


def test_matrices_are_counted_without_norms_biases_and_embeddings():
    whisper = WhisperConfig(5, 6, 2, 1, 7)
    llama = LlamaConfig(11, 8, 9, 3, 2, 1, head_dim=4)
    projector = ProjectorConfig(6, 8, projector_hidden_dim=10, projector_num_layers=1)
    params = abstract_projector(projector), abstract_encoder(whisper), abstract_decoder(llama)
    counter = make_flop_counter(params, llama, window_frames=50)
    assert counter.projector == 4 * 6 * 8 + 2 * 8 * 10
    assert counter.layers == 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 9)
    encoder_layers = 2 * (4 * 6 * 6 + 2 * 6 * 7)
    assert counter.encoder == 50 * (encoder_layers + 3 * 5 * 6 + 3 * 6 * 6)
    assert counter.head == 11 * 8


def test_a_profile_holds_the_steps_after_the_tenth(tmp_path):
    for index in range(13):
        with profiled(index, 2, tmp_path / "profile") as is_last:
            jax.block_until_ready(jax.numpy.ones(3) + index)
        assert is_last == (index == 11)
        assert (tmp_path / "profile").exists() == (index >= 11)


@pytest.mark.parametrize(("num_left", "warns"), [(11, True), (12, False)])
def test_a_start_too_short_for_its_profile_says_so(caplog, num_left, warns):
    check_profile(2, num_left)
    assert ("it needs 12 steps, but only 11 are left" in caplog.text) == warns


def test_every_new_shape_is_counted_as_a_compilation():
    """And an old one is not: a test that finds no compilation means something."""
    double = jax.jit(lambda x: 2 * x + 0.123)

    def new_compilations(x: np.ndarray) -> int:
        before = count()
        double(x)
        return count() - before

    with compilations() as count:
        assert count() == 0
        found = [new_compilations(np.ones(n, np.float32)) for n in (3, 3, 4, 3, 4, 5)]
    assert found == [1, 0, 1, 0, 0, 1]
    assert new_compilations(np.ones(6, np.float32)) == 0, "counted after its block"
