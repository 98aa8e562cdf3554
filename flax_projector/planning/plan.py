"""What a run would need and do on a pod, before anybody pays for one."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import jax

from flax_projector.config import RematName, TrainConfig
from flax_projector.planning.compiled import (
    AbstractRun,
    CompiledStep,
    compile_all,
    shards_to_fit,
)
from flax_projector.planning.estimate import (
    Contents,
    Estimate,
    contents_of,
    decoding_of,
    estimate,
    mixture,
)
from flax_projector.planning.speech import read_speech
from flax_projector.planning.topology import (
    Topology,
    absent_devices,
    needs_gpu_compiler,
    parse_topology,
)
from flax_projector.run import resolve_config
from flax_projector.sharding import make_mesh, num_batch_shards

_GPU_FLAGS = ("--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false")
_NOISY = ("flax_projector.sharding", "jax")


@dataclass(frozen=True)
class Plan:
    """A run on a pod.

    Attributes:
      config: the run's config.
      topology: the pod.
      mesh: devices along each axis.
      steps: one for each bucket.
      contents: what the batches of each hold, in the same order.
      estimates: of each; None if it does not fit.
      mixture: of an epoch; empty if a step does not fit.
      decoding: see `decoding_of`.
      most_rows: rows of a micro-batch that fit on a chip, in the largest bucket.
      shards: the least `--mesh.fsdp` with which all fits, if it does not; 0 if there is none.
      notes: what was assumed, and what the user should know.
    """

    config: TrainConfig
    topology: Topology
    mesh: dict[str, int]
    steps: list[CompiledStep]
    contents: list[Contents]
    estimates: list[Estimate | None]
    mixture: dict[str, float]
    decoding: dict[str, float]
    most_rows: int
    shards: int
    notes: list[str]

    @property
    def fits(self) -> bool:
        """Whether every step fits."""
        return all(step.fits for step in self.steps)

    @property
    def most_clips(self) -> int:
        """The largest `--data.batch-size` that fits."""
        shards = self.mesh["data"] * self.mesh["fsdp"]
        return self.most_rows * shards * self.config.accumulation_steps

    def misfit(self) -> str:
        """What does not fit, and the nearest that does, in one line."""
        step = max(self.steps, key=lambda each: each.peak)
        asked = f"--data.batch-size {self.config.data.batch_size}"
        needs = (
            f"{asked} needs {step.peak / 1e9:.1f} GB of the {step.capacity / 1e9:.1f} GB that a "
            f"{self.topology.chip_name} has for it"
        )
        ways = []
        if self.most_rows:
            ways.append(f"--data.batch-size {self.most_clips} (estimated)")
        if step.rows > 1 and self.most_rows:
            more = -(-step.rows // self.most_rows) * self.config.accumulation_steps
            ways.append(f"--accumulation-steps {more}")
        if self.shards:
            ways.append(f"--mesh.fsdp {self.shards} (estimated)")
        nearest = " or ".join(ways) or "chips with more memory"
        less = get_args(RematName)[get_args(RematName).index(self.config.remat) + 1 :]
        nearest += f"; --remat {' or '.join(less)} needs less" if less else ""
        return f"--plan {self.topology.name}: {needs}; the nearest that fits: {nearest}"

    def to_json(self) -> dict[str, Any]:
        """All figures, with units in their names: bytes, seconds, FLOPs."""
        topology, chip = self.topology, self.topology.chip
        return {
            "topology": topology.name,
            "chips": topology.num_chips,
            "chip": {"name": topology.chip_name, **dataclasses.asdict(chip)},
            "mesh": self.mesh,
            "encoder": self.config.encoder,
            "llm": self.config.llm,
            "dtype": self.config.dtype,
            "remat": self.config.remat,
            "accumulation_steps": self.config.accumulation_steps,
            "kept_frames": self.config.data.cache_features,
            "fits": self.fits,
            "buckets": [
                _bucket_json(*each)
                for each in zip(self.steps, self.contents, self.estimates, strict=True)
            ],
            "mixture": self.mixture,
            "decoding": self.decoding,
            "most_rows_per_chip": self.most_rows,
            "most_clips": self.most_clips,
            "jax": jax.__version__,
            "notes": self.notes,
        }


def _bucket_json(step: CompiledStep, contents: Contents, found: Estimate | None) -> dict[str, Any]:
    memory = ("rows", "num_rows", "arguments", "temporaries", "peak", "capacity", "compile_secs")
    data = {
        **dataclasses.asdict(step.bucket),
        **{name: getattr(step, name) for name in memory},
        "fits": step.fits,
        "num_batches": contents.num_batches,
    }
    if step.program is None or found is None:
        return data
    program = step.program
    return {
        **data,
        "estimate": dataclasses.asdict(found),
        "cycles": dict(program.cycles),
        "loops": {name: dataclasses.asdict(each) for name, each in program.loops.items()},
        "kernels": [dataclasses.asdict(each) for each in program.kernels],
        "collectives": [dataclasses.asdict(each) for each in program.collectives],
        "hbm_bytes": program.hbm_bytes,
    }


def make_plan(config: TrainConfig, topology_name: str) -> Plan:
    """Compiles the steps of a run for a pod, and estimates what they take.

    Args:
      config: the run's config.
      topology_name: see `parse_topology`.

    Raises:
      ValueError: if the pod does not exist, the run does not fit its number of chips, or a
        compiler is not installed.
    """
    topology = parse_topology(topology_name)
    with _absent(topology):
        devices = absent_devices(topology)
        config = resolve_config(config)
        mesh = make_mesh(config.mesh, devices)
        speech = read_speech(config, mesh)
        run = AbstractRun.of(config, mesh, speech)
        try:
            found = compile_all(run, speech, topology.chip)
        except RuntimeError as error:
            if "cuDNN not found" not in str(error):
                raise
            raise ValueError(needs_gpu_compiler(topology)) from error
        held = contents_of(speech, run.model, config.data)
    steps = found.steps
    contents = [held[step.bucket] for step in steps]
    estimates = [
        estimate(run, topology, step, step.program, each) if step.program is not None else None
        for step, each in zip(steps, contents, strict=True)
    ]
    known = [each for each in zip(estimates, contents, strict=True) if each[0] is not None]
    largest = max(steps, key=lambda step: step.peak)
    notes = [*speech.assumptions, *_notes(config, mesh)]
    return Plan(
        config=config,
        topology=topology,
        mesh=dict(mesh.shape),
        steps=steps,
        contents=contents,
        estimates=estimates,
        mixture=dict(mixture(known, topology)) if len(known) == len(steps) else {},  # type: ignore
        most_rows=found.most_rows,
        decoding=decoding_of(
            found.decoding, config.max_new_tokens, topology.chip, mesh.shape["tensor"]
        ),
        shards=0 if largest.fits else next(shards_to_fit(run, largest), 0),
        notes=notes,
    )


def _notes(config: TrainConfig, mesh: Any) -> list[str]:
    notes = []
    ways, clips = num_batch_shards(mesh) * config.accumulation_steps, config.data.batch_size
    if padding := -clips % ways:
        notes.append(
            f"--data.batch-size {clips} does not divide over {num_batch_shards(mesh)} chips in "
            f"--accumulation-steps {config.accumulation_steps}: {padding} of {clips + padding} "
            f"rows are padding; the nearest that divides is {clips + padding}"
        )
    if config.ctc.num_steps:
        notes.append("the steps of the CTC warm start, which do not run the LLM, are not planned")
    return notes


@contextlib.contextmanager
def _absent(topology: Topology) -> Iterator[None]:
    """Inside the block, JAX starts no accelerator, and keeps no programs for absent ones.

    They could be written to the compilation cache, but not read back.
    """
    values: Any = jax.config
    values.update("jax_platforms", "cpu")
    cached = values.jax_enable_compilation_cache
    values.update("jax_enable_compilation_cache", False)
    if not topology.is_tpu:  # to choose among kernels, XLA would run them
        flags = [os.environ.get("XLA_FLAGS", ""), *_GPU_FLAGS]
        os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        values.update("jax_enable_compilation_cache", cached)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
