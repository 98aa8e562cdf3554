"""What a run would need and do on a pod, planned without one."""

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import flax.core.axes_scan
import jax
import numpy as np
import pytest

import train_tpu
from convert.published import published_config
from flax_projector.batch import Bucket
from flax_projector.chips import CHIPS
from flax_projector.config import (
    PRESETS,
    DataConfig,
    LlamaConfig,
    ProjectorConfig,
    RematName,
    WhisperConfig,
)
from flax_projector.models.plain_attention import plain_attend
from flax_projector.planning import compiled, plan
from flax_projector.planning.compiled import AbstractRun
from flax_projector.planning.estimate import contents_of, estimate, needed_flops
from flax_projector.planning.program import Collective, Kernel, Operation, Program
from flax_projector.planning.topology import parse_topology
from flax_projector.sharding import use_mesh
from flax_projector.training.objectives import LLMObjective
from flax_projector.training.throughput import make_flop_counter
from flax_projector.training.train_step import train_step
from tests.planned import CONFIG, LLAMA, WHISPER, lay_out
from tests.tiny import make_speech

ROOT = Path(train_tpu.__file__).parent
GPU_COMPILER = ROOT / ".gpu-compiler"  # where the Makefile puts it


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "tiny"])
def test_the_towers_of_every_preset_are_known_without_a_network(preset):
    config = PRESETS[preset][1]
    assert published_config(config.encoder).d_model == config.projector.encoder_dim
    assert published_config(config.llm).hidden_size == config.projector.llm_dim


@pytest.fixture
def towers(monkeypatch):
    """Lets a config have towers of any size."""

    def use(whisper: WhisperConfig, llama: LlamaConfig) -> None:
        monkeypatch.setattr(compiled, "tower_configs", lambda config: (whisper, llama))

    return use


@pytest.mark.parametrize("remat", get_args(RematName))
@pytest.mark.parametrize("num_layers", [1, 3])
def test_the_formula_counts_what_xla_counts_of_unrolled_layers(
    towers, monkeypatch, remat, num_layers
):
    """XLA counts the body of a loop once, so the layers must not be in one, nor heads."""
    scan = jax.lax.scan
    unrolled = lambda *args, unroll=1, **kwargs: scan(*args, unroll=True, **kwargs)  # noqa: E731
    plainly = lambda *qkv, num_keys=None, **mask: plain_attend(*qkv, **mask)  # noqa: E731
    monkeypatch.setattr(flax.core.axes_scan.lax, "scan", unrolled)
    for module in ("whisper", "llama"):
        monkeypatch.setattr(f"flax_projector.models.{module}.attend", plainly)
    llama = LlamaConfig(2000, 1024, 3072, num_layers, 16, 4, head_dim=64)
    towers(WhisperConfig(80, 512, num_layers, 8, 2048), llama)
    projector = ProjectorConfig(encoder_dim=512, llm_dim=1024, projector_hidden_dim=2048)
    run, speech = lay_out(dataclasses.replace(CONFIG, projector=projector, remat=remat))
    ((bucket, batch),) = speech.batches.abstract_batches()
    step = lambda *args: train_step(  # noqa: E731
        *args, model=run.model, optimizer=run.optimizer, seed=0, objective=LLMObjective()
    )
    with use_mesh(run.mesh):
        lowered = jax.jit(step).lower(run.state, *run.frozen, batch)
    counted: Any = lowered.cost_analysis()
    count = make_flop_counter((run.state.params, *run.frozen), llama, window_frames=200)
    assert needed_flops(run.model, count, bucket, 8, 200) == pytest.approx(
        counted["flops"], rel=0.05
    )


SOMETHING = Counter({"rest": 1})
LIMITED = {  # what a chip does in a second of a v5e's -> what limits the step
    "compute": Program(SOMETHING),
    "HBM": Program(SOMETHING, hbm_bytes=819e9),
    "links": Program(SOMETHING, collectives=[Collective("all-reduce", "f32", 1, 8, 200e9, True)]),
    "network": Program(SOMETHING, collectives=[Collective("send", "f32", 1, 2, 3.1e9, True, True)]),
}


@pytest.mark.parametrize("limit", LIMITED)
def test_the_slowest_of_the_roofline_limits(towers, limit):
    towers(WHISPER, LLAMA)
    run, speech = lay_out(CONFIG)
    ((bucket, held),) = contents_of(speech, run.model, run.config.data).items()
    step = compiled.CompiledStep(bucket, 8, 8, 10**9, 1, 1, 2, 3, LIMITED[limit], 1.0)
    found = estimate(run, parse_topology("v5e:2x4"), step, LIMITED[limit], held)
    assert found.limit == limit
    if limit != "compute":
        assert found.roofline[limit] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("topology", "secs"),
    [("v5e:2x4", 2.0 + 0.5 + 0.25), ("h100:8", (3 * 0.125 + 4.0) / 0.70 + 2.0 / 0.76 + 0.5 / 0.28)],
    ids=["TPU", "GPU"],
)
def test_times_of_a_step(towers, topology, secs):
    """On TPUs cycles, kernels and what nothing hides; on GPUs FLOPs or bytes of every operation."""
    towers(WHISPER, LLAMA)
    run, speech = lay_out(CONFIG)
    ((bucket, held),) = contents_of(speech, run.model, run.config.data).items()
    chip = parse_topology(topology).chip
    is_tpu = topology == "v5e:2x4"
    program = Program(
        cycles=Counter({"encoder": 1_800_000_000, "layout": 1_200_000_000} if is_tpu else {}),
        kernels=[Kernel("attention", "encoder", 2, 0.5 * chip.peak_flops)],
        operations=[
            Operation("layout", 3, 0.0, 0.125 * chip.hbm_bandwidth),
            Operation("encoder", 2, 1.0 * chip.peak_flops, 0.5 * chip.hbm_bandwidth),
            Operation("encoder", 4, 0.5 * chip.peak_flops, 1.0 * chip.hbm_bandwidth),
        ],
        collectives=[
            Collective("all-reduce", "f32", 1, 8, 0.25 * 200e9, not is_tpu),
            Collective("all-gather", "bf16", 36, 4, 1e9, True),
        ],
        hbm_bytes=4.0 * 819e9,
    )
    step = compiled.CompiledStep(bucket, 8, 8, 10**9, 1, 1, 2, 3, program, 1.0)
    found = estimate(run, parse_topology(topology), step, program, held)
    assert found.secs == pytest.approx(secs)
    assert found.audio_hours_per_chip_hour == pytest.approx(held.audio_secs / secs / 8)
    assert found.mfu == pytest.approx(found.model_flops / (secs * 8 * chip.peak_flops))
    assert found.sent_bytes == 0.25 * 200e9 + 1e9 and found.network_bytes == 0
    host = found.host_audio_secs_per_sec
    assert host == pytest.approx(held.audio_secs / secs), "all chips are on one host"
    assert found.host_cores["flac"] == pytest.approx(host / 3384)
    assert found.host_to_chips_bytes_per_sec == pytest.approx(8e9 / secs)


def test_assumed_speech_is_like_that_of_read_books(towers):
    towers(WHISPER, LLAMA)
    data = dataclasses.replace(CONFIG.data, window_secs=15.0, bucket_secs=(5.0, 10.0, 15.0))
    run, speech = lay_out(dataclasses.replace(CONFIG, data=data))
    secs, labels = speech.utterances.durations, speech.utterances.num_labels
    assert secs.mean() == pytest.approx(12.0, rel=0.01) and secs.max() < 15
    assert (labels / secs).mean() == pytest.approx(3.5, rel=0.05)
    held = contents_of(speech, run.model, run.config.data)
    assert len(held) == 3, "every bucket has batches of its own"
    shares = [each.num_batches for each in held.values()]
    total = sum(shares)
    expected = np.array([1 / 3, 15, 65])  # batches of the first bucket hold three times as many
    assert np.array(shares) / total == pytest.approx(expected / expected.sum(), abs=0.01)
    assert any("lengths like those of read books" in text for text in speech.assumptions)


@pytest.mark.parametrize(
    ("remat", "less"),
    [
        ("products", "; --remat gates or attention or layers needs less"),
        ("attention", "; --remat layers needs less"),
        ("layers", ""),
    ],
)
def test_what_does_not_fit_is_told_with_the_nearest_that_does(remat, less):
    step = compiled.CompiledStep(
        Bucket(2, 3, 4), 32, 8, 1, 1, 1, int(20e9), int(16e9), program=None, compile_secs=1.0
    )
    found = plan.Plan(
        config=dataclasses.replace(CONFIG, remat=remat, data=DataConfig(batch_size=32)),
        topology=parse_topology("v5e-4"),
        mesh={"data": 4, "fsdp": 1, "tensor": 1},
        steps=[step],
        contents=[],
        estimates=[None],
        mixture={},
        decoding={},
        most_rows=5,
        shards=2,
        notes=[],
    )
    assert not found.fits
    assert found.misfit() == (
        "--plan v5e:2x2: --data.batch-size 32 needs 20.0 GB of the 16.0 GB that a v5e has for it; "
        "the nearest that fits: --data.batch-size 20 (estimated) or --accumulation-steps 2 or "
        f"--mesh.fsdp 2 (estimated){less}"
    )


@pytest.mark.parametrize(
    ("rows", "bytes_of", "expected"),
    [
        (16, lambda rows: 100 + 10 * rows, 80),  # both sizes fit
        (500, lambda rows: 100 + 10 * rows, 80),  # the first does not
        (1, lambda rows: 100 + 900 * rows, 0),  # none does
        (8, lambda rows: 500 + rows, 400),  # far beyond both
    ],
)
def test_the_most_rows_lie_on_a_line_through_two_sizes(
    towers, monkeypatch, rows, bytes_of, expected
):
    towers(WHISPER, LLAMA)
    run, speech = lay_out(CONFIG)
    ((bucket, batch),) = speech.batches.abstract_batches()
    capacity = 900

    def compile_step(run, bucket, batch, chip):
        count = batch.tokens.shape[0]
        needed = bytes_of(count)
        program = Program() if needed <= capacity else None
        return compiled.CompiledStep(
            bucket, count, count, 1, 100, needed - 100, needed, capacity, program, 1.0
        )

    monkeypatch.setattr(AbstractRun, "argument_bytes", 100)
    monkeypatch.setattr(compiled, "compile_step", compile_step)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)
    first = compile_step(run, bucket, batch, CHIPS["v5e"])
    assert compiled.most_rows(run, first, [], batch, CHIPS["v5e"]) == expected


def test_other_buckets_are_points_of_that_line(towers, monkeypatch):
    """Of 40 positions beside the prefix for 5 rows, 300 bytes; 100 for 4 rows, 500 bytes."""
    towers(WHISPER, LLAMA)
    run, speech = lay_out(CONFIG)
    ((_, batch),) = speech.batches.abstract_batches()

    def step(positions: int, rows: int, peak: int) -> compiled.CompiledStep:
        bucket = Bucket(2, run.model.prefix_len + positions, 4)
        return compiled.CompiledStep(bucket, rows, rows, 1, 1, 1, peak, 900, Program(), 1.0)

    def no_compiler(*_: Any) -> None:
        raise AssertionError("nothing else needs to be compiled")

    monkeypatch.setattr(AbstractRun, "argument_bytes", 100)
    monkeypatch.setattr(compiled, "compile_step", no_compiler)
    longest, others = step(100, 4, 500), [step(80, 4, 420), step(40, 5, 300)]
    # One byte a position: 400 more are 4 rows more.
    assert compiled.most_rows(run, longest, others, batch, CHIPS["v5e"]) == 8


def test_the_predicted_peak_is_what_a_step_takes(report):
    """On the CPU, whose memory can be measured; in a process of its own."""
    found = run_python("-m", "tests.planned")
    report(f"predicted {found['predicted'] / 1e6:.0f} MB, measured {found['measured'] / 1e6:.0f}")
    assert found["temporaries"] > 0.5 * found["predicted"]
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.2)


def run_python(*args: str, **env: str) -> dict:
    """What a program writes to standard output, as JSON."""
    result = subprocess.run(
        [sys.executable, *args],
        text=True,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", **env},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


PLAN = """
import sys, train_tpu
train_tpu.cli(sys.argv[1:])
assert not {"torch", "tensorflow"} & set(sys.modules), "torch was imported"
"""


def plan_demo(topology: str, tiny_towers, folder: Path, *args: str, **env: str) -> dict:
    """The plan of the demo preset with tiny towers, made by the command line."""
    sizes = {"encoder-dim": "24", "llm-dim": "40", "projector-hidden-dim": "32"}
    options = [word for name, size in sizes.items() for word in (f"--projector.{name}", size)]
    towers = ["--encoder", tiny_towers["encoder"], "--llm", tiny_towers["llm"]]
    where = ["--out", str(folder / "run"), "--data.eval"]
    plan = ["--plan", topology, "--json"]
    found = run_python("-c", PLAN, "demo", *towers, *options, *where, *plan, *args, **env)
    assert not (folder / "run").exists(), "a plan leaves nothing behind"
    return found


def test_the_demo_is_planned_for_four_v5e(tiny_towers, tmp_path):
    pytest.importorskip("libtpu", reason="the TPU's compiler: pip install 'flax-projector[test]'")
    manifest = make_speech(tmp_path / "speech", 13)
    args = ("--data.train", manifest, "--data.bucket-secs", "2.0", "--data.max-text-tokens", "40")
    plan = plan_demo("v5e-4", tiny_towers, tmp_path, *args)
    assert (plan["topology"], plan["chips"], plan["fits"]) == ("v5e:2x2", 4, True)
    (bucket,) = plan["buckets"]
    assert bucket["num_rows"] == 4 and bucket["num_batches"] == 4, "13 clips in batches of 4"
    parts = bucket["estimate"]["parts"]
    assert {"encoder", "projector", "LLM forward", "LLM backward", "layout"} & set(parts)
    assert "encoder" not in parts, "its frames are kept"
    chip: Any = CHIPS["v5e"]
    cycles = sum(bucket["cycles"].values())
    kernels = sum(kernel["flops"] for kernel in bucket["kernels"]) / chip.peak_flops
    assert bucket["kernels"]
    assert bucket["estimate"]["secs"] == pytest.approx(
        cycles / chip.clock + kernels + parts["collectives"]
    )
    assert {each["kind"] for each in bucket["collectives"]} == {"all-reduce"}
    assert bucket["peak"] < bucket["capacity"] and plan["most_rows_per_chip"] > 1
    assert not any("prompt:" in note or "speech:" in note for note in plan["notes"]), "all is known"


def test_the_demo_is_planned_for_eight_h100(tiny_towers, tmp_path):
    if not (GPU_COMPILER / "jax_cuda12_plugin").is_dir():
        pytest.skip("no GPU compiler: `make test` installs it")
    args = ("--data.train", "--data.bucket-secs", "2.0")
    plan = plan_demo("h100:8", tiny_towers, tmp_path, *args, PYTHONPATH=str(GPU_COMPILER))
    (bucket,) = plan["buckets"]
    assert plan["fits"] and plan["chips"] == 8
    assert not bucket["cycles"] and bucket["hbm_bytes"] > 0
    found = bucket["estimate"]
    assert {"projector", "LLM forward", "LLM backward", "optimizer", "layout"} < set(found["parts"])
    assert found["secs"] == sum(found["parts"].values()) > max(found["roofline"].values()) > 0
    assert any("the nearest that divides is 8" in note for note in plan["notes"])
    assert any("instead of --data.train, which is not given" in note for note in plan["notes"])
