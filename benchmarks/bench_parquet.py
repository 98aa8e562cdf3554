"""Measures random access to the clips of parquet in a bucket beside those of a packed shard.

Writes the same clips of noise as a data set in parquet, with row groups as `datasets` has them and
smaller ones, and as a tar shard, to a server of Google Cloud Storage on this machine. Then it
reads rows in random order: from parquet, the row group that a row is in; from the shard, its range
of bytes. Prints JSON: milliseconds and bytes that a row takes, and how many times its size that is.
There is no network in between: at a distance, bytes cost more.

Example:

  PYTHONPATH=. python benchmarks/bench_parquet.py --rows 400
"""

import argparse
import functools
import io
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile

from flax_projector.data.audio import Slice
from flax_projector.data.shards.tar import ShardWriter
from flax_projector.lengths import SAMPLE_RATE
from flax_projector.storage.urls import filesystem_of
from tests.bucket import BUCKET, emulator

ROW_GROUPS = (100, 10, 1)
"""`datasets` writes 100 rows of audio in a group."""


def make_clips(count: int, secs: int = 12) -> list[bytes]:
    """Clips of noise in FLAC."""
    rng, clips = np.random.default_rng(0), []
    for _ in range(count):
        file = io.BytesIO()
        samples = 0.1 * rng.standard_normal(secs * SAMPLE_RATE)
        soundfile.write(file, np.clip(samples, -1, 1), SAMPLE_RATE, format="FLAC")
        clips.append(file.getvalue())
    return clips


def as_parquet(clips: list[bytes], group: int) -> bytes:
    """The clips as `datasets` stores them."""
    column = pyarrow.array([{"bytes": clip, "path": None} for clip in clips])
    table, file = pyarrow.table({"audio": column}), io.BytesIO()
    pyarrow.parquet.write_table(table, file, row_group_size=group, compression="snappy")
    return file.getvalue()


def as_shard(clips: list[bytes]) -> tuple[bytes, list[int]]:
    """The clips in a tar, and where each begins."""
    file = io.BytesIO()
    shard = ShardWriter(file)
    starts = [shard.add(f"{i}.flac", clip) for i, clip in enumerate(clips)]
    shard.close()
    return file.getvalue(), starts


def read_group(file: pyarrow.parquet.ParquetFile, row: int, *, group: int) -> bytes:
    """A clip, through the row group that it is in."""
    column = file.read_row_group(row // group, columns=["audio.bytes"]).column("audio")
    return column[row % group]["bytes"].as_py()


def read_slice(row: int, *, url: str, starts: list[int], sizes: list[int]) -> bytes:
    """A clip, through its range of bytes."""
    return Slice(url, starts[row], sizes[row]).fetch()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=400, help="rows of the data set")
    parser.add_argument("--reads", type=int, default=40, help="rows that are read")
    args = parser.parse_args()
    clips = make_clips(args.rows)
    sizes = [len(clip) for clip in clips]
    with emulator():
        fs, _ = filesystem_of(f"gs://{BUCKET}/x")
        fetched: list[int] = []
        cat_file = fs._cat_file_sequential

        async def count(*arguments: object, **options: object) -> bytes:
            content = await cat_file(*arguments, **options)
            fetched.append(len(content))
            return content

        shard, starts = as_shard(clips)
        fs.pipe_file(f"{BUCKET}/0.tar", shard)
        ways: dict[str, Callable[[int], bytes]] = {
            "packed shard": functools.partial(
                read_slice, url=f"gs://{BUCKET}/0.tar", starts=starts, sizes=sizes
            )
        }
        for group in ROW_GROUPS:
            path = f"{BUCKET}/{group}.parquet"
            fs.pipe_file(path, as_parquet(clips, group))
            opened = fs.open(path, cache_type="none")
            file = pyarrow.parquet.ParquetFile(opened, pre_buffer=True)
            ways[f"parquet, {group} rows a group"] = functools.partial(
                read_group, file, group=group
            )
        fs._cat_file_sequential = count
        results = {}
        order = np.random.default_rng(1).permutation(args.rows)[: args.reads].tolist()
        for name, read in ways.items():
            fetched.clear()
            times = []
            for row in order:
                start = time.perf_counter()
                content = read(row)
                times.append(1000 * (time.perf_counter() - start))
                if content != clips[row]:
                    raise RuntimeError(f"{name}: row {row} is not what was written")
            results[name] = {
                "ms_per_row": round(statistics.median(times), 2),
                "mb_per_row": round(sum(fetched) / len(order) / 1e6, 2),
                "times_its_size": round(sum(fetched) / sum(sizes[row] for row in order), 1),
            }
    setting = {"rows": args.rows, "reads": args.reads}
    json.dump({"benchmark": "parquet", **setting, "results": results}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
