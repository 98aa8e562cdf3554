"""Progress of a stream of arrays, by bytes."""

from collections.abc import Iterable, Iterator

import numpy as np
from tqdm import tqdm


def with_progress(
    arrays: Iterable[tuple[str, np.ndarray]], nbytes: int, label: str, *, is_quiet: bool = False
) -> Iterator[tuple[str, np.ndarray]]:
    """Passes named arrays on and shows how far they are, on stderr if that is a terminal.

    Args:
      arrays: (name, array).
      nbytes: of all arrays together.
      label: in front of the bar.
      is_quiet: shows nothing, as on every process but the first.
    """
    disable = True if is_quiet else None  # None: tqdm asks whether stderr is a terminal
    with tqdm(total=nbytes, desc=label, unit="B", unit_scale=True, disable=disable) as bar:
        for name, array in arrays:
            yield name, array
            bar.update(array.nbytes)
