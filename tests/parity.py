"""Errors of ours against what it is compared with: asserted, and kept for docs/parity.md."""

import os
from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

ELEMENT, ABSOLUTE, L2 = "element", "absolute", "L2"

VERSIONS = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "torch", "transformers"))
INTRODUCTION = f"""\
# Parity

Written by `make parity`, which runs the tests that compare results. It gives the errors that the
tests measured and the limits above which they fail. On a CPU, in float32 unless the dtype says
otherwise, with {VERSIONS}.

- **cases** counts the parametrised cases of a test; the row has their worst error.
- **element** is the largest \\|ours - theirs\\| / (1 + \\|theirs\\|): absolute for small elements,
  relative for large ones.
- **absolute** is the largest \\|ours - theirs\\|.
- **L2** is the norm of the difference over the norm of theirs; the worst of several arrays.
- Small models have random values in every parameter. Rows of tiny-audio's module need that module,
  which this repository does not hold, and are left out where it is missing.
"""


class Measurement(NamedTuple):
    """One comparison.

    Attributes:
      what: is compared, where a test compares several things that the table tells apart.
      measure: `ELEMENT`, `ABSOLUTE` or `L2`.
      dtype: of ours.
      limit: above which the test fails.
      error: what was measured.
    """

    what: str
    measure: str
    dtype: str
    limit: float
    error: float


class Claim(NamedTuple):
    """What a test shows; its parametrised cases share it."""

    section: str
    what: str
    oracle: str


MEASURED: dict[str, list[Measurement]] = defaultdict(list)
"""What the tests of this session measured, by node id."""


def relative_l2(got: Any, expected: Any) -> float:
    """Norm of the difference, relative to what was expected."""
    got, expected = _pair(got, expected)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def assert_close(
    got: Any, expected: Any, limit: float, message: str = "", *, what: str = ""
) -> None:
    """Every element is within `limit` * (1 + |expected|).

    Args:
      got: ours.
      expected: theirs, of the same shape.
      limit: of the error.
      message: which of several arrays that share a row of the table.
      what: is compared, if the test compares several things; gives it a row of its own.
    """
    ours, theirs = _pair(got, expected)
    error = np.max(np.abs(ours - theirs) / (1 + np.abs(theirs)))
    _assert_measured(Measurement(what, ELEMENT, _dtype(got), limit, float(error)), message)


def assert_within(
    got: Any, expected: Any, limit: float, message: str = "", *, what: str = ""
) -> None:
    """Every element is within `limit`, whatever its size."""
    ours, theirs = _pair(got, expected)
    error = np.max(np.abs(ours - theirs))
    _assert_measured(Measurement(what, ABSOLUTE, _dtype(got), limit, float(error)), message)


def assert_relative_l2(
    got: Any, expected: Any, limit: float, message: str = "", *, what: str = ""
) -> None:
    """The norm of the difference is within `limit` of the norm of what was expected."""
    error = relative_l2(got, expected)
    _assert_measured(Measurement(what, L2, _dtype(got), limit, error), message)


def _assert_measured(measured: Measurement, message: str) -> None:
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]  # its node id; then its phase
    MEASURED[test].append(measured)
    where = ", ".join(text for text in (measured.what, message) if text) or "ours"
    is_within = measured.error <= measured.limit  # a NaN is within nothing
    assert is_within, (
        f"{where}: {measured.measure} error {measured.error:.3g} > {measured.limit:.3g}"
    )


def _pair(got: Any, expected: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both in f64, of equal shapes."""
    ours, theirs = (_array(x).astype(np.float64) for x in (got, expected))
    assert ours.shape == theirs.shape, f"shape {ours.shape}, expected {theirs.shape}"
    return ours, theirs


def _array(x: Any) -> np.ndarray:
    return np.asarray(x.detach() if torch.is_tensor(x) else x)


def _dtype(x: Any) -> str:
    return _array(x).dtype.name


def write_tables(items: Iterable[pytest.Function]) -> str:
    """docs/parity.md: one table per module of tests, and one of ours against ours."""
    parity, consistency = (
        [
            (_claim(item, mark), MEASURED[item.nodeid])
            for item in items
            if (mark := item.get_closest_marker(name)) and item.nodeid in MEASURED
        ]
        for name in ("parity", "consistency")
    )
    sections = dict.fromkeys(claim.section for claim, _ in parity)
    tables = {name: [case for case in parity if case[0].section == name] for name in sections}
    tables["Ours against ours"] = consistency
    texts = [f"## {name}\n\n{table(cases)}" for name, cases in tables.items() if cases]
    return "\n".join([INTRODUCTION, *texts])


def _claim(item: pytest.Function, mark: pytest.Mark) -> Claim:
    section = (item.module.__doc__ or item.path.stem).partition("\n")[0].rstrip(".")
    what = item.function.__name__.removeprefix("test_").replace("_", " ")
    variant = item.get_closest_marker("variant")
    return Claim(section, f"{what} ({variant.args[0]})" if variant else what, mark.args[0])


def table(cases: Iterable[tuple[Claim, Iterable[Measurement]]]) -> str:
    """A Markdown table of cases: one row per claim and limit, with the worst error of its cases."""
    rows: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for claim, measurements in cases:
        worst: dict[tuple[str, ...], float] = defaultdict(float)
        for m in measurements:
            label = f"{claim.what}: {m.what}" if m.what else claim.what
            row = (label, claim.oracle, m.dtype, m.measure, _number(m.limit))
            worst[row] = max(worst[row], m.error)
        for row, error in worst.items():
            rows[row].append(error)
    lines = ["| claim | compared with | dtype | measure | cases | worst error | limit |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for (*row, limit), errors in rows.items():
        cells = (*row, str(len(errors)), _number(max(errors)), limit)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _number(x: float) -> str:
    return f"{x:.1e}" if x else "0"
