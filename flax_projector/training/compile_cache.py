"""Keeps compiled programs on disk, so that a run that starts again need not compile them again."""

import contextlib
import hashlib
import logging
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from flax_projector.files import is_url
from flax_projector.storage import AnyPath, users_cache

log = logging.getLogger(__name__)


@contextlib.contextmanager
def compile_cache(folder: str, *, shared: str | AnyPath | None = None) -> Iterator[None]:
    """Inside the block, JAX keeps what it compiles; it never fails because of that.

    JAX reads on every host but writes on process 0 only, so several hosts need a folder that all of
    them see. Its variables work as always: JAX_ENABLE_COMPILATION_CACHE=0 turns the cache off.

    Args:
      folder: a local folder or a URL; "auto", or "off". "auto" is what JAX_COMPILATION_CACHE_DIR
        names; else `shared` if there are several processes; else a folder of the user's cache.
      shared: a folder that all hosts see, if there is any.
    """
    config: Any = jax.config  # its fields are made at run time
    if folder == "off":
        config.update("jax_enable_compilation_cache", False)
    elif folder != "auto" or config.jax_compilation_cache_dir is None:
        if folder == "auto":
            folder = str(shared if shared and jax.process_count() > 1 else users_cache() / "xla")
        if is_url(folder):  # XLA's own caches, of GPUs, cannot be there
            config.update("jax_persistent_cache_enable_xla_caches", "none")
        if jax.default_backend() == "cpu":
            folder = f"{folder.rstrip('/')}/{cpu_features()}"
        config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
    with _one_warning(str(config.jax_compilation_cache_dir)):
        yield


def cpu_features() -> str:
    """A name for what this CPU can do.

    A program for a CPU uses all of that, and elsewhere ends by an illegal instruction. JAX's keys
    do not promise to tell CPUs apart, and homes are shared between machines.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        found = platform.processor()
    return f"cpu-{hashlib.sha256(found.encode()).hexdigest()[:16]}"


@contextlib.contextmanager
def _one_warning(folder: str) -> Iterator[None]:
    """Says once that the cache does not work, where JAX says so for every program."""
    said = False

    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        nonlocal said
        if _TROUBLE not in str(message):
            show_others(message, *args, **kwargs)
        elif not said:
            said = True
            text = "%s, the compilation cache, is of no use for some programs, which are compiled "
            text += "anew: %s. Remove it if it is damaged, or name another by --compile-cache"
            log.warning(text, folder, message)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=f".*{_TROUBLE}")
        show_others, warnings.showwarning = warnings.showwarning, show
        yield


_TROUBLE = "persistent compilation cache entry for"
