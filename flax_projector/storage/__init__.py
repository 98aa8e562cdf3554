"""Buckets of Google Cloud Storage beside local disks.

  bucket   folders at gs://bucket/folder, by gcsfs and epath
  growing  files that grow, which buckets do not have

Imports nothing else of the project.
"""

from pathlib import Path
from typing import TypeAlias

from etils import epath

AnyPath: TypeAlias = Path | epath.Path
"""A local path or, as an `epath.Path`, one in a bucket."""


def in_bucket(path: AnyPath) -> bool:
    """Whether a path is in a bucket."""
    return not isinstance(path, Path)
