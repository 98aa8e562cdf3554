"""Checkpoints of a run: the projector, its optimizer and the position in the data."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from flax_projector.train_step import TrainState


def open_manager(folder: Path, *, keep: int) -> ocp.CheckpointManager:
    """A manager that saves in the background and keeps the newest `keep` checkpoints."""
    options = ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.LatestN(keep),
        enable_async_checkpointing=True,
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(
    manager: ocp.CheckpointManager, step: int, state: TrainState, data_state: dict[str, Any]
) -> None:
    """Starts saving; a checkpoint becomes visible only when it is whole."""
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state)
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
    saved = manager.item_metadata(step)["state"]
    saved_dtypes = [jax.numpy.dtype(leaf.dtype) for leaf in jax.tree.leaves(saved)]
    wanted = jax.tree_util.tree_leaves_with_path(abstract_state)
    problems = [
        f"  {jax.tree_util.keystr(path)}: saved as {dtype}, this run has {leaf.dtype}"
        for (path, leaf), dtype in zip(wanted, saved_dtypes, strict=True)
        if dtype != leaf.dtype
    ]
    if problems:
        raise ValueError(f"checkpoint {step} in {manager.directory}:\n" + "\n".join(problems))
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()
        ),
    )
    return restored["state"], restored["data"]
