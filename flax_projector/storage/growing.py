"""Files that grow: logs, tables and traces.

A local file is appended to. An object in a bucket can only be replaced: so the file grows in a
local folder, and is uploaded whole when it is due.
"""

import functools
from pathlib import Path

from flax_projector.storage import AnyPath, in_bucket, temporary_folder
from flax_projector.storage.bucket import filesystem

_uploaded: dict[Path, tuple[int, int]] = {}
"""Size and time of each local file when it was last uploaded."""


_root = functools.cache(temporary_folder)


def _local(path: AnyPath) -> Path:
    return _root() / str(path).partition("://")[2]


def growing(path: AnyPath, *, is_folder: bool = False) -> Path:
    """Where a file, or all files of a folder, can be appended to.

    Args:
      path: of the file or folder.
      is_folder: for files whose names are new at every start: nothing is fetched.

    Returns:
      A local path as it is. For an object in a bucket, the path of a local copy, which `publish`
      uploads.
    """
    if isinstance(path, Path):
        return path
    local = _local(path)
    if is_folder:
        local.mkdir(parents=True, exist_ok=True)
        return local
    local.parent.mkdir(parents=True, exist_ok=True)
    try:
        local.write_bytes(filesystem().cat_file(str(path)))
    except FileNotFoundError:
        local.unlink(missing_ok=True)
    return local


def publish(folder: AnyPath) -> None:
    """Uploads what has grown below a folder; does nothing on a local disk."""
    if not in_bucket(folder):
        return
    local = _local(folder)
    for file in sorted(path for path in local.rglob("*") if path.is_file()):
        stamp = (file.stat().st_size, file.stat().st_mtime_ns)
        if stamp != _uploaded.get(file):
            remote = f"{folder}/{file.relative_to(local).as_posix()}"
            filesystem().pipe_file(remote, file.read_bytes())
            _uploaded[file] = stamp
