"""Checkpoints of a run: the projector, its optimizer and the position in the data."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from flax_projector.train_step import TrainState


class _Manager(ocp.CheckpointManager):
    """Orbax's, but it leaves the preemption service to `PreemptionGuard`.

    At every save Orbax asks the service as well, with the step's number. The service says yes once,
    at a number that it derives from the last one asked for: after Orbax the guard's, which counts
    polls, may never be it, and the run would not stop.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


def open_manager(folder: Path, *, keep: int) -> ocp.CheckpointManager:
    """A manager that saves in the background and keeps the newest `keep` checkpoints."""
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.LatestN(keep),
        enable_async_checkpointing=True,
    )
    # Named here, so that metadata can be read before anything is restored.
    handlers = {"state": ocp.StandardCheckpointHandler(), "position": ocp.JsonCheckpointHandler()}
    return _Manager(folder.absolute(), options=options, item_handlers=handlers)


def save(
    manager: ocp.CheckpointManager, step: int, state: TrainState, position: dict[str, Any]
) -> None:
    """Starts saving; a checkpoint becomes visible only when it is whole.

    Args:
      manager: of the run.
      step: of the state.
      state: arrays, which may be donated as soon as this returns.
      position: JSON of what else a run needs to go on from here.
    """
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
    )
    manager.save(step, args=args)


def restore(
    manager: ocp.CheckpointManager, step: int, abstract_state: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """Loads a checkpoint straight into its shardings.

    Args:
      manager: of the run.
      step: one that it has.
      abstract_state: ShapeDtypeStructs with shardings: of this run's mesh, not of the saving one's.

    Raises:
      ValueError: if a leaf was saved in another dtype, since Orbax would cast it silently.
    """
    saved = _leaves_by_name(manager.item_metadata(step)["state"])
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
            state=ocp.args.StandardRestore(abstract_state), position=ocp.args.JsonRestore()
        ),
    )
    return restored["state"], restored["position"]


def _leaves_by_name(tree: Any) -> dict[str, Any]:
    """Leaves by path; Orbax turns dataclasses into dicts, so only the names are compared."""

    def name_of(key: Any) -> str:
        return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(map(name_of, path)): leaf for path, leaf in leaves}
