"""The helpers that measure raise above their limit, and the table tells what they measured."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.parity import (
    ABSOLUTE,
    ELEMENT,
    L2,
    MEASURED,
    Claim,
    Measurement,
    assert_close,
    assert_relative_l2,
    assert_within,
    table,
)

EXPECTED = np.array([3.0, -4.0])


@pytest.mark.parametrize(
    ("check", "measure", "error"),
    [(assert_close, ELEMENT, 0.1), (assert_within, ABSOLUTE, 0.5), (assert_relative_l2, L2, 0.1)],
)
def test_error_above_its_limit_is_measured_and_raises(check, measure, error, request) -> None:
    got = jnp.array([3.0, -4.5])
    check(got, torch.from_numpy(EXPECTED), 1.01 * error)
    with pytest.raises(AssertionError, match=f"gradient, fc1: {measure} error {error} > "):
        check(got, EXPECTED, 0.99 * error, "fc1", what="gradient")
    measured = MEASURED[request.node.nodeid]
    assert [m.what for m in measured] == ["", "gradient"]
    for m in measured:
        assert (m.measure, m.dtype, m.error) == (measure, "float32", pytest.approx(error))


@pytest.mark.parametrize("check", [assert_close, assert_within, assert_relative_l2])
@pytest.mark.parametrize("got", [[3.0, np.nan], [3.0, np.inf], [3.0, -4.0, 0.0], [[3.0, -4.0]]])
def test_wrong_shape_and_what_is_not_finite_raise(check, got) -> None:
    with pytest.raises(AssertionError):
        check(np.array(got), EXPECTED, 1.0)


def test_cases_fold_into_one_row_with_the_worst_error() -> None:
    claim, other = Claim("", "logits equal theirs", "torch"), Claim("", "tokens too", "torch")
    near, far = (Measurement("", ELEMENT, "float32", 1e-5, error) for error in (1e-7, 2.34e-6))
    exact = far._replace(what="loss", limit=0, error=0)
    cases = [(claim, [far, near]), (other, [near]), (claim, [near, exact])]
    assert table(cases).splitlines()[2:] == [
        "| logits equal theirs | torch | float32 | element | 2 | 2.3e-06 | 1.0e-05 |",
        "| tokens too | torch | float32 | element | 1 | 1.0e-07 | 1.0e-05 |",
        "| logits equal theirs: loss | torch | float32 | element | 1 | 0 | 0 |",
    ]
