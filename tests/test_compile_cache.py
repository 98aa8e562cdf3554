"""Compiled programs are kept for the next start; a cache that does not work ends nothing."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

import train_tpu
from flax_projector.config import TrainConfig
from flax_projector.training.compile_cache import compile_cache, cpu_features

PROGRAM = """
import logging, os, sys
import jax
import jax.numpy as jnp
from flax_projector.training.compile_cache import compile_cache

logging.basicConfig()
found = 0

def listen(event, **_):
    global found
    found += event == "/jax/compilation_cache/cache_hits"

jax.monitoring.register_event_listener(listen)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
with compile_cache(sys.argv[1]):
    for n in (2.0, 3.0):
        program = jax.jit(lambda x: n * x).lower(jax.ShapeDtypeStruct((4,), jnp.float32)).compile()
        assert program(jnp.ones(4, jnp.float32))[0] == n
print(found)
"""


def compile_with(folder: str, **variables: str | None) -> tuple[int, str]:
    """How many of a new process's programs were kept, and what it said."""
    env = os.environ | variables
    ran = subprocess.run(
        [sys.executable, "-W", "default", "-c", PROGRAM, folder],
        cwd=Path(train_tpu.__file__).parent,
        env={name: value for name, value in env.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout), ran.stderr


def test_programs_are_kept_in_the_users_cache_unless_a_folder_is_named(tmp_path):
    """Two that the test compiles, and one that fills an array with ones."""
    home = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": None}
    kept = tmp_path / "flax-projector" / "xla" / cpu_features()
    assert compile_with("off", **home)[0] == 0 and not kept.exists()
    assert compile_with("auto", **home) == (0, "")
    assert len(list(kept.glob("*-cache"))) >= 3
    assert compile_with("auto", **home)[0] >= 3
    assert compile_with(str(kept.parent), **home)[0] >= 3
    assert compile_with("auto", JAX_COMPILATION_CACHE_DIR=str(kept))[0] >= 3
    assert compile_with("auto", JAX_ENABLE_COMPILATION_CACHE="0", **home)[0] == 0


@pytest.mark.parametrize("damage", ["entries", "no folder"])
def test_a_cache_that_does_not_work_is_one_warning(tmp_path, damage):
    folder = tmp_path / "xla"
    if damage == "no folder":
        folder.touch()
    else:
        compile_with(str(folder))
        cut, other, replaced, *rest = (folder / cpu_features()).glob("*-cache")
        cut.write_bytes(cut.read_bytes()[:-20])
        other.write_bytes(b"no program")
        for entry in (replaced, *rest):
            entry.unlink()
            entry.mkdir()
    num_found, said = compile_with(str(folder))
    assert num_found == 0
    assert said.count("\n") == 1 and said.startswith("WARNING:flax_projector.training."), said
    assert f"{folder}/{cpu_features()}, the compilation cache, is of no use for some" in said
    assert "name another by --compile-cache" in said


def test_other_warnings_are_shown_as_ever():
    with pytest.warns(UserWarning, match="of something else"), compile_cache("auto"):
        warnings.warn("of something else", stacklevel=1)


@pytest.mark.parametrize(
    ("folder", "num_processes", "backend", "expected"),
    [
        ("auto", 1, "tpu", "/cache/flax-projector/xla"),
        ("auto", 2, "tpu", "gs://b/run/compile_cache"),
        ("auto", 2, "cpu", f"gs://b/run/compile_cache/{cpu_features()}"),
        ("gs://c/xla", 2, "tpu", "gs://c/xla"),
        ("~/xla", 2, "gpu", f"{Path.home()}/xla"),
    ],
)
def test_several_hosts_share_a_folder(monkeypatch, folder, num_processes, backend, expected):
    settings: dict[str, Any] = {}
    config = SimpleNamespace(jax_compilation_cache_dir=None, update=settings.__setitem__)
    monkeypatch.setattr(jax, "config", config)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setattr(jax, "process_count", lambda: num_processes)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with compile_cache(folder, shared="gs://b/run/compile_cache"):
        pass
    assert settings["jax_compilation_cache_dir"] == expected
    no_others = settings.get("jax_persistent_cache_enable_xla_caches") == "none"
    assert no_others == expected.startswith("gs://")


def test_the_default_keeps_them():
    assert TrainConfig.compile_cache == "auto"
