"""Folders of runs that no model made, with what a report shows of them."""

import json
from pathlib import Path

import numpy as np
import soundfile

from flax_projector.config import PRESETS, to_json
from flax_projector.data.audio import Problem
from flax_projector.data.bad_rows import BadRow, to_line
from flax_projector.report.lengths import histogram
from flax_projector.training.score_files import to_lines
from tests.scored import scored

PAIRS = {
    "dev/0": ("stop at the corner", "stop at the corner"),
    "dev/1": ("turn left and go on", "turn right and now go"),
    "dev/2": ("wait two minutes", "minutes"),
    "dev/10": ("open the window", "open the door"),
}


def make_run(
    folder: Path, *, num_steps: int = 40, pairs: dict[str, tuple[str, str]] = PAIRS, **config
) -> Path:
    """The folder of a finished run with one held-out set, `dev`, whose clips are tones."""
    folder.mkdir(parents=True)
    preset = PRESETS["tiny"][1]
    manifest = make_tones(folder / "speech", pairs)
    data = {"eval": (str(manifest),), "train": ("train.jsonl",)}
    values = json.loads(to_json(preset))
    values |= {"out": str(folder), "num_steps": num_steps, **config}
    values["data"] |= data
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "prompt.json").write_text("{}")
    records = []
    for step in range(0, num_steps + 1, 2):
        records.append(training_record(step)) if step else None
        if step % 20 == 0:
            scores = {"loss": 3 / (1 + step), "wer": 2 / (1 + step), "cer": 1 / (1 + step)}
            records.append({"step": step} | {f"eval/dev/{k}": v for k, v in scores.items()})
            write_transcripts(folder, step, pairs)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "best.json").write_text(json.dumps({"step": 20, "error_rate": 0.1, "loss": 1.0}))
    durations = np.array([1.0, 2.0, 2.5])
    (folder / "lengths.json").write_text(json.dumps({"train": histogram(durations)}))
    bad = [BadRow("clip7", "train.jsonl", Problem.MISSING_FILE, "7.wav does not exist")]
    bad.append(BadRow("clip8", "train.jsonl", Problem.SILENT, "8.wav is silent", "x", is_used=True))
    (folder / "bad_rows.jsonl").write_text("".join(to_line("train", row) for row in bad))
    return folder


def training_record(step: int) -> dict[str, float]:
    """A line of metrics, as of a run with one residual block."""
    return {
        "step": step,
        "time": 1.7e9 + step,
        "ctc_loss" if step <= 10 else "loss": 5 / step,
        "grad_norm": 1 / step,
        "learning_rate": 1e-3 * (1 - step / 1000),
        "weight_norm/input_proj": 20 + step / 10,
        "weight_norm/layers_0/fc1": 10 + step / 10,
        "scale_rms/ln_input": 1.0,
        "scale_ratio": 2.0,
        "audio_secs_per_sec": 100.0 + step,
        "data_wait_rate": 0.02,
        "audio_hours": step / 8,
    }


def write_transcripts(folder: Path, step: int, pairs: dict[str, tuple[str, str]]) -> None:
    """The transcripts of an evaluation."""
    path = folder / "transcripts" / f"dev-{step:06d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text(to_lines(scored(pairs)), "utf-8")


def make_tones(folder: Path, pairs: dict[str, tuple[str, str]]) -> Path:
    """A manifest `dev.jsonl` of tones of a second and a half."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, times = [], np.arange(24_000) / 16_000
    for number, (row_id, (said, _)) in enumerate(pairs.items()):
        samples = 0.2 * np.sin(2 * np.pi * (200 + 50 * number) * times)
        soundfile.write(folder / f"{number}.wav", samples, 16_000)
        rows.append({"id": row_id, "audio": f"{number}.wav", "text": said})
    manifest = folder / "dev.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest
