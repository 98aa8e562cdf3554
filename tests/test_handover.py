"""A running training moves between the HF Trainer and ours, without losing its optimizer."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
import torch

from convert.torch_files import open_torch
from convert.torch_projector import ResidualAudioProjector as TorchProjector
from convert.trainer.files import read_training
from convert.trees import flatten
from flax_projector.config import CTCConfig, OptimizerConfig, ProjectorConfig
from flax_projector.handover.states import read_state
from flax_projector.handover.to_run import to_run
from flax_projector.handover.to_trainer import to_trainer
from flax_projector.run_folder import RunFolder
from flax_projector.training.handed_over import check_run
from flax_projector.training.state import TrainState, init_state
from tests.checkpoints import PROMPT
from tests.handover import RUN, make_ours, read_whole, run_after, steps_of_ours
from tests.models import projector_to_flax
from tests.parity import assert_close
from tests.tiny import read_all
from tests.trainer import CONFIG, NUM_STEPS, OPTIMIZER, TorchTraining, batches, trained

pytestmark = [
    pytest.mark.torch,
    pytest.mark.usefixtures("log_level"),
    pytest.mark.xdist_group("test_handover"),
]

SHARED = Path(__file__).parents[2] / "shared/fixtures/upstream_checkpoint"


@pytest.fixture(scope="module")
def after_20() -> dict[str, np.ndarray]:
    """The parameters at the end of that training, by flax path."""
    return flatten(projector_to_flax(CONFIG, trained(20).parameters()))


# --- the same training -----------------------------------------------------------------------


@pytest.mark.parity("PyTorch")
def test_ten_steps_of_torch_and_ten_of_jax_are_twenty_of_torch(
    after_10, after_20, tmp_path
) -> None:
    folder = to_run(after_10, tmp_path / "run")
    state = steps_of_ours(read_whole(folder, 10, RUN), RUN, 20)
    for name, leaf in flatten(state.params).items():
        assert_close(leaf, after_20[name], 1e-5, name)


@pytest.mark.parity("PyTorch")
def test_ten_steps_of_jax_and_ten_of_torch_are_twenty_of_torch(after_20, tmp_path) -> None:
    training = TorchTraining()
    training.load(to_trainer(run_after(10, tmp_path / "run"), tmp_path / "checkpoint-10"))
    assert training.step == 10
    for frames, target in [*batches(20)][10:]:
        training.update(frames, target)
    found = flatten(projector_to_flax(CONFIG, training.parameters()))
    for name, leaf in after_20.items():
        assert_close(found[name], leaf, 1e-5, name)


def test_a_training_that_is_lost_on_the_way_would_be_found(after_10, after_20, tmp_path) -> None:
    """The control of the two above: with new moments, ten more steps lead elsewhere."""
    state = read_whole(to_run(after_10, tmp_path / "run"), 10, RUN)
    fresh = init_state(state.params, make_ours(RUN)).opt_state
    one_less = optax.tree.set(state.opt_state, count=10 - 1)
    for opt_state in (fresh, one_less):
        lost = TrainState(state.step, state.params, opt_state)
        params = flatten(steps_of_ours(lost, RUN, 20).params)
        worst = max(np.abs(leaf - after_20[name]).max() for name, leaf in params.items())
        assert worst > 1e-4


def test_a_run_goes_on_in_torch_after_its_warm_start(tmp_path) -> None:
    """Which the Trainer's schedule does not count, while Adam does."""
    ctc = CTCConfig(num_steps=5, learning_rate=OPTIMIZER.learning_rate)
    config = dataclasses.replace(RUN, ctc=ctc, num_steps=NUM_STEPS + 5)
    run = run_after(15, tmp_path / "run", config)
    expected = flatten(steps_of_ours(read_whole(run, 15, config), config, 25).params)
    training = TorchTraining()
    training.load(to_trainer(run, tmp_path / "checkpoint"))
    assert training.step == 10
    for frames, target in [*batches(25)][15:]:
        training.update(frames, target)
    found = flatten(projector_to_flax(CONFIG, training.parameters()))
    for name, leaf in expected.items():
        assert_close(found[name], leaf, 1e-5, name)


@pytest.mark.parity("PyTorch")
@pytest.mark.skipif(not SHARED.exists(), reason="needs tiny-audio's optimizer.pt, not in the repo")
def test_the_next_update_of_a_checkpoint_of_tiny_audio_is_that_of_torch(tmp_path) -> None:
    folder = to_run(SHARED, tmp_path / "run")
    handed_over = json.loads((folder / "handed_over.json").read_text())
    said = handed_over["options"]
    config = ProjectorConfig(
        **{n.removeprefix("projector."): v for n, v in said.items() if n.startswith("projector.")}
    )
    optimizer = OptimizerConfig(
        warmup_steps=2,
        clip_norm=1e6,
        **{n.removeprefix("optimizer."): v for n, v in said.items() if n.startswith("optimizer.")},
    )
    assert optimizer.decay_norms
    run = dataclasses.replace(
        RUN,
        projector=config,
        optimizer=optimizer,
        num_steps=said["num_steps"],
        data=dataclasses.replace(RUN.data, audio_tokens=said["data.audio_tokens"]),
        prompt=dataclasses.replace(
            RUN.prompt, system=said["prompt.system"], user=said["prompt.user"]
        ),
    )
    assert check_run(RunFolder(folder), run) == frozenset()  # the learning rate is theirs, too

    module = TorchProjector.from_tensors(config, open_torch(SHARED))
    named = dict(module.named_parameters())
    groups = json.loads((SHARED / "param_groups_names.json").read_text())
    adamw = torch.optim.AdamW(
        [
            {"params": [named[n.removeprefix("projector.")] for n in g["names"]]}
            | {"weight_decay": g["weight_decay"]}
            for g in groups
        ]
    )
    adamw.load_state_dict(torch.load(SHARED / "optimizer.pt", weights_only=True))
    generator = torch.Generator().manual_seed(0)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    grads = projector_to_flax(config, {n: p.grad for n, p in named.items() if p.grad is not None})
    adamw.step()
    expected = flatten(projector_to_flax(config, named))

    state = read_whole(folder, 4, run)
    updates, _ = make_ours(run).update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    after = flatten(params)
    for name, leaf in expected.items():
        assert_close(after[name], leaf, 1e-7, name)


# --- every bit -------------------------------------------------------------------------------


def numbered(folder: Path) -> dict[str, float]:
    """Fills every moment with a number of its own; returns them by parameter."""
    content = torch.load(folder / "optimizer.pt", weights_only=True)
    names = json.loads((folder / "names.json").read_text())
    for number, state in content["state"].items():
        state["exp_avg"].fill_(1 + number)
        state["exp_avg_sq"].fill_(101 + number)
    torch.save(content, folder / "optimizer.pt")
    return {name: 1.0 + number for number, name in enumerate(names)}


@pytest.mark.parametrize("decay_norms", [True, False])
def test_every_moment_finds_its_parameter(tmp_path, decay_norms) -> None:
    """By its number, although several have the same shape."""
    options: Any = {} if decay_norms else {"decayed_names": kernels_alone}
    training = trained(1, **options)
    folder = training.save(tmp_path / "checkpoint-1")
    names = {id(p): n for n, p in training.projector.named_parameters()}
    order = [names[id(p)] for group in training.adamw.param_groups for p in group["params"]]
    (folder / "names.json").write_text(json.dumps(order))
    expected = numbered(folder)
    found = read_training(folder, CONFIG)
    assert found.decay_norms == decay_norms
    for moments, offset in ((found.exp_avg, 0), (found.exp_avg_sq, 100)):
        values = {name: moments.read(name) for name in moments.infos}
        assert {n: v.max() for n, v in values.items()} == {
            n: offset + v for n, v in expected.items()
        }
        assert all(v.min() == v.max() for v in values.values())


def kernels_alone(_trainer: Any, model: torch.nn.Module) -> list[str]:
    """What docs/convert.md has a Trainer decay that continues a run without `decay_norms`."""
    return [name for name, p in model.named_parameters() if p.ndim == 2]


def test_there_and_back_is_the_same_to_the_bit(after_10, tmp_path, caplog) -> None:
    run = to_run(after_10, tmp_path / "run")
    RunFolder(run).claim(RUN, PROMPT, {}, 0.0)  # as the first start does
    back = to_trainer(run, tmp_path / "back")
    assert read_all(open_torch(back)).keys() == read_all(open_torch(after_10)).keys()
    one, two = (read_training(folder, CONFIG) for folder in (after_10, back))
    pairs = [(open_torch(after_10), open_torch(back))]
    pairs += [(one.exp_avg, two.exp_avg), (one.exp_avg_sq, two.exp_avg_sq)]
    for a, b in pairs:
        for name in a.infos:
            assert a.read(name).tobytes() == b.read(name).tobytes(), name
    settings = [
        {f.name: getattr(t, f.name) for f in dataclasses.fields(t) if "exp_avg" not in f.name}
        for t in (one, two)
    ]
    assert settings[0].pop("next_rate") == pytest.approx(settings[1].pop("next_rate"), rel=1e-6)
    assert settings[0] == settings[1]
    assert caplog.text.count("verified: 13 parameters and their moments are identical") == 2
    assert "-> float32" not in caplog.text
    assert "WARNING" not in caplog.text


def test_bf16_is_widened_on_the_way_in_and_said_on_the_way_out(tmp_path, caplog) -> None:
    before = trained(3, dtype=torch.bfloat16)
    folder = before.save(tmp_path / "checkpoint-3")
    run = to_run(folder, tmp_path / "run")
    assert "weights: bfloat16 -> float32" in caplog.text
    assert "running means of gradients: bfloat16 -> float32" in caplog.text
    assert "running means of their squares: bfloat16 -> float32" in caplog.text
    state = read_state(RunFolder(run), 3, CONFIG)
    theirs = read_training(folder, CONFIG).exp_avg.read("input_proj.bias")
    np.testing.assert_array_equal(state.mu.read("input_proj/bias"), theirs.astype(np.float32))
    RunFolder(run).claim(RUN, PROMPT, {}, 0.0)
    back = to_trainer(run, tmp_path / "back", dtype="bfloat16")
    assert "were cast from float32 to bfloat16: not bit for bit" in caplog.text
    again = read_training(back, CONFIG).exp_avg.read("input_proj.bias")
    assert again.tobytes() == theirs.tobytes()  # of bf16 to begin with
    assert json.loads((back / "config.json").read_text())["model_dtype"] == "bfloat16"


# --- what decays -----------------------------------------------------------------------------


def test_a_run_that_decays_kernels_alone_goes_on_with_the_trainer_of_the_docs(
    tmp_path, caplog
) -> None:
    optimizer = dataclasses.replace(OPTIMIZER, decay_norms=False)
    config = dataclasses.replace(RUN, optimizer=optimizer)
    run = run_after(10, tmp_path / "run", config)
    folder = to_trainer(run, tmp_path / "checkpoint-10")
    assert "this run does not decay the weights of norms. The HF Trainer does" in caplog.text
    with pytest.raises(ValueError, match="doesn't match the size"):
        TorchTraining().load(folder)
    training = TorchTraining(decayed_names=kernels_alone)
    training.load(folder)
    for frames, target in [*batches(20)][10:]:
        training.update(frames, target)
    expected = flatten(steps_of_ours(read_whole(run, 10, config), config, 20).params)
    found = flatten(projector_to_flax(CONFIG, training.parameters()))
    for name, leaf in expected.items():
        assert_close(found[name], leaf, 1e-5, name)
