"""Measures loading the towers into shards on 8 devices against reading the whole files.

Loads the encoder of whisper-base and SmolLM2-135M as f32 onto 8 fake CPU devices, in a mesh of
data=2, fsdp=2, tensor=2, where every value is on at least two devices. The baseline is `load_file`
of the safetensors library, which returns the tensors as they are in the file, including those of
Whisper's decoder. Each measurement runs in its own process, and the tasks take turns.

Prints JSON: the median time in seconds, without imports; whether torch was imported; and, in MiB,
the maximum over all rounds of:

  arrays    the arrays on all devices, counting replicas
  buffers   the buffers that hold them; CPU devices may share one
  imports   resident memory after the imports
  peak      resident memory at its peak
  overhead  peak without imports and buffers
  limit     limit of the overhead: the largest stacked parameter + 500 MB

Example:

  python benchmarks/bench_load.py --models models --rounds 5
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

from own_process import measure, peak_mib

MODELS = {"whisper-base": "whisper encoder", "smollm2-135m-instruct": "llama"}
FLAGS = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


def load_tower(folder: Path) -> dict[str, float]:
    """Loads a model into its shards in this process, and measures it."""
    import jax

    from convert import load
    from convert.models import KINDS
    from convert.trees import flatten
    from flax_projector.config import MeshConfig
    from flax_projector.sharding import make_mesh

    (kind,) = (kind for kind in KINDS if kind.name == MODELS[folder.name])
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    abstract = kind.abstract_params(kind.read_config(folder), mesh=mesh)
    imports = peak_mib()
    start = time.perf_counter()
    params = load.load_tower(kind, folder, abstract)
    secs = time.perf_counter() - start
    peak = peak_mib()

    shards = [shard.data for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    by_pointer = {shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}
    buffers = sum(by_pointer.values()) / 2**20
    stacked = [x.nbytes for path, x in flatten(params).items() if path.startswith("layers/")]
    return {
        "secs": secs,
        "arrays_mib": sum(shard.nbytes for shard in shards) / 2**20,
        "buffers_mib": buffers,
        "imports_mib": imports,
        "peak_mib": peak,
        "overhead_mib": peak - imports - buffers,
        "limit_mib": (max(stacked) + 500e6) / 2**20,
        "imported_torch": "torch" in sys.modules,
    }


def load_file(folder: Path) -> dict[str, float]:
    """Reads the file in this process, and measures it."""
    from safetensors import numpy

    imports = peak_mib()
    start = time.perf_counter()
    tensors = numpy.load_file(folder / "model.safetensors")
    secs = time.perf_counter() - start
    arrays = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
    return {"secs": secs, "arrays_mib": arrays, "imports_mib": imports, "peak_mib": peak_mib()}


TASKS = {"load_tower": load_tower, "load_file": load_file}


def summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Returns the median of the seconds of one task, and the maximum of everything else."""
    secs = statistics.median(r["secs"] for r in rounds[1:])  # the first round fills caches
    worst = {name: max(r[name] for r in rounds) for name in rounds[0] if name != "secs"}
    return {"secs": round(secs, 3)} | {
        name: value if isinstance(value, bool) else round(value) for name, value in worst.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds; each runs every task once")
    parser.add_argument(
        "--models",
        type=Path,
        default=Path("models"),
        help="folder of both models (default: %(default)s)",
    )
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)  # runs it on one model
    args = parser.parse_args()
    if args.task:
        json.dump(TASKS[args.task](args.models), sys.stdout)
        return
    measured = {(model, task): [] for model in MODELS for task in TASKS}
    for _ in range(args.rounds + 1):
        for (model, task), rounds in measured.items():
            options = ("--task", task, "--models", args.models / model)
            rounds.append(measure(__file__, *options, env=FLAGS))

    results = {}
    for model in MODELS:
        ours, theirs = (summary(measured[model, task]) for task in TASKS)
        ratio = round(ours["secs"] / theirs["secs"], 2)
        results[model] = {"load_tower": ours, "load_file": theirs, "ratio": ratio}
    setting = {"cpus": os.cpu_count(), "devices": 8, "rounds": args.rounds}
    json.dump({"benchmark": "load", **setting, "results": results}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
