"""Measures how long a start takes to find out which of its clips have kept frames.

  python benchmarks/bench_kept_frames.py --clips 10000000

Makes a store of random keys with empty frames; the digests of clips, which need a look at every
file, are not measured.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from flax_projector.data.frames.keys import find
from flax_projector.data.frames.shards import FRAMES, INDEX, Encoding, read_shards
from flax_projector.data.frames.store import FrameStore

ENCODING = Encoding("random", 1, "bfloat16", 480_000)


def make_store(folder: Path, num_clips: int, clips_per_shard: int) -> None:
    """Writes indexes of random keys, and sparse files of frames."""
    rng = np.random.default_rng(0)
    for first in range(0, num_clips, clips_per_shard):
        count = min(clips_per_shard, num_clips - first)
        num_frames = rng.integers(1, 1500, count, dtype=np.int32)
        np.savez(
            folder / f"{first:032x}{INDEX}",
            keys=rng.integers(0, 2**64, (2, count), dtype=np.uint64),
            num_frames=num_frames,
            notes=np.frombuffer(b"{}", np.uint8),
        )
        with (folder / f"{first:032x}{FRAMES}").open("wb") as file:
            file.truncate(int(num_frames.sum()) * ENCODING.frame_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=10_000_000)
    parser.add_argument("--clips-per-shard", type=int, default=4096)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_store(folder, args.clips, args.clips_per_shard)

        def report(what: str, start: float) -> None:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
            secs = time.perf_counter() - start
            sys.stdout.write(f"{what}: {secs:.1f} s, peak memory {memory:.2f} GB\n")

        start = time.perf_counter()
        shards = read_shards(folder, ENCODING)
        report(f"indexes of {len(shards.names)} shards read", start)
        wanted = shards.keys[:, np.random.default_rng(1).permutation(args.clips)]
        start = time.perf_counter()
        at = find(shards.keys, wanted)
        report(f"{np.count_nonzero(at >= 0)} clips found", start)
        start = time.perf_counter()
        FrameStore.make(folder, ENCODING, wanted, shards.entries[at], shards.names)
        report("table for this process and its workers written", start)


if __name__ == "__main__":
    main()
