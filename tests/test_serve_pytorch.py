"""The folder for a server, and the example that serves it: without JAX, and with the same words."""

import ast
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from convert.__main__ import main
from convert.hf_folder import to_hf_folder
from convert.torch_files import open_torch
from flax_projector.config import TrainConfig, to_json
from flax_projector.data.manifest import read_manifest
from flax_projector.inference.listen import Listener
from flax_projector.run_folder import RunFolder
from tests.checkpoints import UPSTREAM, files_in
from tests.runs import make_run
from tests.tiny import make_projector, make_speech

pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("test_serve_pytorch")]

EXAMPLE = Path(__file__).parents[1] / "examples/serve_pytorch/serve.py"
FILES = {
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "generation_config.json", "preprocessor_config.json"),
}


@pytest.fixture(scope="module")
def run(tiny_towers, tmp_path_factory) -> TrainConfig:
    """One that hears the clip alone."""
    return make_run(tmp_path_factory.mktemp("clip"), tiny_towers)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    """Its folder for a server."""
    return to_hf_folder(run.out, tmp_path_factory.mktemp("exported") / "folder")


@pytest.fixture(scope="module")
def example() -> Any:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("serve", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_needs_only_torch_and_transformers() -> None:
    tree = ast.parse(EXAMPLE.read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    packages = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert packages == {"numpy", "torch", "safetensors", "transformers"}  # torch's own and theirs


@pytest.mark.parity("PyTorch")
@pytest.mark.parametrize("heard", ["clip", "window"])
def test_a_batch_of_ten_clips_has_the_same_tokens(
    heard, run, exported, example, tiny_towers, tmp_path
) -> None:
    if heard == "window":
        run = make_run(tmp_path / "run", tiny_towers, audio_tokens="window")
        exported = to_hf_folder(run.out, tmp_path / "folder")
    rows = list(read_manifest(make_speech(tmp_path / "clips", 10, seed=2))[0])
    listener = Listener(run.out)
    ours = {found.id: found for found in listener.transcribe(rows)}
    end = listener.loaded.prompt.end_of_turn
    serve = example.Transcriber(exported)
    clips = [example.read_wav(row.audio) for row in rows]
    tokens, texts = serve.tokens(clips), serve(clips)
    expected = [list(ours[row.id].tokens) for row in rows]
    expected = [ids[: ids.index(end)] if end in ids else ids for ids in expected]
    assert tokens == expected
    assert texts == [ours[row.id].hypothesis for row in rows]
    assert len({tuple(ids) for ids in tokens}) > 2  # they depend on the clip
    assert serve.tokens(clips[:1]) == expected[:1]  # and not on the others


def test_the_program_prints_a_line_for_each_file(exported, example, tmp_path, capsys) -> None:
    rows = list(read_manifest(make_speech(tmp_path / "clips", 2))[0])
    example.main(str(exported), *(row.audio for row in rows))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("\t")[0] for line in lines] == [row.audio for row in rows]


# --- the folder ------------------------------------------------------------------------------


def test_the_folder_has_the_files_and_fields_of_tiny_audios(run, exported) -> None:
    assert {file.name for file in exported.iterdir()} == FILES
    ours = json.loads((exported / "config.json").read_text())
    theirs = json.loads((UPSTREAM / "config.json").read_text())
    missing = theirs.keys() - ours.keys()
    code = {"auto_map", "custom_pipelines", "transformers_version"}  # of its own, which we lack
    unused = {  # by this projector, or the default of `ASRConfig`
        *("downsample_rate", "early_stopping", "inference_diversity_penalty", "label_smoothing"),
        *("inference_warmup_tokens", "length_penalty", "min_new_tokens", "no_repeat_ngram_size"),
        *("num_experts", "num_experts_per_tok", "projector_input_noise", "repetition_penalty"),
        *("router_aux_loss_coef", "temperature", "top_k", "top_p", "use_cache", "use_specaugment"),
    }
    assert missing == code | unused
    llm = json.loads((Path(run.llm) / "config.json").read_text())
    assert ours["vocab_size"] == ours["text_config"]["vocab_size"] == llm["vocab_size"] + 1
    assert ours["audio_config"]["d_model"] == ours["encoder_dim"]
    assert open_torch(exported).infos.keys() >= {"projector.input_proj.weight"}


def test_transformers_reads_the_tokenizer_and_the_configs(run, exported) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    data = json.loads((exported / "config.json").read_text())
    assert (
        tokenizer.convert_tokens_to_ids("<audio>") == data["vocab_size"] - 1 == len(tokenizer) - 1
    )
    prompt = data["rendered_prompt"]
    ids = tokenizer.encode(
        prompt["before_audio"] + "<audio>" + prompt["after_audio"], add_special_tokens=False
    )
    audio = [data["vocab_size"] - 1]
    assert ids == prompt["before_audio_ids"] + audio + prompt["after_audio_ids"]
    before = transformers.AutoTokenizer.from_pretrained(run.llm)
    messages = [{"role": "user", "content": "go <audio>"}]
    kwargs: Any = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(messages, **kwargs) == before.apply_chat_template(
        messages, **kwargs
    )
    generation = transformers.GenerationConfig.from_pretrained(exported)
    assert generation.max_new_tokens == run.max_new_tokens
    assert generation.eos_token_id == prompt["end_of_turn_id"]
    features = transformers.AutoFeatureExtractor.from_pretrained(exported)
    assert features.n_samples == run.data.window_samples


def test_hub_ids_take_the_place_of_local_paths(run, exported, tmp_path, caplog) -> None:
    names = json.loads((exported / "config.json").read_text())
    assert (names["audio_model_id"], names["text_model_id"]) == (run.encoder, run.llm)
    command = ["to-torch", run.out, str(tmp_path / "folder"), "--hf-folder"]
    ids = ["--audio-model-id", "openai/whisper-base", "--text-model-id", "some/llama"]
    assert main([*command, *ids]) == 0
    assert "on this machine alone" not in caplog.text
    names = json.loads((tmp_path / "folder/config.json").read_text())
    assert (names["audio_model_id"], names["text_model_id"]) == (ids[1], ids[3])
    assert main([*command, "--overwrite", *ids[:2]]) == 0
    assert f"config.json names {run.llm}, which is on this machine alone" in caplog.text
    assert "--text-model-id" in caplog.text


def test_it_can_be_converted_back(run, exported, tmp_path) -> None:
    assert main(["to-flax", str(exported), str(tmp_path / "flax")]) == 0
    assert main(["verify", str(exported), run.out]) == 0


def test_what_cannot_be_exported_is_one_clear_error(run, tmp_path, caplog) -> None:
    out, hf = str(tmp_path / "out"), make_projector(tmp_path / "hf")
    assert main(["to-flax", str(hf), str(tmp_path / "flax")]) == 0
    moved = RunFolder(tmp_path / "moved")
    moved.claim(run, RunFolder(Path(run.out)).prompt.read_text(), {}, 0.0)
    text = to_json(run).replace(run.encoder, "gone/whisper")
    moved.config.write_text(text)
    (tmp_path / "moved/checkpoints").symlink_to(Path(run.out) / "checkpoints")
    before = files_in(tmp_path)
    commands = {
        ("to-torch", str(hf), out, "--hf-folder"): "is not a projector in Flax's form",
        ("to-torch", str(tmp_path / "flax"), out, "--hf-folder"): "was not trained by train_tpu.py",
        ("to-torch", run.out, out, "--audio-model-id", "x/y"): "need --hf-folder",
        ("to-torch", run.out, out, "--hf-folder", "--trainer"): "--trainer does not go with",
        ("to-torch", run.out, out, "--hf-folder", "--prefix", ""): "--prefix is for weights alone",
        ("to-torch", run.out, str(hf), "--hf-folder", "--overwrite"): "will not be overwritten",
        ("to-torch", str(moved.path), out, "--hf-folder"): "name another one with --audio-model-id",
        (
            *("to-torch", str(moved.path), out, "--hf-folder"),
            *("--audio-model-id", run.llm),
        ): "cannot be read as a WhisperConfig",
    }
    for command, message in commands.items():
        caplog.clear()
        assert main([*command]) == 2, command
        assert message in caplog.text, command
    assert files_in(tmp_path) == before
