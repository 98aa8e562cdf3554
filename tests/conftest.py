"""Eight fake CPU devices and exact matmuls, set before JAX starts."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
# Most of a test's time is compilation, of the same tiny programs again and again.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture
def tiny_towers(tmp_path_factory):
    """HF folders of a tiny random Whisper and a tiny random Llama with a ChatML tokenizer."""
    from tests.tiny import make_towers

    return make_towers(tmp_path_factory.mktemp("towers"))
