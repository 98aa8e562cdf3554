"""Measurements in processes of their own: one script calls itself for each."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def peak_mib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(script: str, *options: str | Path, env: Mapping[str, str] | None = None) -> Any:
    """Runs a script, which prints one JSON value; returns it.

    Args:
      script: its path.
      options: of the command line.
      env: variables that are added to this process's.
    """
    output = subprocess.run(
        [sys.executable, script, *map(str, options)],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | (env or {}),
    ).stdout
    return json.loads(output)
