"""Measures converting a 600 MB projector against reading and writing the same file.

The baseline is the safetensors library: `load_file`, then `save_file`. Each measurement runs in its
own process, and the tasks take turns, in an order that changes. Files are in memory (/dev/shm),
unless --folder names another place. Prints JSON: median seconds, without imports, until the task is
done and until every byte is on the disk, and the peak resident memory of the process, with imports.

Example:

  python benchmarks/bench_convert.py --rounds 5
  python benchmarks/bench_convert.py --folder /tmp   # on the disk
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from own_process import measure, peak_mib

RESULTS = {  # task: what it writes; a task may read the output of an earlier one
    "plain copy": "copy.safetensors",
    "to-flax": "flax",
    "to-flax --no-verify": "flax-unverified",
    "to-torch": "hf-back",
    "to-torch --no-verify": "hf-back-unverified",
}


def make_projector(folder: Path) -> int:
    """Writes a random 600 MB f32 projector as an HF folder; returns the size of its file."""
    import numpy as np

    from convert import engine
    from convert.checkpoint import Checkpoint, TensorInfo
    from convert.hf_config import config_text, projector_config_dict
    from convert.models import PROJECTOR
    from convert.torch_files import WEIGHTS, write_safetensors
    from flax_projector.config import ProjectorConfig

    config = ProjectorConfig(encoder_dim=1280, llm_dim=2048, projector_num_layers=4)
    target = PROJECTOR.leaves(config)
    leaves = {path: TensorInfo(x.shape, np.dtype(np.float32)) for path, x in target.items()}
    infos = engine.plan_to_torch(PROJECTOR.table, leaves, target).tensors
    rng = np.random.default_rng(0)
    folder.mkdir()
    write_safetensors(
        folder / WEIGHTS,
        Checkpoint(infos, lambda key: rng.standard_normal(infos[key].shape, np.float32)),
    )
    text = config_text(projector_config_dict(config, dtype="float32"))
    (folder / "config.json").write_text(text)
    return (folder / WEIGHTS).stat().st_size


def run(task: str, folder: Path) -> dict[str, float]:
    """Runs one task in this process and measures it."""
    name, _, option = task.partition(" --")
    dst = folder / RESULTS[task]
    is_verified = option != "no-verify"
    if name == "plain copy":
        from safetensors.numpy import load_file, save_file

        def work():
            save_file(load_file(folder / "hf/model.safetensors"), dst)
    else:
        import jax

        from convert import to_flax, to_torch

        jax.config.update("jax_platforms", "cpu")
        jax.devices()  # starts JAX before the clock

        def work():
            if name == "to-flax":
                to_flax(folder / "hf", dst, verify=is_verified)
            else:
                to_torch(folder / RESULTS["to-flax"], dst, verify=is_verified)

    imported = peak_mib()
    start = time.perf_counter()
    work()
    secs = time.perf_counter() - start
    os.sync()
    on_disk_secs = time.perf_counter() - start
    return {
        "secs": secs,
        "on_disk_secs": on_disk_secs,
        "peak_mib": peak_mib(),
        "imports_mib": imported,
    }


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds; each runs every task once")
    memory = Path("/dev/shm")
    parser.add_argument(
        "--folder",
        type=Path,
        default=memory if memory.is_dir() else None,
        help="working folder (default: %(default)s)",
    )
    parser.add_argument("--task", choices=RESULTS, help=argparse.SUPPRESS)  # runs it in --folder
    args = parser.parse_args()
    if args.task:
        json.dump(run(args.task, args.folder), sys.stdout)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        size = make_projector(folder / "hf")
        measured = {task: [] for task in RESULTS}
        tasks = list(RESULTS)
        for number in range(args.rounds + 1):
            first = number % len(tasks)  # each runs in every position: what ran before it matters
            for task in tasks[first:] + tasks[:first]:
                remove(folder / RESULTS[task])
                os.sync()  # earlier writes must not count towards this task
                measured[task].append(measure(__file__, "--task", task, "--folder", name))

    def median(task: str, name: str) -> float:
        return statistics.median(r[name] for r in measured[task][1:])  # the first fills the caches

    results = {}
    for task, rounds in measured.items():
        medians = {name: median(task, name) for name in ("secs", "on_disk_secs")}
        ratios = {name: secs / median("plain copy", name) for name, secs in medians.items()}
        results[task] = {
            **{name: round(secs, 2) for name, secs in medians.items()},
            "ratio": round(ratios["secs"], 2),
            "on_disk_ratio": round(ratios["on_disk_secs"], 2),
            "peak_mib": round(max(r["peak_mib"] for r in rounds)),
            "imports_mib": round(max(r["imports_mib"] for r in rounds)),
        }
    setting = {"cpus": os.cpu_count(), "rounds": args.rounds, "file_mib": round(size / 2**20)}
    json.dump({"benchmark": "convert", **setting, "results": results}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
