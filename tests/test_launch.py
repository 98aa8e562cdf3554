"""The launch scripts, with stand-ins for the programs of a cloud and a scheduler."""

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from flax_projector.config import TrainConfig
from flax_projector.run_folder import RunFolder
from tests.ports import free_port
from tests.tiny import read_losses, tiny_config

ROOT = Path(__file__).parents[1]
TPU, SLURM = ROOT / "examples/launch/tpu.sh", ROOT / "examples/launch/slurm.sbatch"
SCRIPTS = [TPU, SLURM, ROOT / ".ci/run"]

# Writes down how it was called. Each of the two hosts of a slice is a home folder; a command for
# all hosts runs in each of them, with the variables by which JAX detects the processes of a run.
GCLOUD = """#!/usr/bin/env bash
set -eu
echo "gcloud ${*//$'\\n'/ }" >> "$CALLS"  # in one piece: several run at once
case $4 in
  ssh)
    for host in "$HOSTS"/*; do
      number=${host##*/}
      SLURM_JOB_ID=1 SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_LOCALID=$number \
        SLURM_PROCID=$number HOME=$host bash -c 'cd && eval "$1"' - "${@: -1}"
    done ;;
  scp)
    for host in "$HOSTS"/*; do cp "$5" "$host/${6#*:}"; done ;;
esac
"""
UV = """#!/usr/bin/env bash
echo "uv $*" >> "$CALLS"
if [[ $1 == venv ]]; then
  mkdir -p .venv/bin && printf '#!/bin/sh\\nexec %s "$@"\\n' "$PYTHON" > .venv/bin/python
  chmod +x .venv/bin/python
fi
"""
SRUN = """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=1 ]] && shift
for number in 0 1; do
  SLURM_JOB_ID=1 SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_LOCALID=$number \
    SLURM_PROCID=$number "$@" &
done
wait -n && wait -n
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_have_no_known_mistakes(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def cloud(tmp_path):
    """Runs a script with the stand-ins, and returns what it printed or what was wrong."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {"gcloud": GCLOUD, "uv": UV, "srun": SRUN}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    for number in range(2):
        (tmp_path / "hosts" / str(number)).mkdir(parents=True)
    env = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "HOSTS": str(tmp_path / "hosts"),
        "PYTHON": sys.executable,
        "NAME": "ears",
        "ZONE": "us-west4-a",
        "JAX_COORDINATOR_PORT": str(free_port()),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2"),
    }

    def run(*command: str | Path, works: bool = True, **variables: str) -> str:
        done = subprocess.run(
            [*map(str, command)],
            cwd=tmp_path,
            env=env | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (done.returncode == 0) is works, done.stderr
        return done.stdout + done.stderr

    return run


def test_slices_are_asked_for_and_given_back(cloud, tmp_path):
    cloud(TPU, "create", MODE="--spot")
    cloud(TPU, "create", SLICES="2", TYPE="v6e-16", RUNTIME="v2-alpha-tpuv6e")
    cloud(TPU, "delete")
    one, two, delete = map(str.split, (tmp_path / "calls").read_text().splitlines())
    assert one[one.index("--node-id") + 1] == "ears"
    assert "--spot" in one and "v5litepod-16" in one
    assert two[two.index("--node-prefix") + 1] == "ears"
    assert two[two.index("--node-count") + 1] == "2" and "v2-alpha-tpuv6e" in two
    assert delete[4:6] == ["delete", "ears"]
    assert all(call[call.index("--zone") + 1] == "us-west4-a" for call in (one, two, delete))


@pytest.mark.parametrize(
    ("variables", "names"),
    [({}, ["ears"]), ({"SLICES": "3"}, ["ears-0", "ears-1", "ears-2"])],
    ids=["one slice", "three slices"],
)
def test_a_command_goes_to_every_host_of_every_slice(cloud, tmp_path, variables, names):
    for number in range(2):
        folder = tmp_path / f"hosts/{number}/flax-projector"
        folder.mkdir()
        (folder / "train.log").write_text(f"the log of host {number}\n")
    shown = cloud(TPU, "ends", **variables)
    calls = map(str.split, (tmp_path / "calls").read_text().splitlines())
    assert sorted((call[5], call[8]) for call in calls) == [(n, "--worker=all") for n in names]
    assert shown.count("the log of host 1") == len(names)


def test_a_failure_on_one_host_is_a_failure(cloud, tmp_path):
    assert "No such file" in cloud(TPU, "ends", works=False)


@pytest.mark.parametrize(("arguments", "variables"), [([], {}), (["nothing"], {})])
def test_wrong_use_shows_how_to_use_it(cloud, arguments, variables):
    assert "tpu.sh create" in cloud(TPU, *arguments, works=False, **variables)


def test_the_slice_must_have_a_name(cloud):
    assert "NAME=..." in cloud(TPU, "status", works=False, NAME="")


def options(config: TrainConfig) -> list[str]:
    """What `train_tpu.py` takes to run a config of the tests."""
    return [
        "tiny",
        *("--encoder", config.encoder, "--llm", config.llm, "--out", config.out),
        *("--data.train", *config.data.train, "--data.eval", *config.data.eval),
    ]


@pytest.mark.slow
@pytest.mark.torch
def test_a_slice_installs_trains_stops_and_goes_on(cloud, tmp_path, tiny_towers):
    """Two hosts, as processes of this machine; what they install is the present environment."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, which `install` copies")
    arguments = options(tiny_config(tmp_path, tiny_towers))
    logs = [tmp_path / f"hosts/{number}/flax-projector/train.log" for number in range(2)]

    def wait_for(text: str, which: Iterable[Path]) -> None:
        for _ in range(600):
            if all(log.exists() and text in log.read_text() for log in which):
                return
            time.sleep(0.2)
        raise AssertionError([log.read_text()[-2000:] for log in logs])

    cloud(TPU, "install")
    installs = (tmp_path / "calls").read_text()
    assert installs.count("uv pip install --constraint constraints.txt -e .[tpu,gcs]") == 2
    cloud(TPU, "run", *arguments, "--num-steps", "100000")
    wait_for('"num_steps": 100000', logs[:1])
    assert "stop it first" in cloud(TPU, "run", *arguments, works=False)
    saved = RunFolder(Path(arguments[6])).steps
    while not saved():
        time.sleep(0.2)
    cloud(TPU, "stop")
    wait_for("the same command continues", logs[:1])
    for log in logs:
        subprocess.run(["flock", log.with_name("train.lock"), "true"], check=True, timeout=60)
    cloud(TPU, "run", *arguments, "--num-steps", "100000")
    wait_for(f"resumed at step {max(saved())}", logs[:1])
    cloud(TPU, "stop")
    for log in logs:
        subprocess.run(["flock", log.with_name("train.lock"), "true"], check=True, timeout=60)


@pytest.mark.slow
@pytest.mark.torch
def test_slurm_trains_with_two_tasks(cloud, tmp_path, tiny_towers):
    config = tiny_config(tmp_path, tiny_towers)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "train_tpu.py").symlink_to(ROOT / "train_tpu.py")
    assert "projector saved in" in cloud("bash", SLURM, *options(config))
    assert len(read_losses(config)) == config.num_steps
