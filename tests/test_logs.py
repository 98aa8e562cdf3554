"""How a program shows its progress: bars on terminals, plain lines elsewhere."""

import asyncio
import gc
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from flax_projector import logs
from flax_projector.logs import at_step, one_of_several, printable, progress_bar, setup_logging

log = logging.getLogger("flax_projector.test")


@pytest.fixture
def clock(monkeypatch):
    """The time that progress bars see."""
    clock = SimpleNamespace(secs=1000.0)
    monkeypatch.setattr("tqdm.std.time", lambda: clock.secs)
    return clock


def work(clock, secs: int, *, label: str = "clips", **options) -> None:
    """A unit of work per second."""
    with progress_bar(log, label, total=secs, unit="clip", **options) as progress:
        for _ in range(secs):
            clock.secs += 1
            progress.update()


def test_off_a_terminal_a_line_appears_every_half_minute_and_one_at_the_end(clock, caplog, capsys):
    caplog.set_level(logging.INFO)
    work(clock, 100)
    assert caplog.messages == [
        "clips: 30/100 clip in 00:30, 1.00clip/s",
        "clips: 60/100 clip in 01:00, 1.00clip/s",
        "clips: 90/100 clip in 01:30, 1.00clip/s",
        "clips: 100/100 clip in 01:40, 1.00clip/s",
    ]
    assert capsys.readouterr().err == "", "something was drawn"


def test_an_end_when_a_line_was_due_anyway_is_written_once(clock, caplog):
    caplog.set_level(logging.INFO)
    work(clock, 60)
    assert caplog.messages == [
        "clips: 30/60 clip in 00:30, 1.00clip/s",
        "clips: 60/60 clip in 01:00, 1.00clip/s",
    ]


def test_the_last_line_shows_the_last_numbers(clock, caplog):
    caplog.set_level(logging.INFO)
    with progress_bar(log, "train", total=1, unit="step") as progress:
        clock.secs += 60
        progress.update()
        progress.set_postfix({"loss": "1.5"})
    assert [message.endswith("loss=1.5") for message in caplog.messages] == [False, True]


def test_short_work_writes_no_line(clock, caplog):
    caplog.set_level(logging.INFO)
    work(clock, 29)
    assert not caplog.messages


def test_slow_work_writes_a_line_when_there_is_something_new(clock, caplog):
    caplog.set_level(logging.INFO)
    with progress_bar(log, "clips", total=2, unit="clip") as progress:
        clock.secs += 200
        progress.update()
        progress.set_postfix({"loss": "1.5"})  # a number that changes is no reason for a line
        assert caplog.messages == ["clips: 1/2 clip in 03:20, 200.00s/clip"]
        clock.secs += 200
        progress.update()
    assert caplog.messages[-1] == "clips: 2/2 clip in 06:40, 200.00s/clip, loss=1.5"


def test_a_bar_that_starts_in_the_middle_says_so(clock, caplog):
    caplog.set_level(logging.INFO)
    with progress_bar(log, "train", total=100, initial=60, unit="step") as progress:
        clock.secs += 30
        progress.update(10)
    assert caplog.messages[0].startswith("train: 70/100 step in 00:30")


def test_work_of_unknown_length_counts_what_is_done(clock, caplog):
    caplog.set_level(logging.INFO)
    with progress_bar(log, "rows", total=None, unit="row") as progress:
        clock.secs += 40
        progress.update(400)
    assert caplog.messages[0].startswith("rows: 400/? row in 00:40")


@pytest.mark.parametrize("terminal", [False, True])
def test_where_the_log_is_silent_nothing_is_shown(clock, caplog, capsys, monkeypatch, terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    caplog.set_level(logging.WARNING)
    work(clock, 100)
    assert not caplog.messages
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_bar_is_drawn_and_nothing_logged(clock, caplog, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    caplog.set_level(logging.INFO)
    work(clock, 100)
    drawn = capsys.readouterr().err
    assert drawn.count("\r") > 10 and "100/100" in drawn
    assert not caplog.messages


@pytest.mark.parametrize(("process_index", "is_shown"), [(0, True), (1, False)])
def test_only_the_first_process_talks(clock, caplog, monkeypatch, process_index, is_shown):
    monkeypatch.setattr(logs._Formatter, "process", None)
    loggers = [logging.getLogger(name) for name in ("flax_projector", "convert", "train")]
    levels = [logger.level for logger in loggers]
    caplog.set_level(logging.INFO)
    try:
        one_of_several(process_index)
        work(clock, 40)
        log.warning("a warning of any process")
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    assert any(message.startswith("clips: ") for message in caplog.messages) == is_shown
    assert "a warning of any process" in caplog.messages


def test_lines_of_several_processes_carry_process_and_step(monkeypatch, capsys):
    for name in ("process", "step"):
        monkeypatch.setattr(logs._Formatter, name, None)
    setup_logging("%(message)s")
    log = logging.getLogger("train")
    at_step(7)
    log.warning("alone")
    at_step(None)
    one_of_several(3)
    log.warning("begins")
    at_step(120)
    log.warning("trains %s", "on\nand on")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["alone", "[3] begins", "[3 step 120] trains on", "and on"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a clip.wav", "a clip.wav"),
        (
            "gehört 词 أحب \u200d👩\u200d🚀.wav",
            "gehört 词 أحب \u200d👩\u200d🚀.wav",
        ),  # with joiners
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("one\ntwo\r\tthree", r"one\ntwo\r\tthree"),
        ("\x9b2J\x7f\x00", r"\x9b2J\x7f\x00"),
        ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
        ("exe\u202egpj.wav", r"exe\u202egpj.wav"),
        (os.fsdecode(b"\xff.wav"), r"\udcff.wav"),
    ],
)
def test_names_of_users_are_printed_on_one_line_that_garbles_nothing(
    text, expected, capsys, caplog
):
    assert printable(text) == expected
    expected.encode()
    setup_logging()
    log.warning("%s\n  is a file", text)
    kept = expected.replace(r"\n", "\n").replace(r"\t", "\t")  # messages may have several lines
    assert capsys.readouterr().err.endswith(f" {kept}\n  is a file\n")


def test_a_progress_bar_with_a_name_of_a_user_garbles_nothing(clock, caplog):
    caplog.set_level(logging.INFO)
    work(clock, 30, label="\x1b[2Jdev.jsonl")
    assert caplog.messages[0].startswith(r"\x1b[2Jdev.jsonl: 30/30")


def test_errors_that_libraries_log_and_raise_are_not_shown_twice(capsys):
    setup_logging()
    try:
        raise OSError("full")
    except OSError:
        logging.getLogger("absl").exception("failed")
    thread = threading.Thread(target=lambda: os.stat("/nowhere"))
    thread.start()
    thread.join()

    async def fail():
        raise OSError("full")

    async def forget():
        await asyncio.wait([asyncio.create_task(fail())])

    asyncio.run(forget())
    gc.collect()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["ascii", None])
def test_programs_read_and_show_other_names_in_an_ascii_locale(tmp_path, encoding):
    (tmp_path / "ä").write_text("there")
    script = (
        "import logging, sys\n"
        "from flax_projector.logs import setup_logging, start_in_utf8\n"
        "start_in_utf8()\n"
        "setup_logging('%(message)s')\n"
        "print(open('ä', encoding='utf-8').read(), sys.argv[1])\n"
        "logging.getLogger('train').info('\\xe4')\n"
    )
    (tmp_path / "program.py").write_text(script, "utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ascii_only |= {"PYTHONIOENCODING": encoding} if encoding else {}
    done = subprocess.run(
        [sys.executable, "program.py", "ä"],
        cwd=tmp_path,
        env={**os.environ, **ascii_only, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        encoding="utf-8",
    )
    shown = r"\xe4" if encoding else "ä"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"there {shown}\n", f"{shown}\n")
