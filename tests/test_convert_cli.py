"""The command line: exit codes, one clean message for every error, and help."""

import json
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest

from convert import __main__ as command_line
from convert import api
from convert.__main__ import main
from convert.checkpoint import DTYPES
from convert.torch_files import open_torch
from tests.checkpoints import REPO, files_in, write_weights
from tests.tiny import make_projector, read_all

pytestmark = pytest.mark.usefixtures("log_level")


@pytest.fixture
def projector(tmp_path) -> Path:
    """A random projector in an HF folder."""
    return make_projector(tmp_path / "projector")


PROGRAM = """
import json, sys
from convert.__main__ import cli

codes = []
for command in json.loads(sys.argv[1]):
    sys.argv[1:] = command
    codes.append(cli())
    print("---", file=sys.stderr)
sys.exit(codes != [0, 2])
"""


def test_program_reports_on_stderr_and_leaves_accelerators_alone(tmp_path, projector) -> None:
    good = ["to-flax", str(projector), str(tmp_path / "flax")]
    bad = ["to-flax", str(tmp_path / "nothing"), str(tmp_path / "x")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([good, bad])],
        cwd=REPO,
        env=os.environ | {"JAX_PLATFORMS": "cuda"},  # there is none
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    one, two, _ = done.stderr.split("---\n")
    assert one.splitlines()[-2:] == [
        "verified: 8 tensors, 1192 bytes came back identical",
        f"wrote {tmp_path / 'flax'}",
    ]
    assert two == f"error: {tmp_path / 'nothing'} does not exist\n"


def test_help_has_examples_and_exit_codes_and_needs_no_jax() -> None:
    """It appears at once: what takes seconds is imported when a command runs."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "convert", "--help"],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0
    for text in ("examples:\n", "exit codes:\n", "to-flax", "to-torch", "verify", "inspect"):
        assert text in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "tyro" in imported
    assert not {"jax", "flax", "orbax", "torch"} & imported


COMMON = {
    *("--step N", "--dtype {float32,float16,bfloat16}", "--overwrite", "--no-verify"),
    "--trainer",
}
FOLDER = {"--hf-folder", "--audio-model-id ID", "--text-model-id ID"}
FIELDS = {"--encoder-dim INT", "--projector-pool-stride INT", "--projector-dropout FLOAT"}


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("to-flax", {"SRC", "DST", "--ignore PATTERN", "--rms-norm-eps FLOAT"} | COMMON | FIELDS),
        ("to-torch", {"SRC", "DST", "--prefix TEXT"} | COMMON | FOLDER),
        ("verify", {"A", "B", "--step N", "--ignore PATTERN", "--rms-norm-eps FLOAT"} | FIELDS),
        ("inspect", {"PATH", "--step N"}),
    ],
)
def test_help_of_a_command_lists_each_option_once(command, options, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    shown = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    names = [line for line in shown if line.startswith("--") and line.strip("-")]
    names += [line for line in shown if line.split("  ")[0].isupper()]
    for option in options:
        assert sum(f"{line} ".startswith(f"{option} ") for line in names) == 1, option
    assert len(names) == len(options)


@pytest.mark.parametrize(
    "arguments",
    [[], ["to-flax"], ["to-flax", "a"], ["to-flax", "a", "b", "--nothing"], ["convert", "a", "b"]],
)
def test_wrong_usage_is_an_error(arguments, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "--help" in capsys.readouterr().err


def test_dtypes_are_those_that_can_be_written() -> None:
    assert typing.get_args(command_line.DTypeName) == tuple(DTYPES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("to-flax nowhere x", "nowhere does not exist"),
        ("to-torch projector x", "projector is a PyTorch checkpoint already"),
        ("to-flax projector projector", "projector overlaps with projector/model.safetensors"),
        ("to-flax flax x", "flax is a Flax checkpoint already"),
        ("to-flax projector flax", "flax exists: choose another destination"),
        ("to-flax projector x.pt", "x.pt ends in .pt, expected a folder, whose name has no"),
        ("to-torch flax x.onnx", "expected a folder, whose name has no suffix, or a file ending"),
        ("to-torch flax x.ckpt", "x.ckpt ends in .ckpt, expected a folder"),
        ("to-torch flax flax/params/x", "flax/params/x overlaps with"),
        ("to-flax projector bare.safetensors --overwrite", "expected a folder"),
        ("to-torch flax projector.pt --overwrite", "it is a folder with nothing in it"),
        ("to-torch flax notes --overwrite", "notes will not be overwritten: it is a file"),
        ("to-flax bare.safetensors x", "bare.safetensors has no config.json"),
        ("to-flax projector x --ignore gate.*", "--ignore 'gate.*' matches no tensor"),
        ("inspect nowhere", "nowhere does not exist"),
        ("verify projector flax --step 3", "no step 3: neither projector nor flax is a folder of"),
        ("inspect some/model", "HF_HUB_OFFLINE forbids downloads"),
        ("to-flax some/model x", "HF_HUB_OFFLINE forbids downloads"),
        ("verify projector some/model", "HF_HUB_OFFLINE forbids downloads"),
    ],
)
def test_user_errors_are_one_clean_message(
    tmp_path, projector, monkeypatch, caplog, arguments, message
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(projector / "model.safetensors", "bare.safetensors")
    Path("projector.pt").mkdir()
    Path("notes").write_text("of another program")
    api.to_flax(projector, "flax", verify=False)
    before = files_in(tmp_path)
    assert main(arguments.split()) == 2
    assert message in caplog.text
    assert files_in(tmp_path) == before
    assert not Path("x").exists()


def test_options_reach_the_conversion(tmp_path, projector, caplog) -> None:
    bare = shutil.copy(projector / "model.safetensors", tmp_path / "bare.safetensors")
    fields = ["--encoder-dim", "5", "--rms-norm-eps", "1e-6", "--projector-dropout", "0.5"]
    assert main(["to-flax", str(bare), str(tmp_path / "flax"), "--no-verify", *fields]) == 0
    assert "verified" not in caplog.text
    config = api.inspect(tmp_path / "flax").config
    assert (config.encoder_dim, config.projector_pool_stride) == (5, 3)
    assert config.projector_dropout == 0.5
    file = tmp_path / "x.safetensors"
    options = ["--prefix", "", "--dtype", "float16"]
    assert main(["to-torch", str(tmp_path / "flax"), str(file), *options]) == 0
    assert open_torch(file).infos["input_proj.weight"].dtype == np.float16


def test_tensors_are_left_out_on_request_and_listed(tmp_path, projector, caplog) -> None:
    original = read_all(open_torch(projector))
    extra = {f"projector.gate.{name}": np.ones(3, np.float32) for name in ("weight", "bias")}
    extra["projector.head"] = np.ones(3, np.float32)
    write_weights(projector, original | extra)
    command = ["to-flax", str(projector), str(tmp_path / "flax")]
    assert main(command) == 2
    assert "`to-flax --ignore 'projector.gate.bias'` leaves it out" in caplog.text
    assert main([*command, "--ignore", "*.gate.*", "--ignore", "*.head"]) == 0
    gate = ", ".join(sorted(key for key in extra if "gate" in key))
    assert f"left out by --ignore *.gate.*: {gate}" in caplog.text
    assert "left out by --ignore *.head: projector.head" in caplog.text
    assert "verified: 8 tensors" in caplog.text
    api.to_torch(tmp_path / "flax", tmp_path / "hf")
    assert read_all(open_torch(tmp_path / "hf")).keys() == original.keys()
    with pytest.raises(ValueError, match=r"missing  projector.input_proj.bias"):
        api.to_flax(projector, tmp_path / "x", ignore=["*.gate.*", "*.head", "*.input_proj.bias"])


@pytest.mark.parametrize("eps", [1e-6, 1e-8])
def test_an_epsilon_that_tiny_audio_does_not_read_is_a_warning(tmp_path, projector, eps, caplog):
    api.to_flax(projector, tmp_path / "flax", given={"rms_norm_eps": eps}, verify=False)
    assert main(["to-torch", str(tmp_path / "flax"), str(tmp_path / "hf")]) == 0
    warning = (
        "WARNING: rms_norm_eps is 1e-08, but tiny-audio does not read it: it always uses 1e-06"
    )
    assert (warning in caplog.text) == (eps != 1e-6)


def test_overwrite_replaces_a_conversion(tmp_path, projector) -> None:
    for _ in range(2):
        assert main(["to-flax", str(projector), str(tmp_path / "flax"), "--overwrite"]) == 0
        assert main(["to-torch", str(tmp_path / "flax"), str(tmp_path / "hf"), "--overwrite"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flax", "hf", "projector"]


def test_llama_config_that_cannot_be_expressed_stops_the_conversion(tmp_path, caplog) -> None:
    folder = write_weights(tmp_path / "src", {"model.norm.weight": np.ones(3)})
    text = '{"model_type": "llama", "hidden_act": "gelu", "mlp_bias": true}'
    (folder / "config.json").write_text(text)
    assert main(["to-flax", str(folder), str(tmp_path / "flax")]) == 2
    assert "unsupported  hidden_act" in caplog.text
    assert "unsupported  mlp_bias" in caplog.text
    assert "missing      vocab_size" in caplog.text


def test_ctrl_c_is_one_line(tmp_path, projector, monkeypatch, caplog) -> None:
    def interrupt(*args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "check_round_trip", interrupt)
    assert main(["to-flax", str(projector), str(tmp_path / "flax")]) == 130
    assert caplog.messages[-1] == "interrupted"
    assert [path.name for path in tmp_path.iterdir()] == ["projector"]
