"""What the processes of a run must have in common, compared before it can do harm.

Processes that differ would train on other batches or other weights without anybody noticing, or
wait for one another for ever.
"""

import hashlib
import importlib.metadata
import logging
import platform
import time
from collections.abc import Iterable

import jax

from flax_projector import hosts
from flax_projector.chat.prompt import Prompt
from flax_projector.config import TrainConfig, shared_options
from flax_projector.data.batches import Batches
from flax_projector.run_folder import RunFolder
from flax_projector.run_folder.owner import read_owner, take_over

log = logging.getLogger(__name__)

_PACKAGES = (  # what computes, reads or writes
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml-dtypes", "grain"),
    *("transformers", "tokenizers", "jinja2", "soundfile", "soxr", "flax-projector"),
)
_SETTLE_SECS = 10.0  # until a shared file system shows what another host has written


def agree_on_command(config: TrainConfig, folder: RunFolder) -> None:
    """Compares options, versions and the run folder, before anything is loaded.

    Raises:
      HostsDiffer: on all processes, if one has other options or versions, or another folder.
    """
    hosts.agree({**shared_options(config), **_versions(), **_folder(folder)})


def agree_on_start(prompt: Prompt, sets: Iterable[Batches], latest: int | None) -> None:
    """Compares all else that the first step depends on.

    Args:
      prompt: the run's prompt.
      sets: the batches of all sets.
      latest: the step of the newest checkpoint that this process sees.

    Raises:
      HostsDiffer: on all processes, if one has others.
    """
    values = {"newest checkpoint": str(latest), "prompt": _digest(prompt.to_json())}
    for batches in sets:
        values[f"rows of {batches.name}"] = batches.fingerprint
        lengths = hashlib.sha256(batches.utterances.max_frames.tobytes()).hexdigest()[:16]
        values[f"lengths of {batches.name}"] = f"{batches.buckets} {lengths}"
    hosts.agree(values)


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            versions[package] = "no package"
    return versions


def _folder(folder: RunFolder) -> dict[str, str]:
    """What process 0 has just written to the run folder, as this process sees it."""
    written = hosts.broadcast("owner", take_over(folder, jax.process_index()))
    end = time.monotonic() + _SETTLE_SECS
    while (found := _owner(folder)) != written and time.monotonic() < end:
        time.sleep(0.5)
    return {f"owner of --out {folder.path}, a folder that all hosts must share": found}


def _owner(folder: RunFolder) -> str:
    owner = read_owner(folder)
    return "nothing" if owner is None else owner.nonce


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
