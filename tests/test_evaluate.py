"""Evaluations of a tiny run: by the run itself, and by the program afterwards."""

import dataclasses
import json
import logging
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile

import train_tpu
from flax_projector import __main__ as program
from flax_projector.commands.decoding import Decoding
from flax_projector.commands.evaluate import Evaluate
from flax_projector.commands.transcribe import Transcribe
from flax_projector.commands.use import Use
from flax_projector.config import DataConfig, DecodeConfig, TrainConfig, option
from flax_projector.data.rows import ManifestRow
from flax_projector.data.sources import eval_normalizers
from flax_projector.data.utterances import Utterance, Utterances
from flax_projector.inference import listen
from flax_projector.inference.listen import Listener
from flax_projector.models.speech_llm import Params
from flax_projector.run_folder import RunFolder
from flax_projector.storage import AnyPath
from flax_projector.training.best import Best
from flax_projector.training.evaluate import _too_long
from flax_projector.training.held_out import HeldOut
from flax_projector.training.metrics import MetricsWriter
from flax_projector.training.score_files import read_scores
from tests.clips import spoil
from tests.scored import NORMALIZERS
from tests.tiny import make_speech, tiny_config

pytestmark = pytest.mark.torch

LIMIT = 4  # tokens of a hypothesis; "go" and the end of its turn take 3, "left" takes 5


def with_texts(manifest: str, *texts: str) -> str:
    """A manifest of which the first rows have other texts."""
    rows = [json.loads(line) for line in Path(manifest).read_text().splitlines()]
    for row, text in zip(rows, texts, strict=False):
        row["text"] = text
    Path(manifest).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_towers) -> tuple[TrainConfig, list[str]]:
    """A finished run of one step, with two sets of the same file name; and what it warned of."""
    home, warnings = tmp_path_factory.mktemp("run"), []
    sets = [make_speech(home / name, 3, seed=seed) for name, seed in (("a", 1), ("b", 2))]
    with_texts(sets[0], "Go!", "go", "go!")
    with_texts(sets[1], "Go!", "go", "left right")
    data = {"eval": tuple(sets), "eval_normalizers": ("basic", "none"), "bucket_secs": (2.0,)}
    config = tiny_config(home, tiny_towers, num_steps=1, max_new_tokens=LIMIT, data=data)
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logger = logging.getLogger("flax_projector")
    logger.addHandler(handler)
    try:
        train_tpu.main(config, devices=jax.devices()[:1])
    finally:
        logger.removeHandler(handler)
    return config, warnings


@pytest.fixture(scope="module")
def listener(run) -> Listener:
    return Listener(run[0].out)


def test_two_sets_of_one_file_name_have_their_own_scores_by_their_own_normalisers(run):
    config, _ = run
    lines = RunFolder.of(config).metrics.read_text().splitlines()
    scores = {name for line in lines for name in json.loads(line) if name.startswith("eval/")}
    assert scores == {
        f"eval/{set}-clips/{name}" for set in "ab" for name in ("loss", "wer", "cer", "num_cut")
    }
    for name, normalizer, said in (("a-clips", "basic", "go"), ("b-clips", "none", "Go!")):
        transcripts = read_scores(str(RunFolder.of(config).transcripts(name, 1)))
        assert {(t.set, t.normalizer) for t in transcripts} == {(name, normalizer)}
        assert sorted(t.id for t in transcripts) == ["clip0", "clip1", "clip2"]
        by_id = {t.id: t for t in transcripts}
        assert by_id["clip0"].normalized_reference == said
        clips = Path(config.data.eval["ab".index(name[0])]).parent
        for i in range(3):
            secs = soundfile.info(clips / f"{i}.wav").duration
            assert by_id[f"clip{i}"].secs == pytest.approx(secs, abs=1e-3)


def test_a_limit_of_tokens_that_references_exceed_is_said_at_the_start(run):
    """Which is said once, and hypotheses that it cuts are counted."""
    config, warnings = run
    (line,) = [line for line in warnings if "--max-new-tokens" in line]
    assert line == (
        "b-clips: 1 of 3 references take more than --max-new-tokens 4, up to 11: their transcripts "
        "will be cut"
    )
    end = json.loads(RunFolder.of(config).prompt.read_text())["end_of_turn_id"]
    records = [json.loads(line) for line in RunFolder.of(config).metrics.read_text().splitlines()]
    for step in (0, 1):
        found = {}
        for record in records:
            if record["step"] == step:
                found |= {name: v for name, v in record.items() if name.endswith("num_cut")}
        for name in ("a-clips", "b-clips"):
            transcripts = read_scores(str(RunFolder.of(config).transcripts(name, step)))
            is_cut = [end not in t.tokens for t in transcripts]
            assert [t.cut_by == "max_new_tokens" for t in transcripts] == is_cut
            assert found[f"eval/{name}/num_cut"] == sum(is_cut)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"max_new_tokens": 5}, ["2 of 4 references take more than --max-new-tokens 5, up to 9"]),
        ({"tokens_per_sec": 0.0}, []),
        (
            {"tokens_per_sec": 0.9},
            ["1 of 4 references take more than --tokens-per-sec 0.9 and 8, up to 1"],
        ),
        (
            {"tokens_per_sec": 0.9, "max_new_tokens": 8},  # the lower limit is named
            ["2 of 4 references take more than --max-new-tokens 8, up to 9"],
        ),
    ],
    ids=str,
)
def test_limits_that_references_exceed_are_named(options, expected):
    """Of clips of a second with 1, 5 and 9 labels, and of 4 with 9."""
    utterances = Utterances.of(
        [
            Utterance(ManifestRow(str(i), "x.wav", "x", secs), 100, (1,) * count)
            for i, (secs, count) in enumerate([(1.0, 1), (1.0, 5), (1.0, 9), (4.0, 9)])
        ]
    )
    config = DecodeConfig(**options)
    texts = [f"{text}: their transcripts will be cut" for text in expected]
    assert list(_too_long(utterances, config)) == texts


@pytest.mark.parametrize("command", [Transcribe, Evaluate])
def test_options_of_decoding_are_those_of_the_config(command, run, monkeypatch):
    """Each is there, and those that are given replace the run's."""
    fields = {field.name for field in dataclasses.fields(DecodeConfig)}
    assert {field.name for field in dataclasses.fields(Decoding)} == fields
    assert fields <= {field.name for field in dataclasses.fields(command)}
    made = {}
    monkeypatch.setattr(listen, "Listener", lambda run, **options: made.update(options))
    given = {"beams": 4, "length_penalty": 0.5, "tokens_per_sec": 0.0}
    name = command.__name__.lower()
    args = [x for key, value in given.items() for x in (option(key), str(value))]
    monkeypatch.setattr(command, "__call__", lambda self: self.listener())
    program.cli([name, run[0].out, "x", *args])
    assert made["decoding"] == given


def test_a_run_that_is_decoded_with_beams_says_so_of_bad_ones(run, evaluate):
    config, _ = run
    with pytest.raises(ValueError, match=r"^--beams = 0: must be at least 1$"):
        Listener(config.out, decoding={"beams": 0})
    decoded = Listener(config.out, decoding={"beams": 3, "max_new_tokens": 7})
    assert decoded.config.decoding == DecodeConfig(beams=3, max_new_tokens=7)
    scores = decoded.evaluate(config.data.eval[0], name="a-clips")
    assert {len(t.tokens) for t in scores.transcripts} == {7}


def test_a_set_without_words_is_named_before_the_first_step(run, listener, tmp_path):
    """In training as by the program, whose errors name the set."""
    manifest = with_texts(make_speech(tmp_path / "mute", 2), "um", "[noise]")
    batches = listener._batches.make("mute", [listener._batches.read(manifest)], batch_size=8)
    folder = RunFolder(tmp_path / "run")
    message = "mute: none of 2 references has a word in it after normalisation by 'english', such"

    def write(path: AnyPath, params: Params) -> None:
        pytest.fail("writes")

    with MetricsWriter(folder) as writer, pytest.raises(ValueError, match=message):
        HeldOut(
            evaluator=listener._evaluator,
            sets={"mute": batches},
            normalizers={"mute": "english"},
            frozen=listener.loaded.frozen,
            writer=writer,
            best=Best(folder, write),
            report=lambda: None,
        )
    with pytest.raises(SystemExit, match=f"^error: clips: {message[6:]}"):
        program.cli(["evaluate", run[0].out, manifest, "--normalizer", "english"])


@pytest.fixture
def evaluate(run, monkeypatch, listener, capsys):
    """What `evaluate` prints; the run is loaded only once."""

    def evaluate(*args: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(Use, "listener", lambda _: listener)
            program.cli(["evaluate", run[0].out, *args])
        return capsys.readouterr().out

    return evaluate


def test_what_evaluate_writes_is_what_the_run_wrote_and_what_score_prints(
    run, evaluate, tmp_path, capsys
):
    config, _ = run
    shown = evaluate(*config.data.eval, "--out", str(tmp_path / "out"))
    assert "a-clips: WER " in shown and "b-clips: WER " in shown
    scored = ""
    for name in ("a-clips", "b-clips"):
        path = tmp_path / "out" / f"{name}.jsonl"
        assert path.read_text() == RunFolder.of(config).transcripts(name, 1).read_text()
        program.cli(["score", str(path)])
        scored += capsys.readouterr().out
    assert scored == re.sub(r"  loss .*\n", "", shown)


def test_the_normaliser_of_the_program_is_another_if_it_is_given(run, evaluate, tmp_path):
    config, _ = run
    evaluate(config.data.eval[1], "--normalizer", "english", "--out", str(tmp_path))
    transcripts = read_scores(str(tmp_path / "clips.jsonl"))
    assert {t.normalizer for t in transcripts} == {"english"}
    (record,) = map(json.loads, evaluate(config.data.eval[1], "--json").splitlines())
    assert record["normalizer"] == "none" and record["set"] == "clips"
    assert set(record) >= {"source", "loss", "wer", "cer", "words", "characters", "num_cut"}


def test_an_earlier_result_is_never_replaced_and_a_file_is_no_folder(run, evaluate, tmp_path):
    (tmp_path / "clips.jsonl").write_text("kept")
    out = {
        tmp_path: r"--out: .*/clips.jsonl exists already: choose another folder",
        tmp_path / "clips.jsonl": r"--out .*/clips.jsonl: .*/clips.jsonl is no folder that can be",
        tmp_path / "clips.jsonl" / "x": r"--out .*/x: .*/clips.jsonl is no folder that can be",
    }
    for folder, message in out.items():
        with pytest.raises(SystemExit, match=f"^error: {message}"):
            evaluate(run[0].data.eval[0], "--out", str(folder))
    assert (tmp_path / "clips.jsonl").read_text() == "kept"


def test_silence_is_heard_as_clips_of_zeros_are(run, evaluate, tmp_path):
    """The same clips are scored, and those that cannot be read stay so."""
    manifest = make_speech(tmp_path / "dev", 4, seed=3)
    spoil(manifest, 1)
    evaluate(manifest, "--silence", "--normalizer", "basic", "--out", str(tmp_path))
    assert evaluate(manifest, "--silence", "--normalizer", "basic").count("clips-silence: WER") == 1
    silence = read_scores(str(tmp_path / "clips-silence.jsonl"))
    for i in (0, 2, 3):
        path = Path(manifest).with_name(f"{i}.wav")
        soundfile.write(path, np.zeros(soundfile.info(path).frames), 16_000)
    evaluate(manifest, "--normalizer", "basic", "--out", str(tmp_path))
    zeros = read_scores(str(tmp_path / "clips.jsonl"))
    assert [dataclasses.replace(t, set="clips") for t in silence] == zeros
    assert [t.id for t in silence if t.is_bad] == ["clip1"] and silence[0].tokens


@pytest.mark.parametrize(
    ("normalizers", "expected"),
    [
        (("basic",), {"a": "basic", "b": "basic", "other": "basic"}),
        (("none", "none"), {"a": "none", "b": "none", "other": "none"}),
        (("none", "basic"), {"a": "none", "b": "basic", "other": None}),
    ],
)
def test_normalisers_are_one_for_all_sets_or_one_for_each(normalizers, expected):
    data = DataConfig(eval=("a", "b"), eval_normalizers=normalizers)
    for source, name in expected.items():
        if name is not None:
            assert data.normalizer_of(source) == name
            continue
        with pytest.raises(
            ValueError, match=r"^other is none of the run's --data.eval, .*--normal"
        ):
            data.normalizer_of(source)


@pytest.mark.parametrize("normalizers", [(), ("basic", "none"), ("basic",) * 4])
def test_a_number_of_normalisers_that_fits_no_sets_is_an_error(normalizers):
    with pytest.raises(ValueError, match=r"--data.eval-normalizers = .* one for each of 3 eval so"):
        DataConfig(eval=("a", "b", "c"), eval_normalizers=normalizers)


def test_normalisers_are_found_by_the_names_of_sets(run):
    assert eval_normalizers(run[0]) == {"a-clips": "basic", "b-clips": "none"}
    assert set(NORMALIZERS) == {"english", "basic", "none"}


def test_a_resumed_run_whose_set_is_another_says_so(run, caplog, tmp_path):
    """A set keeps its name as long as no other of its sets has it, so its curve would go on."""
    config, _ = run
    maker = Listener(config.out)._batches
    for sources, warned in ((config.data.eval, 0), ((config.data.eval[1],), 0)):
        data = dataclasses.replace(config.data, eval=sources, eval_normalizers=("basic",))
        dataclasses.replace(maker, config=dataclasses.replace(config, data=data)).eval()
        assert caplog.text.count("when the run began") == warned
    other = make_speech(tmp_path / "x" / "a", 2)
    named = Path(other).rename(Path(other).with_name("a-clips.jsonl"))
    data = dataclasses.replace(config.data, eval=(str(named),), eval_normalizers=("basic",))
    dataclasses.replace(maker, config=dataclasses.replace(config, data=data)).eval()
    assert (
        f"a-clips is {named} now, and was {config.data.eval[0]} when the run began" in caplog.text
    )
