"""The commands, on real files: what comes back is the same, byte for byte."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert import api
from convert.__main__ import main
from convert.checkpoint import DTYPES, in_memory
from convert.flax_files import fill_flax, open_flax
from convert.models import LLAMA, PROJECTOR, WHISPER_ENCODER
from convert.torch_files import open_torch, write_safetensors
from flax_projector.llama import LlamaDecoder
from flax_projector.whisper import WhisperEncoder
from tests.tiny import read_all, read_params

REPO = Path(__file__).parents[1]
FIXTURE = REPO.parent / "shared/fixtures/upstream_checkpoint"

needs_fixture = pytest.mark.skipif(
    not FIXTURE.exists(), reason=f"no upstream checkpoint in {FIXTURE.relative_to(REPO.parent)}"
)

PROJECTOR_SHAPES = {
    "projector.input_proj.weight": (7, 15),
    "projector.input_proj.bias": (7,),
    "projector.ln_input.weight": (7,),
    "projector.layers.0.fc1.weight": (11, 7),
    "projector.layers.0.fc1.bias": (11,),
    "projector.layers.0.fc2.weight": (7, 11),
    "projector.layers.0.fc2.bias": (7,),
    "projector.layer_norms.0.weight": (7,),
}
PROJECTOR_CONFIG = {
    "model_type": "asr_model",
    "encoder_dim": 5,
    "llm_dim": 7,
    "model_dtype": "float32",
    "projector_pool_stride": 3,
    "projector_hidden_dim": 11,
    "projector_num_layers": 1,
    "projector_dropout": 0.0,
    "projector_init_std": 0.02,
}


@pytest.fixture
def projector(tmp_path) -> Path:
    """A random projector in an HF folder whose config.json nobody would write like that."""
    folder = tmp_path / "projector"
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = {k: rng.normal(size=s).astype(np.float32) for k, s in PROJECTOR_SHAPES.items()}
    write_projector(folder, tensors)
    (folder / "config.json").write_text(json.dumps(PROJECTOR_CONFIG, separators=(" ,", ":  ")))
    return folder


def write_projector(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Other tensors in place of the folder's."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    write_safetensors(folder / "model.safetensors", in_memory(tensors))


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and what it holds."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_bytes(a: Path, b: Path) -> bool:
    return a.read_bytes() == b.read_bytes()


def same_tensors(a: Path, b: Path, *, ignore: str = "") -> None:
    """Asserts that two torch checkpoints hold the same tensors."""
    one, two = open_torch(a), open_torch(b)
    keys = {key for key in one.infos if not (ignore and key.startswith(ignore))}
    assert keys == set(two.infos)
    for key in keys:
        assert one.read(key).dtype == two.read(key).dtype
        assert one.read(key).tobytes() == two.read(key).tobytes(), key


@needs_fixture
def test_upstream_checkpoint_comes_back_as_the_same_files(tmp_path) -> None:
    assert main(["to-flax", str(FIXTURE), str(tmp_path / "flax")]) == 0
    assert main(["to-torch", str(tmp_path / "flax"), str(tmp_path / "hf")]) == 0
    assert same_bytes(FIXTURE / "model.safetensors", tmp_path / "hf/model.safetensors")
    assert same_bytes(FIXTURE / "config.json", tmp_path / "hf/config.json")


@needs_fixture
@pytest.mark.torch
def test_pytorch_projector_computes_what_upstream_computes() -> None:
    import torch

    from convert.torch_projector import ResidualAudioProjector

    checkpoint = open_torch(FIXTURE)
    module = ResidualAudioProjector(PROJECTOR.read_config(FIXTURE)).eval()
    module.load_state_dict(
        {k.removeprefix("projector."): torch.tensor(checkpoint.read(k)) for k in checkpoint.infos}
    )
    io = np.load(FIXTURE / "io.npz")
    with torch.no_grad():
        y = module(torch.tensor(io["x"]))
    np.testing.assert_allclose(y.numpy(), io["y"], rtol=1e-5, atol=1e-5)


def test_projector_comes_back_as_the_same_files(tmp_path, projector) -> None:
    api.to_flax(projector, tmp_path / "flax")
    api.to_torch(tmp_path / "flax", tmp_path / "hf")
    assert same_bytes(projector / "model.safetensors", tmp_path / "hf/model.safetensors")
    assert same_bytes(projector / "config.json", tmp_path / "hf/config.json")


def test_bare_file_is_written_and_read_with_its_prefix(tmp_path, projector) -> None:
    api.to_flax(projector / "model.safetensors", tmp_path / "flax")
    api.to_torch(tmp_path / "flax", tmp_path / "bare.safetensors")
    assert same_bytes(projector / "model.safetensors", tmp_path / "bare.safetensors")


@pytest.mark.torch
def test_pt_file_converts_like_safetensors(tmp_path, projector) -> None:
    import torch

    checkpoint = open_torch(projector)
    state = {k.removeprefix("projector."): checkpoint.read(k) for k in checkpoint.infos}
    torch.save({k: torch.tensor(v) for k, v in state.items()}, projector / "best.pt")
    api.to_flax(projector / "best.pt", tmp_path / "flax")
    api.to_torch(tmp_path / "flax", tmp_path / "hf")
    same_tensors(projector, tmp_path / "hf")


def test_pytorch_file_is_the_same_whenever_it_is_written(tmp_path, projector) -> None:
    api.to_flax(projector, tmp_path / "flax")
    first = api.to_torch(tmp_path / "flax", tmp_path / "a.pt").read_bytes()
    assert api.to_torch(tmp_path / "flax", tmp_path / "b.pt").read_bytes() == first


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_casts_says_so_and_updates_the_config(tmp_path, projector, dtype, caplog) -> None:
    assert main(["to-flax", str(projector), str(tmp_path / "flax"), "--dtype", dtype]) == 0
    assert f"casting float32 to {dtype}: not bit for bit" in caplog.text
    assert {info.dtype for info in open_flax(tmp_path / "flax").infos.values()} == {DTYPES[dtype]}
    assert json.loads((tmp_path / "flax/config.json").read_text())["model_dtype"] == dtype

    api.to_torch(tmp_path / "flax", tmp_path / "hf", dtype="float32")
    key = "projector.layers.0.fc1.weight"
    expected = open_torch(projector).read(key).astype(DTYPES[dtype]).astype(np.float32)
    np.testing.assert_array_equal(open_torch(tmp_path / "hf").read(key), expected)


def test_dtype_that_is_there_already_changes_nothing(tmp_path, projector, caplog) -> None:
    assert main(["to-flax", str(projector), str(tmp_path / "flax"), "--dtype", "float32"]) == 0
    assert "casting" not in caplog.text
    api.to_torch(tmp_path / "flax", tmp_path / "hf")
    assert same_bytes(projector / "model.safetensors", tmp_path / "hf/model.safetensors")


def test_cast_that_overflows_is_an_error(tmp_path, projector) -> None:
    tensors = read_all(open_torch(projector))
    bias = np.array([1, -1e5, np.inf, 0, 0, 0, 0], np.float32)
    write_projector(projector, tensors | {"projector.input_proj.bias": bias})
    with pytest.raises(
        ValueError, match=r"input_proj.bias holds -100000, but float16 ends at 65504"
    ):
        api.to_flax(projector, tmp_path / "flax", dtype="float16")
    assert not (tmp_path / "flax").exists()
    api.to_flax(projector, tmp_path / "flax", dtype="bfloat16")


def test_verification_reads_what_was_written(tmp_path, projector, monkeypatch) -> None:
    """A writer that drops bits must be caught, and nothing must be left behind."""

    def lossy(folder, leaves, text) -> None:
        arrays = read_all(leaves)
        arrays["ln_input/scale"] = arrays["ln_input/scale"].astype(ml_dtypes.bfloat16)
        arrays["input_proj/bias"] = arrays["input_proj/bias"] + np.eye(7, dtype=np.float32)[3]
        fill_flax(folder, in_memory(arrays), text)

    monkeypatch.setattr(api, "fill_flax", lossy)
    with pytest.raises(ValueError, match="the round trip changed the checkpoint") as caught:
        api.to_flax(projector, tmp_path / "flax")
    assert "bytes   projector.input_proj.bias" in str(caught.value)
    assert "header  projector.ln_input.weight  float32[7] -> bfloat16[7]" in str(caught.value)
    assert not (tmp_path / "flax").exists()
    api.to_flax(projector, tmp_path / "flax", verify=False)
    assert (tmp_path / "flax").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to-flax", "nowhere", "x"], "nowhere does not exist"),
        (["to-torch", "projector", "x"], "projector is of PyTorch already"),
        (["to-flax", "projector", "projector"], "projector overlaps with the source"),
        (["to-flax", "flax", "x"], "flax is of Flax already"),
        (["to-flax", "projector", "flax"], "flax exists: choose another destination"),
        (
            ["to-flax", "projector", "x.pt"],
            "x.pt ends in .pt, expected a folder, whose name has no",
        ),
        (
            ["to-torch", "flax", "x.onnx"],
            "expected a folder, whose name has no suffix, or a file of",
        ),
        (["to-torch", "flax", "x.ckpt"], "x.ckpt ends in .ckpt, expected a folder"),
        (["to-torch", "flax", "flax/params/x"], "flax/params/x overlaps with the source"),
        (["to-flax", "projector", "bare.safetensors", "--overwrite"], "expected a folder"),
        (["to-torch", "flax", "projector.pt", "--overwrite"], "it is a folder with nothing in it"),
        (
            ["to-torch", "flax", "notes", "--overwrite"],
            "notes will not be overwritten: it is a file",
        ),
        (["to-flax", "bare.safetensors", "x"], "bare.safetensors has no config.json"),
        (
            ["to-flax", "projector", "x", "--ignore", "gate.*"],
            "--ignore 'gate.*' matches no tensor",
        ),
        (["inspect", "nowhere"], "nowhere does not exist"),
        (["verify", "projector", "flax", "--step", "3"], "neither projector nor flax has a step 3"),
        (["inspect", "some/model"], "HF_HUB_OFFLINE forbids downloading"),
        (["to-flax", "some/model", "x"], "HF_HUB_OFFLINE forbids downloading"),
        (["verify", "projector", "some/model"], "HF_HUB_OFFLINE forbids downloading"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
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
    assert main(arguments) == 2
    assert message in caplog.text
    assert files_in(tmp_path) == before
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("src", "dst"),
    [
        ("hf/model.safetensors", "hf"),
        ("hf", "link"),
        ("link/model.safetensors", "hf"),
        ("linked_weights", "hf"),
        ("shards", "hf"),
        ("trainer", "trainer/checkpoint-7"),
        ("trainer", "trainer"),
    ],
)
def test_source_is_never_replaced(tmp_path, projector, src, dst) -> None:
    """Wherever the weights really lie."""
    projector.rename(tmp_path / "hf")
    (tmp_path / "link").symlink_to(tmp_path / "hf")
    for name in ("linked_weights", "shards", "trainer"):
        (tmp_path / name).mkdir()
    weights = Path("../hf/model.safetensors")
    (tmp_path / "linked_weights/model.safetensors").symlink_to(weights)
    index = {"weight_map": dict.fromkeys(PROJECTOR_SHAPES, str(weights))}
    (tmp_path / "shards/model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copytree(tmp_path / "hf", tmp_path / "trainer/checkpoint-7")
    before = files_in(tmp_path)
    for is_overwritten in (False, True):
        with pytest.raises(ValueError, match=f"{dst} overlaps with the source"):
            api.to_flax(tmp_path / src, tmp_path / dst, overwrite=is_overwritten)
    assert files_in(tmp_path) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from convert import api

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

src, dst, moment = sys.argv[1:]
if moment == "verifying":
    api.engine.check_round_trip = die
else:
    Path.replace = die  # the old folder has been moved aside
api.to_flax(src, dst, overwrite=True)
"""


@pytest.mark.parametrize("moment", ["verifying", "replacing"])
def test_killed_conversion_leaves_the_earlier_result(tmp_path, projector, moment) -> None:
    dst = api.to_flax(projector, tmp_path / "flax", verify=False)
    before = files_in(dst)
    arguments = [sys.executable, "-c", KILLED, str(projector), str(dst), moment]
    killed = subprocess.run(arguments, cwd=REPO, timeout=120, stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".flax.*"))) == 1  # what it was writing
    assert dst.exists() == (moment == "verifying")

    with pytest.raises(ValueError, match="flax exists"):  # nobody asked for another
        api.to_flax(projector, dst)
    assert files_in(dst) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flax", "projector"]


def test_tensors_are_left_out_on_request_and_listed(tmp_path, projector, caplog) -> None:
    original = read_all(open_torch(projector))
    extra = {f"projector.gate.{name}": np.ones(3, np.float32) for name in ("weight", "bias")}
    write_projector(projector, original | extra)
    command = ["to-flax", str(projector), str(tmp_path / "flax")]
    assert main(command) == 2
    assert "to-flax leaves it out with --ignore 'projector.gate.bias'" in caplog.text
    assert main([*command, "--ignore", "*.gate.*"]) == 0
    assert "left out, since you ignore *.gate.*: " + ", ".join(sorted(extra)) in caplog.text
    assert "verified: 8 tensors" in caplog.text
    api.to_torch(tmp_path / "flax", tmp_path / "hf")
    assert read_all(open_torch(tmp_path / "hf")).keys() == original.keys()
    with pytest.raises(ValueError, match=r"missing  projector.input_proj.bias"):
        api.to_flax(projector, tmp_path / "x", ignore=["*.gate.*", "*.input_proj.bias"])


@pytest.mark.parametrize("eps", [1e-6, 1e-8])
def test_an_epsilon_that_upstream_does_not_read_is_a_warning(tmp_path, projector, eps, caplog):
    api.to_flax(projector, tmp_path / "flax", given={"rms_norm_eps": eps}, verify=False)
    assert main(["to-torch", str(tmp_path / "flax"), str(tmp_path / "hf")]) == 0
    warning = (
        "WARNING: rms_norm_eps is 1e-08, but tiny-audio never reads it and computes with 1e-06"
    )
    assert (warning in caplog.text) == (eps != 1e-6)


def test_overwrite_replaces_a_conversion(tmp_path, projector) -> None:
    for _ in range(2):
        assert main(["to-flax", str(projector), str(tmp_path / "flax"), "--overwrite"]) == 0
        assert main(["to-torch", str(tmp_path / "flax"), str(tmp_path / "hf"), "--overwrite"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flax", "hf", "projector"]


@pytest.mark.parametrize("form", ["torch", "flax", "bare"])
def test_inspect_lists_the_headers(tmp_path, projector, capsys, form) -> None:
    path = projector
    if form == "flax":
        path = api.to_flax(projector, tmp_path / "flax", verify=False)
    elif form == "bare":
        path = shutil.copy(projector / "model.safetensors", tmp_path / "bare.safetensors")
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    bare = "projector: supported, but this one cannot be converted as it is"
    assert out.splitlines()[0] == f"model   {bare if form == 'bare' else 'asr_model: supported'}"
    assert ("pass --rms-norm-eps" in out) == (form == "bare")
    assert ("encoder_dim = 5" in out) == (form != "bare")
    name = "input_proj/kernel" if form == "flax" else "projector.input_proj.weight"
    assert name in out
    assert "total   8 tensors, 298 parameters, 1,192 bytes" in out


GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (None, "unknown  names  of the 1 tensors do not tell which model it is, supported: proj"),
        ({}, "unsupported  model_type  = None, supported: projector (asr_model), whisper encoder"),
        (GPT2, "unsupported  model_type  = 'gpt2', supported: projector"),
        ({"model_type": ["gpt2"], "architectures": 3}, "model_type  = ['gpt2'], supported: proj"),
    ],
)
def test_inspect_shows_what_cannot_be_converted(tmp_path, capsys, config, line) -> None:
    write_safetensors(tmp_path / "x.safetensors", in_memory({"w": np.zeros((3, 2), np.float16)}))
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 0
    out = capsys.readouterr().out
    name = "gpt2 (GPT2LMHeadModel)" if config == GPT2 else "['gpt2']" if config else "unknown"
    assert out.startswith(f"model   {name}: not supported\n")
    assert line in out
    assert "\nw  float16   [3, 2]\n" in out


@pytest.mark.torch
@pytest.mark.parametrize(
    ("is_whisper", "changes", "verdict", "problems"),
    [
        (True, {}, "whisper (WhisperModel): supported", []),
        (False, {}, "llama (LlamaForCausalLM): supported", []),
        (
            True,
            {"activation_function": "relu"},
            "whisper (WhisperModel): not supported",
            ["unsupported  activation_function  = 'relu', supported: 'gelu'"],
        ),
        (
            True,
            {"d_model": 13, "encoder_layers": 0},
            "whisper (WhisperModel): not supported",
            [
                "config.json: WhisperConfig.encoder_layers = 0: must be at least 1",
                "WhisperConfig.d_model = 13: must be a multiple of encoder_attention_heads = 3",
            ],
        ),
        (
            False,
            {"hidden_act": "gelu", "sliding_window": 128},
            "llama (LlamaForCausalLM): not supported",
            ["hidden_act      = 'gelu', supported: 'silu'", "sliding_window  = 128, supported: N"],
        ),
        (
            False,
            {"model_type": "qwen3", "architectures": None},
            "qwen3: supported, but this one cannot be converted as it is",
            ["missing  model.layers.0.self_attn.k_norm.weight  [6] -> layers/self_attn/k_norm/sca"],
        ),
    ],
)
def test_inspect_tells_whether_an_architecture_is_supported(
    tmp_path, capsys, is_whisper, changes, verdict, problems
) -> None:
    model = tiny_whisper("WhisperModel") if is_whisper else tiny_llama(True)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"model   {verdict}"
    assert not [problem for problem in problems if problem not in out]


def test_inspect_says_what_to_flax_would_refuse(tmp_path, projector, capsys) -> None:
    config = PROJECTOR_CONFIG | {"projector_pool_stride": 4}
    (projector / "config.json").write_text(json.dumps(config))
    shape = "shape  projector.input_proj.weight  got [7, 15], expected [7, 20]"
    (tmp_path / "whisper").mkdir()
    tensors = {"conv1.weight": np.ones((6, 5, 3), np.float32)}
    write_safetensors(tmp_path / "whisper/model.safetensors", in_memory(tensors))
    absent = "whisper/config.json does not exist: shapes alone do not describe a whisper encoder"
    for path, name, text in (
        (projector, "asr_model", shape),
        (tmp_path / "whisper", "whisper encoder", absent),
    ):
        assert main(["inspect", str(path)]) == 0
        first, *others = capsys.readouterr().out.splitlines()
        assert first == f"model   {name}: supported, but this one cannot be converted as it is"
        assert any(text in line for line in others)
        with pytest.raises(ValueError, match=re.escape(text)):
            api.to_flax(path, tmp_path / "x")


def test_command_line_runs_as_a_module(tmp_path, projector) -> None:
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "convert", *map(str, arguments)],
            cwd=REPO,
            capture_output=True,
            text=True,
            timeout=120,
        )

    done = run("to-flax", projector, tmp_path / "flax")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.splitlines()[-2:] == [
        "verified: 8 tensors, 1192 bytes came back identical",
        f"wrote {tmp_path / 'flax'}",
    ]
    failed = run("to-flax", tmp_path / "nothing", tmp_path / "x")
    assert failed.returncode == 2
    assert failed.stderr == f"error: {tmp_path / 'nothing'} does not exist\n"
    assert run("to-flax").returncode == 2
    help_text = run("--help").stdout
    assert "examples:" in help_text
    assert "exit codes: 0 done, and in `verify` the same; 1 `verify` found differ" in help_text


def randomize(model: Any) -> Any:
    """Draws every parameter: default norms and biases would hide a swap."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny_llama(is_tied: bool) -> Any:
    """A random Llama of Hugging Face."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=20,
        intermediate_size=17,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        tie_word_embeddings=is_tied,
    )
    return randomize(transformers.LlamaForCausalLM(config))


def tiny_whisper(form: str) -> Any:
    """A random Whisper of Hugging Face: a class with encoder and decoder, or its "encoder"."""
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=31,
        num_mel_bins=5,
        d_model=12,
        encoder_layers=3,
        encoder_attention_heads=3,
        encoder_ffn_dim=17,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=13,
        max_source_positions=19,
        max_target_positions=11,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    if form == "encoder":
        return randomize(transformers.WhisperModel(config).encoder)
    return randomize(getattr(transformers, form)(config))


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shard_size", ["1KB", "1GB"])
def test_llama_comes_back_and_hugging_face_takes_it(tmp_path, dtype, is_tied, shard_size) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model = tiny_llama(is_tied)
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "src", max_shard_size=shard_size)
    assert (len(list((tmp_path / "src").glob("*.safetensors"))) > 1) == (shard_size == "1KB")

    api.to_flax(tmp_path / "src", tmp_path / "flax")
    api.to_torch(tmp_path / "flax", tmp_path / "hf")
    same_tensors(tmp_path / "src", tmp_path / "hf")
    assert ("lm_head/kernel" in open_flax(tmp_path / "flax").infos) == (not is_tied)

    result: Any = LlamaForCausalLM.from_pretrained(
        tmp_path / "hf", dtype="auto", output_loading_info=True
    )
    loaded, report = result
    assert not any(report.values())
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.torch
@pytest.mark.parametrize("form", ["WhisperModel", "WhisperForConditionalGeneration", "encoder"])
def test_whisper_encoder_comes_back(tmp_path, form, caplog) -> None:
    model = tiny_whisper(form)
    model.save_pretrained(tmp_path / "src")
    assert main(["to-flax", str(tmp_path / "src"), str(tmp_path / "flax")]) == 0
    assert main(["to-torch", str(tmp_path / "flax"), str(tmp_path / "hf")]) == 0
    left_out = "decoder.* (the decoder is not used: the LLM takes its place)"
    assert (left_out in caplog.text) == (form != "encoder")

    before, after = open_torch(tmp_path / "src"), open_torch(tmp_path / "hf")
    prefix = {"WhisperModel": "encoder.", "encoder": ""}.get(form, "model.encoder.")
    encoder = {key for key in before.infos if key.startswith(prefix) and "decoder" not in key}
    assert {f"model.encoder.{key.removeprefix(prefix)}" for key in encoder} == set(after.infos)
    for key in encoder:
        back = after.read(f"model.encoder.{key.removeprefix(prefix)}")
        assert back.tobytes() == before.read(key).tobytes(), key
    assert same_bytes(tmp_path / "src/config.json", tmp_path / "hf/config.json")


@pytest.mark.torch
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_converted_llama_computes_the_same(tmp_path, is_tied) -> None:
    """The round trip cannot see two rows exchanged; the forward pass can."""
    import torch

    model = tiny_llama(is_tied)
    model.save_pretrained(tmp_path / "hf")
    params = read_params(api.to_flax(tmp_path / "hf", tmp_path / "flax", verify=False))
    tokens = np.arange(14).reshape(2, 7) * 5 % 31
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    with jax.default_matmul_precision("highest"):
        decoder = LlamaDecoder(LLAMA.read_config(tmp_path / "flax"))
        logits = decoder.apply({"params": params}, jnp.asarray(tokens))
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.torch
def test_converted_whisper_encoder_computes_the_same(tmp_path) -> None:
    import torch

    model = tiny_whisper("encoder")
    model.save_pretrained(tmp_path / "hf")
    params = read_params(api.to_flax(tmp_path / "hf", tmp_path / "flax", verify=False))
    mel = np.random.default_rng(0).normal(size=(2, 5, 38)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.tensor(mel)).last_hidden_state.numpy()
    with jax.default_matmul_precision("highest"):
        encoder = WhisperEncoder(WHISPER_ENCODER.read_config(tmp_path / "flax"))
        frames, _ = encoder.apply({"params": params}, jnp.asarray(mel))
    np.testing.assert_allclose(np.asarray(frames), expected, rtol=1e-4, atol=1e-4)


def test_llama_config_that_cannot_be_expressed_stops_the_conversion(tmp_path, caplog) -> None:
    config = {"model_type": "llama", "hidden_act": "gelu", "mlp_bias": True}
    (tmp_path / "src").mkdir()
    write_safetensors(
        tmp_path / "src/model.safetensors", in_memory({"model.norm.weight": np.ones(3)})
    )
    (tmp_path / "src/config.json").write_text(json.dumps(config))
    assert main(["to-flax", str(tmp_path / "src"), str(tmp_path / "flax")]) == 2
    assert "unsupported  hidden_act" in caplog.text
    assert "unsupported  mlp_bias" in caplog.text
    assert "missing      vocab_size" in caplog.text
