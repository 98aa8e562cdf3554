"""`transcribe FILE...`, with a tiny run that nobody has trained."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from flax_projector import __main__ as program
from flax_projector.inference.listen import Listener
from flax_projector.logs import printable
from tests.media import clips, encode, mute_video, spoken
from tests.runs import make_run

pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("test_transcribe")]

RATE = 16_000


@pytest.fixture(scope="module")
def run(tiny_towers, tmp_path_factory) -> str:
    return make_run(tmp_path_factory.mktemp("run"), tiny_towers).out


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A short file, and a long one in two formats; its pieces are at most 2 s long."""
    folder, speech = tmp_path_factory.mktemp("files"), clips(5)
    samples, _ = spoken([speech[1], speech[3][:RATE], speech[4][:RATE]], pause_secs=1.0)
    soundfile.write(folder / "short.wav", speech[1], RATE)
    soundfile.write(folder / "long.flac", samples, RATE)
    (folder / "long.m4a").write_bytes(encode(samples, RATE, "ipod"))
    return folder


def transcribe(capsys, run: str, *args: object, code: int | None = None) -> tuple[str, str]:
    """Standard output, and the errors that are logged."""
    command = ["transcribe", run, *map(str, args)]
    if code is None:
        program.cli(command)
    else:
        with pytest.raises(SystemExit) as caught:
            program.cli(command)
        assert caught.value.code == code
    found = capsys.readouterr()
    return found.out, found.err


def test_a_line_for_each_file_with_the_words_of_an_evaluation(capsys, run, files):
    paths = [files / "long.m4a", files / "short.wav", files / "long.flac"]
    out, _ = transcribe(capsys, run, *paths)
    lines = [line.split("\t") for line in out.splitlines()]
    assert [path for path, _ in lines] == [str(path) for path in paths]
    manifest = files / "short.jsonl"
    manifest.write_text(json.dumps({"audio": "short.wav", "text": "go"}))
    scores = Listener(run).evaluate(str(manifest), name="short")
    words = " ".join(scores.transcripts[0].hypothesis.split())
    assert lines[1][1] == printable(words)


def test_json_has_the_times_of_the_parts(capsys, run, files, tmp_path):
    out, _ = transcribe(capsys, run, files / "long.flac", "--format", "jsonl")
    record = json.loads(out)
    assert record["audio"] == str(files / "long.flac") and len(record["segments"]) == 3
    times = [time for part in record["segments"] for time in (part["start"], part["end"])]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= record["secs"]
    transcribe(capsys, run, files / "long.flac", "--format", "json", "--out", tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == [record]


@pytest.mark.parametrize("form", ["srt", "vtt", "text"])
def test_a_folder_gets_a_file_for_each(capsys, run, files, tmp_path, form):
    paths = (files / "short.wav", files / "long.flac", files / "long.m4a")
    out = f"{tmp_path}/new/" if form == "text" else tmp_path / "new"
    shown, _ = transcribe(capsys, run, *paths, "--format", form, "--out", out)
    suffix = "txt" if form == "text" else form
    names = {f"short.{suffix}", f"long.flac.{suffix}", f"long.m4a.{suffix}"}
    assert {file.name for file in (tmp_path / "new").iterdir()} == names and not shown
    if form == "text":
        assert (tmp_path / "new/short.txt").read_text().startswith(f"{files}/short.wav\t")


def test_what_is_wrong_with_out_is_found_before_the_model_is_loaded(
    capsys, run, files, tmp_path, monkeypatch
):
    monkeypatch.setattr("flax_projector.inference.listen.Listener", None)
    (tmp_path / "there.srt").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/short.txt").write_text("kept")
    one, two = [files / "short.wav"], [files / "short.wav", files / "long.flac"]
    wrong = {
        (*two, "--format", "srt"): "--format srt writes a file for each of several: pass --out F",
        (*one, "--out", tmp_path / "there.srt"): "there.srt exists already: choose another name",
        (*one, "--out", tmp_path / "folder"): "short.txt exists already: choose another folder",
        (*one, "--out", tmp_path / "there.srt/x"): "there.srt is no folder that can be written to",
        (*two, "--format", "vtt", "--out", tmp_path / "there.srt"): "there.srt is no folder",
    }
    for args, message in wrong.items():
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            program.cli(["transcribe", run, *map(str, args)])
    assert (tmp_path / "there.srt").read_text() == "kept"
    assert (tmp_path / "folder/short.txt").read_text() == "kept"


def bad_files(folder: Path) -> dict[str, str]:
    """Files of which nothing can be heard: what is said of each."""
    soundfile.write(folder / "silence.wav", np.zeros(20 * RATE), RATE)
    soundfile.write(folder / "quiet.wav", np.zeros(RATE), RATE)
    soundfile.write(folder / "none.wav", np.zeros(0), RATE)
    soundfile.write(folder / "nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("hello\n" * 50)
    (folder / "mute.mp4").write_bytes(mute_video())
    soundfile.write(folder / "cut.wav", np.ones(9 * RATE) * 0.1, RATE)
    (folder / "cut.wav").write_bytes((folder / "cut.wav").read_bytes()[:-RATE])
    (folder / "folder.wav").mkdir()
    return {
        "silence.wav": ": no speech was found in its 20.0 s",
        "quiet.wav": ": no speech was found in its 1.0 s",
        "none.wav": " has 0 samples at 16 kHz",
        "nan.wav": " has samples that are not finite",
        "empty.wav": " is empty: copy or download it again",
        "text.wav": " is not a readable audio file: Format not recognised",
        "mute.mp4": ": it has no sound",
        "cut.wav": ": its end is missing",
        "folder.wav": " is a folder: name the files in it",
        "missing.wav": " does not exist",
    }


def test_what_cannot_be_heard_is_a_line_of_its_own_and_the_others_are(capsys, run, files, tmp_path):
    expected = bad_files(tmp_path)
    paths = [tmp_path / name for name in expected]
    out, errors = transcribe(capsys, run, *paths, files / "short.wav", code=1)
    assert out.startswith(f"{files}/short.wav\t") and out.count("\n") == 1
    lines = [line for line in errors.splitlines() if "error: " in line]
    assert len(lines) == len(expected)
    for name, message in expected.items():
        (line,) = (line for line in lines if f"/{name}" in line)
        assert f"error: {tmp_path}/{name}{message}" in line
    assert "Traceback" not in errors


@pytest.mark.parametrize("form", ["text", "json", "vtt"])
def test_without_a_file_that_can_be_heard_nothing_is_loaded_or_written(
    capsys, run, tmp_path, monkeypatch, form
):
    monkeypatch.setattr("flax_projector.inference.listen.Listener", None)
    options = ("--format", form, "--out", tmp_path / "x")
    out, errors = transcribe(capsys, run, tmp_path / "missing.wav", *options, code=1)
    assert not out and "missing.wav does not exist" in errors and not list(tmp_path.iterdir())


def test_a_single_clip_is_no_batch_of_the_evaluations_size(run, files, monkeypatch):
    listener = Listener(run)
    sizes = []
    hear = listener._evaluator.transcribe_batch

    def counted(params, batch, members):
        sizes.append((len(members), sum(member is not None for member in members)))
        return hear(params, batch, members)

    monkeypatch.setattr(listener._evaluator, "transcribe_batch", counted)
    monkeypatch.setattr(listener, "_batch_size", 16)
    list(listener.transcribe_files([str(files / "short.wav")]))
    assert sizes == [(8, 1)]  # a row for each device
    list(listener.transcribe_files([str(files / "long.flac")] * 4))  # 12 pieces
    assert sizes[1:] == [(16, 12)]
    list(listener.transcribe_files([str(files / "short.wav")] * 5))  # no third size is compiled
    assert sizes[2:] == [(16, 5)]


def test_the_help_needs_no_jax():
    code = (
        "import sys, flax_projector.__main__ as p\n"
        "try: p.cli(['transcribe', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'jax', 'av', 'soundfile'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "text|json|jsonl|srt|vtt" in done.stdout
