"""Checkpoints for the tests of the converter: made, changed and compared. Needs no torch."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.checkpoint import Checkpoint, TensorInfo, in_memory
from convert.models import LLAMA, PROJECTOR, WHISPER_ENCODER
from convert.torch_files import WEIGHTS, open_torch, write_safetensors
from flax_projector.config import (
    LlamaConfig,
    ProjectorConfig,
    TrainConfig,
    WhisperConfig,
)
from flax_projector.run_folder import RunFolder

REPO = Path(__file__).parents[1]
UPSTREAM = Path(__file__).parent / "data/upstream_checkpoint"
"""Written by tiny-audio; its README describes the files."""

# Unequal, co-prime, not square: a forgotten transpose cannot hide in a shape.
CONFIGS = {
    PROJECTOR: ProjectorConfig(5, 7, projector_pool_stride=3, projector_hidden_dim=11),
    WHISPER_ENCODER: WhisperConfig(5, 6, 3, 2, 11, max_source_positions=13),
    LLAMA: LlamaConfig(13, 10, 7, 3, 4, 2, head_dim=6, qkv_bias=True, o_bias=True, qk_norm=True),
}


def random_bits(infos: dict[str, TensorInfo], seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors of random bits: NaNs with payloads, infinities and signed zeros among them."""
    rng = np.random.default_rng(seed)
    return {
        name: np.frombuffer(rng.bytes(info.nbytes), info.dtype).reshape(info.shape)
        for name, info in infos.items()
    }


def random_tensors(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Two tensors of no model."""
    rng = np.random.default_rng(0)
    return {
        "b.weight": rng.normal(size=(3, 5)).astype(dtype),
        "a.bias": rng.normal(size=7).astype(dtype),
    }


def run_script(script: str, folder: Path, **variables: str) -> list[str]:
    """The lines that a script prints, run in a process of its own with a folder as its argument.

    It says nothing else. `variables` are set in its environment.
    """
    # A GPU's compiler on the path of packages would complain that there is no GPU.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        cwd=REPO,
        env=env | {"JAX_PLATFORMS": "cpu"} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def write_weights(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    """Writes tensors into an HF folder, in place of those in it; returns the folder."""
    folder.mkdir(exist_ok=True)
    (folder / WEIGHTS).unlink(missing_ok=True)
    write_safetensors(folder / WEIGHTS, in_memory(tensors))
    return folder


PROMPT = """{
  "system": "Be brief.",
  "user": "Write: <audio>",
  "date": "",
  "before_audio": "<|im_start|>system\\nBe brief.<|im_end|>\\n<|im_start|>user\\nWrite: ",
  "after_audio": "<|im_end|>\\n<|im_start|>assistant\\n",
  "end": "<|im_end|>\\n",
  "before_audio_ids": [1, 7, 5],
  "after_audio_ids": [2, 5, 1, 9, 5],
  "end_of_turn_id": 2
}"""
"""As a run keeps it."""


def write_run(path: Path, config: ProjectorConfig, params: dict, *, steps: Sequence[int]) -> None:
    """Writes the folder of a training run, with the same parameters at every step."""
    from flax_projector.training.checkpoints import open_manager, save
    from flax_projector.training.state import TrainState

    run = RunFolder(path)
    run.claim(
        TrainConfig(encoder="some/whisper", llm="some/llama", projector=config), PROMPT, {}, 0.0
    )
    state = TrainState(np.int32(0), params, {"count": np.int32(0)})
    with open_manager(run.checkpoints, keep=len(steps)) as manager:
        for step in steps:
            save(manager, step, jax.tree.map(jnp.asarray, state), {})


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and its content."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_same_file(a: Path, b: Path) -> bool:
    """Whether two files have the same content."""
    return a.read_bytes() == b.read_bytes()


def assert_same_arrays(got: dict, expected: dict) -> None:
    """The same names, dtypes and values."""
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype, name
        np.testing.assert_array_equal(np.asarray(got[name]), array, name)


def assert_same_bytes(got: Checkpoint, expected: Checkpoint) -> None:
    """The same names, dtypes, shapes and bytes."""
    assert dict(got.infos) == dict(expected.infos)
    for name in expected.infos:
        assert got.read(name).tobytes() == expected.read(name).tobytes(), name


def assert_same_tensors(a: Path, b: Path) -> None:
    """The same, for the torch checkpoints at two paths."""
    assert_same_bytes(open_torch(a), open_torch(b))


def change_tensor(folder: Path, key: str, index: tuple[int, ...], value: float) -> None:
    """Changes one element of a tensor in an HF folder."""
    checkpoint = open_torch(folder)
    tensors = {name: checkpoint.read(name) for name in checkpoint.infos}
    tensors[key] = tensors[key].copy()
    tensors[key][index] = value
    write_weights(folder, tensors)
