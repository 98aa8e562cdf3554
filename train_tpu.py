"""Trains the audio projector between a frozen Whisper encoder and a frozen Llama-family LLM.

Examples:

  python train_tpu.py demo --encoder models/whisper-base --llm models/smollm2-135m-instruct
  python train_tpu.py whisper-base-smollm2-135m --data.train clips.jsonl --data.eval dev.jsonl
  python train_tpu.py whisper-base-smollm2-135m --data.train clips.jsonl --mesh.fsdp 4 \\
      --init-projector converted/   # continue a PyTorch run, see `python -m convert to-flax`

  python train_tpu.py whisper-turbo-smollm3-3b --plan v5e:16x16   # [--json] trains nothing: says
      # what the run would need of that pod and how fast it would be, on a machine without one

Running the same command again continues the run. `python train_tpu.py demo --help` lists every
option of a preset with its default.
"""

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import optax
import tyro
from jax.sharding import Mesh

from convert.load import load_projector_params
from flax_projector import hosts
from flax_projector.config import PRESETS, TrainConfig, to_json
from flax_projector.data.bad_rows import BadRowLog
from flax_projector.data.batches import Batches
from flax_projector.data.reader import BatchIterator, read_batch
from flax_projector.data.sources import check_sources, eval_normalizers
from flax_projector.logs import (
    lines_above_bars,
    printable,
    setup_logging,
    start_in_utf8,
)
from flax_projector.planning.plan import make_plan
from flax_projector.planning.report import report
from flax_projector.report.writing import Reporter
from flax_projector.run import (
    LoadedModel,
    find_towers,
    load_model,
    resolve_config,
)
from flax_projector.run_folder import RunFolder
from flax_projector.run_folder.owner import lock
from flax_projector.sharding import make_mesh, use_mesh
from flax_projector.training.agreement import agree_on_command, agree_on_start
from flax_projector.training.best import Best
from flax_projector.training.checkpoints import Saver, open_manager, restore
from flax_projector.training.cluster import join
from flax_projector.training.compile_cache import compile_cache
from flax_projector.training.due import Due
from flax_projector.training.handed_over import check_run
from flax_projector.training.held_out import HeldOut
from flax_projector.training.metrics import MetricsWriter
from flax_projector.training.objectives import CTCObjective, Stages, ctc_classes
from flax_projector.training.preemption import Preempted, PreemptionGuard
from flax_projector.training.start_up import StartUp
from flax_projector.training.state import (
    TrainState,
    abstract_state,
    begin_anew,
    begin_with,
    make_optimizer,
    make_schedule,
)
from flax_projector.training.step_log import StepLog, Totals
from flax_projector.training.throughput import (
    check_profile,
    compilations,
    profiled,
)
from flax_projector.training.train_step import compile_steps

log = logging.getLogger("train")


@contextlib.contextmanager
def mesh_in_use(config: TrainConfig, devices: Sequence[Any] | None) -> Iterator[Mesh]:
    """The mesh of the run's devices, which it uses in the block; logs it."""
    mesh = make_mesh(config.mesh, devices)
    log.info("%d %s devices, mesh %s", mesh.size, jax.default_backend(), dict(mesh.shape))
    if jax.default_backend() == "cpu" and config.dtype == "bfloat16":
        log.warning("bfloat16 is many times slower than float32 on CPUs: pass --dtype float32")
    with use_mesh(mesh):
        yield mesh


def begin(
    config: TrainConfig,
    loaded: LoadedModel,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
) -> TrainState:
    """The initial state of a new run, from a given projector or a random one."""
    if config.init_projector:
        params = load_projector_params(config.init_projector, config.projector, abstract.params)
        return begin_with(params, optimizer, abstract)
    output_scale = config.init_output_scale
    if output_scale == "auto":
        output_scale = loaded.embedding_rms()
        log.info("the last norm starts at %.4f, the RMS of the LLM's embeddings", output_scale)
    return begin_anew(
        loaded.model.projector,
        optimizer,
        abstract,
        seed=config.seed,
        output_scale=output_scale,
    )


def make_stages(config: TrainConfig, loaded: LoadedModel, batches: Batches) -> Stages:
    """The objectives of a run: CTC for its warm start, if it has one, then the LLM's."""
    if not config.ctc.num_steps:
        return Stages()
    blank = loaded.prompt.token_id(config.ctc.blank)
    classes = ctc_classes(batches.utterances.spoken(), blank)
    objective = CTCObjective(classes, config.projector.projector_pool_stride)
    return Stages(objective, config.ctc.num_steps)


def main(config: TrainConfig, *, devices: Sequence[Any] | None = None) -> None:
    """Trains on all `devices` to the config's last step, or until the process is told to stop."""
    with contextlib.ExitStack() as stack, hosts.telling():
        start_up = StartUp("connect")  # --- processes, run folder, mesh ----------------------
        join(config.distributed)
        guard = stack.enter_context(PreemptionGuard().watching())
        stack.enter_context(hosts.ending_together())
        folder = RunFolder.of(config)
        stack.enter_context(lock(folder, jax.process_index()))
        config = resolve_config(config)
        log.info("config:\n%s", to_json(config))
        stack.enter_context(compile_cache(config.compile_cache, shared=folder.compile_cache))
        moved, began = check_run(folder, config), folder.read_origin().began
        agree_on_command(config, folder)
        check_sources(config)
        mesh = stack.enter_context(mesh_in_use(config, devices))
        num_compiled = stack.enter_context(compilations())

        start_up.enter("towers")  # --- frozen towers and data --------------------------------
        towers = find_towers(config)
        folder.check_contents(towers.contents)
        loaded = load_model(config, mesh, towers)
        start_up.enter("data")
        bad_rows = BadRowLog(folder.bad_rows, max_rate=config.data.max_bad_rate)
        maker = loaded.make_batch_maker(folder, bad_rows)
        batches, sets = maker.train(), maker.eval()
        iterator = BatchIterator(
            batches, num_threads=config.data.num_threads, num_workers=config.data.num_workers
        )
        stack.enter_context(contextlib.closing(iterator))

        start_up.enter("state")  # --- state, compiled functions -----------------------------
        # Restart order: 1. the run folder's newest checkpoint; 2. --init-projector; 3. the seed.
        schedule = make_schedule(config.optimizer, config.num_steps, config.ctc)
        optimizer = make_optimizer(config.optimizer, schedule)
        abstract = abstract_state(config.projector, optimizer, mesh)
        manager = open_manager(folder.checkpoints, keep=config.keep_checkpoints)
        stack.enter_context(manager)
        latest = manager.latest_step()
        agree_on_start(loaded.prompt, [batches, *sets.values()], latest)
        if latest is None:
            state, totals = begin(config, loaded, optimizer, abstract), Totals()
        else:
            state, position = restore(manager, latest, abstract)
            iterator.set_state(position["iterator"], has_moved="data.train" in moved)
            totals = Totals(**position["totals"])
            log.info("resumed at step %d", latest)
        loaded.log_parameters(state.params)
        first = step = int(state.step)
        start_up.enter("compile")
        stages = make_stages(config, loaded, batches)
        objectives, shapes = stages.objectives(first, config.num_steps), batches.abstract_batches()
        steps = compile_steps(
            objectives, shapes, abstract, loaded.frozen, optimizer, loaded.model, config
        )

        start_up.enter("files")  # --- what happens between steps ------------------------------
        writer = MetricsWriter(folder, first_step=first, wandb_project=config.wandb_project)
        stack.enter_context(writer)
        if jax.process_index() == 0:
            folder.claim(config, loaded.prompt.to_json(), towers.contents, began)
        step_log = StepLog(
            writer,
            batches,
            bad_rows,
            first_step=first,
            num_steps=config.num_steps,
            totals=totals,
            began=began,
            start_up=start_up,
            schedule=schedule,
            count_flops=loaded.make_flop_counter(state.params),
            num_compiled=num_compiled,
        )
        stack.enter_context(contextlib.closing(step_log))
        best, due = Best(folder, loaded.write_projector), Due(config)
        evaluator, normalizers = loaded.make_evaluator(bad_rows), eval_normalizers(config)
        reporter = Reporter(folder, {"train": batches, **sets})
        held_out = HeldOut(evaluator, sets, normalizers, loaded.frozen, writer, best, reporter)
        saver = Saver(manager, iterator, step_log, writer, every_mins=config.save_every_mins)
        check_profile(config.profile_steps, config.num_steps - first)
        guard.protect(manager.wait_until_finished, stall_mins=config.stall_mins)

        start_up.enter("evaluation")  # --- loop -----------------------------------------------
        try:
            if due.evaluate(first):  # even after a restart, since it may have been interrupted
                with step_log.paused():
                    held_out.evaluate(first, state.params, check=guard.check)
            start_up.enter("first step")
            while step < config.num_steps:
                guard.check()
                with profiled(step - first, config.profile_steps, folder.profile) as is_last:
                    with step_log.waiting():
                        batch = read_batch(iterator, batches, bad_rows)
                    run_step = steps[stages.objective(step), batches.bucket(step)]
                    with jax.transfer_guard("disallow"):
                        state, metrics = run_step(state, *loaded.frozen, batch)
                    if is_last:
                        jax.block_until_ready(metrics)
                step += 1
                step_log.add(metrics)
                if due.log(step):
                    step_log.flush(step)
                if due.save(step) or (due.log(step) and saver.is_late()):
                    saver.save(step, state)
                if due.evaluate(step):
                    with step_log.paused():
                        held_out.evaluate(step, state.params, check=guard.check)
        except Preempted:
            saver.save(step, state)
            manager.wait_until_finished()
            log.info("stopped at step %d, which is saved: the same command continues", step)
            return

        # --- result --------------------------------------------------------------------------
        manager.wait_until_finished()
        loaded.write_projector(folder.projector, state.params)
        log.info("%s", bad_rows.summary())
        log.info("projector saved in %s", folder.projector)
        best.report(step)


def split_plan(args: Sequence[str]) -> tuple[str | None, bool, list[str]]:
    """Takes `--plan TOPOLOGY` and `--json` out of a command line; the rest describes the config."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plan", metavar="TOPOLOGY")
    parser.add_argument("--json", action="store_true")
    found, others = parser.parse_known_args(args)
    if found.json and found.plan is None:
        parser.error("--json belongs to --plan TOPOLOGY")
    return found.plan, found.json, others


def plan(config: TrainConfig, topology: str, *, as_json: bool) -> None:
    """Prints what a run would need and do on a pod.

    Raises:
      ValueError: if that is impossible, or does not fit; names the nearest that does.
    """
    found = make_plan(config, topology)
    text = json.dumps(found.to_json(), indent=2) + "\n" if as_json else report(found)
    sys.stdout.write(text)
    if not found.fits:
        raise ValueError(found.misfit())


def read_config(args: Sequence[str] | None = None) -> TrainConfig:
    """The config that a command line describes: a preset with options that override it."""
    return tyro.extras.overridable_config_cli(PRESETS, description=__doc__, args=args)


def cli(args: Sequence[str] | None = None) -> None:
    """Runs what the command line says; invalid input ends with a one-line error."""
    start_in_utf8()
    setup_logging()
    topology, as_json, others = split_plan(sys.argv[1:] if args is None else args)
    config = read_config(others)
    with lines_above_bars():
        try:
            if topology is None:
                main(config)
            else:
                plan(config, topology, as_json=as_json)
        except hosts.USER_ERRORS as error:
            sys.exit(printable(f"error: {error}", keep="\n"))


if __name__ == "__main__":
    cli()
