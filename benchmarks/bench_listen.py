"""Measures how much memory and time it takes to read and cut sound files that last for hours.

  python benchmarks/bench_listen.py --hours 3

Makes stereo files at 44.1 kHz of speech with pauses between the clips, and lets `transcribe` read
them, each in a process of its own, with a model that hears nothing: what is measured is what comes
on top of a real one. Prints JSON: for each format, the peak of memory in MiB after everything is
imported and at the end, the number of pieces, and the seconds of sound per second.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile
import soxr
from own_process import measure, peak_mib

from flax_projector.config import DataConfig
from flax_projector.data.audio import load_audio
from flax_projector.data.manifest import read_manifest
from flax_projector.inference.pieces import Piece
from flax_projector.inference.sound_files import hear_files
from flax_projector.lengths import SAMPLE_RATE
from flax_projector.training.scores import Transcript

RATE, PAUSE_SECS = 44_100, 0.6
FORMATS = ("wav", "flac", "m4a")


def speech(manifest: str, hours: float) -> Iterator[np.ndarray]:
    """Clips, each followed by a pause, over and over: f32[N, 2]."""
    num_left = round(hours * 3600 * RATE)
    for row in itertools.cycle(read_manifest(manifest)[0]):
        mono = soxr.resample(load_audio(row.audio), SAMPLE_RATE, RATE)
        mono = np.pad(mono, (0, round(PAUSE_SECS * RATE)))[:num_left]
        yield np.stack([mono, 0.5 * mono], axis=1)
        num_left -= len(mono)
        if not num_left:
            return


def write(path: Path, blocks: Iterator[np.ndarray]) -> None:
    """Writes a file in the format of its suffix."""
    if path.suffix != ".m4a":
        with soundfile.SoundFile(path, "w", RATE, 2) as file:
            for block in blocks:
                file.write(block)
        return
    import av

    with av.open(path, "w", format="ipod") as file:
        stream = file.add_stream("aac", rate=RATE)
        for block in blocks:
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(block.T), format="fltp", layout="stereo"
            )
            frame.sample_rate = RATE
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def hear_nothing(pieces: Sequence[Piece], bound: float, size: int) -> list[Transcript]:
    """In place of a model."""
    del bound, size
    return [Transcript("", "", "", (), None, is_bad=False, cut_by=None) for _ in pieces]


def measure_file(path: str) -> dict[str, float]:
    """Reads a file as `transcribe` does."""
    data, before, start = DataConfig(), peak_mib(), time.perf_counter()
    sizes = [data.eval_batch_size] * len(data.bucket_bounds)
    (heard,) = hear_files([path], hear_nothing, bounds=data.bucket_bounds, sizes=sizes)
    secs = time.perf_counter() - start
    return {
        "hours": round(heard.secs / 3600, 3),
        "pieces": len(heard.segments),
        "imports_mib": round(before),
        "peak_mib": round(peak_mib()),
        "secs_per_sec": round(heard.secs / secs),
    }


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=3.0)
    parser.add_argument("--speech", default="examples/demo/speech/heldout_seen_voices.jsonl")
    parser.add_argument("--file", help=argparse.SUPPRESS)  # for the processes
    options = parser.parse_args()
    if options.file:
        json.dump(measure_file(options.file), sys.stdout)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for suffix in FORMATS:
            path = Path(folder) / f"speech.{suffix}"
            write(path, speech(options.speech, options.hours))
            found[suffix] = measure(__file__, "--file", path)
            path.unlink()
    json.dump(found, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
