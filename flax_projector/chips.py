"""What the makers of accelerators say of them, and what is attained: the only such table."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Attained:
    """What programs attain of a chip's peaks, as shares.

    Attributes:
      products: of FLOP/s, in products of matrices.
      kernels: of FLOP/s, in kernels of attention.
      hbm: of the memory's bandwidth.
    """

    products: float = 1.0
    kernels: float = 1.0
    hbm: float = 1.0


_ON_H100 = Attained(products=0.76, kernels=0.28, hbm=0.70)
"""In the training step, as one H100 was traced: docs/gpu.md. Assumed of the other GPUs."""


@dataclass(frozen=True)
class Chip:
    """An accelerator, as JAX sees it: one device.

    Attributes:
      kind: the beginning of JAX's `device_kind`.
      peak_flops: dense bf16 FLOP/s.
      hbm_bytes: memory.
      hbm_bandwidth: bytes/s between chip and memory.
      link_bandwidth: bytes/s that leave a chip for others of its slice: half of what makers call
        bidirectional.
      network_bandwidth: bytes/s that leave a chip for other slices, over the network of the data
        centre; a slice of GPUs is a machine. Of TPUs only v5e's is published (6.4 Tbit/s for a pod
        of 256), and stands for all.
      clock: cycles/s, in which the TPU's compiler estimates; None for GPUs, whose compiler does
        not. It is the peak divided by the FLOPs that all MXUs of a chip do in a cycle.
      source: where the figures are from.
      attained: what programs attain of these figures, where the compiler does not estimate it.
    """

    kind: str
    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    clock: float | None
    source: str
    attained: Attained = Attained()


GIB = 2.0**30
CHIPS = {
    "v3": Chip(
        "TPU v3",  # one of the two cores of a chip
        peak_flops=61.5e12,
        hbm_bytes=16 * GIB,
        hbm_bandwidth=450e9,
        link_bandwidth=164e9,
        network_bandwidth=3.1e9,
        clock=0.94e9,
        source="Google Cloud, TPU v3; its interconnect: Jouppi et al., CACM 63 (7), 2020",
    ),
    "v4": Chip(
        "TPU v4",
        peak_flops=275e12,
        hbm_bytes=32 * GIB,
        hbm_bandwidth=1200e9,
        link_bandwidth=300e9,
        network_bandwidth=3.1e9,
        clock=1.05e9,
        source="Google Cloud, TPU v4",
    ),
    "v5e": Chip(
        "TPU v5 lite",
        peak_flops=197e12,
        hbm_bytes=16 * GIB,
        hbm_bandwidth=819e9,
        link_bandwidth=200e9,
        network_bandwidth=3.1e9,
        clock=1.5e9,
        source="Google Cloud, TPU v5e",
    ),
    "v5p": Chip(
        "TPU v5",
        peak_flops=459e12,
        hbm_bytes=95 * GIB,
        hbm_bandwidth=2765e9,
        link_bandwidth=600e9,
        network_bandwidth=3.1e9,
        clock=1.75e9,
        source="Google Cloud, TPU v5p",
    ),
    "v6e": Chip(
        "TPU v6 lite",
        peak_flops=918e12,
        hbm_bytes=32 * GIB,
        hbm_bandwidth=1638e9,
        link_bandwidth=400e9,
        network_bandwidth=3.1e9,
        clock=1.75e9,
        source="Google Cloud, TPU v6e",
    ),
    "a100": Chip(
        "NVIDIA A100",
        peak_flops=312e12,
        hbm_bytes=80 * GIB,
        hbm_bandwidth=2039e9,
        link_bandwidth=300e9,
        network_bandwidth=25e9,
        clock=None,
        source="NVIDIA, A100 80GB SXM and DGX A100",
        attained=_ON_H100,
    ),
    "h100": Chip(
        "NVIDIA H100",
        peak_flops=989e12,
        hbm_bytes=80 * GIB,
        hbm_bandwidth=3352e9,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        clock=None,
        source="NVIDIA, H100 SXM and DGX H100",
        attained=_ON_H100,
    ),
    "h200": Chip(
        "NVIDIA H200",
        peak_flops=989e12,
        hbm_bytes=141e9,
        hbm_bandwidth=4800e9,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        clock=None,
        source="NVIDIA, H200 SXM and DGX H200",
        attained=_ON_H100,
    ),
}
"""By the names that `--plan` knows them by."""


def chip_of(device: Any) -> Chip | None:
    """The chip of a JAX device, or None if it is not in the table (a CPU)."""
    found = [chip for chip in CHIPS.values() if device.device_kind.startswith(chip.kind)]
    return max(found, key=lambda chip: len(chip.kind), default=None)


def peak_flops(device: Any) -> float | None:
    """Peak bf16 FLOP/s of a device, or None if it is not in the table."""
    chip = chip_of(device)
    return None if chip is None else chip.peak_flops
