"""What `--plan` takes: pods that exist, and runs that they can hold."""

import importlib.util

import jax
import pytest

import train_tpu
from flax_projector.planning import plan
from flax_projector.planning.topology import parse_topology


@pytest.mark.parametrize(
    ("text", "name", "chips", "hosts"),
    [
        ("v5e:16x16", "v5e:16x16", 256, 64),
        ("v5e-256", "v5e:16x16", 256, 64),
        ("v5litepod-8", "v5e:2x4", 8, 1),
        ("V5E:16X16 x 2", "v5e:16x16 x 2", 512, 128),
        ("v6e-64 x 4", "v6e:8x8 x 4", 256, 64),
        ("v5p-128", "v5p:4x4x4", 64, 16),
        ("v4-32", "v4:2x2x4", 16, 4),
        ("v4:2x2", "v4:2x2x1", 4, 1),
        ("h100:8", "h100:8", 8, 1),
        ("h200:32", "h200:8 x 4", 32, 4),
        ("a100:2", "a100:2", 2, 1),
    ],
)
def test_names_of_topologies(text, name, chips, hosts):
    topology = parse_topology(text)
    assert (topology.name, topology.num_chips) == (name, chips)
    assert topology.num_chips // topology.chips_per_host == hosts


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("v5e:3x3", "v5e:2x4"),
        ("v5e:16x16x2", "v5e:16x16"),
        ("v5e-12", r"v5e-16 \(v5e:4x4\)"),
        ("v5p-100", r"v5p-128 \(v5p:4x4x4\)"),
        ("v4:16x16x17", "v4:16x16x16"),
        ("h100:12", "h100:16"),
        ("h100:2x4", "h100:8"),
        ("v9:2x2", "v4, v5e, v5p, v6e, a100, h100, h200"),
        ("16x16", "v5e:4x4"),
        ("v5e:0x4", "v5e:4x4"),
        ("v5e:4x4 x 0", "v5e:4x4"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_nearest_that_does(text, nearest):
    with pytest.raises(SystemExit, match=rf"^error: --plan '{text}'.*{nearest}[^\n]*$"):
        train_tpu.cli(["tiny", "--plan", text])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--llm", "no/such"], r"--llm 'no/such' is neither .* HuggingFaceTB/SmolLM3-3B"),
        (["--encoder", "no/such"], r"--encoder 'no/such' is neither .* openai/whisper-large-v3"),
        (["--mesh.fsdp", "3"], r".*--mesh.fsdp 3 .* does not fit 4 devices: 3, .* must divide it"),
        (["--projector.llm-dim", "41"], r"--llm has width 576, .* --projector.llm-dim 576"),
    ],
)
def test_what_a_run_cannot_be_is_one_line(monkeypatch, args, message):
    """With devices of this process: JAX's profiler crashes where the TPU's compiler is loaded."""
    monkeypatch.setattr(plan, "absent_devices", lambda topology: jax.devices()[:4])
    small = ["whisper-base-smollm2-135m", "--plan", "v5e:2x2"]
    with pytest.raises(SystemExit, match=rf"^error: {message}[^\n]*$"):
        train_tpu.cli([*small, *args])


@pytest.mark.parametrize(
    ("topology", "advice"),
    [("v5e:2x2", "pip install libtpu"), ("h100:8", "pip install --no-deps .* jax-cuda12-plugin")],
)
def test_a_missing_compiler_says_what_to_install(monkeypatch, topology, advice):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=rf"^error: --plan {topology} needs .*{advice}"):
        train_tpu.cli(["tiny", "--plan", topology])


def test_a_missing_cudnn_says_what_to_install(monkeypatch):
    def compile_all(*args):
        raise RuntimeError("cuDNN not found.")  # as JAX does while it traces attention

    monkeypatch.setattr(plan, "absent_devices", lambda topology: jax.devices()[:8])
    monkeypatch.setattr(plan, "compile_all", compile_all)
    with pytest.raises(SystemExit, match=r"^error: --plan h100:8 needs .* nvidia-cudnn-cu12, and"):
        train_tpu.cli(["whisper-base-smollm2-135m", "--plan", "h100:8"])


def test_a_plan_leaves_the_rest_of_a_command_line_as_it_is():
    options = ["--mesh.data", "-1", "--data.train", "a.jsonl", "b.jsonl", "--no-resume"]
    assert train_tpu.split_plan(["demo", *options]) == (None, False, ["demo", *options])
    words = ["demo", *options[:2], "--plan", "v5e:2x2", *options[2:], "--json"]
    assert train_tpu.split_plan(words) == ("v5e:2x2", True, ["demo", *options])


def test_json_needs_a_plan(capsys):
    with pytest.raises(SystemExit) as error:
        train_tpu.cli(["tiny", "--json"])
    assert error.value.code == 2
    assert "--json belongs to --plan TOPOLOGY" in capsys.readouterr().err
