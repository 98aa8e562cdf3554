"""Measures how much audio the input pipeline decodes, resamples and batches.

Reads 12-second clips in the usual audio formats with `Batches` and `BatchIterator`, into NumPy
batches as the training loop takes them. The baseline reads the same files with soundfile and soxr
alone, in one thread and without batches. The two take turns. Prints JSON: hours of audio per second
of wall-clock time and per second of CPU time, and the ratio of the CPU times.

With --shards it reads the same FLAC clips as single files and from a tar shard, on the disk and
in a bucket, in turns. The bucket is that of a server on this machine, so that its figures hold the
work of the client and the server, and no network.

Examples:

  python benchmarks/bench_input.py --rounds 5 --threads 2
  PYTHONPATH=. python benchmarks/bench_input.py --shards
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile
import soxr

from flax_projector.config import DataConfig, MeshConfig
from flax_projector.data.audio import Audio
from flax_projector.data.batches import Batches
from flax_projector.data.inputs import Waveforms
from flax_projector.data.manifest import read_manifest
from flax_projector.data.reader import BatchIterator
from flax_projector.data.rows import ManifestRow
from flax_projector.data.shards.pack import pack
from flax_projector.data.utterances import Utterance, Utterances
from flax_projector.lengths import SAMPLE_RATE, num_encoder_frames
from flax_projector.planning.speech import prompt_of_ids
from flax_projector.sharding import make_mesh

FORMATS = {  # suffix, sample rate, channels
    "wav, 16 kHz": ("wav", 16_000, 1),
    "flac, 16 kHz": ("flac", 16_000, 1),
    "flac, 48 kHz stereo": ("flac", 48_000, 2),
    "mp3, 44.1 kHz": ("mp3", 44_100, 1),
    "ogg vorbis, 16 kHz": ("ogg", 16_000, 1),
}
CLIPS, SECS, BATCH = 64, 12, 8
DATA = DataConfig(bucket_secs=(15.0,), batch_size=BATCH)
PROMPT = prompt_of_ids(before_audio=(3,), after_audio=(4,))
LABELS = (5, PROMPT.end_of_turn)


def write_clips(folder: Path, suffix: str, rate: int, channels: int) -> list[Path]:
    """Writes clips of noise that rises and falls as speech does, to give a codec real work."""
    rng = np.random.default_rng(0)
    loudness = 0.1 * (1 + np.sin(np.arange(SECS * rate) * (2 * np.pi * 3 / rate)))
    paths = [folder / f"{i}.{suffix}" for i in range(CLIPS)]
    for path in paths:
        noise = rng.standard_normal((SECS * rate, channels)) * loudness[:, None]
        smooth = noise[1:] + 0.9 * noise[:-1]
        soundfile.write(path, np.clip(smooth, -1, 1).astype(np.float32), rate)
    return paths


def read_batches(clips: Sequence[Audio], num_threads: int) -> None:
    """Reads one epoch of batches with our pipeline."""
    max_frames = num_encoder_frames(SECS * SAMPLE_RATE) + 1
    utterances = [
        Utterance(ManifestRow(str(clip), clip, "", float(SECS)), max_frames, LABELS)
        for clip in clips
    ]
    batches = Batches(
        Utterances.of(utterances),
        inputs=Waveforms(DATA.window_samples),
        prompt=PROMPT,
        config=DATA,
        pool_stride=4,
        mesh=make_mesh(MeshConfig()),
        batch_size=BATCH,
    )
    with contextlib.closing(BatchIterator(batches, num_threads=num_threads)) as iterator:
        for batch in iterator:
            if batch.bad:
                raise RuntimeError("a clip could not be read")


def read_plainly(paths: list[Path]) -> None:
    """Reads the clips with the libraries alone."""
    for path in paths:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE)


def seconds(function: Callable[[], None]) -> tuple[float, float]:
    """Returns the wall-clock time and the CPU time of a call."""
    start, cpu_start = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start, time.process_time() - cpu_start


def measure(paths: list[Path], num_threads: int, rounds: int) -> dict[str, float]:
    """Returns the medians of both ways to read the clips."""
    ways = (lambda: read_batches(paths, num_threads), lambda: read_plainly(paths))
    times = [[seconds(way) for way in ways] for _ in range(rounds + 1)][1:]  # the first warms up
    ours, plain = zip(*times, strict=True)
    wall, cpu = (statistics.median(column) for column in zip(*ours, strict=True))
    plain_cpu = statistics.median(cpu for _, cpu in plain)
    hours = CLIPS * SECS / 3600
    return {
        "hours_per_sec": round(hours / wall, 2),
        "hours_per_core_sec": round(hours / cpu, 2),
        "libraries_hours_per_core_sec": round(hours / plain_cpu, 2),
        "cpu_ratio": round(cpu / plain_cpu, 2),
    }


def measure_shards(folder: Path, num_threads: int, rounds: int) -> dict[str, dict[str, float]]:
    """Returns the medians for single files and shards, on a disk and in a bucket."""
    from tests.bucket import BUCKET, emulator

    paths = write_clips(folder, "flac", SAMPLE_RATE, 1)
    rows = [{"audio": str(p), "text": "x", "duration": float(SECS)} for p in paths]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with emulator() as server:
        server.files().put([str(p) for p in paths], f"gs://{BUCKET}/files/")
        places: dict[str, list[Audio]] = {
            "local files": [*paths],
            "files in a bucket": [f"gs://{BUCKET}/files/{p.name}" for p in paths],
        }
        destinations = {"local shard": f"{folder}/shards", "shard in a bucket": f"gs://{BUCKET}/s"}
        for name, dst in destinations.items():
            pack(f"{folder}/a.jsonl", dst, shard_mb=256, flac=False, config=DATA)
            places[name] = [row.audio for row in read_manifest(f"{dst}/manifest.jsonl")[0]]
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in places}
        for _ in range(rounds + 1):
            for name, clips in places.items():
                times[name].append(seconds(functools.partial(read_batches, clips, num_threads)))
    hours = CLIPS * SECS / 3600
    results = {}
    for name, found in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*found[1:], strict=True))
        results[name] = {
            "hours_per_sec": round(hours / wall, 2),
            "hours_per_core_sec": round(hours / cpu, 2),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds per format")
    parser.add_argument(
        "--threads", type=int, default=DATA.num_threads, help="threads of the pipeline"
    )
    parser.add_argument("--shards", action="store_true", help="shards beside single files")
    args = parser.parse_args()
    results = {}
    if args.shards:
        with tempfile.TemporaryDirectory() as folder:
            results = measure_shards(Path(folder), args.threads, args.rounds)
    for name, (suffix, rate, channels) in () if args.shards else FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            paths = write_clips(Path(folder), suffix, rate, channels)
            results[name] = measure(paths, args.threads, args.rounds)
    setting = {"cpus": os.cpu_count(), "threads": args.threads, "rounds": args.rounds}
    json.dump({"benchmark": "input", **setting, "results": results}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
