"""Reports: what is read of a folder, what becomes of it, and where it is written."""

import base64
import io
import json
import logging
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from flax_projector import __main__ as program
from flax_projector.data.batches import Batches
from flax_projector.data.manifest import read_manifest
from flax_projector.report import clips as clips_module
from flax_projector.report import writing
from flax_projector.report.curves import Curve, hours_at, read_curves, thinned
from flax_projector.report.differences import differences
from flax_projector.report.page import MARK
from flax_projector.run_folder import RunFolder
from tests.clips import make_batches
from tests.reports import PAIRS, make_run, make_tones
from tests.scored import scored, write_scores


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "runs" / "first")


def report(*args: str | Path) -> None:
    program.cli(["report", *map(str, args)])


def make_sets(run: Path) -> dict[str, Batches]:
    """The sets of a run that trains: both are its held-out clips."""
    rows, _ = read_manifest(run / "speech" / "dev.jsonl")
    batches = make_batches(rows)
    return {"train": batches, "dev": batches}


def data_of(page: Path) -> dict:
    """What the page's script is given."""
    pattern = r'<script type="application/json" id="page-data">(.*?)</script>'
    (found,) = re.findall(pattern, page.read_text("utf-8"), re.S)
    return json.loads(found)


def text_of(page: Path) -> str:
    """The text of the page, without what scripts show."""
    html = re.sub(r"<(script|style)\b.*?</\1>", "", page.read_text("utf-8"), flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def test_a_report_shows_what_is_in_the_run_folder(run):
    report(run)
    data, text = data_of(run / "report.html"), text_of(run / "report.html")
    assert "step 40 of 40, finished, 5.00 hours of audio, lowest error rate at step 20" in text
    titles = [chart["title"] for chart in data["charts"]]
    assert titles == [
        *("Loss", "Word error rate", "Character error rate", "Learning rate", "Gradient norm"),
        *("Weight norms", "Scales of the norms", "Audio tokens against text", "Speed"),
        "Waiting for data",
    ]
    loss = {line["name"]: line for line in data["charts"][0]["lines"]}
    assert list(loss) == ["CTC warm start", "training", "dev"]
    assert loss["dev"]["steps"] == [0, 20, 40] and loss["dev"]["hours"] == [0, 2.5, 5]
    assert loss["training"]["values"][-1] == 0.125
    wer = data["charts"][1]["lines"][0]
    assert wer["values"] == [200.0, 9.5238, 4.878]  # in percent
    assert [found["set"] for found in data["lengths"]] == ["train"]
    assert "missing file no 1" in text and "silent yes, but doubtful 1" in text
    assert "--data.batch-size 8" in text
    assert "dev 40.0%" in text  # 6 of 15 words


def test_every_utterance_has_its_clip_and_its_differences(run):
    report(run)
    rows = {row["id"]: row for row in data_of(run / "report.html")["utterances"]}
    assert set(rows) == set(PAIRS)
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(rows["dev/1"]["sound"])))
    assert rate == 16_000 and abs(len(samples) / rate - 1.5) < 0.2  # MP3 pads its ends
    loudest = np.argmax(np.abs(np.fft.rfft(samples))) * rate / len(samples)
    assert abs(loudest - 250) < 3  # the tone of this clip, and of no other one
    (result,) = rows["dev/1"]["results"]
    assert result["errors"] == 3 and result["length"] == 5
    assert result["parts"] == [
        ["=", "turn"],
        ["~", "left", "right"],
        ["=", "and"],
        *([["+", "", "now"], ["=", "go"], ["-", "on", ""]]),
    ]


@pytest.mark.parametrize(
    ("said", "heard", "expected"),
    [
        ("go on", "go on", [("equal", "go on", "go on")]),
        ("go on", "", [("delete", "go on", "")]),
        ("Go, on!", "go", [("equal", "go", "go"), ("delete", "on", "")]),
        ("um", "go", [("insert", "", "go")]),  # nothing is left to compare with
        ("um", "", [("equal", "", "")]),
        (
            "今天好",
            "今日 好",
            [("equal", "今", "今"), ("substitute", "天", "日"), ("equal", "好", "好")],
        ),
    ],
)
def test_differences_are_those_that_were_counted(said, heard, expected):
    normalizer = "english" if said.isascii() else "basic"
    assert differences(scored({"a": (said, heard)}, normalizer=normalizer)) == [expected]


def test_several_runs_share_a_page(run, tmp_path):
    pairs = PAIRS | {"dev/1": ("turn left and go on", "turn left and go on")}
    other = make_run(tmp_path / "runs" / "other", pairs=pairs, num_steps=20, seed=7)
    report(run, other, "--out", tmp_path / "both.html")
    data, text = data_of(tmp_path / "both.html"), text_of(tmp_path / "both.html")
    assert data["runs"] == ["first", "other"]
    assert {line["run"] for line in data["charts"][0]["lines"]} == {0, 1}
    rows = {row["id"]: row for row in data["utterances"]}
    assert [result["errors"] for result in rows["dev/1"]["results"]] == [3, 0]
    assert len(rows) == len(PAIRS)
    html = (tmp_path / "both.html").read_text()
    differing = re.findall(r'<tr class="differs"><th scope="row">(\S+)', html)
    assert {"--seed", "--num-steps", "--out"} <= set(differing)
    assert "--optimizer.learning-rate" not in differing and "--optimizer.learning-rate" in text


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / name / "run") for name in ("a", "b")]
    report(*folders, "--out", tmp_path / "both.html")
    assert data_of(tmp_path / "both.html")["runs"] == ["a/run", "b/run"]


def test_scores_of_an_evaluation_have_a_report_and_clips_if_they_are_named(tmp_path):
    folder = tmp_path / "scores"
    write_scores(folder / "dev.jsonl", scored(PAIRS))
    report(folder)
    rows = data_of(folder / "report.html")["utterances"]
    assert {row["sound"] for row in rows} == {None}
    assert rows[0]["silent"] == "it is not known where the clips of dev are: name them with --data"
    report(folder, "--data", make_tones(tmp_path / "speech", PAIRS))
    assert all(row["sound"] for row in data_of(folder / "report.html")["utterances"])


HALF = {  # what a run folder lacks: what the page says
    "metrics.jsonl": "no step has been logged yet",
    "config.json": "step 40, 5.00 hours of audio",
    "lengths.json": "How long the utterances are is not known",
    "bad_rows.jsonl": "No row of the data was left out.",
    "best.json": "step 40 of 40, finished, 5.00 hours of audio Written",
}


@pytest.mark.parametrize("missing", HALF)
def test_half_a_run_is_shown_as_far_as_it_is_there(run, missing):
    (run / missing).unlink()
    report(run)
    assert HALF[missing] in text_of(run / "report.html")


DAMAGED = {  # a file, its contents, and the warning, which the page has too
    "metrics.jsonl": (
        '{"step": 1, "loss": 2.0}\n{"st\nnull\n{"loss": 1}\n',
        "3 lines are damaged, and left out, from line 2 on",
    ),
    "best.json": ("[", "best.json is damaged, and left out (JSONDecodeError:"),
    "lengths.json": ('{"train": {"counts": [1]}}', "lengths.json is damaged, and left out (KeyE"),
    "bad_rows.jsonl": ('{"set": 1}\n', "bad_rows.jsonl is damaged, and left out (KeyError: 'id')"),
    "config.json": ("[1]", "config.json is damaged, and left out (TypeError: expected an object)"),
    "transcripts/dev-000040.jsonl": ("{}\n", "dev-000040.jsonl, line 1: has no id, reference"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_left_out_with_one_warning(run, capsys, name):
    content, warning = DAMAGED[name]
    (run / name).write_text(content)
    report(run)
    line, written = capsys.readouterr().err.splitlines()
    assert warning in line and "report written: " in written
    assert warning[:30].split("(")[0].strip() in text_of(run / "report.html")


def test_a_line_that_is_being_written_is_no_damage():
    curves, damaged = read_curves(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert not damaged and curves["loss"].steps.tolist() == [1]


def test_of_a_step_that_was_done_again_the_last_value_counts():
    lines = [(1, 9.0), (2, 8.0), (3, 7.0), (2, 5.0), (3, float("nan"))]
    text = "".join(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in lines)
    curve = read_curves(text.encode())[0]["loss"]
    assert (curve.steps.tolist(), curve.values.tolist()) == ([1, 2, 3], [9.0, 5.0, 7.0])


def test_hours_of_evaluations_lie_between_those_of_training():
    curves = {"audio_hours": Curve(np.array([10, 20]), np.array([1.0, 3.0]))}
    assert hours_at(curves, np.array([0, 10, 15, 20, 30])).tolist() == [0, 1, 2, 3, 3]
    assert hours_at({}, np.array([5])).tolist() == [0]


def test_a_long_curve_keeps_its_extremes_and_its_ends():
    rng = np.random.default_rng(0)
    curve = Curve(np.arange(1, 100_001), rng.normal(size=100_000))
    curve.values[[0, 54_321, 77_777, -1]] = [3, 50, -50, 2]
    thin = thinned(curve)
    assert len(thin.steps) <= 1500 and (np.diff(thin.steps) > 0).all()
    assert {1, 54_322, 77_778, 100_000} <= set(thin.steps.tolist())
    assert np.array_equal(thin.values, curve.values[thin.steps - 1])
    assert thinned(thin) is thin


WRONG = {  # arguments, in a folder made by `a_mess`, and the error
    "no folder": ([], "name at least one folder of a run"),
    "missing": (["nothing"], "nothing does not exist"),
    "a file": (["run/config.json"], "run/config.json is a file: name the folder of a run"),
    "empty": (["empty"], "empty is neither the folder of a run, which has a metrics.jsonl, nor"),
    "a projector": (
        ["projector"],
        "projector holds a model, and nothing that was measured: run `python -m flax_projector "
        "evaluate projector SET --out SCORES`, and then `python -m flax_projector report SCORES`",
    ),
    "no scores": (["manifest"], "manifest/dev.jsonl, line 1: has no reference, hypothesis"),
    "twice": (["run", "run", "--out", "x.html"], "run is named more than once"),
    "no place": (["run", "other"], "several folders have one report: say where with --out FILE"),
    "a folder": (["run", "--out", "empty"], "empty is a folder: name a file"),
    "another file": (["run", "--out", "notes.html"], "notes.html exists and is not a report: "),
    "below a file": (
        ["run", "--out", "notes.html/x"],
        "notes.html/x could not be written: File ",
    ),
    "a url": (["run", "--out", "s3://x/y"], "s3://x/y is a URL that cannot be used here: expected"),
    "no such data": (["run", "--data", "none.jsonl", "--out", "notes.html"], "notes.html exists"),
}


@pytest.fixture(scope="module")
def a_mess(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mess")
    for name in ("run", "other"):
        make_run(folder / name)
    for name in ("empty", "projector/params", "manifest"):
        (folder / name).mkdir(parents=True)
    (folder / "projector/config.json").write_text("{}")
    (folder / "manifest/dev.jsonl").write_text('{"id": "a", "audio": "a.wav", "text": "a"}\n')
    (folder / "notes.html").write_text("<!doctype html>my notes")
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_changes_nothing(a_mess, monkeypatch, case):
    args, message = WRONG[case]
    monkeypatch.chdir(a_mess)
    before = sorted(a_mess.rglob("*"))
    with pytest.raises(SystemExit) as error:
        report(*args)
    assert str(error.value.code).startswith(f"error: {message}")
    assert "\n" not in str(error.value.code)
    assert sorted(a_mess.rglob("*")) == before
    assert (a_mess / "notes.html").read_text() == "<!doctype html>my notes"


def test_a_report_replaces_an_earlier_one(run):
    report(run)
    (run / "report.html").write_text(f"<!doctype html>{MARK}")
    report(run)
    assert data_of(run / "report.html")["runs"] == ["first"]


SILENT = {  # what is done to the clips, and why there is no player
    "a clip is gone": ("0.wav", "0.wav does not exist"),
    "the manifest is gone": ("dev.jsonl", "dev.jsonl"),
}


@pytest.mark.parametrize("case", SILENT)
def test_what_cannot_be_read_has_no_player_and_the_reason(run, case):
    name, reason = SILENT[case]
    (run / "speech" / name).unlink()
    report(run)
    rows = {row["id"]: row for row in data_of(run / "report.html")["utterances"]}
    assert rows["dev/0"]["sound"] is None and reason in rows["dev/0"]["silent"]
    assert bool(rows["dev/1"]["sound"]) == (name == "0.wav")


ODD = {  # samples, and why a clip of them has no player, if it has none
    "not a number": ([math.nan], "has samples that are not finite"),
    "infinite": ([math.inf], "has samples that are not finite"),
    "far beyond full scale": ([1e30], "has a sample of 1e+30; full scale is 1"),
    "too loud": ([-90.0, 90.0], None),
    "at full scale": ([-1.0, 1.0], None),
    "silent": ([0.0], None),
    "a constant": ([0.5], None),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_sound_ends_no_process(run, case):
    """LAME aborts on some of it: this is read by training, which must go on."""
    pattern, reason = ODD[case]
    samples = np.concatenate([np.full(8000, 0.1), np.resize(pattern, 16_000)])
    soundfile.write(run / "speech" / "1.wav", samples, 16_000, subtype="FLOAT")
    report(run)
    (row,) = [r for r in data_of(run / "report.html")["utterances"] if r["id"] == "dev/1"]
    assert bool(row["sound"]) == (reason is None)
    assert (reason or "") in (row["silent"] or "")


def test_the_worst_have_players_if_not_all_fit(run, monkeypatch):
    monkeypatch.setattr(clips_module, "MAX_CLIPS", 2)
    report(run)
    data = data_of(run / "report.html")
    assert {row["id"] for row in data["utterances"] if row["sound"]} == {"dev/1", "dev/2"}
    assert "2 of 4 utterances have a player: the worst of each set" in text_of(run / "report.html")
    monkeypatch.setattr(clips_module, "MAX_CLIPS", 200)
    sizes = {row["id"]: len(row["sound"]) for row in data["utterances"] if row["sound"]}
    monkeypatch.setattr(clips_module, "MAX_BYTES", sizes["dev/1"] + 10)
    report(run)
    rows = data_of(run / "report.html")["utterances"]
    assert {row["id"] for row in rows if row["sound"]} == {"dev/1"}


def test_texts_of_users_are_inert(tmp_path):
    evil = "</script><img src=x onerror=alert(1)>'\"&{{ 7 * 7 }}"
    run = make_run(tmp_path / "<b>run", pairs={f"id{evil}": (f"go {evil}", f"stop {evil}")})
    bad = {"set": "train", "id": evil, "reason": "silent", "detail": evil, "is_used": False}
    (run / "bad_rows.jsonl").write_text(json.dumps(bad | {"id": "\ud800"}) + "\n")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"encoder": evil}))
    report(run)
    html = (run / "report.html").read_text("utf-8")
    ours = re.sub(r"<script>.*?</script>", "", html, flags=re.S)
    assert "<img" not in ours and "<b>run" not in ours and ours.count("</script>") == 1
    assert "{{ 7 * 7 }}" in ours
    assert data_of(run / "report.html")["utterances"][0]["said"] == f"go {evil}"


def test_training_writes_a_report_and_the_lengths_of_its_clips(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "lengths.json").unlink()
    writing.Reporter(RunFolder(run), make_sets(run))()
    data = data_of(run / "report.html")
    assert all(row["sound"] for row in data["utterances"])
    lengths = {found["set"]: found for found in data["lengths"]}
    assert lengths["train"]["num_utterances"] == sum(lengths["train"]["counts"]) == 4
    assert sorted(lengths) == ["dev", "train"]


def test_a_set_that_is_no_longer_evaluated_keeps_its_scores(tmp_path):
    run = make_run(tmp_path / "run")
    sets = make_sets(run)
    writing.Reporter(RunFolder(run), {"train": sets["train"]})()
    row = data_of(run / "report.html")["utterances"][0]
    assert row["sound"] is None and "no longer evaluated on this set" in row["silent"]


def test_clips_are_read_once_for_all_evaluations(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    reporter = writing.Reporter(RunFolder(run), make_sets(run))
    read = []
    monkeypatch.setattr(
        clips_module, "load_audio", lambda audio, **_: read.append(audio) or np.zeros(16_000)
    )
    reporter()
    reporter()
    assert len(read) == len(PAIRS)


def test_a_report_that_cannot_be_written_is_one_warning_and_the_training_goes_on(tmp_path, caplog):
    run = make_run(tmp_path / "run")
    (run / "report.html").mkdir()
    reporter = writing.Reporter(RunFolder(run), make_sets(run))
    reporter()
    reporter()
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "report.html is not written: NotWritten: " in record.getMessage()
    assert not [name for name in os.listdir(run) if "partial" in name]
