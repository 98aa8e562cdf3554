"""Which process of a run this is, as flags or a launcher say, and which GPUs it uses."""

import http.server
import importlib.machinery
import logging
import os
import sys
import threading
import types

import jax
import pytest
from jax._src.clusters import GkeTpuCluster, K8sCluster, cloud_tpu_cluster

from flax_projector import hosts
from flax_projector.config import DistributedConfig
from flax_projector.training import cluster
from flax_projector.training.cluster import Place, find_place, gpus_of, join

SRUN = {
    "SLURM_JOB_ID": "5000",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
SBATCH = {name: SRUN[name] for name in SRUN if name != "SLURM_STEP_NODELIST"} | {
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}
OPEN_MPI_4 = OPEN_MPI | {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
MPICH = {"PMI_SIZE": "4", "PMI_RANK": "2"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
TPU_POD = {
    "TPU_WORKER_HOSTNAMES": "t0,t1",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "t0",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}
ONE_TPU_HOST = TPU_POD | {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "1"}
NOTHING = DistributedConfig()
ALONE = DistributedConfig(num_processes=1)
FLAGS = DistributedConfig(coordinator="h:9", num_processes=3, process_id=1)
PLACES = {
    "nothing": ({}, NOTHING, None),
    "flags": ({}, FLAGS, Place("h:9", 3, 1)),
    "flags, whatever is detected": (SRUN | OPEN_MPI, FLAGS, Place("h:9", 3, 1)),
    "srun": (SRUN, NOTHING, Place("node07:62344", 4, 3, 1)),
    "srun, another port": (
        SRUN | {"JAX_COORDINATOR_PORT": "81"},
        NOTHING,
        Place("node07:81", 4, 3, 1),
    ),
    "srun, another address": (
        SRUN | {"JAX_COORDINATOR_ADDRESS": "10.0.0.7:8"},
        NOTHING,
        Place("10.0.0.7:8", 4, 3, 1),
    ),
    "srun with PMI": (SRUN | MPICH | {"PMI_RANK": "3"}, NOTHING, Place("node07:62344", 4, 3, 1)),
    "srun, each by itself": (SRUN, ALONE, None),
    "srun of one task": (SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, NOTHING, None),
    "sbatch on one node": (SBATCH | {"SLURM_JOB_NUM_NODES": "1"}, NOTHING, None),
    "sbatch, on the first node": (SBATCH, ALONE, None),
    "Open MPI 4": (OPEN_MPI_4, NOTHING, Place("10.96.0.1:62624", 4, 2, 1)),
    "Open MPI 5, one process": (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, NOTHING, None),
    "Open MPI 5, each by itself": (OPEN_MPI, ALONE, None),
    "TPU slices": (TPU_POD, NOTHING, Place("t0:8482", 4, 3)),
    "one TPU host": (ONE_TPU_HOST, NOTHING, None),
    "a pod by itself": (POD, NOTHING, None),
}
REFUSED = {
    "sbatch on two nodes": (SBATCH, "2 nodes, but srun has not started this process"),
    "Open MPI 5": (OPEN_MPI, r"Open MPI has started 4 .* N = \$OMPI_COMM_WORLD_SIZE"),
    "MPICH": (MPICH, r"MPICH has started 4 processes, .* I = \$PMI_RANK"),
    "MPICH by daemons of SLURM": (MPICH | SRUN, "MPICH has started 4 processes"),
    "Open MPI 5 by daemons of SLURM": (
        OPEN_MPI | SRUN | {"SLURM_NTASKS": "2"},
        "Open MPI has started 4 processes",
    ),
    "an Indexed Job without the library": (
        POD | {"JOB_COMPLETION_INDEX": "1"},
        "cannot detect the processes .*pip install kubernetes.* --distributed.num-processes 1",
    ),
}
LAUNCHERS = ("SLURM_", "OMPI_", "PMI_", "KUBERNETES_", "JOB_", "TPU_WORKER", "MEGASCALE_", "JAX_C")


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables of a launcher, and no others."""

    def put(variables):
        for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        is_tpu = "TPU_WORKER_ID" in variables
        monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", is_tpu)
        monkeypatch.setattr(GkeTpuCluster, "wait_for_coordinator", lambda *_: None)

    return put


@pytest.mark.parametrize("case", PLACES)
def test_a_process_knows_its_place(case, environment):
    variables, config, expected = PLACES[case]
    environment(variables)
    assert find_place(config) == expected


@pytest.mark.parametrize("case", REFUSED)
def test_several_processes_never_train_by_themselves_unasked(case, environment, monkeypatch):
    variables, message = REFUSED[case]
    environment(variables)
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(ValueError, match=message):
        join(NOTHING)


METADATA = {  # of the second host in the second of two slices
    "agent-worker-number": "1",
    "worker-network-endpoints": "unknown:unknown:10.0.0.5,unknown:unknown:10.0.0.6",
    "tpu-env": "MEGASCALE_COORDINATOR_ADDRESS: 'localhost:8080'\n"
    "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n",
}


class Metadata(http.server.BaseHTTPRequestHandler):
    """What a virtual machine of Google's learns about itself."""

    def do_GET(self) -> None:
        text = METADATA.get(self.path.rpartition("/")[2], "")
        self.send_response(200 if text else 404)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def test_the_hosts_of_several_slices_are_detected(environment, monkeypatch):
    """On TPU VMs, which have no variables, but a server of metadata."""
    environment({})
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.delenv("TPU_PROCESS_ADDRESSES", raising=False)
    with http.server.ThreadingHTTPServer(("localhost", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
        assert find_place(NOTHING) == Place("localhost:8482", 4, 3)
        server.shutdown()


def test_an_indexed_job_of_kubernetes_is_detected(environment, monkeypatch):
    environment(POD | {"JOB_COMPLETION_INDEX": "1"})
    module = types.ModuleType("kubernetes")
    module.__spec__ = importlib.machinery.ModuleSpec("kubernetes", None)
    monkeypatch.setitem(sys.modules, "kubernetes", module)
    answers = {"is_env_present": True, "get_process_count": 2, "get_coordinator_address": "job-0:5"}
    for name, answer in answers.items():
        monkeypatch.setattr(K8sCluster, name, lambda answer=answer, **_: answer)
    assert find_place(NOTHING) == Place("job-0:5", 2, 1)

    def refuse():
        raise RuntimeError("jobs must be indexed")

    monkeypatch.setattr(K8sCluster, "get_process_count", refuse)
    with pytest.raises(ValueError, match=r"cannot detect the processes .* jobs must be indexed"):
        find_place(NOTHING)


def test_jax_is_told_what_was_found(environment, monkeypatch):
    told = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **kw: told.append((a, kw)))
    monkeypatch.setattr(cluster, "call_roll", lambda *_, **__: 2)
    monkeypatch.setattr(hosts, "connect", lambda: told.append("hosts"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    environment({})
    join(NOTHING)
    assert not told, "a process that is alone needs no others"
    environment(SRUN)
    join(NOTHING)
    (place, options), connected = told
    assert connected == "hosts"
    assert place == ("node07:62344", 4, 3)
    assert options["local_device_ids"] == [1]
    assert options["cluster_detection_method"] == "deactivate"  # it would choose other devices
    assert options["initialization_timeout"] == 600


GPUS = {  # processes on the machine, what each sees, and what process 3 of them takes
    "one for all eight": (1, "0,1,2,3,4,5,6,7", None),
    "one each": (8, "0,1,2,3,4,5,6,7", [3]),
    "divided by the launcher": (8, "0", None),
    "some idle": (4, "0,1,2,3,4,5,6,7", [3]),
    "no GPUs": (4, "", None),
}


@pytest.mark.parametrize("case", GPUS)
def test_the_processes_of_a_machine_use_all_its_gpus_or_say_so(case, monkeypatch, caplog):
    """JAX would give a process that is alone on its machine one of eight."""
    neighbours, visible, expected = GPUS[case]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with caplog.at_level(logging.WARNING):
        assert gpus_of(Place("h:9", 16, 11, 3), neighbours) == expected
    assert ("--ntasks-per-node 8" in caplog.text) == (case == "some idle")


def test_a_process_that_was_given_its_gpus_keeps_them(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert gpus_of(Place("h:9", 2, 1), 2) is None  # by flags
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0")
    assert gpus_of(Place("h:9", 2, 1, 1), 2) is None  # JAX reads the variable
