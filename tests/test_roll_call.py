"""The processes of a run report to process 0, here as threads on loopback."""

import concurrent.futures
import re
import socket
import threading
import time

import pytest

from flax_projector.training import roll_call
from flax_projector.training.roll_call import call_roll
from tests.ports import free_port


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """A thread that starts before process 0 listens tries again well within the test's limits."""
    monkeypatch.setattr(roll_call, "_RETRY_SECS", 0.05)


def run(processes: list[tuple[int, int]], secs: float = 10.0, port: int | None = None) -> list:
    """What each of the processes, given by number and how many there are, returns or raises."""
    address = f"localhost:{port or free_port()}"
    # On a busy machine the thread of process 0 may begin to listen after that time.
    has_desk = 0 in [number for number, _ in processes]
    patience = secs + 20 * has_desk

    def call(process_id, num_processes):
        try:
            return call_roll(
                address,
                num_processes=num_processes,
                process_id=process_id,
                timeout_secs=patience if process_id else secs,
            )
        except ValueError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        told = list(pool.map(call, *zip(*processes, strict=True)))
    assert not has_desk or "roll call" not in [thread.name for thread in threading.enumerate()]
    return told


def test_all_are_there():
    port = free_port()
    assert run([(i, 3) for i in range(3)], port=port) == [3, 3, 3]
    with socket.create_server(("localhost", port)):
        pass  # the port is free for JAX


def test_processes_on_other_machines_are_not_counted(monkeypatch):
    names = iter("aab")
    monkeypatch.setattr(socket, "gethostname", lambda: next(names))
    assert sorted(run([(i, 3) for i in range(3)])) == [1, 2, 2]


HOST = re.escape(socket.gethostname())
FAULTS = {  # processes, and what those of them are told that can know
    "one is missing": ([(0, 3), (2, 3)], rf"process 1 of 3 \(found: 0 on {HOST}, 2 .*after 1 s"),
    "many are missing": (
        [(0, 20)],
        r"processes 1, 2, 3, 4, 5, 6, 7, 8 and 11 more of 20 .* not there after 1 s",
    ),
    "two have one number": (
        [(0, 3), (1, 3), (1, 3)],
        f"have the number 1, on {HOST} and {HOST}",
    ),
    "another number of processes": ([(0, 2), (2, 3)], "as one of 3 processes, but .* as one of 2"),
    "no process 0": ([(1, 2)], r"process 1 of 2 found no process 0 at localhost port \d+ in 1 s"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_missing_is_named_to_all(case):
    processes, message = FAULTS[case]
    for told in run(processes, secs=1.0):
        assert re.search(message, str(told)), told


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        (told,) = run([(0, 2)], port=port)
    assert re.match(rf"process 0 cannot listen at port {port} \(Address already in use", told)


def test_an_address_of_no_machine_is_named():
    with pytest.raises(ValueError, match=r"found no process 0 at nowhere\.invalid port 9 in 0.1 s"):
        call_roll("nowhere.invalid:9", num_processes=2, process_id=1, timeout_secs=0.1)


def test_something_else_at_the_port_is_named():
    with socket.create_server(("localhost", 0)) as other:

        def greet():
            connection, _ = other.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"220 mail\n")

        threading.Thread(target=greet).start()
        (told,) = run([(1, 2)], secs=0.0, port=other.getsockname()[1])
    assert "something else answers there" in told


def test_strangers_and_processes_that_start_again_do_no_harm():
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(run, [(0, 3)], 20.0, port)
        sent = (b"GET / HTTP/1.1\r\n\r\n", b"x" * 2 * roll_call._MAX_LINE_BYTES, b"[]\n")
        for line in (*sent, b'{"process": 1, "of": 3, "host": "b"}\n'):
            while True:
                try:
                    with socket.create_connection(("localhost", port)) as connection:
                        connection.sendall(line)
                    break
                except ConnectionRefusedError:  # process 0 has not started yet
                    time.sleep(0.01)
        assert run([(1, 3), (2, 3)], 20.0, port) == [3, 3]
        assert first.result() == [3]
