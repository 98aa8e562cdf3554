"""Files at URLs: the one place that opens them."""

from pathlib import Path
from typing import Any

from etils import epath

from flax_projector.storage import AnyPath
from flax_projector.storage.bucket import filesystem

_READ_AHEAD = 8 << 20  # bytes that are asked for at once
_VERSIONS = ("etag", "ETag", "md5Hash", "crc32c", "generation", "created", "mtime")
"""What file systems call the version of a file."""


def filesystem_of(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path of the URL in it.

    That of `gs://` is patient, and has errors of one line; see `storage.bucket`.

    Args:
      url: of any kind that fsspec opens.

    Raises:
      ValueError: naming the URL, if no installed package opens it.
    """
    import fsspec

    try:
        if url.startswith(("gs://", "gcs://")):
            fs = filesystem()
            return fs, fs._strip_protocol(url)
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} cannot be opened: {error}") from error


def writable(path: str) -> AnyPath | None:
    """A path or URL as a place that may be written to; None for a URL of a kind that is only read.

    It is not looked at.
    """
    if "://" not in path:
        return Path(path)
    return epath.Path(path) if path.startswith("gs://") else None


def open_url(url: str) -> Any:
    """Opens a file at a URL, to be read from its beginning to its end."""
    fs, path = filesystem_of(url)
    return fs.open(path, block_size=_READ_AHEAD, cache_type="readahead")


def url_stamp(url: str) -> list[Any]:
    """What changes when a file at a URL does; empty if that cannot be known."""
    fs, path = filesystem_of(url)
    try:
        info = fs.info(path)
    except Exception:  # whoever reads the file will say why
        return []
    version = [str(info[key]) for key in _VERSIONS if info.get(key)]
    return [info.get("size"), *version] if version else []
