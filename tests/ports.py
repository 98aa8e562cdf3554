"""Ports of this machine."""

import socket


def free_port() -> int:
    """A port that nobody uses; the system hands out another one each time."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
