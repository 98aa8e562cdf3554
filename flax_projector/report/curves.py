"""Metrics over steps and hours of audio, with few enough points for a page."""

import itertools
import json
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

MAX_POINTS = 1500  # more than a chart has pixels across


@dataclass(frozen=True)
class Curve:
    """A metric over the steps of a run.

    Attributes:
      steps: i64[N], ascending.
      values: f64[N], finite.
    """

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        """The newest value."""
        return float(self.values[-1])


def read_curves(content: bytes) -> tuple[dict[str, Curve], list[int]]:
    """Reads the metrics of a run.

    Args:
      content: of `metrics.jsonl`. A last line without its end is still being written.

    Returns:
      Curves by the metric's name, and the numbers of the lines that are damaged.
    """
    found: dict[str, tuple[array, array]] = {}
    damaged = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            step = record.pop("step")
            if type(step) is not int or step < 0:
                raise ValueError("no step")
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
            damaged.append(number)
            continue
        for name, value in record.items():
            if type(value) in (float, int) and math.isfinite(value):
                steps, values = found.setdefault(name, (array("q"), array("d")))
                steps.append(step)
                values.append(value)
    return {name: _in_order(*columns) for name, columns in found.items()}, damaged


def _in_order(steps: array, values: array) -> Curve:
    """A curve that has each step once: of a step that was done again, the last value."""
    backwards = np.array(steps)[::-1]
    unique, first = np.unique(backwards, return_index=True)
    return Curve(unique, np.array(values)[::-1][first])


def hours_at(curves: Mapping[str, Curve], steps: np.ndarray) -> np.ndarray:
    """f64[N], the hours of audio that a run has been trained on after some steps."""
    hours = curves.get("audio_hours", Curve(np.zeros(0, int), np.zeros(0)))
    return np.interp(steps, np.append(0, hours.steps), np.append(0.0, hours.values))


def thinned(curve: Curve, max_points: int = MAX_POINTS) -> Curve:
    """A curve with fewer points that looks the same: the extremes of each stretch of steps.

    Args:
      curve: any curve.
      max_points: how many points it may have.
    """
    count = len(curve.steps)
    if count <= max_points:
        return curve
    num_bins = max_points // 2 - 1  # two of each, and the ends
    starts = np.linspace(0, count, num_bins + 1).astype(int)
    kept = {0, count - 1}
    for start, end in itertools.pairwise(starts):
        part = curve.values[start:end]
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
    chosen = np.array(sorted(kept))
    return Curve(curve.steps[chosen], curve.values[chosen])
