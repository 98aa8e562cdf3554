"""The processes of a run on several hosts: who they are, and connecting them.

JAX detects TPU slices, SLURM's `srun`, Open MPI up to version 4 and Indexed Jobs of Kubernetes. For
anything else there are flags.
"""

import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import jax
from jax._src.clusters import ClusterEnv, K8sCluster  # there is no public form

from flax_projector import hosts
from flax_projector.config import DistributedConfig
from flax_projector.logs import one_of_several
from flax_projector.training.roll_call import call_roll

log = logging.getLogger(__name__)

START_SECS = 600.0
"""How long the processes wait for one another: machines and containers start minutes apart."""

_GONE_SECS = 30
"""Without a sign of life from a process for so long, JAX ends the others."""

# Variables with the number of processes and the number of this one, of launchers that JAX does not
# detect, or confuses with SLURM, which they start their own daemons by.
_LAUNCHERS = {
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "MPICH": ("PMI_SIZE", "PMI_RANK"),
}
_FLAGS = (
    "--distributed.coordinator HOST:PORT --distributed.num-processes N --distributed.process-id I"
)
_ALONE = "--distributed.num-processes 1 makes it a run of this process alone"


@dataclass(frozen=True)
class Place:
    """The place of this process among those of its run.

    Attributes:
      coordinator: HOST:PORT of process 0.
      num_processes: how many there are.
      process_id: the number of this one.
      local_id: its number among those on its machine, which divide the GPUs among them. None if it
        uses whatever it sees.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_id: int | None = None


def join(config: DistributedConfig, *, timeout_secs: float = START_SECS) -> None:
    """Connects this process with the others of its run, if there are any.

    Call it before anything that starts JAX's backend.

    Args:
      config: the flags.
      timeout_secs: how long to wait for the others.

    Raises:
      ValueError: if the processes cannot find one another; see `find_place` and `call_roll`.
    """
    place = find_place(config, timeout_secs=timeout_secs)
    if place is None:
        return
    neighbours = call_roll(
        place.coordinator,
        num_processes=place.num_processes,
        process_id=place.process_id,
        timeout_secs=timeout_secs,
    )
    jax.distributed.initialize(
        place.coordinator,
        place.num_processes,
        place.process_id,
        local_device_ids=gpus_of(place, neighbours),
        cluster_detection_method="deactivate",
        initialization_timeout=max(1, int(timeout_secs)),
        heartbeat_timeout_seconds=_GONE_SECS,
        shutdown_timeout_seconds=_GONE_SECS,  # of those that have all come to the end of the run
    )
    one_of_several(place.process_id)
    hosts.connect()
    log.info("%d processes, connected by %s", place.num_processes, place.coordinator)


def find_place(config: DistributedConfig, *, timeout_secs: float = START_SECS) -> Place | None:
    """The place of this process: what the flags say, or else what JAX detects.

    Args:
      config: the flags.
      timeout_secs: how long to wait until the name of process 0's machine is known.

    Returns:
      The place, or None if the process runs alone.

    Raises:
      ValueError: if a launcher has started several processes that JAX does not detect, or detects
        wrongly; or if the detection fails.
    """
    if config.num_processes is not None:
        if config.coordinator is None or config.process_id is None:
            return None  # --distributed.num-processes 1
        place = Place(config.coordinator, config.num_processes, config.process_id)
    else:
        try:
            place = _detect(timeout_secs)
        except Exception as error:  # of whatever library asks the cluster
            raise ValueError(
                f"cannot detect the processes of this run: {error}. Pass {_FLAGS}; {_ALONE}"
            ) from error
        _check_launchers(place)
    return place if place and place.num_processes > 1 else None


def _detect(timeout_secs: float) -> Place | None:
    """What JAX would detect, but a process that is alone need not have an address."""
    cluster = next((c for c in ClusterEnv._cluster_types if _is_present(c)), None)
    if cluster is None:
        return None
    num_processes, process_id = cluster.get_process_count(), cluster.get_process_id()
    if num_processes == 1:
        return Place("", 1, 0)
    coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS") or cluster.get_coordinator_address(
        timeout_secs=int(timeout_secs),
        override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"),
    )
    return Place(coordinator, num_processes, process_id, cluster.get_local_process_id())


def _is_present(cluster: type[ClusterEnv]) -> bool:
    if cluster is K8sCluster:  # JAX takes any pod for one of several
        if not {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(os.environ):
            return False
        if importlib.util.find_spec("kubernetes") is None:
            raise ValueError("in an Indexed Job of Kubernetes, JAX needs `pip install kubernetes`")
    return not cluster.opt_in_only_method and cluster.is_env_present()


def _check_launchers(place: Place | None) -> None:
    """Refuses to train in every process by itself where a launcher has started several."""
    detected = (place.num_processes, place.process_id) if place else (1, 0)
    for name, (size, rank) in _LAUNCHERS.items():
        num_started = int(os.environ.get(size) or 1)
        if num_started > 1 and (num_started, int(os.environ.get(rank) or 0)) != detected:
            raise ValueError(
                f"{name} has started {num_started} processes, which JAX does not detect: pass each "
                f"of them {_FLAGS}, with N = ${size} and I = ${rank} (in a script that it starts); "
                f"{_ALONE}"
            )
    num_nodes = int(os.environ.get("SLURM_JOB_NUM_NODES") or 1)
    if place is None and num_nodes > 1:
        raise ValueError(
            f"this job of SLURM has {num_nodes} nodes, but srun has not started this process: "
            f"start it by `srun python train_tpu.py ...`, or pass {_FLAGS}; {_ALONE}"
        )


def gpus_of(place: Place, neighbours: int) -> list[int] | None:
    """Which of the GPUs that it sees a process uses; None means all.

    JAX would give each process one, even if it is the only one on its machine.

    Args:
      place: the place of the process.
      neighbours: the number of processes on its machine, itself included.
    """
    gpus = num_visible_gpus()
    if place.local_id is None or neighbours == 1 or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    if gpus < neighbours:
        return None  # the launcher has divided them: each process sees only its own
    if gpus > neighbours:
        log.warning(
            "%d processes on this machine use one GPU each, of %d: start one process for each GPU "
            "(--ntasks-per-node %d), or one for all of them (--ntasks-per-node 1)",
            neighbours,
            gpus,
            gpus,
        )
    return [place.local_id]


def num_visible_gpus() -> int:
    """The number of NVIDIA GPUs that this process sees, without starting JAX's backend."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(list(Path("/dev").glob("nvidia[0-9]*")))
    return len([name for name in visible.split(",") if name.strip()])
