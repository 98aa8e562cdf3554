"""A run that continues on other devices, processes and slices: the same rows and losses."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train_tpu
from flax_projector.config import MeshConfig, TrainConfig, to_json
from flax_projector.run_folder import RunFolder
from tests.parity import assert_within
from tests.ports import free_port
from tests.tiny import make_speech, read_losses, tiny_config

pytestmark = pytest.mark.torch

NUM_STEPS = 12

PROGRAM = """
import json, os, signal, sys, time
import jax
import numpy as np
import train_tpu
from flax_projector.config import from_json
from flax_projector.data.batches import Batches

config_path, rows_path, num_batches, *flags = sys.argv[1:]
to_global, log = Batches.to_global, open(rows_path, "a")

def record(self, batch):
    global num_batches
    rows = [labels[valid].tolist() for labels, valid in zip(batch.labels, batch.label_valid)]
    log.write(json.dumps([row for row in rows if row]) + "\\n")
    log.flush()
    num_batches = int(num_batches) - 1
    if num_batches == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    if flags:
        time.sleep(0.5)  # several processes need a while to agree about the last step
    return to_global(self, batch)

class InSlice:
    # A device of JAX, which says that its process is a slice: on CPUs there is only one.
    def __init__(self, device):
        self.device, self.slice_index = device, device.process_index

    def __getattr__(self, name):
        return getattr(self.device, name)

make_mesh = train_tpu.make_mesh

def make_mesh_of_slices(config, _devices):
    mesh = make_mesh(config, [InSlice(device) for device in jax.devices()])
    print("slices", [device.slice_index for device in mesh.devices[:, 0, 0]])
    devices = np.array([device.device for device in mesh.devices.flat], object)
    devices = devices.reshape(mesh.devices.shape)
    return jax.sharding.Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)

Batches.to_global = record
if "SLICES" in os.environ:
    train_tpu.make_mesh = make_mesh_of_slices
train_tpu.PRESETS = {"moving": ("", from_json(open(config_path).read()))}
train_tpu.cli(["moving", *flags])
"""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a start of the run has: the devices of each process, its slices and its mesh."""

    devices: int
    processes: int = 1
    slices: int = 1
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


SHAPES = {
    "8, 4, 1, 8 devices": (Shape(8), Shape(4), Shape(1), Shape(8)),
    "8 devices in other meshes": (
        Shape(8, mesh=MeshConfig(fsdp=8)),
        Shape(8, mesh=MeshConfig(fsdp=2, tensor=2)),
        Shape(8),
    ),
    "2, 1, 4 processes": (Shape(2, processes=2), Shape(4), Shape(1, processes=4)),
    "1, 2, 1 slices": (
        Shape(2, processes=2, mesh=MeshConfig(fsdp=2)),
        Shape(2, processes=2, slices=2, mesh=MeshConfig(fsdp=2)),
        Shape(2, processes=2),
    ),
}
QUICK = (Shape(8, mesh=MeshConfig(fsdp=2)), Shape(1))


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> str:
    """A manifest of clips that have a text each, by which a row is known."""
    folder = tmp_path_factory.mktemp("speech")
    manifest = Path(make_speech(folder, 21))
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines = [json.dumps(row | {"text": f"clip {i}"}) + "\n" for i, row in enumerate(rows)]
    manifest.write_text("".join(lines))
    return str(manifest)


class Run:
    """A run that is started on several shapes."""

    def __init__(self, folder: Path, towers: dict[str, str], speech: str):
        folder.mkdir()
        self.folder = folder
        self.config = tiny_config(
            folder,
            towers,
            num_steps=NUM_STEPS,
            log_every_steps=1,
            eval_every_steps=0,
            data={"train": (speech,), "eval": (), "bucket_secs": (2.0,)},
        )

    def start(self, shape: Shape, number: int, *, num_batches: int) -> list[list[list[int]]]:
        """Trains until so many batches are read; 0 to the end.

        Returns:
          The rows of every batch, by their labels, as the processes together have read them.
        """
        config_path = self.folder / "config.json"
        config_path.write_text(to_json(dataclasses.replace(self.config, mesh=shape.mesh)))
        port = free_port()
        logs = [self.folder / f"rows-{number}-{i}.jsonl" for i in range(shape.processes)]
        processes = []
        for i, log in enumerate(logs):
            flags, env = [], dict(os.environ)
            if shape.processes > 1:
                run = f"--distributed.coordinator localhost:{port} --distributed.num-processes"
                flags = [*run.split(), f"{shape.processes}", "--distributed.process-id", f"{i}"]
            if shape.slices > 1:
                env["SLICES"] = "one for each process"
            env["XLA_FLAGS"] = env["XLA_FLAGS"].replace(
                "device_count=8", f"device_count={shape.devices}"
            )
            batches = num_batches if i == 0 else 0
            command = [sys.executable, "-c", PROGRAM, config_path, log, str(batches), *flags]
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=Path(train_tpu.__file__).parent,
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        said = [process.communicate(timeout=300) for process in processes]
        for process, (out, errors) in zip(processes, said, strict=True):
            assert process.returncode == 0, errors[-3000:]
            assert ("slices [0, 1]" in out) == (shape.slices == 2), out
        read = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
        assert len({len(batches) for batches in read}) == 1, "some processes did more steps"
        return [[row for part in parts for row in part] for parts in zip(*read, strict=True)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_towers, speech) -> tuple[TrainConfig, list[list[list[int]]]]:
    """The run without an interruption, on one device, and its rows."""
    run = Run(tmp_path_factory.mktemp("whole") / "run", tiny_towers, speech)
    return run.config, run.start(Shape(1), 0, num_batches=0)


def check(run: Run, shapes: tuple[Shape, ...], whole) -> None:
    """Starts the run on each shape, and compares what it has read and learnt."""
    config, expected = whole
    rows = []
    for number, shape in enumerate(shapes):
        is_last = number == len(shapes) - 1
        num_batches = 0 if is_last else NUM_STEPS // len(shapes)
        rows += run.start(shape, number, num_batches=num_batches)
        assert is_last or num_batches <= len(rows) < NUM_STEPS
    assert len(rows) == NUM_STEPS
    assert [sorted(batch) for batch in rows] == [sorted(batch) for batch in expected]
    losses = np.array(read_losses(run.config), np.float32)
    assert_within(losses, read_losses(config), 1e-5)
    assert not RunFolder(run.folder / "run").bad_rows.exists()


def test_every_row_of_an_epoch_is_read_once(whole):
    """What the others are compared with: 21 clips in batches of 8."""
    rows = [tuple(row) for batch in whole[1] for row in batch]
    assert len(whole[1]) == NUM_STEPS
    assert len(set(rows)) == 21 and sorted(rows[:21]) == sorted(set(rows))


@pytest.mark.consistency("ours on one device, uninterrupted")
def test_a_run_continues_on_other_devices(tmp_path, tiny_towers, speech, whole):
    check(Run(tmp_path / "run", tiny_towers, speech), QUICK, whole)


@pytest.mark.slow
@pytest.mark.consistency("ours on one device, uninterrupted")
@pytest.mark.parametrize("name", SHAPES)
def test_a_run_continues_on_other_shapes(tmp_path, tiny_towers, speech, whole, name):
    check(Run(tmp_path / "run", tiny_towers, speech), SHAPES[name], whole)
