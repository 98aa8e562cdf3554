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
import logging
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from convert.checkpoint import in_memory
from convert.flax_files import write_flax
from convert.hf_config import config_text, run_config_dict
from convert.load import load_projector
from convert.trees import flatten
from flax_projector import config as configs
from flax_projector.checkpoints import open_manager, restore, save
from flax_projector.config import PRESETS, TrainConfig
from flax_projector.data import BatchIterator, take_problems, to_global
from flax_projector.metrics import (
    MetricsWriter,
    quiet_other_processes,
    require_finite,
    setup_logging,
)
from flax_projector.projector import abstract_projector, last_norm_name
from flax_projector.run import (
    LoadedModel,
    load_model,
    make_eval_sources,
    make_evaluator,
    make_train_source,
    open_bad_rows,
)
from flax_projector.sharding import batch_sharding, make_mesh, replicated, strip_axes, use_mesh
from flax_projector.train_step import (
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
    folder = Path(config.out)
    saved_path = folder / "config.json"
    if saved_path.is_file():
        if not config.resume:
            raise ValueError(f"{folder} holds a run: choose another --out, or pass --resume")
        saved = configs.from_json(saved_path.read_text())
        if changed := configs.changes(saved, config):
            listed = "\n  ".join(changed)
            raise ValueError(
                f"{folder} holds a run with another config:\n  {listed}\n"
                "Choose another --out, or take these back."
            )
    return folder


def save_config(folder: Path, config: TrainConfig) -> None:
    """Makes the folder this run's; called when everything is loaded, so that a start that failed
    on a wrong path or manifest leaves no config behind."""
    path = folder / "config.json"
    if jax.process_index() == 0 and not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(configs.to_json(config))


def abstract_train_state(
    config: TrainConfig, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
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


def main(config: TrainConfig) -> None:
    """Runs a config to its last step."""
    # --- processes, run folder, mesh ---------------------------------------------------------
    if config.distributed:
        jax.distributed.initialize()
    quiet_other_processes()
    folder = check_run_folder(config)
    mesh = make_mesh(config.mesh)
    log.info("%d %s devices, mesh %s", mesh.size, jax.default_backend(), dict(mesh.shape))

    with contextlib.ExitStack() as stack:
        stack.enter_context(use_mesh(mesh))
        # --- frozen towers and data ----------------------------------------------------------
        loaded = load_model(config, mesh)
        bad_rows = open_bad_rows(config)
        source = make_train_source(loaded, config, bad_rows)
        eval_sources = make_eval_sources(loaded, config, bad_rows)

        # --- state ---------------------------------------------------------------------------
        # Restart order: 1. the run folder's newest checkpoint; 2. --init-projector; 3. the seed.
        schedule = make_schedule(config.optimizer, config.num_steps, config.ctc)
        optimizer = make_optimizer(config.optimizer, schedule)
        abstract = abstract_train_state(config, optimizer, mesh)
        manager = stack.enter_context(
            open_manager(folder / "checkpoints", keep=config.keep_checkpoints)
        )
        iterator = BatchIterator(
            source, num_threads=config.data.num_threads, num_workers=config.data.num_workers
        )
        stack.callback(iterator.close)
        latest = manager.latest_step()
        if latest is not None:
            state, data_state = restore(manager, latest, abstract)
            iterator.set_state(data_state)
            log.info("resumed at step %d", latest)
        else:
            state = make_initial_state(config, loaded, optimizer, abstract)
        log_parameters(loaded, state)
        save_config(folder, config)

        # --- compiled functions --------------------------------------------------------------
        def compile_step(**kwargs):
            return jax.jit(
                functools.partial(
                    train_step,
                    model=loaded.model,
                    optimizer=optimizer,
                    seed=config.seed,
                    **kwargs,
                ),
                in_shardings=(
                    shardings_of(abstract),
                    *map(shardings_of, loaded.frozen),
                    batch_sharding(mesh),
                ),
                out_shardings=(shardings_of(abstract), replicated(mesh)),
                donate_argnums=0,
            )

        step_fn = ctc_step_fn = compile_step()
        if config.ctc.num_steps:
            targets = [utterance.target for utterance in source.utterances]
            classes = ctc_classes(targets, loaded.prompt.token_id(config.ctc.blank))
            ctc_step_fn = compile_step(classes=classes)
        evaluator = make_evaluator(loaded, config, bad_rows)
        writer = stack.enter_context(MetricsWriter(folder))

        def evaluate(step: int) -> None:
            for name, eval_source in eval_sources.items():
                scores = evaluator((state.params, *loaded.frozen), eval_source, name=name)
                writer.write(
                    step, {f"eval/{name}/loss": scores.loss, f"eval/{name}/wer": scores.wer}
                )
                writer.write_transcripts(step, name, scores.transcripts)
                log.info(
                    "step %d, %s: WER %.1f%%, loss %.3f over %d utterances",
                    *(step, name, 100 * scores.wer, scores.loss, len(scores.transcripts)),
                )

        # --- loop ----------------------------------------------------------------------------
        def is_eval_step(step: int) -> bool:
            every = config.eval_every_steps
            is_due = every > 0 and step % every == 0 and step > config.ctc.num_steps
            return step in (0, config.num_steps) or is_due

        first = int(state.step)
        if is_eval_step(first):  # after a restart too: the evaluation may be what was interrupted
            evaluate(first)
        progress = tqdm(
            total=config.num_steps,
            initial=first,
            desc="train",
            unit="step",
            disable=jax.process_index() > 0,
        )
        pending, since = [], time.monotonic()
        for step in range(first + 1, config.num_steps + 1):
            batch = take_problems(next(iterator), source, step - 1, bad_rows)
            batch = to_global(batch, source)
            is_warm_start = step <= config.ctc.num_steps
            run_step = ctc_step_fn if is_warm_start else step_fn
            with jax.transfer_guard("disallow"):
                state, metrics = run_step(state, *loaded.frozen, batch)
            pending.append(metrics)
            progress.update()

            is_last = step == config.num_steps
            ends_warm_start = step == config.ctc.num_steps
            if step % config.log_every_steps == 0 or is_last or ends_warm_start:
                scalars = summarize(jax.device_get(pending), time.monotonic() - since)
                scalars["learning_rate"] = float(np.asarray(schedule(step - 1)))
                batches = range(step - len(pending), step)
                ids = [u.row.id for i in batches for u in source.members(i) if u is not None]
                require_finite(scalars, step=step, utterance_ids=ids)
                writer.write(step, scalars)
                loss = "ctc_loss" if is_warm_start else "loss"
                progress.set_postfix(
                    {loss: f"{scalars[loss]:.3f}"},
                    lr=f"{scalars['learning_rate']:.1e}",
                    audio=f"{scalars['audio_secs_per_sec']:.0f}s/s",
                )
                pending, since = [], time.monotonic()
            if step % config.save_every_steps == 0 or is_last:
                save(manager, step, state, iterator.get_state())
            if is_eval_step(step):
                evaluate(step)
                since = time.monotonic()
        progress.close()

        # --- result --------------------------------------------------------------------------
        manager.wait_until_finished()
        params = jax.device_get(jax.jit(lambda p: p, out_shardings=replicated(mesh))(state.params))
        if jax.process_index() == 0:
            leaves = in_memory(flatten(params))
            text = config_text(run_config_dict(config))
            write_flax(folder / "projector", leaves, text, overwrite=True)
        log.info("projector saved in %s", folder / "projector")


def summarize(steps: list[dict[str, np.ndarray]], secs: float) -> dict[str, float]:
    """Means over the steps since the last log line, with the throughput."""
    stacked = {name: np.array([metrics[name] for metrics in steps]) for name in steps[0]}
    labels, audio_secs = (stacked.pop(name) for name in ("num_labels", "audio_secs"))
    means = {name: float(values.mean()) for name, values in stacked.items()}
    for name in {"loss", "ctc_loss"} & stacked.keys():  # per label, not per step
        means[name] = float(np.average(stacked[name], weights=np.maximum(labels, 1)))
    return {
        **means,
        "num_steps": len(steps),
        "step_secs": secs / len(steps),
        "audio_secs_per_sec": float(audio_secs.sum()) / secs,
    }


def cli() -> None:
    """Reads the command line, and runs; bad input ends in one line."""
    setup_logging()
    config = tyro.extras.overridable_config_cli(PRESETS, description=__doc__)
    log.info("config:\n%s", configs.to_json(config))
    with logging_redirect_tqdm():
        try:
            main(config)
        except ValueError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    cli()
