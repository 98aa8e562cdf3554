"""Buckets of Google Cloud Storage beside local disks.

  urls     files at URLs of any kind, which only this package opens
  bucket   folders at gs://bucket/folder, by gcsfs and epath
  growing  files that grow, which buckets do not have

Imports nothing else of the project.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import TypeAlias

from etils import epath

AnyPath: TypeAlias = Path | epath.Path
"""A local path or, as an `epath.Path`, one in a bucket."""


def users_cache() -> Path:
    """The folder of the user's cache that is ours."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "flax-projector"


def temporary_folder() -> Path:
    """A new local folder, which is removed when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix="flax-projector-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def in_bucket(path: AnyPath) -> bool:
    """Whether a path is in a bucket."""
    return not isinstance(path, Path)
