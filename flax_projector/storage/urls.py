"""Files at URLs: the one place that opens them."""

from typing import Any

from flax_projector.storage.bucket import filesystem


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
