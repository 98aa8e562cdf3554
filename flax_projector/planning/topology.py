"""Pods by name, and the devices that their compilers compile for without having any."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flax_projector.chips import CHIPS, Chip

MACHINE = 8
"""GPUs in a machine."""
_MOST = {"v4": 4096, "v5e": 256, "v5p": 6144, "v6e": 256}  # chips in a slice
_FORMS = (
    "v5e:4x4 (or v5e-16), v6e:8x8, v4:2x2x4 (or v4-32, which counts cores), v5p:4x4x4, h100:8, "
    'a100:8, h200:16; "v5e:16x16 x 2" for two slices'
)


@dataclass(frozen=True)
class Topology:
    """One or several slices of equal chips.

    Attributes:
      name: its full name, as in `v5e:16x16 x 2`.
      chip_name: the chip's name in `CHIPS`.
      shape: chips along each dimension of a slice.
      num_slices: number of slices, which only the network of the data centre connects.
    """

    name: str
    chip_name: str
    shape: tuple[int, ...]
    num_slices: int

    @property
    def chip(self) -> Chip:
        """What its maker says of the chip."""
        return CHIPS[self.chip_name]

    @property
    def is_tpu(self) -> bool:
        """Whether the chips are TPUs."""
        return self.chip_name in _MOST

    @property
    def slice_size(self) -> int:
        """Chips in a slice."""
        return math.prod(self.shape)

    @property
    def num_chips(self) -> int:
        """Chips in all slices."""
        return self.num_slices * self.slice_size

    @property
    def chips_per_host(self) -> int:
        """Chips that one host feeds: 8 of a GPU's, 4 of a TPU's on several hosts."""
        if not self.is_tpu:
            return min(self.slice_size, MACHINE)
        is_one_host = self.chip_name in ("v5e", "v6e") and self.slice_size <= 8
        return self.slice_size if is_one_host else min(4, self.slice_size)


def parse_topology(text: str) -> Topology:
    """Reads a name such as `v5e:16x16`, `v5p-128`, `v5e-256 x 2` or `h100:8`.

    Raises:
      ValueError: if there is no such thing; names the nearest.
    """
    found = re.fullmatch(
        r"\s*(?P<chip>[a-z]+\d+[a-z]*|v\d\w*)\s*(?P<sign>[:-])\s*(?P<size>\d+(?:x\d+)*)"
        r"(?:\s+x\s*(?P<slices>\d+))?\s*",
        text.lower().replace("v5litepod", "v5e"),
    )
    if found is None:
        raise ValueError(f"--plan {text!r} is no topology. Such are {_FORMS}")
    chip, sizes = found["chip"], [int(n) for n in found["size"].split("x")]
    num_slices = int(found["slices"] or 1)
    known = [*_MOST, "a100", "h100", "h200"]
    if chip not in known:
        raise ValueError(f"--plan {text!r}: no chip {chip!r}; known are {', '.join(known)}")
    if min(*sizes, num_slices, 1) < 1:
        raise ValueError(f"--plan {text!r}: it has no chips. Such are {_FORMS}")
    if chip not in _MOST:
        return _gpus(text, chip, sizes, num_slices)
    dims = 2 if chip in ("v5e", "v6e") else 3
    shapes = _shapes(chip)
    if len(sizes) == 1:
        cores = 1 if dims == 2 else 2  # the names of v4 and v5p count cores, two in a chip
        by_size = {cores * math.prod(shape): shape for shape in reversed(shapes)}
        if sizes[0] not in by_size:
            near = min(by_size, key=lambda size: abs(math.log(size / sizes[0])))
            raise ValueError(
                f"--plan {text!r}: there is no slice of this size; the nearest is {chip}-{near} "
                f"({_joined(chip, by_size[near])})"
            )
        shape = by_size[sizes[0]]
    else:
        shape = tuple(sizes + [1] * (dims - len(sizes)))
        if len(sizes) > dims or shape not in shapes:
            wanted = math.prod(sizes)
            near = min(shapes, key=lambda s: (abs(math.log(math.prod(s) / wanted)), s != shape))
            raise ValueError(
                f"--plan {text!r}: {chip} has no slices of this shape; the nearest is "
                f"{_joined(chip, near)}"
            )
    return Topology(_joined(chip, shape, num_slices), chip, shape, num_slices)


def _gpus(text: str, chip: str, sizes: Sequence[int], num_slices: int) -> Topology:
    """Of GPUs, a slice is a machine: `h100:16` is two."""
    if len(sizes) > 1 or (sizes[0] > MACHINE and sizes[0] % MACHINE):
        near = MACHINE * max(1, round(math.prod(sizes) / MACHINE))
        raise ValueError(
            f"--plan {text!r}: up to {MACHINE} GPUs are in a machine, and more are whole machines; "
            f"the nearest is {chip}:{near}"
        )
    num_slices *= max(1, sizes[0] // MACHINE)
    shape = (min(sizes[0], MACHINE),)
    return Topology(_joined(chip, shape, num_slices), chip, shape, num_slices)


def _shapes(chip: str) -> list[tuple[int, ...]]:
    """The shapes of slices, smallest first: of 2D chips the maker's list, of 3D chips what is made
    of cubes of 4x4x4, and what is smaller than one."""
    if chip in ("v5e", "v6e"):
        return [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
    small = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    sides = range(4, 25, 4)
    cubes = [(a, b, c) for a in sides for b in sides for c in sides if a <= b <= c]
    found = [shape for shape in small + cubes if math.prod(shape) <= _MOST[chip]]
    # Of shapes with the same number of chips, the most compact is the last.
    return sorted(found, key=lambda shape: (math.prod(shape), -sum(shape)))


def _joined(chip: str, shape: Sequence[int], num_slices: int = 1) -> str:
    return f"{chip}:{'x'.join(map(str, shape))}" + f" x {num_slices}" * (num_slices > 1)


def absent_devices(topology: Topology) -> list[Any]:
    """The devices of a topology, for the compiler; nobody needs to have them.

    Raises:
      ValueError: if the compiler is not installed.
    """
    _require_compiler(topology)
    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        if topology.is_tpu:
            # A device of v4 and later is a whole chip; of v4, the compiler has to be told.
            config = {"chip_config_name": "megacore"} if topology.chip_name == "v4" else {}
            shape = "x".join(map(str, topology.shape))
            description = topologies.get_topology_desc(
                platform="tpu",
                topology_name=f"{topology.chip_name}:{shape}",
                num_slices=topology.num_slices,
                **config,
            )
        else:
            description = topologies.get_topology_desc(
                topology.chip_name,
                "cuda",
                target_config=_gpu_target(topology.chip_name),
                topology=f"1x{topology.num_slices}x{topology.slice_size}",
            )
    except Exception as error:  # the compilers' own errors
        raise ValueError(f"--plan {topology.name} is refused by the compiler: {error}") from error
    return list(description.devices)


_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # the cloud is not asked for the machine's TPUs
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another program may use the compiler too
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of no effect, but it complains without these two
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def _require_compiler(topology: Topology) -> None:
    if topology.is_tpu:
        if importlib.util.find_spec("libtpu") is None:
            raise ValueError(
                f"--plan {topology.name} needs the TPU's compiler, which needs no TPU: "
                "pip install libtpu"
            )
    elif importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise ValueError(needs_gpu_compiler(topology))


def needs_gpu_compiler(topology: Topology) -> str:
    """What to do if the GPU's compiler, or cuDNN for it, is not installed."""
    return (
        f"--plan {topology.name} needs the GPU's compiler, which needs no GPU: pip install "
        "--no-deps --target gpu-compiler jax-cuda12-plugin jax-cuda12-pjrt nvidia-cudnn-cu12, "
        "and set PYTHONPATH=gpu-compiler"
    )


_GPUS = {  # cores, KiB of shared memory in a core, MiB of L2, GHz, compute capability, full name
    "a100": (108, 164, 40, 1.41, 8, "NVIDIA A100-SXM4-80GB"),
    "h100": (132, 228, 50, 1.98, 9, "NVIDIA H100 80GB HBM3"),
    "h200": (132, 228, 50, 1.98, 9, "NVIDIA H200"),
}


def _gpu_target(name: str) -> str:
    """A GPU as XLA describes it."""
    cores, shared_kib, l2_mib, clock, major, full_name = _GPUS[name]
    chip = CHIPS[name]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_kib * 1024}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {64 if major == 8 else 128}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.hbm_bandwidth)}
  l2_cache_size: {l2_mib * 2**20}
  clock_rate_ghz: {clock}
  device_memory_size: {int(chip.hbm_bytes)}
  shared_memory_per_block_optin: {(shared_kib - 1) * 1024}
  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{full_name}"
"""
