"""Compiles ahead of time for TPUs and GPUs, with their real compilers, which need no hardware."""

import dataclasses
import importlib.util
import math
import re
import time

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from convert.published import published_config
from flax_projector.batch import Bucket, abstract_batch, empty_batch
from flax_projector.config import PRESETS, MeshConfig, ProjectorConfig
from flax_projector.models.attention import attend
from flax_projector.models.llama import abstract_decoder, make_cache
from flax_projector.models.plain_attention import plain_attend
from flax_projector.models.projector import abstract_projector
from flax_projector.models.speech_llm import make_speech_llm
from flax_projector.models.whisper import abstract_encoder
from flax_projector.planning.compiled import memory_of
from flax_projector.planning.topology import absent_devices, parse_topology
from flax_projector.sharding import batch_sharding, make_mesh, use_mesh
from flax_projector.training.objectives import CTCObjective, LLMObjective
from flax_projector.training.state import abstract_state, make_optimizer, make_schedule
from flax_projector.training.train_step import compile_steps

pytestmark = pytest.mark.slow

WHISPER_BASE = published_config("openai/whisper-base")
SMOLLM2_135M = published_config("HuggingFaceTB/SmolLM2-135M")
WHISPER_LARGE_V3_TURBO = published_config("openai/whisper-large-v3-turbo")
SMOLLM3_3B = published_config("HuggingFaceTB/SmolLM3-3B")
CHIP_BYTES = 16e9  # of a v5e


@pytest.fixture(autouse=True)
def settings_of_a_run():
    """Without what suits the other tests.

    TPU kernels refuse the highest precision for bf16, and programs for absent devices can be
    written to the persistent cache, but not read back.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it remembers whether it is in use
    with jax.default_matmul_precision("default"):
        yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def tpu_devices(topology: str):
    """v5e chips that nobody needs to have."""
    pytest.importorskip("libtpu", reason="the TPU compiler: pip install 'flax-projector[test]'")
    return absent_devices(parse_topology(topology))


def gpu_devices():
    """Eight H100 that nobody needs to have."""
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip("no GPU compiler: `make test-slow` installs it")
    return absent_devices(parse_topology("h100:8"))


STAGES = {  # what is minimised, and micro-batches
    "llm": (LLMObjective(), 1),
    "llm, in two parts": (LLMObjective(), 2),
    "ctc": (CTCObjective(tuple(range(200)), 2), 1),
}


def compile_step(mesh, objective, config, whisper=WHISPER_BASE, llm=SMOLLM2_135M):
    """The training step for 16 clips of 15 s, with 25 audio tokens for each second."""
    dtype = jnp.dtype(config.dtype)
    model = make_speech_llm(whisper, config.projector, llm, dtype=dtype, remat=config.remat)
    prefix = jax.device_get(make_cache(llm, 1, 24, dtype))
    model = dataclasses.replace(model, prefix=prefix)
    schedule = make_schedule(config.optimizer, config.num_steps, config.ctc)
    optimizer = make_optimizer(config.optimizer, schedule)
    frozen = (
        abstract_encoder(whisper, param_dtype=dtype, mesh=mesh),
        abstract_decoder(llm, param_dtype=dtype, mesh=mesh),
    )
    bucket = Bucket(num_frames=750, merged_len=512, text_len=64)
    window = empty_batch(bucket, 1, fill=0, audio_shape={"samples": (480_000,)})
    batch = abstract_batch(window, 16, batch_sharding(mesh))
    state = abstract_state(config.projector, optimizer, mesh)
    with use_mesh(mesh):
        steps = compile_steps(
            [objective], [(bucket, batch)], state, frozen, optimizer, model, config
        )
    return steps[objective, bucket]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mesh_config", [MeshConfig(), MeshConfig(data=1, fsdp=2, tensor=2)])
def test_step_compiles_for_v5e_and_fits_its_memory(mesh_config, stage, report):
    objective, num_parts = STAGES[stage]
    config = dataclasses.replace(
        PRESETS["whisper-base-smollm2-135m"][1], accumulation_steps=num_parts
    )
    mesh = make_mesh(mesh_config, tpu_devices("v5e:2x2"))
    compiled = compile_step(mesh, objective, config)
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and hlo is not None
    peak = memory_of(compiled)[2]
    report(f"v5e:2x2, {mesh_config}, {stage}: {peak / 1e9:.2f} GB per chip")
    assert memory.alias_size_in_bytes > 0, "the state is not donated"
    assert peak < CHIP_BYTES
    assert "all-reduce" in hlo, "gradients are not summed over the chips"


@pytest.mark.parametrize("num_parts", [1, 2])
def test_gradients_cross_slices_once_in_a_step(num_parts, report):
    """Two slices of v5e, with parameters sharded inside each.

    The compiler makes one program for all slices. What leaves a slice is sent by its host.
    """
    mesh = make_mesh(MeshConfig(fsdp=2), tpu_devices("v5e:2x2 x 2"))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    config = dataclasses.replace(
        PRESETS["whisper-base-smollm2-135m"][1], accumulation_steps=num_parts
    )
    compiled = compile_step(
        mesh,
        LLMObjective(),
        config,
        dataclasses.replace(WHISPER_BASE, encoder_layers=2),
        dataclasses.replace(SMOLLM2_135M, num_hidden_layers=2),
    )
    hlo = compiled.as_text()
    assert hlo is not None
    sent, sent_in_loops = transfers(hlo)
    params = abstract_projector(config.projector, mesh=mesh)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    chips = mesh.size // 2  # of a slice; each sends its share
    report(f"2 x v5e:2x2: {chips * sum(sent)} of {num_params} numbers, in loops {sent_in_loops}")
    assert num_params <= chips * sum(sent) < 1.01 * num_params
    assert chips * sum(sent_in_loops) < 0.01 * num_params, "not only small sums, but gradients"
    assert " all-gather(" in hlo, "parameters are not sharded"
    groups = re.findall(r"replica_groups=\{([{}\d,]+)\}", hlo)
    assert max(int(chip) for group in groups for chip in re.findall(r"\d+", group)) < chips


def transfers(hlo: str) -> tuple[list[int], list[int]]:
    """How many numbers a chip sends to other slices: once in a step, and within loops."""
    sent = {True: [], False: []}
    is_entry = False
    for line in hlo.splitlines():
        if not line.startswith(" "):
            is_entry = line.startswith("ENTRY")
        if " send(" in line:
            assert 'megascale_transfer_type="ALL_REDUCE"' in line, line
            (shape,) = re.findall(r"= \(\w+\[([\d,]*)\]", line)
            sent[is_entry].append(math.prod(int(size) for size in shape.split(",")))
    return sent[True], sent[False]


LENGTH, LABELS = 512, 96  # of the sequence of an utterance


@pytest.fixture(scope="module")
def towers():
    """whisper-large-v3-turbo and SmolLM3-3B in bf16, on 64 chips, weights split four ways."""
    mesh = make_mesh(MeshConfig(fsdp=4), tpu_devices("v5e:8x8"))
    bf16 = jnp.bfloat16
    model = make_speech_llm(
        WHISPER_LARGE_V3_TURBO,
        ProjectorConfig(encoder_dim=1280, llm_dim=2048),
        SMOLLM3_3B,
        dtype=bf16,
        remat="layers",
    )
    params = {
        "encoder": abstract_encoder(WHISPER_LARGE_V3_TURBO, param_dtype=bf16, mesh=mesh),
        "llm": abstract_decoder(SMOLLM3_3B, param_dtype=bf16, mesh=mesh),
    }
    return model, params, mesh


@pytest.mark.parametrize("part", ["encoder", "llm", "llm gradient"])
def test_full_size_towers_compile_for_64_chips(towers, part, report):
    """Four utterances of 30 s on each chip, with the fused attention."""
    model, params, mesh = towers

    def on_chips(*shape, dtype=jnp.bfloat16):
        batch = 4 * mesh.size
        return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=batch_sharding(mesh))

    def logits(params, inputs, positions):
        return model.label_logits(params, inputs, positions)

    def gradient(params, inputs, positions):
        return jax.grad(lambda x: jnp.sum(jax.nn.logsumexp(logits(params, x, positions), -1)))(
            inputs
        )

    inputs = (on_chips(LENGTH, 2048), on_chips(LABELS, dtype=jnp.int32))
    function, args = {
        "encoder": (model.encode, (params["encoder"], on_chips(480_000, dtype=jnp.float32))),
        "llm": (logits, (params["llm"], *inputs)),
        "llm gradient": (gradient, (params["llm"], *inputs)),
    }[part]
    start = time.monotonic()
    with use_mesh(mesh):
        jitted = jax.jit(function, out_shardings=batch_sharding(mesh))
        compiled = jitted.lower(*args).compile()
    secs, peak, hlo = time.monotonic() - start, memory_of(compiled)[2], compiled.as_text()
    report(f"v5e:8x8, {part}: compiled in {secs:.0f} s, {peak / 1e9:.2f} GB per chip")
    assert peak < CHIP_BYTES
    assert hlo is not None and "splash" in hlo, "attention is not fused"


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1500, 1500), (751, 751), (391, 415)])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_attention_is_fused_on_gpus(num_queries, num_keys, is_causal):
    """Gradients of 16 heads on 4 of keys, under a mesh that splits batch and heads."""
    mesh = make_mesh(MeshConfig(tensor=2), gpu_devices())
    q, k, v = (
        jax.ShapeDtypeStruct((8, n, length, 64), jnp.bfloat16, sharding=batch_sharding(mesh))
        for n, length in ((16, num_queries), (4, num_keys), (4, num_keys))
    )

    def compile_gradient(attention):
        def total(q, k, v):
            return jnp.sum(attention(q, k, v, is_causal=is_causal).astype(jnp.float32))

        with use_mesh(mesh):
            return jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, v).compile()

    fused, plain = map(compile_gradient, (attend, plain_attend))
    assert "cudnn" in (fused.as_text() or "")
    assert "cudnn" not in (plain.as_text() or "")
    assert memory_of(fused)[2] < memory_of(plain)[2]
