"""The update does not depend on how many devices or micro-batches make it, in bf16 either."""

import os
import pickle
import subprocess
import sys

import pytest

from tests.device_counts import CASES
from tests.parity import assert_relative_l2

LIMIT_SECS = 1800.0  # stops a hang
# Rounds where the program says. Otherwise the compiler drops roundings to bf16 between operations
# in f32, and not the same ones in a program for one device as in one for several.
FLAGS = (
    "--xla_force_host_platform_device_count=64 --xla_allow_excess_precision=false"
    " --xla_backend_optimization_level=0"
)


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """Of each case and each parameter."""
    path = tmp_path_factory.mktemp("gradients") / "gradients.pickle"
    subprocess.run(
        [sys.executable, "-m", "tests.device_counts", str(path)],
        env={**os.environ, "XLA_FLAGS": FLAGS},
        check=True,
        timeout=LIMIT_SECS,
    )
    return pickle.loads(path.read_bytes())


@pytest.mark.consistency("ours in one part on one device")
@pytest.mark.parametrize("case", [case for case in CASES if case[1:] != (1, 1)])
def test_bf16_gradients_are_the_same_in_parts_and_on_64_devices(gradients, case):
    expected = gradients[case[0], 1, 1]
    assert gradients[case].keys() == expected.keys()
    for name, want in expected.items():
        assert gradients[case][name].dtype == "float32"
        assert_relative_l2(gradients[case][name], want, 1e-5, name)
