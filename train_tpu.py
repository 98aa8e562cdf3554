"""Trains the audio projector between a frozen Whisper encoder and a frozen Llama-family LLM.

Examples:

  python train_tpu.py demo --encoder models/whisper-base --llm models/smollm2-135m-instruct
  python train_tpu.py whisper-base-smollm2-135m --data.train clips.jsonl --data.eval dev.jsonl
  python train_tpu.py whisper-base-smollm2-135m --data.train clips.jsonl --mesh.fsdp 4 \\
      --init-projector converted/   # continue a PyTorch run, see `python -m convert to-flax`

Starting the same command again continues the run. `python train_tpu.py demo --help` lists every
option of a preset with its default.
"""

import contextlib
import functools
import itertools
import logging
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from convert.load import load_projector
from flax_projector import config as configs
from flax_projector.audio import is_url
from flax_projector.batch_plan import Bucket
from flax_projector.checkpoints import open_manager, restore, save
from flax_projector.config import PRESETS, TrainConfig
from flax_projector.data import BatchIterator, BatchSource, take_problems, to_global
from flax_projector.evaluate import Scores
from flax_projector.files import write_atomically
from flax_projector.metrics import (
    MetricsWriter,
    quiet_other_processes,
    require_finite,
    samples,
    setup_logging,
)
from flax_projector.preemption import Preempted, PreemptionGuard
from flax_projector.projector import abstract_projector, last_norm_name
from flax_projector.run import (
    LoadedModel,
    load_model,
    make_eval_sources,
    make_evaluator,
    make_train_source,
    open_bad_rows,
    read_best,
    write_best,
    write_projector,
)
from flax_projector.sharding import batch_sharding, make_mesh, replicated, strip_axes, use_mesh
from flax_projector.throughput import (
    check_profile,
    compilations,
    make_flop_counter,
    profiled,
    progress_postfix,
    summarize,
)
from flax_projector.train_step import (
    CTCClasses,
    TrainState,
    ctc_classes,
    init_state,
    make_optimizer,
    make_schedule,
    train_step,
)

log = logging.getLogger("train")


def check_run_folder(config: TrainConfig) -> Path:
    """The run folder, if it holds no run or this one.

    Raises:
      ValueError: if another run lies there.
    """
    if is_url(config.out):
        raise ValueError(f"--out {config.out}: a run folder must be a local or mounted path")
    folder = Path(config.out)
    saved_path = folder / "config.json"
    if saved_path.is_file():
        if not config.resume:
            raise ValueError(f"{folder} holds a run: choose another --out, or pass --resume")
        saved = configs.from_json(saved_path.read_text())
        refused, allowed = configs.changes(saved, config)
        if refused:
            listed = "\n  ".join(refused)
            raise ValueError(
                f"{folder} holds a run with another config:\n  {listed}\n"
                "Choose another --out, or take these back."
            )
        for change in allowed:
            log.info("the run goes on with %s", change)
    return folder


def save_config(folder: Path, config: TrainConfig) -> None:
    """Makes the folder this run's; called when everything is loaded, so that a start that failed
    on a wrong path or manifest leaves no config behind."""
    path = folder / "config.json"
    if jax.process_index() == 0 and not path.is_file():
        write_atomically(path, configs.to_json(config))


def abstract_train_state(
    config: TrainConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of everything that is trained: moments lie as their params."""
    params = abstract_projector(config.projector, mesh=mesh)
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), params)
    place = functools.partial(_with_sharding, sharding=replicated(mesh))
    opt_state = optax.tree.map_params(
        optimizer,
        lambda leaf, param: _with_sharding(leaf, param.sharding),
        state.opt_state,
        params,
        transform_non_params=place,
    )
    return TrainState(place(state.step), params, opt_state)


def _with_sharding(leaf, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def shardings_of(tree):
    """The sharding of every leaf of a tree of arrays or ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def make_initial_state(
    config: TrainConfig,
    loaded: LoadedModel,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
) -> TrainState:
    """A fresh state, born in its shards: random, or around a given projector."""
    init_rest = functools.partial(init_state, optimizer=optimizer)
    if config.init_projector:
        params = load_projector(config.init_projector, config.projector, abstract.params)
        return jax.jit(init_rest, out_shardings=shardings_of(abstract))(params)

    def init(key):
        frames = jnp.zeros((1, 1, config.projector.encoder_dim))
        params = strip_axes(loaded.model.projector.init(key, frames)["params"])
        last_norm = params[last_norm_name(config.projector)]
        last_norm["scale"] = last_norm["scale"] * config.init_output_scale
        return init_rest(params)

    key = jax.random.key(config.seed)
    return jax.jit(init, out_shardings=shardings_of(abstract))(key)


def log_parameters(loaded: LoadedModel, state: TrainState) -> None:
    """What trains and what does not, with counts."""
    parts = {
        "encoder": (loaded.encoder_params, "frozen"),
        "projector": (state.params, "trained"),
        "llm": (loaded.llm_params, "frozen"),
    }
    for name, (params, role) in parts.items():
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        log.info("%-9s %13s parameters, %s", name, f"{count:,}", role)


def compile_steps(
    stages: list[CTCClasses | None],
    source: BatchSource,
    abstract: TrainState,
    loaded: LoadedModel,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
) -> dict[tuple[CTCClasses | None, Bucket], jax.stages.Compiled]:
    """The step of every stage and length, compiled before any is run: none compiles in the loop."""
    compiled, start = {}, time.monotonic()
    for classes, (bucket, batch) in itertools.product(stages, source.abstract_batches()):
        step = jax.jit(
            functools.partial(
                train_step,
                model=loaded.model,
                optimizer=optimizer,
                seed=config.seed,
                classes=classes,
                accumulation_steps=config.accumulation_steps,
            ),
            in_shardings=(
                shardings_of(abstract),
                *map(shardings_of, loaded.frozen),
                batch_sharding(loaded.mesh),
            ),
            out_shardings=(shardings_of(abstract), replicated(loaded.mesh)),
            donate_argnums=0,
        )
        compiled[classes, bucket] = step.lower(abstract, *loaded.frozen, batch).compile()
    log.info("compiled %d steps in %.0f s", len(compiled), time.monotonic() - start)
    return compiled


def main(config: TrainConfig) -> None:
    """Runs a config to its last step, or until the process is told to stop."""
    with contextlib.ExitStack() as stack:
        # --- processes, run folder, mesh -----------------------------------------------------
        if config.distributed:
            jax.distributed.initialize()
        quiet_other_processes()
        guard = stack.enter_context(PreemptionGuard().watching())
        folder = check_run_folder(config)
        mesh = make_mesh(config.mesh)
        log.info("%d %s devices, mesh %s", mesh.size, jax.default_backend(), dict(mesh.shape))
        stack.enter_context(use_mesh(mesh))
        num_compiled = stack.enter_context(compilations())
        if jax.default_backend() == "cpu" and config.dtype == "bfloat16":
            log.warning("bfloat16 is many times slower than float32 on CPUs: pass --dtype float32")

        # --- frozen towers and data ----------------------------------------------------------
        loaded = load_model(config, mesh)
        bad_rows = open_bad_rows(config)
        source = make_train_source(loaded, config, bad_rows)
        eval_sources = make_eval_sources(loaded, config, bad_rows)
        iterator = BatchIterator(
            source, num_threads=config.data.num_threads, num_workers=config.data.num_workers
        )
        stack.callback(iterator.close)

        # --- state ---------------------------------------------------------------------------
        # Restart order: 1. the run folder's newest checkpoint; 2. --init-projector; 3. the seed.
        schedule = make_schedule(config.optimizer, config.num_steps, config.ctc)
        optimizer = make_optimizer(config.optimizer, schedule)
        abstract = abstract_train_state(config, optimizer, mesh)
        manager = stack.enter_context(
            open_manager(folder / "checkpoints", keep=config.keep_checkpoints)
        )
        audio_secs, best = 0.0, read_best(folder)
        latest = manager.latest_step()
        if latest is not None:
            state, position = restore(manager, latest, abstract)
            iterator.set_state(position["iterator"])
            audio_secs = position["audio_secs"]
            log.info("resumed at step %d", latest)
        else:
            state = make_initial_state(config, loaded, optimizer, abstract)
        log_parameters(loaded, state)
        first = int(state.step)
        writer = stack.enter_context(
            MetricsWriter(folder, first_step=first, wandb_project=config.wandb_project)
        )
        save_config(folder, config)
        check_profile(config.profile_steps, config.num_steps - first)

        # --- compiled functions --------------------------------------------------------------
        classes, stages = None, []
        if first < config.ctc.num_steps:
            targets = [utterance.target for utterance in source.utterances]
            classes = ctc_classes(targets, loaded.prompt.token_id(config.ctc.blank))
            stages.append(classes)
        if first < config.num_steps:
            stages.append(None)
        steps = compile_steps(stages, source, abstract, loaded, optimizer, config)
        evaluator = make_evaluator(loaded, config, bad_rows)
        count_flops = make_flop_counter(
            (state.params, *loaded.frozen),
            loaded.model.llm.config,
            window_frames=0 if config.data.cache_features else config.data.window_frames,
        )

        # --- what happens between steps ------------------------------------------------------
        pending, since, waited = [], time.monotonic(), 0.0
        saved_step, saved_at = latest, time.monotonic()

        def log_steps(step: int) -> None:
            nonlocal pending, since, waited, audio_secs
            if not pending:
                return
            measured = jax.device_get(pending)
            for index, metrics in enumerate(measured, step - len(measured)):
                ids = [u.row.id for u in source.members(index) if u is not None]
                require_finite(metrics, step=index + 1, utterance_ids=ids)
            scalars = summarize(
                measured,
                secs=time.monotonic() - since,
                wait_secs=waited,
                count_flops=count_flops,
                devices=mesh.devices.flatten().tolist(),
            )
            audio_secs += scalars.pop("audio_secs")
            scalars["audio_hours"] = audio_secs / 3600
            scalars["learning_rate"] = float(np.asarray(schedule(step - 1)))
            scalars["num_compiled"] = num_compiled()
            writer.write(step, scalars)
            progress.set_postfix(progress_postfix(scalars))
            pending, since, waited = [], time.monotonic(), 0.0

        def save_state(step: int) -> None:
            nonlocal saved_step, saved_at
            log_steps(step)  # the log of a checkpoint's steps is complete
            if step != saved_step:
                position = {"iterator": iterator.get_state(), "audio_secs": audio_secs}
                save(manager, step, state, position)
                saved_step, saved_at = step, time.monotonic()

        def evaluate(step: int) -> None:
            nonlocal best, since
            wers, losses = [], []
            for name, eval_source in eval_sources.items():
                params = (state.params, *loaded.frozen)
                scores = evaluator(params, eval_source, name=name, check=guard.check)
                wers.append(scores.wer)
                losses.append(scores.loss)
                writer.write(
                    step, {f"eval/{name}/loss": scores.loss, f"eval/{name}/wer": scores.wer}
                )
                writer.write_transcripts(step, name, scores.transcripts)
                log_scores(step, name, scores)
            log.info("%d programs compiled so far", num_compiled())
            if wers and step:
                now = {"step": step, "wer": float(np.mean(wers)), "loss": float(np.mean(losses))}
                if (now["wer"], now["loss"]) < (best["wer"], best["loss"]):
                    best = now
                    write_projector(folder / "best", state.params, config, mesh)
                    write_best(folder, best)
            since = time.monotonic()

        def is_eval_step(step: int) -> bool:
            every = config.eval_every_steps
            is_due = every > 0 and step % every == 0 and step > config.ctc.num_steps
            return step in (0, config.num_steps) or is_due

        # --- loop ----------------------------------------------------------------------------
        guard.protect(manager.wait_until_finished)
        progress = stack.enter_context(
            tqdm(
                total=config.num_steps,
                initial=first,
                desc="train",
                unit="step",
                disable=jax.process_index() > 0,
            )
        )
        step = first
        try:
            if is_eval_step(first):  # after a restart too: the evaluation may have been interrupted
                evaluate(first)
            while step < config.num_steps:
                guard.check()
                with profiled(step - first, config.profile_steps, folder / "profile") as is_last:
                    start = time.monotonic()
                    rows = take_problems(next(iterator), source, step, bad_rows)
                    batch = to_global(rows, source)
                    waited += time.monotonic() - start
                    stage = classes if step < config.ctc.num_steps else None
                    run_step = steps[stage, source.bucket(step)]
                    with jax.transfer_guard("disallow"):
                        state, metrics = run_step(state, *loaded.frozen, batch)
                    if is_last:
                        jax.block_until_ready(metrics)
                pending.append(metrics)
                step += 1
                progress.update()
                is_due = step % config.save_every_steps == 0 or is_eval_step(step)
                if step % config.log_every_steps == 0 or step == config.ctc.num_steps:
                    log_steps(step)
                    is_late = time.monotonic() - saved_at > 60 * config.save_every_mins
                    is_due |= bool(multihost_utils.broadcast_one_to_all(is_late))
                if is_due:
                    save_state(step)
                if is_eval_step(step):
                    evaluate(step)
        except Preempted:
            save_state(step)
            manager.wait_until_finished()
            log.info("stopped at step %d, which is saved: the same command goes on", step)
            return

        # --- result --------------------------------------------------------------------------
        manager.wait_until_finished()
        write_projector(folder / "projector", state.params, config, mesh)
        log.info("%s", bad_rows.summary())
        log.info("projector saved in %s", folder / "projector")
        if best["step"] not in (None, step):
            log.info(
                "the lowest word error rate was that of step %d: %.1f%%, in %s",
                *(best["step"], 100 * best["wer"], folder / "best"),
            )


def log_scores(step: int, name: str, scores: Scores) -> None:
    """Scores of an evaluation, with ten of its transcripts."""
    log.info(
        "step %d, %s: WER %.1f%%, loss %.3f over %d utterances",
        *(step, name, 100 * scores.wer, scores.loss, len(scores.transcripts)),
    )
    for transcript in samples(scores.transcripts):
        log.info("  said %r, heard %r", transcript.reference, transcript.hypothesis)


def cli() -> None:
    """Reads the command line, and runs; bad input ends in one line."""
    setup_logging()
    config = tyro.extras.overridable_config_cli(PRESETS, description=__doc__)
    log.info("config:\n%s", configs.to_json(config))
    with logging_redirect_tqdm():
        try:
            main(config)
        except (ValueError, FloatingPointError) as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()
