"""Runs each measurement in its own process: a script calls itself."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def peak_mib() -> float:
    """Returns the peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(script: str, *options: str | Path, env: Mapping[str, str] | None = None) -> Any:
    """Runs a script that prints one JSON value, and returns the value.

    Args:
      script: path of the script.
      options: its command-line options.
      env: environment variables, in addition to those of this process.
    """
    output = subprocess.run(
        [sys.executable, script, *map(str, options)],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | (env or {}),
    ).stdout
    return json.loads(output)
