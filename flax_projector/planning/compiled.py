"""Compiles the steps of a run for chips that nobody needs to have, and what they need of one."""

import functools
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from convert.models import LLAMA, WHISPER_ENCODER, ModelKind
from convert.published import LLMS, WHISPERS, published_config
from flax_projector.batch import Batch, Bucket, abstract_batch
from flax_projector.chips import GIB, Chip
from flax_projector.config import TrainConfig, option
from flax_projector.files import any_path
from flax_projector.logs import progress_bar
from flax_projector.models.decode import generate
from flax_projector.models.llama import KVCache, abstract_decoder, make_cache
from flax_projector.models.speech_llm import Params, SpeechLLM
from flax_projector.models.whisper import abstract_encoder
from flax_projector.planning.program import Program, read_program
from flax_projector.planning.speech import Speech
from flax_projector.run import make_model
from flax_projector.sharding import batch_sharding, num_batch_shards, replicated, use_mesh
from flax_projector.training.objectives import LLMObjective
from flax_projector.training.state import (
    TrainState,
    abstract_state,
    make_optimizer,
    make_schedule,
)
from flax_projector.training.train_step import lower_step

log = logging.getLogger(__name__)

USABLE = 0.98
"""Of a chip's memory: the TPU's runtime keeps a quarter of a gigabyte of 16."""


def tower_configs(config: TrainConfig) -> tuple[Any, Any]:
    """The configs of the encoder and of the LLM, without their weights.

    Raises:
      ValueError: if one is neither a folder nor a published model that is known here.
    """

    def find(name: str, kind: ModelKind, known: Any) -> Any:
        path = getattr(config, name)
        if (found := published_config(path)) is not None:
            return found
        try:
            folder = any_path(path)
            if (folder / "config.json").is_file():
                return kind.parse_text((folder / "config.json").read_text("utf-8"), path)
        except ValueError as error:
            raise ValueError(f"{option(name)}: {error}") from error
        raise ValueError(
            f"{option(name)} {path!r} is neither a folder with a config.json nor one of the models "
            f"whose config is known without a network: {', '.join(known)}"
        )

    return find("encoder", WHISPER_ENCODER, WHISPERS), find("llm", LLAMA, LLMS)


@dataclass(frozen=True)
class AbstractRun:
    """All that a step is compiled from, as shapes.

    Attributes:
      config: the run's config.
      mesh: of absent devices.
      model: the modules, with a prefix of the right size.
      state: the trained state.
      frozen: the parameters of the towers.
      optimizer: the optimizer.
    """

    config: TrainConfig
    mesh: Mesh
    model: SpeechLLM
    state: TrainState
    frozen: tuple[Params, Params]
    optimizer: Any

    @classmethod
    def of(cls, config: TrainConfig, mesh: Mesh, speech: Speech) -> "AbstractRun":
        """Lays out a run."""
        whisper, llama = tower_configs(config)
        dtype = jnp.dtype(config.dtype)
        model = make_model(config, whisper, llama)
        schedule = make_schedule(config.optimizer, config.num_steps, config.ctc)
        optimizer = make_optimizer(config.optimizer, schedule)
        return cls(
            config,
            mesh,
            replace(model, prefix=_some_prefix(llama, len(speech.prompt.before_audio), dtype)),
            abstract_state(config.projector, optimizer, mesh),
            (
                abstract_encoder(whisper, param_dtype=dtype, mesh=mesh),
                abstract_decoder(llama, param_dtype=dtype, mesh=mesh),
            ),
            optimizer,
        )

    def lower(self, batch: Batch) -> jax.stages.Lowered:
        """The step for an abstract batch, exactly as training compiles it."""
        args = self.state, self.frozen, self.optimizer, self.model, self.config
        with use_mesh(self.mesh):
            return lower_step(LLMObjective(), batch, *args)

    @property
    def argument_bytes(self) -> int:
        """Bytes of the state and the towers on a chip."""
        leaves = jax.tree.leaves((self.state, self.frozen))
        return sum(_shard_bytes(leaf) for leaf in leaves)


def compile_and_write(run: AbstractRun, lowered: jax.stages.Lowered) -> tuple[Any, str]:
    """Compiles a program, and gives its text too.

    That of a TPU is what the compiler itself writes: JAX cannot read back all of its instructions.
    """
    if run.mesh.devices.flat[0].platform != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text() or ""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(options)
        (file,) = Path(folder).glob("*.after_codegen.txt")
        return compiled, file.read_text()


def memory_of(compiled: jax.stages.Compiled) -> tuple[int, int, int]:
    """Bytes on a chip, by the compiler: of arguments, of temporaries, and of all together."""
    memory: Any = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return arguments, temporaries, arguments + temporaries + results


def _shard_bytes(leaf: Any) -> int:
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize


def _some_prefix(llama: Any, length: int, dtype: Any) -> KVCache | None:
    """Keys and values for the constants of a step. Zeros might be simplified away."""
    if not length:
        return None
    rng = np.random.default_rng(0)
    zeros = jax.device_get(make_cache(llama, 1, length, dtype))
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), zeros)


@dataclass(frozen=True)
class CompiledStep:
    """A step that was compiled for some rows.

    Attributes:
      bucket: its static lengths.
      num_rows: rows of the global batch.
      rows: rows of a chip in a micro-batch.
      batch_bytes: bytes of the batch on a chip.
      arguments: bytes on a chip: state, towers and batch.
      temporaries: bytes on a chip, by the compiler.
      peak: bytes on a chip, all together.
      capacity: bytes that a chip has for them.
      program: what the step does; None if it does not fit.
      compile_secs: how long the compiler took.
    """

    bucket: Bucket
    num_rows: int
    rows: int
    batch_bytes: int
    arguments: int
    temporaries: int
    peak: int
    capacity: int
    program: Program | None = field(repr=False)
    compile_secs: float

    @property
    def fits(self) -> bool:
        """Whether a chip has enough memory."""
        return self.program is not None and self.peak <= self.capacity


def compile_step(run: AbstractRun, bucket: Bucket, batch: Batch, chip: Chip) -> CompiledStep:
    """Compiles the step of a bucket, and reads what the compiler has made of it."""
    num_rows = batch.tokens.shape[0]
    shards = num_batch_shards(run.mesh) * run.config.accumulation_steps
    batch_bytes = sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(batch))
    start, program = time.monotonic(), None
    try:
        compiled, text = compile_and_write(run, run.lower(batch))
    except jax.errors.JaxRuntimeError as error:
        if (temporaries := _needed(str(error))) is None:
            raise
        arguments = run.argument_bytes + batch_bytes
        peak = arguments + temporaries
    else:
        arguments, temporaries, peak = memory_of(compiled)
        program = read_program(text)
    return CompiledStep(
        bucket=bucket,
        num_rows=num_rows,
        rows=-(-num_rows // shards),
        batch_bytes=batch_bytes,
        arguments=arguments,
        temporaries=temporaries,
        peak=peak,
        capacity=int(USABLE * chip.hbm_bytes),
        program=program,
        compile_secs=time.monotonic() - start,
    )


def compile_decoding(run: AbstractRun, bucket: Bucket) -> tuple[int, Program]:
    """Compiles what evaluation does once the audio is heard: prompts are read and continued.

    Args:
      run: the run.
      bucket: of the clips.

    Returns:
      Rows of a chip, and what the program does: nothing if it does not fit.
    """
    config, mesh = run.config, run.mesh
    ways = num_batch_shards(mesh)
    rows = -(-config.data.eval_batch_size // ways)
    sharding = batch_sharding(mesh)
    prompts = jax.ShapeDtypeStruct(
        (rows * ways, bucket.merged_len, run.model.llm.config.hidden_size),
        jnp.dtype(config.dtype),
        sharding=sharding,
    )
    lengths = jax.ShapeDtypeStruct((rows * ways,), jnp.int32, sharding=sharding)
    decode = functools.partial(generate, model=run.model, config=config.decoding, end_of_turn=2)
    try:
        with use_mesh(mesh):
            jitted = jax.jit(decode, out_shardings=replicated(mesh))
            lowered = jitted.lower(run.frozen[1], prompts, lengths)
        _, text = compile_and_write(run, lowered)
    except jax.errors.JaxRuntimeError as error:
        if _needed(str(error)) is None:
            raise
        return rows, Program()
    return rows, read_program(text)


def _needed(message: str) -> int | None:
    """The bytes of temporaries that the compiler wanted, if it says that it had too few."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"\((\d+(?:\.\d+)?)([GM])\) exceeds available HBM", message)
    return int(float(found[1]) * (GIB if found[2] == "G" else 2**20)) if found else None


@dataclass(frozen=True)
class Compiled:
    """All that is compiled for a plan.

    Attributes:
      steps: of the buckets.
      most_rows: how many rows of a micro-batch fit on a chip in the largest: see `most_rows`.
      decoding: rows of a chip, and the program; see `compile_decoding`.
    """

    steps: list[CompiledStep]
    most_rows: int
    decoding: tuple[int, Program]


def compile_all(run: AbstractRun, speech: Speech, chip: Chip) -> Compiled:
    """Compiles the step of every bucket, and decoding.

    As many at a time as there are cores: XLA does not hold Python's lock.
    """
    batches = speech.batches.abstract_batches()
    largest = max(batches, key=lambda each: (each[0].merged_len, each[0].num_frames))
    order = [largest, *(each for each in reversed(batches) if each is not largest)]
    lock, label = threading.Lock(), f"compiling for {run.mesh.size} absent chips"
    num_programs = len(order) + 1 + (len(order) == 1)  # with decoding, and with other rows
    with (
        progress_bar(log, label, total=num_programs, unit="program") as progress,
        ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool,
    ):

        def begin(function: Callable[..., Any], *args: Any) -> Future[Any]:
            def counted() -> Any:
                result = function(*args)
                with lock:
                    progress.update(1)
                return result

            return pool.submit(counted)

        pending = {each[0]: begin(compile_step, run, *each, chip) for each in order}
        decoding = begin(compile_decoding, run, largest[0])
        steps = {bucket: step.result() for bucket, step in pending.items()}
        others = [step for bucket, step in steps.items() if bucket != largest[0]]
        most = most_rows(run, steps[largest[0]], others, largest[1], chip)
        progress.update(len(order) == 1)
        return Compiled([steps[bucket] for bucket, _ in batches], most, decoding.result())


def most_rows(
    run: AbstractRun, step: CompiledStep, others: Sequence[CompiledStep], batch: Batch, chip: Chip
) -> int:
    """How many rows of a micro-batch fit on a chip, by a line through two compiled sizes.

    Temporaries and batches grow linearly with the positions that the LLM computes; what the
    compiler wants of a size that does not fit is a point of the line, too. The second size is that
    of another bucket or, if none differs enough, another number of rows, which is compiled for it.

    Args:
      run: the run.
      step: a compiled step of the bucket.
      others: those of the other buckets.
      batch: the bucket's batch.
      chip: the chip.
    """
    fixed = run.argument_bytes
    if step.capacity <= fixed:
        return 0
    if step.peak <= fixed:
        return step.rows

    def slope(other: CompiledStep) -> float:  # bytes per row
        rows = other.rows * _positions(run, other) / _positions(run, step)
        return (step.peak - other.peak) / (step.rows - rows) if rows != step.rows else 0.0

    least = min(others, key=lambda each: each.rows * _positions(run, each), default=step)
    is_apart = 1.2 * least.rows * _positions(run, least) < step.rows * _positions(run, step)
    if not is_apart or slope(least) <= 0:
        least = _with_other_rows(run, step, batch, chip)
        if least is None:
            return step.rows if step.fits else 0
        if slope(least) <= 0:
            return max(each.rows for each in (step, least) if each.fits or each.rows == 1)
    return max(0, int((step.capacity - step.peak) / slope(least) + step.rows))


def _positions(run: AbstractRun, step: CompiledStep) -> int:
    """What the LLM computes of a row."""
    return step.bucket.merged_len - run.model.prefix_len


def _with_other_rows(
    run: AbstractRun, step: CompiledStep, batch: Batch, chip: Chip
) -> CompiledStep | None:
    """The step with other rows, nearer to what fits; None if there is no other number."""
    # The other size lies between the first and where a line through the origin would end, and not
    # so far away that the program would be another one.
    fixed = run.argument_bytes
    guess = (step.capacity - fixed) * step.rows / (step.peak - fixed)
    other = round(min((step.rows * guess) ** 0.5, 8 * step.rows))
    if other == step.rows:
        other = step.rows + 1 if guess > step.rows else max(1, step.rows - 1)
    if other == step.rows:
        return None
    num_rows = other * num_batch_shards(run.mesh) * run.config.accumulation_steps
    resized = abstract_batch(batch, num_rows, batch_sharding(run.mesh))
    return compile_step(run, step.bucket, resized, chip)


def shards_to_fit(run: AbstractRun, step: CompiledStep) -> Iterator[int]:
    """Values of `--mesh.fsdp` with which the parameters would leave room for a step, ascending."""
    num_slices = len({getattr(device, "slice_index", 0) for device in run.mesh.devices.flat})
    slice_size, now = run.mesh.size // num_slices, run.mesh.shape["fsdp"]
    rest = step.peak - run.argument_bytes
    for ways in range(now + 1, slice_size + 1):
        divides = slice_size % (ways * run.mesh.shape["tensor"]) == 0
        if divides and run.argument_bytes * now / ways + rest < step.capacity:
            yield ways
