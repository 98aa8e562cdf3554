"""Which curves share a chart, and what the chart says of them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flax_projector.report.curves import Curve, hours_at, thinned

_DIGITS = 5


@dataclass(frozen=True)
class Chart:
    """Some metrics of a run over its steps.

    Attributes:
      title: what they are.
      unit: of their values.
      note: how they are to be read.
      metrics: what their curves are called, by patterns of their names; a group in a pattern takes
        the place of {}.
      scale: what values are multiplied by.
      is_log: whether they are best read on a logarithmic axis.
    """

    title: str
    unit: str
    note: str
    metrics: Mapping[str, str]
    scale: float = 1.0
    is_log: bool = False


CHARTS = (
    Chart(
        "Loss",
        "nats per label",
        "Mean over the labels of the steps since the point before; held-out sets in full.",
        {"ctc_loss": "CTC warm start", "loss": "training", r"eval/(.+)/loss": "{}"},
        is_log=True,
    ),
    Chart(
        "Word error rate",
        "% of words",
        "Words replaced, missed or added, per word that was said.",
        {r"eval/(.+)/wer": "{}"},
        scale=100.0,
        is_log=True,
    ),
    Chart(
        "Character error rate",
        "% of characters",
        "Characters replaced, missed or added, per character of what was said.",
        {r"eval/(.+)/cer": "{}"},
        scale=100.0,
        is_log=True,
    ),
    Chart(
        "Learning rate",
        "learning rate",
        "Of the last step before each point.",
        {"learning_rate": "learning rate"},
    ),
    Chart(
        "Gradient norm",
        "norm",
        "Of all gradients together, before clipping.",
        {"grad_norm": "gradient norm"},
        is_log=True,
    ),
    Chart(
        "Weight norms",
        "Frobenius norm",
        "Of the projector's kernels. The larger one has grown, the less a step turns it.",
        {r"weight_norm/(.+)": "{}"},
    ),
    Chart(
        "Scales of the norms",
        "RMS",
        "Of the projector's norms. That of the last one is about the RMS of the audio tokens.",
        {r"scale_rms/(.+)": "{}"},
        is_log=True,
    ),
    Chart(
        "Audio tokens against text",
        "ratio of RMS",
        "The scale ratio: size of the audio tokens over that of the text's embeddings.",
        {"scale_ratio": "scale ratio"},
    ),
    Chart(
        "Speed",
        "seconds of audio per second",
        "How much speech is trained on in a second.",
        {"audio_secs_per_sec": "speed"},
        is_log=True,
    ),
    Chart(
        "Waiting for data",
        "% of the time",
        "Share of the time in which the devices had no batch to work on.",
        {"data_wait_rate": "waiting"},
        scale=100.0,
    ),
    Chart(
        "Use of the devices",
        "% of peak FLOPs",
        "Model FLOP utilisation (MFU), without what is computed twice.",
        {"mfu": "MFU"},
        scale=100.0,
    ),
)


def draw_charts(runs: Sequence[Mapping[str, Curve]]) -> list[dict[str, Any]]:
    """What the page's script draws: every chart that has a curve.

    Args:
      runs: the curves of each run, by the metrics' names.
    """
    drawn = []
    for chart in CHARTS:
        found = [_lines(chart, curves, run) for run, curves in enumerate(runs)]
        if lines := [line for part in found for line in part]:
            drawn.append(
                {
                    "title": chart.title,
                    "unit": chart.unit,
                    "note": chart.note,
                    "isLog": chart.is_log,
                    "lines": lines,
                }
            )
    return drawn


def _lines(chart: Chart, curves: Mapping[str, Curve], run: int) -> Iterator[dict[str, Any]]:
    for pattern, label in chart.metrics.items():
        for name in sorted(curves):
            if not (match := re.fullmatch(pattern, name)):
                continue
            shown = thinned(curves[name])
            yield {
                "run": run,
                "name": label.format(*match.groups()),
                "isHeldOut": name.startswith("eval/"),
                "isThinned": len(shown.steps) < len(curves[name].steps),
                "steps": shown.steps.tolist(),
                "hours": _rounded(hours_at(curves, shown.steps)),
                "values": _rounded(shown.values * chart.scale),
            }


def _rounded(values: np.ndarray) -> list[float]:
    """Values with as many digits as one can see."""
    return [float(f"{value:.{_DIGITS}g}") for value in values]
