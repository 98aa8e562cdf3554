"""Runs with chat models of several families: the prompt of a run is its LLM's own, and stays."""

import dataclasses
import json
import shutil
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import train_tpu
from convert import __main__ as convert_program
from convert import api
from flax_projector import __main__ as program
from flax_projector import run as run_module
from flax_projector.batch import AUDIO_TOKEN
from flax_projector.config import PromptConfig, TrainConfig
from flax_projector.logs import printable
from flax_projector.run import load_prompt, resolve_config
from flax_projector.training.metrics import MetricsWriter
from tests.chat import Reference, save_chat_tokenizer
from tests.checkpoints import UPSTREAM
from tests.tiny import final_params, read_losses, save_llm, tiny_config

pytestmark = pytest.mark.torch

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "chatml": (LlamaConfig, LlamaForCausalLM, {}),
    "llama3": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": _LLAMA3_ROPE}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 10}),
}


@pytest.fixture(scope="module")
def llms(tmp_path_factory) -> dict[str, str]:
    """Folders of tiny LLMs, by family."""
    folders = {}
    for family, (make_config, make_model, options) in FAMILIES.items():
        folder = save_chat_tokenizer(tmp_path_factory.mktemp(family), family)
        save_llm(folder, make_config, make_model, vocab_size=700, pad_token_id=None, **options)
        folders[family] = str(folder)
    return folders


@pytest.fixture
def run(tmp_path, tiny_towers, llms):
    """Runs a tiny config with an LLM of the family, on one device, and returns it."""

    def run(family: str, *, name: str) -> TrainConfig:
        towers = {**tiny_towers, "llm": llms[family]}
        config = tiny_config(tmp_path / name, towers, num_steps=4)
        train_tpu.main(config, devices=jax.devices()[:1])
        return config

    return run


def prompt_of(config: TrainConfig) -> dict[str, Any]:
    return json.loads((Path(config.out) / "prompt.json").read_text())


def begin_on(date: datetime, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=lambda: date, fromisoformat=datetime.fromisoformat)
    monkeypatch.setattr(run_module, "datetime", clock)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills the next run when it writes the metrics of a step."""
    write = MetricsWriter.write

    def write_until_killed(self, at, scalars):
        if at == step:
            raise KeyboardInterrupt
        write(self, at, scalars)

    monkeypatch.setattr(MetricsWriter, "write", write_until_killed)


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_a_family_trains_resumes_evaluates_and_transcribes(run, family, monkeypatch, capsys):
    """Begun on another day, and resumed today: the same bytes as in one go, with its prompt."""
    day = datetime(2020, 2, 29, 12)
    with monkeypatch.context() as patch:
        begin_on(day, patch)
        whole = run(family, name="whole")
        stop_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            run(family, name="killed")
    resumed = run(family, name="killed")
    prompt = prompt_of(resumed)
    assert prompt == prompt_of(whole)
    assert ("29 Feb 2020" in prompt["before_audio"]) == (family == "llama3")
    assert read_losses(resumed)[-2:] == read_losses(whole)[-2:]
    expected = final_params(whole)
    for name, leaf in final_params(resumed).items():
        assert leaf.tobytes() == expected[name].tobytes(), name

    lines = (Path(resumed.out) / "transcripts" / "clips-000004.jsonl").read_text().splitlines()
    heard = {t["id"]: t["hypothesis"] for t in map(json.loads, lines)}
    assert len(heard) == 5
    clip = Path(resumed.data.eval[0]).parent / "0.wav"
    program.cli(["transcribe", resumed.out, str(clip)])
    assert capsys.readouterr().out == f"{clip}\t{printable(heard['clip0'])}\n"
    program.cli(["evaluate", resumed.out, resumed.data.eval[0]])
    assert "WER" in capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_towers, llms):
    """Runs of one step, by family."""
    configs = {}
    for family in ("chatml", "qwen3"):
        folder = tmp_path_factory.mktemp("run")
        data = {"eval": (), "bucket_secs": (2.0,)}
        asked = PromptConfig(user="<audio> Write it down.")
        towers = {**tiny_towers, "llm": llms[family]}
        configs[family] = tiny_config(folder, towers, data=data, num_steps=1, prompt=asked)
        train_tpu.main(configs[family], devices=jax.devices()[:1])
    return configs


def test_inspect_shows_the_prompt_of_a_run(finished, capsys):
    assert convert_program.main(["inspect", finished["chatml"].out]) == 0
    assert (
        "prompt  <|im_start|>system\n        /no_think /system_override<|im_end|>\n"
        "        <|im_start|>user\n        <audio> Write it down.<|im_end|>\n"
        "        <|im_start|>assistant\n        TRANSCRIPT<|im_end|>\n"
    ) in capsys.readouterr().out


@pytest.mark.parametrize("family", ["chatml", "qwen3"])
def test_an_exported_folder_has_the_messages_of_the_same_ids(finished, tmp_path, family, caplog):
    config = finished[family]
    exported = json.loads((api.to_torch(config.out, tmp_path / "hf") / "config.json").read_text())
    # A user message of one's own: tiny-audio has its own in its code, and does not read it.
    assert "trained with the user message '<audio> Write it down.'. config.json has" in caplog.text
    reference = Reference(exported["text_model_id"])
    theirs = reference.ids(exported["system_prompt"], exported["user_prompt"])
    before, after = (prompt_of(config)[f"{name}_audio_ids"] for name in ("before", "after"))
    assert [*before, AUDIO_TOKEN, *after] == theirs


def test_a_run_takes_over_how_its_projector_was_trained(finished, tmp_path, caplog):
    """Its folder says it, whether tiny-audio wrote it or we did; what is given goes first."""
    exported = api.to_torch(finished["chatml"].out, tmp_path / "hf")
    new = dataclasses.replace(
        finished["chatml"], out=str(tmp_path / "new"), init_projector=str(exported)
    )
    caplog.clear()

    def resolve(prompt: PromptConfig, **data: Any) -> tuple[Any, ...]:
        config = dataclasses.replace(new, prompt=prompt)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
        config = resolve_config(config)
        return config.prompt.system, config.prompt.user, config.data.audio_tokens

    system, user = "/no_think /system_override", "<audio> Write it down."
    assert resolve(PromptConfig()) == (system, user, "clip")
    assert not caplog.records
    given = resolve(PromptConfig(user="Listen: "), audio_tokens="window")
    assert given == (system, "Listen: ", "window")
    starts = ("--prompt.user is 'Listen: ', but ", "--data.audio-tokens is 'window', but ")
    assert [r.message[: len(s)] for r, s in zip(caplog.records, starts, strict=True)] == [*starts]

    path = exported / "config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"system_prompt": None}))  # tiny-audio's: no system turn
    assert resolve(PromptConfig()) == ("", user, "clip")
    path.write_text(json.dumps({k: v for k, v in said.items() if "prompt" not in k}))
    assert resolve(PromptConfig()) == (system, "Transcribe: <audio>", "clip")


def test_a_projector_of_tiny_audio_has_heard_the_whole_window(tmp_path):
    config = tiny_config(tmp_path, {}, init_projector=str(UPSTREAM))
    resolved = resolve_config(config)
    assert resolve_config(resolved) == resolved
    assert resolved.prompt.user == "Transcribe: <audio>"
    assert resolved.data.audio_tokens == "window"


def test_a_resumed_run_takes_over_what_is_left_open(finished):
    """Even if the projector that it began with is gone."""
    config = dataclasses.replace(finished["chatml"], prompt=PromptConfig(), init_projector="/gone")
    assert resolve_config(config).prompt.user == "<audio> Write it down."


def test_another_template_stops_a_resumed_run(finished):
    config = finished["chatml"]
    path = Path(config.llm) / "chat_template.jinja"
    template = path.read_text()
    try:
        path.write_text(template.replace("assistant", "scribe"))
        with pytest.raises(ValueError, match=r"(?s)another prompt than .*then: .*assistant.*now: "):
            load_prompt(resolve_config(config), Path(config.llm))
        with pytest.raises(SystemExit, match="another prompt than"):
            program.cli(["evaluate", config.out, str(path)])
    finally:
        path.write_text(template)


def test_a_run_without_a_prompt_is_refused(finished, tmp_path):
    """As earlier versions left them: nobody knows what their LLM read."""
    shutil.copytree(finished["chatml"].out, tmp_path / "old")
    (tmp_path / "old" / "prompt.json").unlink()
    with pytest.raises(SystemExit, match=r"prompt.json is missing: the run was begun"):
        program.cli(["evaluate", str(tmp_path / "old"), "x.jsonl"])


def test_the_texts_of_a_base_model_belong_to_the_run(finished):
    config = finished["chatml"]
    texts = PromptConfig(before="Audio: ", after="\nText: ", end="<|endoftext|>")
    with pytest.raises(ValueError, match=r"--prompt.after: '' -> '\\nText: '"):
        train_tpu.main(dataclasses.replace(config, prompt=texts))
