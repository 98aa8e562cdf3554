"""Where the words and numbers of a run go; process 0 alone writes files."""

import dataclasses
import json
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from flax_projector.evaluate import Transcript
from flax_projector.files import write_atomically

_OUR_LOGGERS = ("flax_projector", "convert", "train")


def setup_logging() -> None:
    """Shows this project's messages, and of its libraries only warnings."""
    # absl, which Orbax imports, installs a handler of its own: force replaces it.
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    for ours in _OUR_LOGGERS:
        logging.getLogger(ours).setLevel(logging.INFO)


def quiet_other_processes() -> None:
    """Leaves the talking to process 0; asks JAX, so only once `jax.distributed` is set up."""
    if jax.process_index() > 0:
        for ours in _OUR_LOGGERS:
            logging.getLogger(ours).setLevel(logging.WARNING)


class MetricsWriter:
    """Writes scalars to `metrics.jsonl`, TensorBoard event files and, if asked to, W&B."""

    def __init__(self, folder: Path, *, first_step: int = 0, wandb_project: str | None = None):
        """Opens the run's files for appending; only process 0 writes.

        Args:
          folder: of the run.
          first_step: the checkpoint that the run goes on from. What an earlier start recorded after
            it, and its evaluation, are removed from `metrics.jsonl`: they will be written again.
          wandb_project: of Weights & Biases; None does not use it.

        Raises:
          ValueError: if wandb is asked for and not installed.
        """
        self._is_writer = jax.process_index() == 0
        self._folder = folder
        if self._is_writer:
            folder.mkdir(parents=True, exist_ok=True)
            self._wandb = _start_wandb(wandb_project, folder) if wandb_project else None
            path = folder / "metrics.jsonl"
            _drop_after(path, first_step)
            self._jsonl = path.open("a", encoding="utf-8")
            self._events = EventFileWriter(str(folder / "tensorboard"))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records scalars by name at a step."""
        if not self._is_writer:
            return
        record = {"step": step, "time": round(time.time(), 3), **scalars}
        self._jsonl.write(json.dumps(record) + "\n")
        self._jsonl.flush()
        for name, value in scalars.items():
            self._add_event(step, scalar_pb(name, value))
        if self._wandb is not None:
            self._wandb.log(dict(scalars), step=step)

    def write_transcripts(self, step: int, name: str, transcripts: Sequence[Transcript]) -> None:
        """Saves every transcript of an evaluation, and shows samples in TensorBoard."""
        if not self._is_writer:
            return
        folder = self._folder / "transcripts"
        folder.mkdir(exist_ok=True)
        lines = [json.dumps(dataclasses.asdict(t), ensure_ascii=False) for t in transcripts]
        (folder / f"{name}-{step:06d}.jsonl").write_text("\n".join(lines) + "\n")
        shown = "\n".join(f"| {t.reference} | {t.hypothesis} |" for t in samples(transcripts))
        table = f"| reference | hypothesis |\n| --- | --- |\n{shown}"
        self._add_event(step, text_pb(f"transcripts/{name}", table))

    def _add_event(self, step: int, summary: Any) -> None:
        self._events.add_event(Event(step=step, wall_time=time.time(), summary=summary))

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_exc_info: object) -> None:
        if self._is_writer:
            self._jsonl.close()
            self._events.close()
            if self._wandb is not None:
                self._wandb.finish()


def _drop_after(path: Path, first_step: int) -> None:
    """Keeps the records up to a step; of the step itself those of training, which are complete."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):  # the process was killed while it wrote
            continue
        record = json.loads(line)
        if record["step"] < first_step or (record["step"] == first_step and "grad_norm" in record):
            kept.append(line)
    write_atomically(path, "".join(kept))


def _start_wandb(project: str, folder: Path) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]  # optional
    except ImportError as error:
        raise ValueError(
            "wandb_project is set and wandb is not installed: `pip install wandb`, or leave it out"
        ) from error
    id_path = folder / "wandb_id"
    run_id = id_path.read_text() if id_path.is_file() else uuid.uuid4().hex
    run = wandb.init(project=project, name=folder.name, dir=str(folder), id=run_id, resume="allow")
    id_path.write_text(run_id)
    return run


def samples(transcripts: Sequence[Transcript], count: int = 10) -> Sequence[Transcript]:
    """Some of an evaluation's transcripts, from the shortest clips to the longest."""
    return transcripts[:: max(1, -(-len(transcripts) // count))]


def require_finite(
    scalars: Mapping[str, float | np.ndarray], *, step: int, utterance_ids: list[str]
) -> None:
    """Raises FloatingPointError, naming metric, step and utterances, unless all is finite."""
    for name, value in scalars.items():
        if not np.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value} at step {step}; utterances of the batch: {utterance_ids}. "
                "Lower the learning rate, or look at these clips."
            )
