"""What processes tell each other, with a store in memory; `test_processes.py` has real ones."""

import json
import os
import threading
import time

import jax
import pytest

from flax_projector import hosts


class Exit(BaseException):
    """Instead of `os._exit`."""


class Store:
    """A client of JAX's store, which all threads of the test share."""

    def __init__(self):
        self.texts: dict[str, str] = {}

    def key_value_set(self, key: str, text: str) -> None:
        if self.texts.setdefault(key, text) is not text:
            raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")

    def key_value_try_get(self, key: str) -> str:
        if key not in self.texts:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {key}")
        return self.texts[key]

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [(key, text) for key, text in self.texts.items() if key.startswith(folder)]

    def key_value_delete(self, key: str) -> None:
        del self.texts[key]


@pytest.fixture
def client(monkeypatch):
    """The store of three processes, of which the test is number 1."""
    client = Store()
    names = ["a", "b", "c"]
    monkeypatch.setattr(hosts, "_store", hosts._Store(client, 1, 3, names))
    monkeypatch.setattr(hosts, "_LINGER_SECS", 0.0)
    monkeypatch.setattr(hosts, "_WATCH_SECS", 0.01)

    def leave(code):
        raise Exit(code)

    monkeypatch.setattr(os, "_exit", leave)
    yield client
    hosts.disconnect()


def test_a_process_that_is_alone_tells_itself(capsys):
    assert hosts.exchange("x", "mine") == ["mine"] and hosts.broadcast("x", "mine") == "mine"
    hosts.agree({"a": "1"})
    with pytest.raises(ValueError, match="wrong"), hosts.ending_together(), hosts.telling():
        raise ValueError("wrong")
    with hosts.ending_together():
        pass
    assert capsys.readouterr().err == ""


def test_all_get_the_texts_of_all_in_order(client):
    for count in range(1, 4):
        client.texts |= {f"x/{count}/2": f"c{count}", f"x/{count}/0": f"a{count}"}
        assert hosts.exchange("x", f"b{count}") == [f"a{count}", f"b{count}", f"c{count}"]
    client.texts |= {"x/4/2": "", "x/4/0": "first"}
    assert hosts.broadcast("x", "") == "first"
    assert [key for key in client.texts if key.endswith("/1")] == ["x/4/1"]  # removed when read


def test_a_process_that_does_not_come_is_named(client, monkeypatch, caplog):
    monkeypatch.setattr(hosts, "_REMIND_SECS", 0.05)
    client.texts["rows/1/2"] = ""
    with pytest.raises(ValueError, match="process 0 on a did not come to the exchange of 'rows'"):
        hosts.exchange("rows", "", timeout_secs=0.2)
    assert caplog.messages[0] == "waiting for process 0 on a: rows"


def test_values_that_differ_are_named_with_the_processes_that_have_them(client):
    mine = {"--seed": "0", "rows": "x" * 500, "jax": "0.10.2"}
    for process, other in ((0, mine | {"rows": "y"}), (2, {"--seed": "1", "rows": "y"})):
        client.texts[f"agreement/1/{process}"] = json.dumps(other)
    with pytest.raises(hosts.HostsDiffer) as error:
        hosts.agree(mine)
    way_out, *lines = str(error.value).splitlines()
    assert lines == [
        "  --seed: 0 (process 0 on a, process 1 on b) but 1 (process 2 on c)",
        "  rows: y (process 0 on a, process 2 on c) but [...] (process 1 on b)",
        "  jax: 0.10.2 (process 0 on a, process 1 on b) but nothing (process 2 on c)",
    ]
    assert "start the same command" in way_out
    client.texts |= {f"agreement/2/{process}": json.dumps(mine) for process in (0, 2)}
    hosts.agree(mine)


ERRORS = {  # what is raised, and what all are told
    "of the user": (OSError("no disk"), "process 1 on b: no disk"),
    "unexpected": (KeyError("x"), "process 1 on b: KeyError: 'x'"),
    "of all": (hosts.HostsDiffer("the hosts differ"), "the hosts differ"),
    "of the devices": (
        jax.errors.JaxRuntimeError("closed"),
        "process 2 on c has ended or does not",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_told_before_anything_is_closed(client, case, monkeypatch, capsys):
    monkeypatch.setattr(hosts, "_ANSWER_SECS", 0.1)
    error, text = ERRORS[case]
    client.texts["here/0"] = ""  # as if process 0 had answered
    closed = []
    with pytest.raises(Exit, match="1"), hosts.ending_together():
        try:
            with hosts.telling():
                raise error
        finally:
            closed.append(client.texts["news/error"])
    assert closed[0].startswith(text)
    shown = capsys.readouterr().err
    assert shown.splitlines()[-1].startswith(f"error: {text}")
    assert ("Traceback" in shown) == (case in ("unexpected", "of the devices"))
    assert "gone/1" in client.texts


def test_the_first_error_is_the_cause(client, capsys):
    client.texts["news/error"] = "process 2 on c: no disk"
    with pytest.raises(Exit, match="1"), hosts.ending_together(), hosts.telling():
        raise OSError("what came of it")
    assert capsys.readouterr().err == "error: process 2 on c: no disk\n"


def test_a_process_that_is_busy_is_ended(client, capfd):
    ended = threading.Event()

    def watch():
        assert hosts._store is not None
        with pytest.raises(Exit, match="1"):
            hosts._watch(hosts._store)
        ended.set()

    threading.Thread(target=watch).start()
    time.sleep(0.05)
    assert not ended.is_set()
    client.texts["news/error"] = "process 2 on c: no disk"
    assert ended.wait(10)
    assert capfd.readouterr().err == "error: process 2 on c: no disk\n"


def test_a_good_end_waits_for_all(client):
    client.texts["end/1/0"] = ""
    threading.Timer(0.3, lambda: client.texts.update({"end/1/2": ""})).start()
    began = time.monotonic()
    with hosts.ending_together():
        pass
    assert time.monotonic() - began > 0.2 and hosts._store is None


def test_a_signal_to_any_process_is_noticed_once(client):
    told = []
    hosts.when_told_to_stop(lambda: told.append("stop"))
    assert hosts._store is not None
    thread = threading.Thread(target=hosts._watch, args=(hosts._store,))
    thread.start()
    client.texts[hosts._STOP] = ""
    time.sleep(0.2)
    hosts.disconnect()
    thread.join(10)
    assert told == ["stop"]


def test_of_many_names_the_first_are_shown():
    assert hosts.some([]) == "none" and hosts.some(["a", "b"]) == "a, b"
    assert hosts.some([str(i) for i in range(20)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
