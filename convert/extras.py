"""torch is an extra: imported where it is needed, with a clear error where it is missing."""

from typing import Any


class MissingExtraError(ImportError, ValueError):
    """An optional dependency is not installed."""


def import_torch(purpose: str) -> Any:
    """Imports torch.

    Args:
      purpose: what needs it, the subject of the error message: "reading best.pt".

    Raises:
      MissingExtraError: if torch cannot be imported.
    """
    try:
        import torch
    except ImportError as error:
        raise missing_torch(purpose) from error
    return torch


def missing_torch(purpose: str) -> MissingExtraError:
    """The error of `import_torch`."""
    return MissingExtraError(
        f"{purpose} needs PyTorch, which is not installed: pip install 'flax-projector[torch]'"
    )
