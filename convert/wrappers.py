"""Takes out of the names of tensors what wrappers around a module have put there."""

import logging
from collections import Counter

from convert.checkpoint import Checkpoint
from convert.errors import Problem, raise_any
from convert.tables import WRAPPERS

_log = logging.getLogger(__name__)


def without_wrappers(checkpoint: Checkpoint, where: str) -> Checkpoint:
    """The same tensors by the names that they have in the module itself; logs what was left out.

    Args:
      checkpoint: of torch.
      where: its path, for messages.

    Raises:
      ConversionError: if only some of the names have a wrapper's prefix, or two become the same.
    """
    found = {key: _unwrapped(key) for key in checkpoint.infos}
    count = Counter(name for _, names in found.values() for name in names)
    if not count:
        return checkpoint
    bare = Counter(key for key, _ in found.values())
    problems = [
        Problem("twice", key, f"without {' and '.join(names)} it is {new}, as another is")
        for key, (new, names) in found.items()
        if bare[new] > 1 and names
    ]
    first = {key: _first_wrapper(key) for key in found}
    if len(set(first.values())) > 1:
        example = {wrapper: key for key, wrapper in reversed(first.items())}
        problems += [
            Problem("mixture", key, f"begins with {wrapper or 'no prefix of a wrapper'}")
            for wrapper, key in example.items()
        ]
    raise_any(f"{where} holds tensors of several models: save the one that is meant", problems)
    for name, n in sorted(count.items()):
        _log.info("%s: left %s out of %d names (%s)", where, name, n, WRAPPERS[name])
    return checkpoint.renamed({new: old for old, (new, _) in found.items()})


def _first_wrapper(key: str) -> str:
    return next((name for name in WRAPPERS if key.startswith(name)), "")


def _unwrapped(key: str) -> tuple[str, list[str]]:
    """The key without wrappers' parts, and these parts."""
    found = []
    for name in WRAPPERS:
        while f".{name}" in f".{key}":
            key = f".{key}".replace(f".{name}", ".", 1)[1:]
            found.append(name)
    return key, found
