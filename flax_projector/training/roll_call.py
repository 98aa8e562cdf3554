"""Before JAX connects the processes of a run: all of them report to process 0, or are named.

JAX itself aborts every process when one of them is missing, with a stack trace that names none.
"""

import json
import logging
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field

from flax_projector.hosts import some

log = logging.getLogger(__name__)

_RETRY_SECS = 0.5
_REMIND_SECS = 30.0
_LINGER_SECS = 1.0
_MAX_LINE_BYTES = 4096


def call_roll(address: str, *, num_processes: int, process_id: int, timeout_secs: float) -> int:
    """Waits until all processes of a run have reported to process 0, which listens meanwhile.

    Args:
      address: HOST:PORT of process 0. The port is free again afterwards.
      num_processes: number of processes of the run.
      process_id: the number of this one.
      timeout_secs: how long to wait for the others.

    Returns:
      The number of processes on this machine, this one included.

    Raises:
      ValueError: if the port is taken, process 0 cannot be reached, a process is missing or two
        have the same number. All processes that have reported get the same message.
    """
    host, _, port = address.rpartition(":")
    where = host.strip("[]"), int(port)
    if process_id > 0:
        return _report(where, num_processes, process_id, timeout_secs)
    try:
        listener = _listen(int(port))
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen at port {port} ({error.strerror}): "
            "give all processes another one, as in --distributed.coordinator HOST:PORT"
        ) from error
    desk = _Desk(listener, num_processes, timeout_secs)
    thread = threading.Thread(target=desk.run, name="roll call", daemon=True)
    thread.start()
    try:
        return _report(where, num_processes, process_id, timeout_secs)
    finally:
        thread.join(2 * _LINGER_SECS)  # it may still be answering others


def _listen(port: int) -> socket.socket:
    """Listens at all addresses of this machine, as JAX does."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _report(
    where: tuple[str, int], num_processes: int, process_id: int, timeout_secs: float
) -> int:
    """Reports to process 0, as soon as it is there, and waits for its answer."""
    mine = {"process": process_id, "of": num_processes, "host": socket.gethostname()}
    deadline = time.monotonic() + timeout_secs
    while True:
        try:
            with socket.create_connection(where, timeout=10) as connection:
                connection.sendall(json.dumps(mine).encode() + b"\n")
                connection.settimeout(timeout_secs + 10)  # it may have started much later
                with connection.makefile("rb") as stream:
                    reply = _parse(stream.readline(_MAX_LINE_BYTES))
            if "error" in reply:
                raise ValueError(reply["error"])
            if "on_this_machine" in reply:
                return reply["on_this_machine"]
            reason = "something else answers there"
        except OSError as error:  # such as a name that is not known yet
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            raise ValueError(
                f"process {process_id} of {num_processes} found no process 0 at "
                f"{where[0]} port {where[1]} in {timeout_secs:g} s ({reason}): is it running, is "
                "that the address of its machine, and is the port open between the machines?"
            )
        time.sleep(min(_RETRY_SECS, timeout_secs))


def _parse(line: bytes) -> dict:
    """A line of the protocol; empty if it is none."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@dataclass
class _Desk:
    """Where the processes report: in process 0.

    Attributes:
      listener: accepts their connections.
      num_processes: how many are expected.
      timeout_secs: how long they are waited for.
      hosts: the machines of those that are there, by number.
      lines: what was received through each connection.
      error: what is wrong.
    """

    listener: socket.socket
    num_processes: int
    timeout_secs: float
    hosts: dict[int, str] = field(default_factory=dict)
    lines: dict[socket.socket, bytes] = field(default_factory=dict)
    error: str = ""

    def run(self) -> None:
        """Waits for all processes, and answers them all at once."""
        with selectors.DefaultSelector() as selector, self.listener:
            selector.register(self.listener, selectors.EVENT_READ, self.listener)
            start = now = time.monotonic()
            end, reminder = start + self.timeout_secs, start + _REMIND_SECS
            while now < end and (self.error or len(self.hosts) < self.num_processes):
                for key, _ in selector.select(min(end - now, reminder - now)):
                    self._serve(key.data, selector)
                now = time.monotonic()
                if self.error:  # those that come now are told, too
                    end = min(end, now + _LINGER_SECS)
                elif now > reminder:
                    reminder += _REMIND_SECS
                    log.info("after %.0f s, %s not there", now - start, self._missing())
        if not self.error and len(self.hosts) < self.num_processes:
            self.error = (
                f"{self._missing()} not there after {self.timeout_secs:g} s: "
                "are all of them running, and can they reach process 0?"
            )
        for connection, line in self.lines.items():  # the port is free by now
            with connection:
                self._answer(connection, _parse(line))

    def _serve(self, ready: socket.socket, selector: selectors.BaseSelector) -> None:
        if ready is self.listener:
            connection, _ = ready.accept()
            self.lines[connection] = b""
            selector.register(connection, selectors.EVENT_READ, connection)
            return
        try:
            data = ready.recv(_MAX_LINE_BYTES)
        except OSError:
            data = b""
        before = self.lines[ready]
        line = self.lines[ready] = before + data
        if not data or len(line) > _MAX_LINE_BYTES:
            selector.unregister(ready)
            ready.close()
            del self.lines[ready]
            if before.endswith(b"\n"):  # a process that had reported has ended
                self.hosts.pop(_parse(before).get("process", -1), None)
        elif line.endswith(b"\n"):
            self._note(_parse(line))

    def _note(self, report: dict) -> None:
        match report:
            case {"process": int(process), "of": int(number), "host": str(host)}:
                if number != self.num_processes:
                    self.error = (
                        f"process {process} on {host} was started as one of {number} processes, "
                        f"but process 0 as one of {self.num_processes}"
                    )
                elif process in self.hosts:
                    self.error = (
                        f"two processes have the number {process}, on {self.hosts[process]} and "
                        f"{host}: each needs its own --distributed.process-id"
                    )
                else:
                    self.hosts[process] = host

    def _answer(self, connection: socket.socket, report: dict) -> None:
        neighbours = list(self.hosts.values()).count(report.get("host", ""))
        reply = {"error": self.error} if self.error else {"on_this_machine": neighbours}
        try:
            connection.sendall(json.dumps(reply).encode() + b"\n")
        except OSError:
            log.debug("a process ended before it was answered")

    def _missing(self) -> str:
        missing = [str(i) for i in range(self.num_processes) if i not in self.hosts]
        here = [f"{i} on {host}" for i, host in sorted(self.hosts.items())]
        more = len(missing) > 1
        return (
            f"process{'es' * more} {some(missing)} of {self.num_processes} (found: {some(here)}) "
            f"{'are' if more else 'is'}"
        )
