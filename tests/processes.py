"""Starts the processes of a run on loopback, each with patches of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import train_tpu
from flax_projector.config import TrainConfig, to_json
from tests.ports import free_port

NUM_DEVICES = 4  # of all processes together
LIMIT_SECS = 300.0  # stops a hang

SLOWLY = """
from flax_projector.data.reader import BatchIterator
read = BatchIterator.__next__
def read_slowly(self):
    time.sleep(0.2)
    return read(self)
BatchIterator.__next__ = read_slowly
"""
"""A patch: time for a signal to come in the middle of a run."""

_PROGRAM = """
import os, signal, sys, time
import train_tpu
from flax_projector.config import from_json

def say(text):
    sys.stderr.write(text + "\\n")
    sys.stderr.flush()

def at(owner, name, number, act):
    "Does something at a call of a method, then goes on."
    original, count = getattr(owner, name), [0]
    def patched(*args, **kwargs):
        count[0] += 1
        if count[0] == number:
            say("NOW")
            act()
        return original(*args, **kwargs)
    setattr(owner, name, patched)

def fail(error):
    def act():
        raise error
    return act

config_path, *flags = sys.argv[1:]
{patch}
train_tpu.PRESETS = {{"run": ("", from_json(open(config_path).read()))}}
train_tpu.cli(["run", *flags])
"""


@dataclass
class Ended:
    """What a process left.

    Attributes:
      code: its exit code; negative for a signal.
      text: what it wrote to stderr.
      secs: how long it ran.
    """

    code: int
    text: str
    secs: float

    def secs_after(self, moment: float, processes: "Processes") -> float:
        """How long it went on after a moment of `wait_for`."""
        return processes.began + self.secs - moment

    @property
    def last_line(self) -> str:
        """The last line that is not empty."""
        return self.text.rstrip().rpartition("\n")[2]


@dataclass
class Processes:
    """The processes of one run.

    Attributes:
      running: by number.
      began: when they were started.
      logs: files with what they write to stderr.
    """

    running: list[subprocess.Popen]
    logs: list[Path]
    began: float = field(default_factory=time.monotonic)

    def wait_for(self, text: str = "NOW", process: int = 0) -> float:
        """Waits until a process has logged a text; the time at which that was seen."""
        while text not in self.logs[process].read_text(errors="replace"):
            assert self.running[process].poll() is None, self.logs[process].read_text()[-3000:]
            assert time.monotonic() - self.began < LIMIT_SECS, f"no {text!r}"
            time.sleep(0.05)
        return time.monotonic()

    def send(self, number: int, *processes: int) -> None:
        """Sends a signal to some of them, or to all."""
        for i in processes or range(len(self.running)):
            self.running[i].send_signal(number)

    def end(self) -> list[Ended]:
        """Waits until all have ended."""
        ends: dict[int, Ended] = {}
        try:
            while len(ends) < len(self.running):
                secs = time.monotonic() - self.began
                for i, process in enumerate(self.running):
                    if i not in ends and (code := process.poll()) is not None:
                        ends[i] = Ended(code, self.logs[i].read_text(errors="replace"), secs)
                assert secs < LIMIT_SECS, "\n\n".join(log.read_text()[-2000:] for log in self.logs)
                time.sleep(0.05)
        finally:
            for process in self.running:
                if process.poll() is None:
                    process.kill()
        return [ends[i] for i in range(len(ends))]

    def finish(self) -> str:
        """Waits until all have ended well; what they logged."""
        ends = self.end()
        for end in ends:
            assert end.code == 0, end.text[-3000:]
        return "".join(end.text for end in ends)


def by_flags(number: int, count: int, port: int) -> tuple[list[str], dict[str, str]]:
    """Flags that tell a process its place, and no variables."""
    run = f"--distributed.coordinator localhost:{port} --distributed.num-processes {count}"
    return [*run.split(), "--distributed.process-id", str(number)], {}


def by_srun(number: int, count: int, port: int) -> tuple[list[str], dict[str, str]]:
    """The variables of SLURM's srun, and no flags."""
    return [], {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
        "JAX_COORDINATOR_PORT": str(port),
    }


def start(
    config: TrainConfig,
    count: int = 2,
    *,
    place=by_flags,
    options: Mapping[int, Sequence[str]] | None = None,
    patches: Mapping[int, str] | None = None,
    patch: str = "",
) -> Processes:
    """Starts a run.

    Args:
      config: the config of the run.
      count: the number of processes, which share `NUM_DEVICES` CPU devices.
      place: how they are told their places.
      options: more options of some of the processes, by number.
      patches: Python of some of the processes, which runs before anything else.
      patch: Python of all of them.
    """
    places = (str(Path(config.out).parent), str(Path(config.data.train[0]).parents[1]))
    local = next(place for place in places if not place.startswith("gs:"))  # one of them
    folder = Path(local) / "processes"
    folder.mkdir(parents=True, exist_ok=True)
    run = len(list(folder.iterdir()))
    config_path = folder / f"{run}.json"
    config_path.write_text(to_json(config))
    port = free_port()
    mine = f"device_count={NUM_DEVICES // count}"
    xla_flags = os.environ["XLA_FLAGS"].replace("device_count=8", mine)
    running, logs = [], [folder / f"{run}.{number}.log" for number in range(count)]
    for number in range(count):
        flags, variables = place(number, count, port)
        code = _PROGRAM.format(patch=f"{patch}\n{(patches or {}).get(number, '')}")
        with logs[number].open("wb") as log:
            running.append(
                subprocess.Popen(
                    [
                        *(sys.executable, "-c", code, config_path),
                        *(*flags, *(options or {}).get(number, ())),
                    ],
                    cwd=Path(train_tpu.__file__).parent,
                    env=os.environ | {"XLA_FLAGS": xla_flags} | variables,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                )
            )
    return Processes(running, logs)
