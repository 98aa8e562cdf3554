"""Checkpoints of a run: the trained state, and the position in the data."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from flax_projector import hosts
from flax_projector.data.reader import BatchIterator
from flax_projector.files import any_path, is_url, system_error, whole_path, writing
from flax_projector.run_folder import STATE
from flax_projector.storage import AnyPath
from flax_projector.training.metrics import MetricsWriter
from flax_projector.training.state import TrainState
from flax_projector.training.step_log import StepLog

_POSITION = "position"


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, except for three things.

    Errors of writing become OSErrors that name the folder.

    If a save fails in the background, the other processes are told at once. Orbax's own thread
    would first wait for them, and they for it: for 20 minutes.

    It leaves the preemption service to `PreemptionGuard`. Orbax asks the service at every save,
    with the number of the step. The service says yes only once, at a number that it derives from
    the last one it was asked about. The guard asks with its own count of polls: if Orbax asked too,
    the guard's numbers might never match, and the run would not stop.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False

    def _wait_for_checkpointers(self) -> None:
        with hosts.telling(), _writing(self.directory):
            super()._wait_for_checkpointers()

    def save(self, *args: Any, **kwargs: Any) -> bool:
        with _writing(self.directory):
            return super().save(*args, **kwargs)

    def wait_until_finished(self) -> None:
        with _writing(self.directory):
            super().wait_until_finished()


@contextlib.contextmanager
def _writing(folder: Any) -> Iterator[None]:
    with writing(any_path(folder)):
        try:
            yield
        except ValueError as error:
            found = system_error(error)
            if found is None and is_url(folder):
                # Of TensorStore itself, with a long description.
                found = OSError(str(error).partition(" [")[0])
            if found is None:
                raise
            raise found from error


def open_manager(folder: AnyPath, *, keep: int) -> ocp.CheckpointManager:
    """A manager that saves in the background and keeps the newest `keep` checkpoints."""
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.LatestN(keep),
        enable_async_checkpointing=True,
    )
    # Passed here so that metadata can be read before anything is restored.
    handlers = {STATE: ocp.StandardCheckpointHandler(), _POSITION: ocp.JsonCheckpointHandler()}
    return _Manager(whole_path(folder), options=options, item_handlers=handlers)


def save(
    manager: ocp.CheckpointManager, step: int, state: TrainState, position: dict[str, Any]
) -> None:
    """Starts saving; a checkpoint becomes visible only when it is complete.

    Args:
      manager: the run's checkpoint manager.
      step: the state's step.
      state: arrays, which may be donated as soon as this returns.
      position: JSON with whatever else a run needs to continue from here.
    """
    items = {STATE: ocp.args.StandardSave(state), _POSITION: ocp.args.JsonSave(position)}
    args = ocp.args.Composite(**items)
    manager.save(step, args=args)


def restore(
    manager: ocp.CheckpointManager, step: int, abstract_state: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """Loads a checkpoint straight into its shardings.

    Args:
      manager: the run's checkpoint manager.
      step: the step of an existing checkpoint.
      abstract_state: ShapeDtypeStructs with shardings of this run's mesh, which may differ from the
        mesh that it was saved on.

    Raises:
      ValueError: if a leaf was saved in another dtype, since Orbax would cast it silently.
    """
    saved = _leaves_by_name(manager.item_metadata(step)[STATE])
    problems = [
        f"  {name}: saved as {saved[name].dtype}, this run has {leaf.dtype}"
        for name, leaf in _leaves_by_name(abstract_state).items()
        if name in saved and saved[name].dtype != leaf.dtype
    ]
    if problems:
        raise ValueError(f"checkpoint {step} in {manager.directory}:\n" + "\n".join(problems))
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            **{STATE: ocp.args.StandardRestore(abstract_state), _POSITION: ocp.args.JsonRestore()}
        ),
    )
    return restored[STATE], restored[_POSITION]


def _leaves_by_name(tree: Any) -> dict[str, Any]:
    """Leaves by path; Orbax turns dataclasses into dicts, so only the names are compared."""

    def name_of(key: Any) -> str:
        return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(map(name_of, path)): leaf for path, leaf in leaves}


class Saver:
    """Saves a run: the state, the position in the data, and the log up to that point."""

    def __init__(
        self,
        manager: ocp.CheckpointManager,
        iterator: BatchIterator,
        step_log: StepLog,
        writer: MetricsWriter,
        *,
        every_mins: float,
    ):
        """Saves nothing yet.

        Args:
          manager: the run's checkpoint manager.
          iterator: the iterator over the training batches.
          step_log: the run's step log.
          writer: what the step log writes to.
          every_mins: see `is_late`.
        """
        self._manager, self._iterator = manager, iterator
        self._step_log, self._writer = step_log, writer
        self._every_secs = 60 * every_mins
        self._saved_step, self._saved_at = manager.latest_step(), time.monotonic()

    def save(self, step: int, state: TrainState) -> None:
        """Starts saving, unless this step is already saved; every process must call it."""
        self._step_log.flush(step)  # so that the log of a checkpoint's steps is complete
        self._writer.publish()
        if step != self._saved_step:
            position = {
                "iterator": self._iterator.get_state(),
                "totals": asdict(self._step_log.totals),
            }
            save(self._manager, step, state, position)
            self._saved_step, self._saved_at = step, time.monotonic()

    def is_late(self) -> bool:
        """Whether the last save was more than `every_mins` ago; process 0 decides for all."""
        is_late = time.monotonic() - self._saved_at > self._every_secs
        return bool(hosts.broadcast("save is late", "yes" if is_late else ""))
