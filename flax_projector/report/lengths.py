"""How long the utterances of a set are."""

from typing import Any

import numpy as np

_NUM_BINS = 30


def histogram(durations: np.ndarray) -> dict[str, Any]:
    """How many utterances of a set have about each length.

    Args:
      durations: f64[N], in seconds.

    Returns:
      "num_utterances", "hours", the "edges" of the bins in seconds, and the "counts" in them.
    """
    longest = float(durations.max(initial=0.1))
    counts, edges = np.histogram(durations, bins=_NUM_BINS, range=(0, np.ceil(10 * longest) / 10))
    return {
        "num_utterances": len(durations),
        "hours": round(float(durations.sum()) / 3600, 4),
        "edges": edges.round(4).tolist(),
        "counts": counts.tolist(),
    }


def check_histogram(found: Any) -> None:
    """Checks what was read of a histogram.

    Raises:
      LookupError, TypeError or ValueError: if it is none.
    """
    counts, edges = np.array(found["counts"], int), np.array(found["edges"], float)
    if counts.ndim != 1 or edges.shape != (len(counts) + 1,) or not np.isfinite(edges).all():
        raise ValueError("the edges of the bins are not those of their counts")
    if type(found["num_utterances"]) is not int or type(found["hours"]) is not float:
        raise TypeError("expected numbers of utterances and of hours")
