"""Whole training steps, from waveforms to updated parameters, against PyTorch."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
import torch

from convert.torch_projector import ResidualAudioProjector as TorchProjector
from convert.trees import flatten
from flax_projector.config import (
    PRESETS,
    CTCConfig,
    MeshConfig,
    OptimizerConfig,
    ProjectorConfig,
    TrainConfig,
)
from flax_projector.data.audio import load_audio
from flax_projector.data.bad_rows import BadRowLog
from flax_projector.data.batches import Batches
from flax_projector.run import LoadedModel, load_model
from flax_projector.run_folder import RunFolder
from flax_projector.sharding import make_mesh, use_mesh
from flax_projector.training.state import (
    abstract_state,
    begin_with,
    make_optimizer,
    make_schedule,
)
from flax_projector.training.train_step import compile_steps
from tests.models import projector_to_flax
from tests.parity import assert_close, assert_relative_l2
from tests.tiny import ENCODER_DIM, LLM_DIM, randomize, tiny_config
from tests.torch_step import Clip, TorchOptimizer, TorchSpeechLLM
from train_tpu import make_stages

pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("test_step_parity")]

ROOT = Path(__file__).parents[1]
MODELS = Path(os.environ.get("FLAX_PROJECTOR_MODELS", ROOT / "models"))
STAGES = [
    pytest.param("llm", marks=pytest.mark.variant("cross-entropy")),
    pytest.param("ctc", marks=pytest.mark.variant("CTC")),
]


class Steps(NamedTuple):
    """What the steps of a stage computed, and where they led.

    Attributes:
      losses: of every step.
      num_labels: of every step: what its loss is divided by.
      norms: of every step's gradients, before clipping.
      gradients: of the first step, before clipping, by flax path.
      params: after the last step, by flax path.
    """

    losses: np.ndarray
    num_labels: np.ndarray
    norms: np.ndarray
    gradients: dict[str, np.ndarray]
    params: dict[str, np.ndarray]


# --- the two sides ---------------------------------------------------------------------------


def load(config: TrainConfig) -> LoadedModel:
    """The model of a config, on one device."""
    return load_model(config, make_mesh(MeshConfig(), jax.devices()[:1]))


def with_config(loaded: LoadedModel, **changes: Any) -> LoadedModel:
    """The same model in a run with other settings."""
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, **changes))


def in_stage(loaded: LoadedModel, stage: str) -> LoadedModel:
    """The same model in a run that begins with the LLM, or with as many steps of CTC."""
    if stage == "llm":
        return loaded
    config = loaded.config
    ctc = CTCConfig(config.num_steps, config.optimizer.learning_rate)
    return with_config(loaded, ctc=ctc, num_steps=2 * config.num_steps)


def num_steps(config: TrainConfig) -> int:
    """Steps in the run's first stage."""
    return config.ctc.num_steps or config.num_steps


def make_batches(loaded: LoadedModel) -> Batches:
    """The training batches of the run."""
    folder = RunFolder.of(loaded.config)
    bad_rows = BadRowLog(folder.bad_rows, max_rate=0.0)
    return loaded.make_batch_maker(folder, bad_rows).train()


def to_flax(config: TrainConfig, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Copies of a PyTorch projector's parameters or gradients, by flax path."""
    return flatten(projector_to_flax(config.projector, tensors))


def train_ours(loaded: LoadedModel, params: dict) -> Steps:
    """The first stage of the run, from these parameters, made of what `train_tpu.main` is."""
    config, mesh, batches = loaded.config, loaded.mesh, make_batches(loaded)
    schedule = make_schedule(config.optimizer, config.num_steps, config.ctc)
    recorder = optax.trace(decay=0.0)  # its state is the last gradient, which it passes on
    optimizer = optax.chain(recorder, make_optimizer(config.optimizer, schedule))
    abstract = abstract_state(config.projector, optimizer, mesh)
    objective = make_stages(config, loaded, batches).objective(0)
    gradients, metrics = [], []
    with use_mesh(mesh):
        steps = compile_steps(
            [objective],
            batches.abstract_batches(),
            abstract,
            loaded.frozen,
            optimizer,
            loaded.model,
            config,
        )
        state = begin_with(params, optimizer, abstract)
        for i in range(num_steps(config)):
            batch = batches.to_global(batches[i].batch)
            state, found = steps[objective, batches.bucket(i)](state, *loaded.frozen, batch)
            gradients.append(jax.tree.map(np.array, state.opt_state[0].trace))
            metrics.append(found)
    return Steps(
        losses=np.array([found[objective.loss_name] for found in metrics]),
        num_labels=np.array([found[objective.count_name] for found in metrics]),
        norms=np.array([found["grad_norm"] for found in metrics]),
        gradients=flatten(gradients[0]),
        params=flatten(state.params),
    )


def train_torch(loaded: LoadedModel, projector: TorchProjector) -> Steps:
    """The same stage in PyTorch, with the same clips in every batch; it updates the projector."""
    config, batches = loaded.config, make_batches(loaded)
    model = TorchSpeechLLM(
        config.encoder,
        config.llm,
        projector,
        loaded.prompt,
        window_secs=round(config.data.window_secs),
    )
    is_warm_start = config.ctc.num_steps > 0
    optimizer = TorchOptimizer(
        projector,
        config.optimizer,
        learning_rate=(config.ctc if is_warm_start else config.optimizer).learning_rate,
        num_steps=num_steps(config),
    )
    classes = model.ctc_classes(utterance.row.text for utterance in batches.utterances)
    losses, counts, norms, gradients = [], [], [], []
    for i in range(num_steps(config)):
        rows = [utterance.row for utterance in batches.members(i) if utterance is not None]
        clips = [
            Clip(load_audio(row.audio, offset=row.offset, duration=row.duration), row.text)
            for row in rows
        ]
        loss, count = model.ctc(clips, classes) if is_warm_start else model.cross_entropy(clips)
        loss.backward()
        losses.append(loss.item())
        counts.append(count)
        gradients.append(to_flax(config, {n: p.grad for n, p in projector.named_parameters()}))
        norms.append(optimizer.step())
    return Steps(
        losses=np.array(losses),
        num_labels=np.array(counts),
        norms=np.array(norms),
        gradients=gradients[0],
        params=to_flax(config, dict(projector.named_parameters())),
    )


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Threads of PyTorch slow small products down while other processes need the cores."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


# --- tiny towers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_towers, tmp_path_factory) -> LoadedModel:
    """Random towers, and ten steps on batches of five and three clips.

    The projector's fc1 and fc2 are square, so that no shape shows if one is transposed.
    """
    return load(
        tiny_config(
            tmp_path_factory.mktemp("steps"),
            tiny_towers,
            projector=ProjectorConfig(ENCODER_DIM, LLM_DIM, projector_hidden_dim=LLM_DIM),
            data={"bucket_secs": (2.0,), "batch_size": 5},
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=3, weight_decay=0.1),
            num_steps=10,
        )
    )


@pytest.fixture(scope="module", params=STAGES)
def trained(request, tiny) -> Any:
    """A stage of the tiny run, the parameters that it begins with, and its steps in PyTorch."""
    loaded = in_stage(tiny, request.param)
    projector = randomize(TorchProjector(loaded.config.projector), seed=2)
    params = projector_to_flax(loaded.config.projector, projector.state_dict())
    with one_torch_thread():
        theirs = train_torch(loaded, projector)
    return SimpleNamespace(loaded=loaded, params=params, theirs=theirs)


@pytest.mark.parity("PyTorch")
@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_ten_steps_equal_those_of_torch(trained, accumulation_steps) -> None:
    """The batch in one part, and in three micro-batches; some of its rows are padding."""
    theirs = trained.theirs
    loaded = with_config(trained.loaded, accumulation_steps=accumulation_steps)
    ours = train_ours(loaded, trained.params)
    assert ours.num_labels.tolist() == theirs.num_labels.tolist()
    assert_close(ours.losses, theirs.losses, 1e-5, what="losses")
    assert_close(ours.norms, theirs.norms, 1e-5, what="norms of the gradients")
    for path, expected in theirs.gradients.items():
        assert_relative_l2(
            ours.gradients[path], expected, 1e-5, path, what="gradients of the first step"
        )
    for path, expected in theirs.params.items():
        assert_close(ours.params[path], expected, 1e-5, path, what="parameters after the last step")


def test_the_ten_steps_try_what_can_differ(trained) -> None:
    """Clipping, every parameter, rows of padding, and clips that are too short for CTC."""
    config, theirs = trained.loaded.config, trained.theirs
    assert min(theirs.norms) < config.optimizer.clip_norm < max(theirs.norms)
    for path, before in flatten(trained.params).items():
        moved = np.sqrt(np.mean((theirs.params[path] - before) ** 2))
        assert moved > 1e-3, path  # a hundred times the tolerance
    batches = make_batches(trained.loaded)
    rows = [row for i in range(num_steps(config)) for row in batches.members(i)]
    assert None in rows
    clips = [clip for clip in rows if clip is not None]
    num_audio = np.array([1 + 12.5 * clip.row.duration for clip in clips])
    num_spoken = np.array([len(clip.target) - 1 for clip in clips])
    assert (num_audio < num_spoken).any()


# --- real towers -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    not (MODELS / "whisper-base").is_dir(),
    reason="no real weights: run `make models`, or set FLAX_PROJECTOR_MODELS",
)
@pytest.mark.parity("PyTorch")
@pytest.mark.parametrize("stage", STAGES)
def test_three_steps_with_real_weights_equal_those_of_torch(tmp_path, stage) -> None:
    """The demo's start on its speech, in three micro-batches with a row of padding.

    The learning rate is low. At 1e-4, the third gradient of cross-entropy hangs on rounding: its
    norm changes by 0.6% if every initial parameter of ours changes by 2e-7 of itself.
    """
    demo = PRESETS["demo"][1]
    config = dataclasses.replace(
        demo,
        encoder=str(MODELS / "whisper-base"),
        llm=str(MODELS / "smollm2-135m-instruct"),
        out=str(tmp_path),
        data=dataclasses.replace(
            demo.data,
            train=tuple(str(ROOT / source) for source in demo.data.train),
            bucket_secs=(4.0,),
            batch_size=5,
            cache_features=False,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=1),
        ctc=CTCConfig(),
        accumulation_steps=3,
        num_steps=3,
    )
    loaded = in_stage(load(config), stage)
    torch.manual_seed(0)
    projector = TorchProjector(config.projector)
    last_norm: Any = projector.layer_norms[-1]
    torch.nn.init.constant_(last_norm.weight, loaded.embedding_rms())
    params = projector_to_flax(config.projector, projector.state_dict())
    theirs = train_torch(loaded, projector)
    ours = train_ours(loaded, params)
    assert ours.num_labels.tolist() == theirs.num_labels.tolist()
    assert_close(ours.losses, theirs.losses, 1e-5, what="losses")
    # PyTorch adds millions of squares with an error of 1e-4, ours with one of 1e-8.
    assert_close(ours.norms, theirs.norms, 2e-4, what="norms of the gradients")
    for path, before in flatten(params).items():
        expected = theirs.gradients[path]
        assert_relative_l2(
            ours.gradients[path], expected, 1e-4, path, what="gradients of the first step"
        )
        # Adam divides every gradient by its size, even one that is little more than rounding.
        change, expected = ours.params[path] - before, theirs.params[path] - before
        assert_relative_l2(change, expected, 1e-3, path, what="change of the parameters")
