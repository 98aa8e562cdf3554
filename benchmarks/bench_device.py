"""Measures the training step of a preset on this machine's accelerators, with random weights.

It needs neither the towers' weights nor data, and no PyTorch. Every row of a batch is a clip of the
given length with 64 labels, 8 tokens before the audio and 24 in the prefix that rows share. Steps
follow each other as in training, and every round of four is timed as a whole. Prints JSON: for each
length of clips the median of the rounds, speech per second, MFU by the formula of `FlopCounter`,
what the compiler reserves on a device, and the most that was in use so far.

Example:

  python benchmarks/bench_device.py whisper-turbo-smollm3-3b --rows 16 --clip-secs 5 15 30
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
import zlib
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
import jax.numpy as jnp
import numpy as np

from convert.published import published_config
from flax_projector.batch import AUDIO_TOKEN, Batch, Bucket, abstract_batch, empty_batch, to_global
from flax_projector.config import PRESETS, MeshConfig, SpecAugmentConfig, TrainConfig
from flax_projector.lengths import FRAME_SECS, SAMPLE_RATE, num_audio_tokens
from flax_projector.models.llama import abstract_decoder
from flax_projector.models.speech_llm import encode_prefix, make_speech_llm
from flax_projector.models.whisper import abstract_encoder
from flax_projector.sharding import batch_sharding, make_mesh, use_mesh
from flax_projector.training.objectives import LLMObjective
from flax_projector.training.state import abstract_state, begin_anew, make_optimizer, make_schedule
from flax_projector.training.throughput import make_flop_counter, summarize
from flax_projector.training.train_step import compile_steps

PREFIX, PROMPT, LABELS = 24, 8, 64
STEPS = 4  # in a round
OBJECTIVE = LLMObjective()


def random_params(abstract: Any) -> Any:
    """Parameters of the right size for their layer; a norm's scale is one."""

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape, leaf.dtype, device=leaf.sharding)
        key = jax.random.key(zlib.crc32(jax.tree_util.keystr(path).encode()))
        make = jax.jit(
            lambda key: 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype),
            out_shardings=leaf.sharding,
        )
        return make(key)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def make_batch(config: TrainConfig, num_rows: int, secs: float, dim: int, prefix: list[int]) -> Any:
    """The bucket of clips of this length, and a batch that fills it, as NumPy arrays."""
    num_frames = round(secs / FRAME_SECS)
    num_audio = num_audio_tokens(num_frames, config.projector.projector_pool_stride)
    prompt_len = len(prefix) + num_audio + PROMPT
    bucket = Bucket(num_frames, prompt_len + LABELS, LABELS)
    audio: dict[str, tuple[int, ...]] = {"samples": (round(config.data.window_secs * SAMPLE_RATE),)}
    if config.data.cache_features:
        audio = {"frames": (num_frames, dim)}
    rng = np.random.default_rng(0)
    batch = empty_batch(bucket, num_rows, fill=0, audio_shape=audio)
    batch.tokens[:] = rng.integers(0, 1000, batch.tokens.shape)
    batch.tokens[:, : len(prefix)] = prefix
    batch.tokens[:, len(prefix) :][:, :num_audio] = AUDIO_TOKEN
    batch.num_frames[:], batch.prompt_len[:], batch.label_valid[:] = num_frames, prompt_len, True
    batch.label_positions[:] = prompt_len - 1 + np.arange(LABELS)
    batch.labels[:] = rng.integers(0, 1000, batch.labels.shape)
    for heard in (batch.samples, batch.frames):
        if heard is not None:
            heard[:] = 0.1 * rng.standard_normal(heard.shape)
    return bucket, batch


def measure(config: TrainConfig, num_rows: int, lengths: list[float], rounds: int) -> dict:
    """Times the steps of a config at each length of clips; see `main`."""
    mesh = make_mesh(config.mesh)
    whisper, llama = published_config(config.encoder), published_config(config.llm)
    dtype = jnp.dtype(config.dtype)
    model = make_speech_llm(
        whisper, config.projector, llama, dtype=dtype, remat=config.remat, augmentation=None
    )
    frozen = (
        random_params(abstract_encoder(whisper, param_dtype=dtype, mesh=mesh)),
        random_params(abstract_decoder(llama, param_dtype=dtype, mesh=mesh)),
    )
    prefix = list(range(PREFIX))
    with use_mesh(mesh):
        shared = encode_prefix(model, frozen[1], prefix, mesh)
    model = dataclasses.replace(model, prefix=shared)
    optimizer = make_optimizer(
        config.optimizer, make_schedule(config.optimizer, config.num_steps, config.ctc)
    )
    abstract = abstract_state(config.projector, optimizer, mesh)
    results = {}
    for secs in lengths:
        bucket, local = make_batch(config, num_rows, secs, whisper.d_model, prefix)
        sharding = batch_sharding(mesh)
        batch: Batch = to_global(local, num_rows, sharding)
        start = time.perf_counter()
        with use_mesh(mesh):
            steps = compile_steps(
                [OBJECTIVE],
                [(bucket, abstract_batch(local, num_rows, sharding))],
                abstract,
                frozen,
                optimizer,
                model,
                config,
            )
        compile_secs = time.perf_counter() - start
        step = steps[OBJECTIVE, bucket]
        with use_mesh(mesh):
            state = begin_anew(model.projector, optimizer, abstract, seed=0, output_scale=1.0)
        times, metrics = [], {}
        for _ in range(1 + rounds):  # the first warms up
            start = time.perf_counter()
            for _ in range(STEPS):
                state, metrics = step(state, *frozen, batch)
            jax.block_until_ready(metrics)
            times.append((time.perf_counter() - start) / STEPS)
        step_secs = statistics.median(times[1:])
        count_flops = make_flop_counter(
            (state.params, *frozen),
            llama,
            window_frames=0 if config.data.cache_features else config.data.window_frames,
        )
        summary = summarize(
            [jax.device_get(metrics)],
            secs=step_secs,
            wait_secs=0.0,
            count_flops=count_flops,
            devices=mesh.devices.flatten().tolist(),
        )
        memory: Any = step.memory_analysis()
        used = mesh.devices.flat[0].memory_stats() or {}  # a CPU has none
        results[f"{secs:g} s"] = {
            "step_secs": round(step_secs, 4),
            "audio_secs_per_sec": round(summary["audio_secs_per_sec"], 1),
            "mfu": round(summary["mfu"], 3) if "mfu" in summary else None,
            "loss": round(summary["loss"], 4),
            "compile_secs": round(compile_secs, 1),
            "argument_gb": round(memory.argument_size_in_bytes / 1e9, 2),
            "temporary_gb": round(memory.temp_size_in_bytes / 1e9, 2),
            "most_used_gb": round(used.get("peak_bytes_in_use", 0) / 1e9, 2) or None,
            "slowest_round": round(max(times[1:]), 4),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    presets = [name for name, (_, config) in PRESETS.items() if published_config(config.encoder)]
    parser.add_argument("preset", choices=presets)
    parser.add_argument("--rows", type=int, default=16, help="clips in a batch, over all devices")
    parser.add_argument("--clip-secs", type=float, nargs="+", default=[15.0])
    parser.add_argument("--remat", help="instead of the preset's")
    parser.add_argument("--dtype", help="instead of the preset's")
    parser.add_argument("--accumulation-steps", type=int, default=1)
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--kept-frames", action="store_true", help="without the encoder")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of four steps that are timed")
    args = parser.parse_args()
    config = PRESETS[args.preset][1]
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, cache_features=args.kept_frames),
        spec_augment=SpecAugmentConfig() if args.kept_frames else config.spec_augment,
        accumulation_steps=args.accumulation_steps,
        mesh=MeshConfig(fsdp=args.fsdp),
        **{n: v for n in ("remat", "dtype") if (v := getattr(args, n)) is not None},
    )
    setting = {
        "benchmark": "device",
        "preset": args.preset,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "rows": args.rows,
        "dtype": config.dtype,
        "remat": config.remat,
        "accumulation_steps": config.accumulation_steps,
        "kept_frames": args.kept_frames,
        "rounds": args.rounds,
    }
    results = measure(config, args.rows, args.clip_secs, args.rounds)
    json.dump({**setting, "results": results}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
