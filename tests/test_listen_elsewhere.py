"""Projectors without a run: converted folders, and upstream's, with their towers named or given."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import soundfile

from convert import to_flax
from convert.hf_folder import to_hf_folder
from flax_projector import __main__ as program
from flax_projector.inference.listen import Listener
from flax_projector.inference.projectors import find_named
from flax_projector.run_folder import RunFolder
from tests.checkpoints import UPSTREAM
from tests.media import clips, spoken
from tests.runs import make_run
from tests.tiny import make_projector, make_speech

pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("test_listen_elsewhere")]


@pytest.fixture(scope="module")
def run(tiny_towers, tmp_path_factory) -> str:
    return make_run(tmp_path_factory.mktemp("run"), tiny_towers).out


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    """Its folder in tiny-audio's format."""
    return to_hf_folder(run, tmp_path_factory.mktemp("exported") / "folder")


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> str:
    return make_speech(tmp_path_factory.mktemp("speech"), 3)


def change(folder: Path, to: Path, remove: tuple[str, ...] = (), **values: Any) -> Path:
    """A copy of a projector's folder, with another config.json."""
    shutil.copytree(folder, to)
    data = json.loads((to / "config.json").read_text()) | values
    kept = {name: value for name, value in data.items() if name not in remove}
    (to / "config.json").write_text(json.dumps(kept))
    return to


def heard(named: Path | str, speech: str) -> dict[str, tuple[int, ...]]:
    """The tokens that are heard in clips, by their ids."""
    listener = Listener(str(named))
    scores = listener.evaluate(speech, name="clips", normalizer="none")
    return {transcript.id: transcript.tokens for transcript in scores.transcripts}


def test_what_a_run_was_converted_to_hears_the_same_as_the_run(run, exported, speech, tmp_path):
    expected = heard(run, speech)
    assert len(set(expected.values())) > 1
    to_flax(exported, tmp_path / "flax")
    for named in (exported, tmp_path / "flax"):
        assert heard(named, speech) == expected


def test_one_line_says_what_is_assumed(exported, run, caplog):
    caplog.set_level("INFO")
    config = find_named(exported, projector=None, encoder=None, llm=None).config
    (line,) = (record.getMessage() for record in caplog.records if "no run" in record.msg)
    towers = RunFolder(Path(run)).read_config()
    assert line.startswith(f"{exported} is no run: encoder {towers.encoder}, LLM {towers.llm}, ")
    assert line.endswith("audio tokens of the clip, a window of 2 s, pieces of up to 2 s, float32")
    assert config.max_new_tokens == towers.max_new_tokens == 11


UPSTREAMS = ("rendered_prompt", "audio_tokens", "window_secs", "max_clip_secs")


def test_upstreams_folder_is_heard_as_upstream_trains(exported, tmp_path, tiny_towers, capsys):
    folder = change(exported, tmp_path / "hf", UPSTREAMS, audio_model_id="a/b", text_model_id="c/d")
    towers = ("--encoder", tiny_towers["encoder"], "--llm", tiny_towers["llm"])
    soundfile.write(tmp_path / "long.wav", spoken(clips(9), 0.3)[0], 16_000)
    program.cli(["transcribe", str(folder), str(tmp_path / "long.wav"), *towers])
    assert capsys.readouterr().out.startswith(f"{tmp_path}/long.wav\t")
    found = find_named(folder, projector=None, encoder="x", llm="y")
    assert found.config.data.audio_tokens == "window" and found.config.data.window_secs == 30
    assert found.config.data.bucket_secs[-1] == 15
    assert (found.config.encoder, found.config.llm) == ("x", "y")
    assert found.config.prompt.system == "/no_think /system_override" and not found.rendered


def test_a_projector_in_a_run_finds_the_towers_of_the_run(run, tmp_path, monkeypatch):
    config = RunFolder(Path(run)).read_config()
    shutil.copytree(run, tmp_path / "work/runs/a")
    shutil.copytree(config.encoder, tmp_path / "work/m/encoder")
    origin = {"directory": str(tmp_path / "work"), "contents": {}, "began": 0.0}
    (tmp_path / "work/runs/a/origin.json").write_text(json.dumps(origin))
    make_flax = tmp_path / "work/runs/a/projector"
    to_flax(make_projector(tmp_path / "p"), make_flax)
    data = json.loads((make_flax / "config.json").read_text())
    names = {"audio_model_id": "m/encoder", "text_model_id": "no/where"}
    (make_flax / "config.json").write_text(json.dumps(data | names))
    monkeypatch.chdir(tmp_path)
    found = find_named("work/runs/a/projector", projector=None, encoder=None, llm=None).config
    assert (found.encoder, found.llm) == (str(tmp_path / "work/m/encoder"), "no/where")


def bare(folder: Path, **values: Any) -> Path:
    """A projector whose config.json says nothing of towers."""
    return change(make_projector(folder / "made"), folder / "bare", **values)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda at, _: at / "gone", (), "gone does not exist: name the folder of a run, or of"),
        (lambda at, _: "gone/gone", (), "there is no run or projector gone/gone: .*from the hub"),
        (lambda at, _: at, (), "is not the folder of a run, nor of a projector: it has neither co"),
        (lambda at, _: bare(at), (), "bare does not name its towers: pass --encoder and --llm$"),
        (lambda at, _: bare(at, audio_model_id="a/b"), (), "its towers: pass --llm$"),
        (
            lambda at, _: bare(at, audio_model_id="a/b", text_model_id="c/d"),
            (),
            "--encoder: 'a/b' is not a folder.*\n--llm: 'c/d' is not a folder",
        ),
        (lambda at, _: UPSTREAM, (), "--encoder: 'fake/whisper' is not.*\n--llm: 'fake/llama'"),
        (
            lambda at, towers: bare(
                at, audio_model_id=towers["encoder"], text_model_id=towers["llm"]
            ),
            (),
            "--encoder has width 24, but the projector is made for 5.*\n--llm has width 40",
        ),
        (lambda at, towers: towers["llm"], (), "is no projector: name the folder of a run, or of"),
        (lambda at, _: bare(at), ("--projector", "best"), "--projector chooses one of a run, but"),
        (lambda at, _: bare(at, window_secs=0.03), ("--llm", "x"), "pass --encoder$"),
        (
            lambda at, _: bare(at, window_secs=0.03),
            ("--llm", "x", "--encoder", "y"),
            "bare is damaged .*--data.window-secs = 0.03: must.*: correct its config.json",
        ),
        (
            lambda at, _: bare(at, max_clip_secs="x"),
            ("--llm", "x", "--encoder", "y"),
            "bare is damaged .*: correct its config.json",
        ),
        (lambda at, _: make_projector(at / "p") / "model.safetensors", (), "name its towers"),
    ],
)
def test_what_is_no_projector_or_lacks_something_is_one_clear_error(
    make, options, message, tiny_towers, tmp_path
):
    named = make(tmp_path, tiny_towers)
    soundfile.write(tmp_path / "x.wav", clips(1)[0], 16_000)
    with pytest.raises(SystemExit, match=f"^error: (?:.|\n)*{message}"):
        program.cli(["transcribe", str(named), str(tmp_path / "x.wav"), *options])


def test_weights_without_a_config_say_how_to_convert_them(tmp_path):
    folder = make_projector(tmp_path / "p")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config.json: convert it with `python -m convert"):
        find_named(folder, projector=None, encoder="x", llm="y")


def test_half_a_run_is_one_clear_error(run, tmp_path):
    shutil.copytree(run, tmp_path / "a")
    shutil.rmtree(tmp_path / "a/checkpoints")
    with pytest.raises(ValueError, match="has not ended, so it has no projector: wait for its fir"):
        find_named(tmp_path / "a", projector=None, encoder=None, llm=None)
    shutil.copytree(run, tmp_path / "b")
    (tmp_path / "b/config.json").unlink()
    with pytest.raises(ValueError, match=r"b is not the folder of a run: no config.json"):
        find_named(tmp_path / "b", projector=None, encoder=None, llm=None)
    (tmp_path / "b/config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not the config of a training run"):
        find_named(tmp_path / "b", projector=None, encoder=None, llm=None)


def test_another_tokenizer_is_an_error(exported, tmp_path):
    rendered = json.loads((exported / "config.json").read_text())["rendered_prompt"]
    other = change(exported, tmp_path / "hf", rendered_prompt=rendered | {"before_audio_ids": [1]})
    with pytest.raises(ValueError, match=r"with another tokenizer than that in .*: before_audio_i"):
        Listener(other)
