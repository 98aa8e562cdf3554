"""Eight fake CPU devices and exact matmuls, set before JAX starts."""

import logging
import os
import sys
import threading
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
CACHE = str(Path(__file__).parents[1] / ".jax_cache")
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE  # for processes that tests start
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_addoption(parser):
    help = "write what the tests measured against PyTorch as Markdown; without -n"
    parser.addoption("--parity-table", metavar="FILE", help=help)


def pytest_configure(config):
    if config.getoption("parity_table") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--parity-table needs the tests in one process: leave out -n")


def pytest_sessionfinish(session, exitstatus):
    file = session.config.getoption("parity_table")
    if file and exitstatus == pytest.ExitCode.OK:
        from tests.parity import write_tables

        Path(file).write_text(write_tables(session.items))


@pytest.fixture
def free_encoder(monkeypatch) -> None:
    """Clips cost only their length, so that batches of short ones hold more of them."""
    monkeypatch.setattr("flax_projector.data.batch_plan._ENCODER_COST", 0.0)


@pytest.fixture(scope="session")
def tiny_towers(tmp_path_factory):
    """HF folders of a tiny random Whisper and a tiny random Llama with a ChatML tokenizer."""
    from tests.tiny import make_towers

    return make_towers(tmp_path_factory.mktemp("towers"))


@pytest.fixture(scope="session")
def bucket_server():
    """A server of Google Cloud Storage: one for all tests, since TensorStore looks it up once."""
    from tests.bucket import emulator

    with emulator() as server:
        yield server


@pytest.fixture(autouse=True)
def logging_as_it_was():
    """Takes back what a program under test set up for its own log."""
    names = ("", "flax_projector", "convert", "train", "absl", "asyncio")
    loggers = [logging.getLogger(name) for name in names]
    before = [(log.level, log.handlers[:], log.filters[:]) for log in loggers]
    hooks = threading.excepthook, sys.unraisablehook
    yield
    threading.excepthook, sys.unraisablehook = hooks
    for logger, (level, handlers, filters) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:], logger.filters[:] = handlers, filters


@pytest.fixture
def log_level(caplog):
    """As the command lines set it up."""
    for name in ("convert", "flax_projector"):
        caplog.set_level("INFO", logger=name)


@pytest.fixture(scope="session")
def after_10(tmp_path_factory):
    """`checkpoint-10` of a training of 20 steps by PyTorch, as the HF Trainer saves it."""
    from tests.trainer import trained

    return trained(10).save(tmp_path_factory.mktemp("trainer") / "checkpoint-10")


@pytest.fixture
def report(capsys):
    """Shows a line of what was measured, whether or not pytest captures output."""

    def show(line: str) -> None:
        with capsys.disabled():
            print(f"\n  {line}", end=" ")  # noqa: T201

    return show
