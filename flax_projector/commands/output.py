"""The files that a command is to write, checked before anything slow."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flax_projector.storage import AnyPath


def check_new(files: "Sequence[AnyPath]", out: str, *, way_out: str) -> None:
    """Checks that files can be written, and that none of them exists.

    Args:
      files: their paths.
      out: what `--out` names.
      way_out: what else to choose if one exists.

    Raises:
      ValueError: naming what is in the way.
    """
    for folder in {file.parent for file in files if isinstance(file, Path)}:
        above = next(path for path in (folder, *folder.parents) if path.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            raise ValueError(f"--out {out}: {above} is no folder that can be written to")
    if found := [str(file) for file in files if file.exists()]:
        exist = "exists" if len(found) == 1 else "exist"
        raise ValueError(f"--out: {' and '.join(found)} {exist} already: choose another {way_out}")
