"""Folders in buckets of Google Cloud Storage: access, errors in one line, and patience."""

import functools
import inspect
import logging
import os
import re
import urllib.parse
from typing import Any

from etils import epath

_log = logging.getLogger(__name__)

_NUM_TRIES = 8
"""A request that fails is repeated after 1, 2, 4, 8, 16, 32 and 32 seconds, and fractions of them:
outages of a minute and a half are survived. TensorStore, through which Orbax writes arrays, tries
for longer."""
_LOGIN = (
    "log in with `gcloud auth application-default login`, or use a machine whose service account "
    "has rights"
)
_RIGHTS = (
    "give the account the roles storage.objectUser and storage.legacyBucketReader on the bucket "
    "(`gcloud storage buckets add-iam-policy-binding`)"
)


def bucket_path(url: str) -> epath.Path:
    """A folder or file in a bucket, which this process may look at.

    Args:
      url: `gs://bucket/folder`.

    Raises:
      ValueError: if it is another kind of URL, there is no such bucket, or gcsfs is missing.
      OSError: if there are no credentials or no rights, or the bucket does not answer.
    """
    url = url.rstrip("/")
    match = re.fullmatch(r"gs://([^/]+)/(.+)", url)
    if match is None or {"", ".", ".."} & set(match[2].split("/")):
        raise ValueError(
            f"{url} is a URL that cannot be used here: expected gs://BUCKET/FOLDER, or a local or "
            "mounted path"
        )
    _check_bucket(match[1])
    return epath.Path(url)


def filesystem() -> Any:
    """gcsfs, as Orbax and epath use it from now on as well.

    Raises:
      ValueError: if it is not installed.
    """
    return _patient_filesystem()()


@functools.cache
def _check_bucket(name: str) -> None:
    try:
        filesystem().call("GET", "b/{}", name, json_out=True)
    except FileNotFoundError as error:
        raise ValueError(
            f"gs://{name}: there is no such bucket: check the name, or create it with "
            f"`gcloud storage buckets create gs://{name}`"
        ) from error


@functools.cache
def _patient_filesystem() -> type:
    try:
        import aiohttp
        import gcsfs
        from gcsfs import retry
    except ImportError as error:
        raise ValueError(
            "gs:// paths need gcsfs: `pip install 'flax-projector[gcs]'`, or use a local path"
        ) from error
    import fsspec
    import requests
    from google.auth.exceptions import GoogleAuthError

    # It logs each failed request with a traceback, and raises the error as well.
    logging.getLogger("gcsfs").addFilter(lambda record: not record.exc_info)
    failures = (aiohttp.ClientError, requests.RequestException, TimeoutError)

    once = inspect.unwrap(gcsfs.GCSFileSystem._request)  # without the retries of gcsfs

    patiently: Any = retry.retry_request

    @patiently(retries=_NUM_TRIES)
    async def request(self: Any, method: str, path: str, *args: Any, **options: Any) -> Any:
        try:
            return await once(self, method, path, *args, **options)
        except Exception as error:
            if retry.is_retriable(error):
                _log.warning("%s: %s: trying again", _place(path, args), _line(error))
            raise

    class PatientFileSystem(gcsfs.GCSFileSystem):
        """Tries for longer, and raises OSErrors that name the bucket and say what to do."""

        def __init__(self, *args: Any, **options: Any) -> None:
            # Other machines, and TensorStore, write to the same folder.
            super().__init__(*args, **options | {"use_listings_cache": False})

        async def _request(self, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
            where = _place(path, args)
            try:
                return await request(self, method, path, *args, **kwargs)
            except (FileNotFoundError, FileExistsError):
                raise
            except retry.HttpError as error:
                if error.code == 401:
                    raise PermissionError(f"{where}: no valid credentials: {_LOGIN}") from error
                if error.code not in retry.errs:
                    raise
                raise _no_answer(where, error) from error
            except GoogleAuthError as error:
                raise PermissionError(f"{where}: no valid credentials: {_LOGIN}") from error
            except failures as error:
                raise _no_answer(where, error) from error
            except OSError as error:
                if not str(error).startswith("Forbidden"):
                    raise
                raise PermissionError(f"{where}: no rights (403): {_RIGHTS}") from error

    # TensorFlow, if it is installed, would take the place of gcsfs.
    os.environ["EPATH_USE_TF"] = "false"
    for protocol in ("gs", "gcs"):
        fsspec.register_implementation(protocol, PatientFileSystem, clobber=True)
    return PatientFileSystem


def _place(path: str, args: tuple) -> str:
    """What a request is about, as users know it."""
    if args:
        return "gs://" + "/".join(map(str, args))
    found = re.search(r"/b/([^/]+)/o/([^?]+)", path)  # the contents of an object
    return f"gs://{found[1]}/{urllib.parse.unquote(found[2])}" if found else path


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _no_answer(where: str, error: Exception) -> OSError:
    return OSError(
        f"{where}: the bucket did not answer in {_NUM_TRIES} tries "
        f"({_line(error)}): start the same command again later"
    )
