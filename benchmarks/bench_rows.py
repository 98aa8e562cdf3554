"""Measures how long a start takes to have the rows of a large manifest ready for training.

  python benchmarks/bench_rows.py --rows 10000000

Makes a manifest of clips in tar shards, which are empty files of the right size, and plans its
batches twice, each time in a process of its own: first the rows are read from the manifest and
tokenized, then from the columns that were kept. Prints JSON: seconds, and the peak of memory in GB:
all of it, and without the pages of mapped files, which processes share and the system may drop; and
the memory of worker processes to which the batches were sent.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from flax_projector.chat.prompt import make_prompt
from flax_projector.chat.tokenizer import load_tokenizer
from flax_projector.config import DataConfig, MeshConfig, PromptConfig
from flax_projector.data.batches import Batches
from flax_projector.data.inputs import Waveforms
from flax_projector.data.manifest import read_manifest
from flax_projector.data.utterances import prepare
from flax_projector.sharding import make_mesh

ROWS_PER_SHARD, CLIP_BYTES = 1000, 60_000
WORDS = [f"{a}{b}" for a in ("ba", "ke", "li", "mo", "su") for b in ("n", "r", "st", "ton", "ly")]


def write_manifest(folder: Path, num_rows: int) -> Path:
    """Writes a manifest of clips of 1 to 20 s, with their transcripts."""
    rng, manifest = np.random.default_rng(0), folder / "clips.jsonl"
    with manifest.open("w") as file:
        for first in range(0, num_rows, ROWS_PER_SHARD):
            shard = f"{first // ROWS_PER_SHARD:06d}"
            with (folder / f"{shard}.tar").open("wb") as tar:
                tar.truncate(ROWS_PER_SHARD * CLIP_BYTES)
            secs = rng.uniform(1, 20, ROWS_PER_SHARD).round(3)
            for i in range(min(ROWS_PER_SHARD, num_rows - first)):
                text = " ".join(rng.choice(WORDS, max(2, int(2.5 * secs[i] / 4))))
                span = f"[{i * CLIP_BYTES}, {CLIP_BYTES}]"
                file.write(
                    f'{{"id": "{shard}/{i:06d}", "audio": "{shard}.tar", "bytes": {span}, '
                    f'"text": "{text}", "duration": {secs[i]}}}\n'
                )
    return manifest


def memory(pid: str = "self") -> dict[str, float]:
    """Memory of a process in GB: of its own, and with the pages of mapped files."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    kilobytes = {line[0]: int(line[1]) for line in lines if line[0] in ("RssAnon:", "VmRSS:")}
    return {"own_gb": kilobytes["RssAnon:"] / 1e6, "gb": kilobytes["VmRSS:"] / 1e6}


class Peak(threading.Thread):
    """Looks at the memory of this process every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.found = {"own_gb": 0.0, "gb": 0.0}
        self.start()

    def run(self) -> None:
        while True:
            now = memory()
            self.found = {name: max(now[name], peak) for name, peak in self.found.items()}
            time.sleep(0.005)


def start(manifest: str, llm: Path, num_workers: int) -> dict[str, Any]:
    """Makes the batches of a run, and its first one."""
    config = DataConfig(bucket_secs=(5.0, 10.0, 20.0), batch_size=512)
    prompt = make_prompt(load_tokenizer(llm), PromptConfig(user="Transcribe: {audio}"))
    mesh = make_mesh(MeshConfig())
    before, peak, began = memory(), Peak(), time.perf_counter()
    secs = {}

    def note(phase: str) -> None:
        secs[phase] = round(time.perf_counter() - began - sum(secs.values()), 2)

    rows, _ = read_manifest(manifest)
    note("rows")
    utterances, _ = prepare([rows], prompt, config)
    note("labels and lengths")
    batches = Batches(
        utterances,
        inputs=Waveforms(config.window_samples),
        prompt=prompt,
        config=config,
        pool_stride=4,
        mesh=mesh,
        batch_size=config.batch_size,
        shuffle_seed=0,
    )
    note("first epoch planned")
    fingerprint = batches.fingerprint
    note("fingerprint")
    batches.members(0)
    note("first batch")
    found = {
        "secs": round(sum(secs.values()), 1),
        "phases": secs,
        "before": before,
        "peak": peak.found,
        "fingerprint": fingerprint,
    }
    if num_workers:
        context = multiprocessing.get_context("spawn")
        with context.Pool(num_workers) as pool:
            found["workers"] = pool.map(open_batches, [batches] * num_workers, chunksize=1)
    return found


def open_batches(batches: Batches) -> dict[str, float]:
    """Makes the members of a batch in a worker process; its memory."""
    batches.members(len(batches) - 1)
    return memory()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--llm", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--manifest", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.manifest:
        sys.stdout.write(json.dumps(start(args.manifest, args.llm, args.workers)) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_manifest(Path(folder), args.rows)
        found: dict[str, Any] = {"rows": args.rows}
        for name in ("from the manifest", "from kept columns"):
            command = [sys.executable, __file__, "--manifest", str(manifest), "--llm", args.llm]
            command += ["--workers", str(args.workers)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            found[name] = json.loads(done.stdout)
        kept = (Path(folder) / "clips.jsonl.columns").glob("*")
        found["kept_gb"] = sum(path.stat().st_size for path in kept) / 1e9
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
