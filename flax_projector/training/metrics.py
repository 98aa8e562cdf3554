"""Writes the metrics and transcripts of a run to files, TensorBoard and Weights & Biases."""

import contextlib
import json
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from flax_projector.files import reading, write_atomically, writing
from flax_projector.run_folder import RunFolder
from flax_projector.run_folder.owner import check_owner
from flax_projector.storage.growing import growing, publish
from flax_projector.training.evaluate import Scores
from flax_projector.training.score_files import to_lines
from flax_projector.training.scores import ScoredTranscript, Transcript

log = logging.getLogger(__name__)

_PUBLISH_EVERY_SECS = 60.0


class MetricsWriter:
    """Writes scalars to `metrics.jsonl`, TensorBoard event files and, on request, W&B."""

    def __init__(self, folder: RunFolder, *, first_step: int = 0, wandb_project: str | None = None):
        """Opens the run's files for appending; only process 0 writes.

        Args:
          folder: the run's folder.
          first_step: step of the checkpoint that the run continues from. Records of later steps,
            and of this step's evaluation, are removed from `metrics.jsonl`: they will be written
            again.
          wandb_project: the Weights & Biases project; None to do without.

        Raises:
          ValueError: if wandb is requested but not installed.
        """
        self._is_writer = jax.process_index() == 0
        self._folder, self._published_at = folder, time.monotonic()
        if self._is_writer:
            self._wandb = _start_wandb(wandb_project, folder) if wandb_project else None
            with writing(folder.metrics):
                metrics = growing(folder.metrics)
                metrics.parent.mkdir(parents=True, exist_ok=True)
            _drop_after(metrics, first_step)
            with writing(folder.metrics):
                self._jsonl = metrics.open("a", encoding="utf-8")
            with writing(folder.tensorboard):
                self._events = EventFileWriter(str(growing(folder.tensorboard, is_folder=True)))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records named scalars at a step."""
        if time.monotonic() - self._published_at > _PUBLISH_EVERY_SECS:
            self.publish()
        if not self._is_writer:
            return
        record = {"step": step, "time": round(time.time(), 3), **scalars}
        with writing(self._folder.metrics):
            self._jsonl.write(json.dumps(record) + "\n")
            self._jsonl.flush()
        for name, value in scalars.items():
            self._add_event(step, scalar_pb(name, value))
        if self._wandb is not None:
            self._wandb.log(dict(scalars), step=step)

    def publish(self) -> None:
        """Uploads what has been written, if the run folder is in a bucket; every process calls it.

        Raises:
          OSError: if another program has begun to train in the folder, or it cannot be written.
        """
        self._published_at = time.monotonic()
        if self._is_writer:
            with writing(self._folder.tensorboard):
                self._events.flush()
        self._upload()

    def _upload(self) -> None:
        if self._is_writer:
            check_owner(self._folder)
        with writing(self._folder.path):
            publish(self._folder.path)

    def write_scores(self, step: int, name: str, scores: Scores) -> None:
        """Records the scores and transcripts of a set, and logs a sample of the transcripts."""
        found = scores.summary
        scalars = {"loss": scores.loss, "wer": found.wer, "cer": found.cer}
        scalars["num_cut"] = found.num_cut
        self.write(step, {f"eval/{name}/{key}": value for key, value in scalars.items()})
        self.write_transcripts(step, name, scores.transcripts)
        log.info(
            "step %d, %s: %s %.1f%%, loss %.3f over %d utterances%s",
            step,
            name,
            found.headline.upper(),
            100 * found.rate,
            scores.loss,
            found.num_utterances,
            f", cut: {found.cut_text}" if found.cut_text else "",
        )
        for transcript in samples(scores.transcripts):
            log.info("  said %r, heard %r", transcript.reference, transcript.hypothesis)

    def write_transcripts(
        self, step: int, name: str, transcripts: Sequence[ScoredTranscript]
    ) -> None:
        """Saves all transcripts of an evaluation, and shows a sample of them in TensorBoard."""
        if not self._is_writer:
            return
        write_atomically(self._folder.transcripts(name, step), to_lines(transcripts))
        shown = "\n".join(f"| {t.reference} | {t.hypothesis} |" for t in samples(transcripts))
        table = f"| reference | hypothesis |\n| --- | --- |\n{shown}"
        self._add_event(step, text_pb(f"transcripts/{name}", table))

    def _add_event(self, step: int, summary: Any) -> None:
        with writing(self._folder.tensorboard):
            self._events.add_event(Event(step=step, wall_time=time.time(), summary=summary))

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        with contextlib.ExitStack() as stack:  # each, even if one fails
            if not isinstance(error, OSError):  # the folder may be another's, or out of reach
                stack.callback(self._upload)
            if not self._is_writer:
                return
            if self._wandb is not None:
                stack.callback(self._wandb.finish)
            stack.enter_context(writing(self._folder.tensorboard))
            stack.callback(self._events.close)
            stack.enter_context(writing(self._folder.metrics))
            stack.callback(self._jsonl.close)


def _drop_after(path: Path, first_step: int) -> None:
    """Keeps the records before a step and, of the step itself, only the record of training."""
    if not path.is_file():
        return
    kept = []
    with reading(path, way_out="remove the lines that are not JSON, or the file"):
        for line in path.read_text("utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):  # the process was killed while writing
                continue
            record = json.loads(line)
            step = record["step"]
            if step < first_step or (step == first_step and "grad_norm" in record):
                kept.append(line)
    write_atomically(path, "".join(kept))


def _start_wandb(project: str, folder: RunFolder) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]  # optional
    except ImportError as error:
        raise ValueError(
            "--wandb-project needs wandb: `pip install wandb`, or omit the option"
        ) from error
    id_path = folder.wandb_id
    run_id = id_path.read_text() if id_path.is_file() else uuid.uuid4().hex
    folder.on_disk.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=project, name=folder.path.name, dir=str(folder.on_disk), id=run_id, resume="allow"
    )
    write_atomically(id_path, run_id)
    return run


def samples(transcripts: Sequence[Transcript], count: int = 10) -> Sequence[Transcript]:
    """Some of an evaluation's transcripts, evenly spaced from the shortest clips to the longest."""
    return transcripts[:: max(1, -(-len(transcripts) // count))]
