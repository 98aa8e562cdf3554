"""Downloads from a stand-in for the Hugging Face hub, by several processes of a machine."""

import collections
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time

import pytest

FILES = {
    "chat_template.jinja": b"{{ messages }}",
    "config.json": b"{}",
    "model.safetensors": b"weights" * 100_000,
}
PROGRAM = """
from convert.load import resolve_model
print(*sorted(path.name for path in resolve_model("me/model").iterdir()))
"""


class Hub(http.server.ThreadingHTTPServer):
    """A hub with one model.

    Attributes:
      requests: how often each file was asked for, by method and name.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.requests: collections.Counter = collections.Counter()


class _Request(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        assert isinstance(self.server, Hub)
        self.server.requests[self.command, name] += 1
        data, headers = FILES.get(name, b""), {}
        if self.path.startswith("/api/models/"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in FILES.items()]
            data = json.dumps({"id": "me/model", "sha": 40 * "0", "siblings": siblings}).encode()
            if "/tree/" in self.path:
                entries = [{"type": "file", "path": n, "size": len(d)} for n, d in FILES.items()]
                data = json.dumps([{**e, "oid": 40 * "0"} for e in entries]).encode()
        elif name in FILES:
            etag = hashlib.sha256(data).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": 40 * "0"}
        self.send_response(200 if data else 404)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            time.sleep(1.0 * (name == "model.safetensors"))  # the others ask in the meantime
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.mark.slow
def test_processes_of_a_machine_download_a_model_once(tmp_path):
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
        }
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM],
                env=os.environ | settings,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(4)
        ]
        ends = [process.communicate(timeout=120) for process in processes]
        hub.shutdown()
    assert [out.split() for out, _ in ends] == 4 * [sorted(FILES)], ends
    assert hub.requests["GET", "model.safetensors"] == 1, hub.requests
