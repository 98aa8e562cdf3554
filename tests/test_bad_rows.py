"""The list of rows that cannot be used: what it holds, what it counts, when it stops a run."""

import json
from pathlib import Path

import pytest

from flax_projector import hosts
from flax_projector.data.audio import Problem
from flax_projector.data.bad_rows import BadRow, BadRowLog


def defects(
    count: int, reason: Problem = Problem.UNDECODABLE, first: int = 0, *, is_used: bool = False
) -> list[BadRow]:
    rows = range(first, first + count)
    return [BadRow(f"r{i}", "a.jsonl", reason, "why", is_used=is_used) for i in rows]


def listed(path: Path) -> list[tuple[str, str]]:
    entries = map(json.loads, path.read_bytes().splitlines())
    return [(entry["set"], entry["id"]) for entry in entries]


def test_bad_rows_are_counted_by_reason_and_listed(tmp_path, caplog):
    bad_rows = BadRowLog(tmp_path / "run" / "bad_rows.jsonl", max_rate=0.05)
    found = [*defects(2), *defects(3, Problem.TOO_LONG, first=2)]
    bad_rows.start("train", found, num_rows=100)
    assert "train: 5 of 100 rows are left out: 3 too long, 2 undecodable" in caplog.text
    bad_rows.add("train", defects(1, Problem.NOT_FINITE, first=50) * 2)
    lines = (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [e["reason"] for e in entries] == ["undecodable"] * 2 + ["too_long"] * 3 + ["not_finite"]
    assert entries[-1] == {
        "set": "train",
        "id": "r50",
        "source": "a.jsonl",
        "reason": "not_finite",
        "detail": "why",
        "text": "",
        "is_used": False,
    }


def test_the_summary_of_a_run_has_every_set_and_reason():
    bad_rows = BadRowLog(None, max_rate=0.05)
    bad_rows.start("train", defects(2, Problem.TOO_LONG), num_rows=100)
    bad_rows.start("dev", [], num_rows=20)
    bad_rows.add("train", defects(1, first=2))
    expected = "rows left out: train 3 of 100 (2 too long, 1 undecodable); dev 0 of 20"
    assert bad_rows.summary() == expected


def test_doubtful_rows_are_counted_and_listed_but_neither_left_out_nor_defects(tmp_path, caplog):
    path = tmp_path / "bad.jsonl"
    bad_rows = BadRowLog(path, max_rate=0.0)
    bad_rows.start("train", [], num_rows=10)
    bad_rows.add("train", defects(3, Problem.SILENT, is_used=True))
    bad_rows.add("train", defects(1, Problem.CLIPPED, first=3, is_used=True))
    bad_rows.add("train", defects(4, Problem.SILENT, first=4, is_used=True))
    assert [line for line in caplog.messages if "left out" in line] == []
    assert caplog.messages == [
        "train: doubtful, but used: r0: why",
        "train: doubtful, but used: r3: why",
    ]
    expected = "train 0 of 10, and used but doubtful: 7 silent, 1 clipped"
    assert bad_rows.summary() == f"rows left out: {expected}"
    assert listed(path) == [("train", f"r{i}") for i in range(8)]
    again = BadRowLog(path, max_rate=0.0)
    assert len(again.known("train")) == 8
    again.start("train", [], num_rows=10, unreadable=defects(2, Problem.SILENT))
    assert listed(path) == [("train", "r0"), ("train", "r1")]


def test_doubtful_rows_that_are_dropped_are_left_out_but_no_defects(tmp_path, caplog):
    path = tmp_path / "bad.jsonl"
    bad_rows = BadRowLog(path, max_rate=0.0)
    bad_rows.start("train", [], num_rows=10)
    bad_rows.add("train", defects(2, Problem.SILENT))
    assert caplog.messages == ["train: left out r0: why; r1: why"]
    assert bad_rows.summary() == "rows left out: train 2 of 10 (2 silent)"
    again = BadRowLog(path, max_rate=0.0)
    again.start("train", [], num_rows=10, unreadable=defects(2, Problem.SILENT))
    assert listed(path) == [("train", "r0"), ("train", "r1")]


def test_without_a_file_the_log_is_the_list(caplog):
    BadRowLog(None, max_rate=1.0).start("dev", defects(1), num_rows=6)
    assert caplog.messages == [
        "dev: 1 of 6 rows are left out: 1 undecodable",
        "  r0: undecodable: why",
    ]
    caplog.clear()
    BadRowLog(None, max_rate=1.0).start("dev", defects(500), num_rows=600)
    assert len(caplog.messages) == 52 and caplog.messages[-1] == "  and 450 more"


@pytest.mark.parametrize("at_start", [True, False])
def test_the_run_stops_only_above_the_share(tmp_path, at_start):
    bad_rows = BadRowLog(tmp_path / "bad.jsonl", max_rate=0.03)
    bad_rows.start("train", defects(3), num_rows=100)
    bad_rows.start("dev", defects(3), num_rows=100)
    message = (
        r"(?s)train: 4 of 100 rows are defective \(4 undecodable\), more than --data.max-bad-rate "
        r"0.03 allows.*bad.jsonl\n  a.jsonl, r0: why\n.*  a.jsonl, r3: why\n"
        r"Repair .* or raise --data.max-bad-rate"
    )
    with pytest.raises(ValueError, match=message):
        if at_start:
            bad_rows.start("train", defects(4), num_rows=100)
        else:
            bad_rows.add("train", defects(1, first=3))


def test_clips_beyond_the_limits_do_not_stop_a_run(tmp_path):
    bad_rows = BadRowLog(tmp_path / "bad.jsonl", max_rate=0.0)
    by_design = [*defects(5, Problem.TOO_LONG), *defects(5, Problem.TOO_MANY_LABELS, first=5)]
    bad_rows.start("train", by_design, num_rows=10)
    assert len(listed(tmp_path / "bad.jsonl")) == 10


def test_a_start_replaces_what_earlier_starts_found(tmp_path):
    path = tmp_path / "bad.jsonl"
    for _ in range(3):
        with pytest.raises(ValueError, match="1 of 1 rows are defective"):
            BadRowLog(path, max_rate=0.0).start("train", defects(1), num_rows=1)
    assert listed(path) == [("train", "r0")]
    BadRowLog(path, max_rate=0.0).start("train", [], num_rows=1)
    assert not path.exists()


def test_what_an_earlier_start_could_not_read_counts_while_it_is_true(tmp_path):
    path = tmp_path / "bad.jsonl"
    bad_rows = BadRowLog(path, max_rate=0.03)
    bad_rows.start("train", defects(1, Problem.TOO_LONG, first=90), num_rows=100)
    bad_rows.start("dev", [], num_rows=10)
    bad_rows.add("train", defects(3))
    bad_rows = BadRowLog(path, max_rate=0.03)
    assert bad_rows.known("train") == {f"a.jsonl\tr{i}" for i in (90, 0, 1, 2)}
    by_design = defects(1, Problem.TOO_LONG, first=90)
    bad_rows.start("train", by_design, num_rows=100, unreadable=defects(2, first=1))
    assert listed(path) == [("train", f"r{i}") for i in (90, 1, 2)]  # r0 was repaired
    bad_rows.add("train", defects(2))
    with pytest.raises(ValueError, match="4 of 100 rows are defective"):
        bad_rows.add("train", defects(1, first=3))


def test_sets_that_have_not_started_again_stay_listed(tmp_path):
    bad_rows = BadRowLog(tmp_path / "bad.jsonl", max_rate=1.0)
    for name in ("train", "dev"):
        bad_rows.start(name, defects(1), num_rows=1)
    BadRowLog(tmp_path / "bad.jsonl", max_rate=1.0).start("train", [], num_rows=1)
    assert listed(tmp_path / "bad.jsonl") == [("dev", "r0")]


def test_a_list_that_is_cut_short_is_named(tmp_path):
    """Every list is written whole, even by a process that is killed."""
    path, row = tmp_path / "bad.jsonl", BadRow("x", "a", Problem.UNREADABLE, "why", "one\u2028two")
    bad_rows = BadRowLog(path, max_rate=1.0)
    bad_rows.start("train", [row], num_rows=3)
    bad_rows.add("train", defects(1))
    assert BadRowLog(path, max_rate=1.0).known("train") == {row.key, *(r.key for r in defects(1))}
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"bad.jsonl is damaged .* remove it, and bad rows are fo"):
        BadRowLog(path, max_rate=1.0)


def test_all_processes_list_count_and_stop_alike(tmp_path, monkeypatch):
    """Each reads other clips; what they share is the list of all, which process 0 writes."""
    monkeypatch.setattr("jax.process_count", lambda: 2)
    sent: list[str] = []

    def run(process: int, answer: list[str]) -> BadRowLog:
        def exchange(_, text: str) -> list[str]:
            sent.append(text)
            return answer

        monkeypatch.setattr("jax.process_index", lambda: process)
        monkeypatch.setattr(hosts, "exchange", exchange)
        bad_rows = BadRowLog(tmp_path / f"{process}.jsonl", max_rate=0.03)
        bad_rows.start("train", defects(1, Problem.TOO_LONG, first=90), num_rows=100)
        bad_rows.add("train", defects(2, first=10 * process))
        bad_rows.add("train", defects(1, first=10 * process))  # again, in another epoch
        assert "too long" in bad_rows.summary() and "undecodable" not in bad_rows.summary()
        return bad_rows

    for process in range(2):
        run(process, []).share()
    for process in range(2):
        bad_rows = run(process, sent[:2])
        with pytest.raises(ValueError, match=r"4 of 100 rows are defective \(4 undecodable\)"):
            bad_rows.share()
        assert "train 5 of 100 (4 undecodable, 1 too long)" in bad_rows.summary()
    assert [row for _, row in listed(tmp_path / "0.jsonl")] == ["r90", "r0", "r1", "r10", "r11"]
    assert not (tmp_path / "1.jsonl").exists()
