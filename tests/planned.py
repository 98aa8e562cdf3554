"""Small runs that are planned for a CPU; as a program, measures the memory that one takes."""

import ctypes
import dataclasses
import gc
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_projector.config import (
    DataConfig,
    LlamaConfig,
    MeshConfig,
    ProjectorConfig,
    TrainConfig,
    WhisperConfig,
)
from flax_projector.planning import compiled
from flax_projector.planning.compiled import AbstractRun, memory_of
from flax_projector.planning.speech import Speech, read_speech
from flax_projector.run import resolve_config
from flax_projector.sharding import make_mesh

WHISPER = WhisperConfig(80, 128, 1, 2, 512)
LLAMA = LlamaConfig(1000, 256, 768, 1, 4, 2, head_dim=64)
CONFIG = TrainConfig(
    encoder="small whisper",
    llm="small llama",
    projector=ProjectorConfig(encoder_dim=128, llm_dim=256, projector_hidden_dim=512),
    data=DataConfig(batch_size=8, window_secs=4.0, bucket_secs=(4.0,)),
    dtype="float32",
)


def lay_out(config: TrainConfig) -> tuple[AbstractRun, Speech]:
    """A run on one CPU, with assumed speech; `compiled.tower_configs` must be patched."""
    config = resolve_config(config)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    speech = read_speech(config, mesh)
    return AbstractRun.of(config, mesh, speech), speech


def memory(name: str) -> int:
    """Resident bytes of this process, now (VmRSS) or at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    (kib,) = re.findall(rf"^{name}:\s+(\d+) kB$", status, re.M)
    return 1024 * int(kib)


def fill(abstract: Any) -> Any:
    """Arrays that are really in memory."""
    make = lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding)  # noqa: E731
    return jax.block_until_ready(jax.tree.map(make, abstract))


def main() -> None:
    """Prints what the plan predicts of a step, and what a step takes.

    Several layers, whose activations are kept: beside them, the copies that Eigen makes of the
    operands of a product, and that XLA does not know of, are small.
    """
    llama = dataclasses.replace(LLAMA, num_hidden_layers=4)
    compiled.tower_configs = lambda config: (WHISPER, llama)
    data = DataConfig(batch_size=32, window_secs=8.0, bucket_secs=(8.0,), cache_features=True)
    run, speech = lay_out(dataclasses.replace(CONFIG, data=data, remat="none"))
    ((_, batch),) = speech.batches.abstract_batches()
    step = run.lower(batch).compile()
    _, temporaries, predicted = memory_of(step)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what compiling took is not reused unseen
    before = memory("VmRSS")
    arguments = fill((run.state, *run.frozen, batch))
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    jax.block_until_ready(step(*arguments))
    measured = memory("VmHWM") - before
    found = {"predicted": predicted, "temporaries": temporaries, "measured": measured}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
