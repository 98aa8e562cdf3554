"""Compiles the training step ahead of time for a TPU slice, with the real TPU compiler."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_projector.config import PRESETS, LlamaConfig, MeshConfig, WhisperConfig
from flax_projector.llama import abstract_decoder
from flax_projector.sharding import batch_sharding, make_mesh, replicated, use_mesh
from flax_projector.speech_llm import make_speech_llm
from flax_projector.train_step import make_optimizer, make_schedule, train_step
from flax_projector.whisper import abstract_encoder
from train_tpu import abstract_train_state, shardings_of

pytestmark = pytest.mark.slow

WHISPER_BASE = WhisperConfig(
    num_mel_bins=80,
    d_model=512,
    encoder_layers=6,
    encoder_attention_heads=8,
    encoder_ffn_dim=2048,
)
SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=100000.0,
    tie_word_embeddings=True,
)
CHIP_BYTES = 16e9  # of a v5e


@pytest.fixture
def tpu_devices():
    """Four v5e chips that nobody needs to have."""
    pytest.importorskip("libtpu", reason="the TPU compiler: pip install 'flax-projector[slow]'")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


def abstract_batch(mesh, batch_size: int, *, frames: int, length: int, text: int) -> dict:
    """A batch of 30-second windows."""
    shapes = {
        "samples": ((480_000,), jnp.float32),
        "frame_valid": ((frames,), bool),
        "tokens": ((length,), jnp.int32),
        "prompt_len": ((), jnp.int32),
        "label_positions": ((text,), jnp.int32),
        "labels": ((text,), jnp.int32),
        "label_valid": ((text,), bool),
    }
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=batch_sharding(mesh))
        for name, (shape, dtype) in shapes.items()
    }


@pytest.mark.parametrize("classes", [None, np.arange(200)], ids=["llm", "ctc"])
@pytest.mark.parametrize("mesh_config", [MeshConfig(), MeshConfig(data=1, fsdp=2, tensor=2)])
def test_step_compiles_for_v5e_and_fits_its_memory(tpu_devices, mesh_config, classes):
    config = PRESETS["whisper-base-smollm2-135m"][1]
    mesh = make_mesh(mesh_config, tpu_devices)
    dtype = jnp.dtype(config.dtype)
    model = make_speech_llm(WHISPER_BASE, config.projector, SMOLLM2_135M, dtype=dtype)
    schedule = make_schedule(config.optimizer, config.num_steps, config.ctc)
    optimizer = make_optimizer(config.optimizer, schedule)
    state = abstract_train_state(config, optimizer, mesh)
    frozen = (
        abstract_encoder(WHISPER_BASE, param_dtype=dtype, mesh=mesh),
        abstract_decoder(SMOLLM2_135M, param_dtype=dtype, mesh=mesh),
    )
    batch = abstract_batch(mesh, 16, frames=750, length=256, text=64)
    step = functools.partial(train_step, model=model, optimizer=optimizer, seed=0, classes=classes)
    with use_mesh(mesh):
        compiled = (
            jax.jit(
                step,
                out_shardings=(shardings_of(state), replicated(mesh)),
                donate_argnums=0,
            )
            .lower(state, *frozen, batch)
            .compile()
        )
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and hlo is not None
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    print(f"{mesh_config}: {peak / 1e9:.2f} GB per chip")  # noqa: T201 - shown by pytest -s
    assert memory.alias_size_in_bytes > 0, "the state is not donated"
    assert peak < CHIP_BYTES
    assert "all-reduce" in hlo, "gradients are not summed over the chips"
