"""What accelerators can do: the one table of peaks, memory and bandwidths, for MFU and for `avlm preflight`.

All numbers are of one JAX device, the unit that `jax.devices()` counts: a chip, but half a chip for TPU7x, whose two cores
are two devices. `hbm_bytes` of TPUs is what libtpu 0.0.42 says a program may use ("exceeds available HBM (15.75G)"), found by
compiling one that asks for too much; the rest are the vendors' figures. Sources, by the letters in the table:

    [v4] [v5e] [v5p] [v6e] [tpu7x]   docs.cloud.google.com/tpu/docs/<name>, "System architecture"
    [isca]    Jouppi et al., TPU v4, ISCA 2023: six links of 50 GB/s
    [nvidia]  NVIDIA data sheets: A100 Tensor Core GPU, H100 Tensor Core GPU, H200 Tensor Core GPU; dense, without sparsity
"""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
        name: as people rent it ("v5e", "h100").
        device_kinds: what `jax.Device.device_kind` says, all spellings known.
        peak_flops: dense bf16 FLOP/s.
        hbm_bytes: memory a program may use.
        hbm_bandwidth: bytes/s between memory and cores.
        ici_bandwidth: bytes/s that leave a device over all its links to neighbours, one direction (TPU: half the documented
            bidirectional figure; GPU: NVLink).
        ici_links: links to neighbours that share it; 1 where a switch joins them.
        dcn_bandwidth: bytes/s of a host's network card, one direction.
        devices_per_host: devices of one process; of a TPU slice over several hosts.
        devices_per_chip: JAX devices that make up a chip.
    """

    name: str
    device_kinds: tuple[str, ...]
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    ici_links: int
    dcn_bandwidth: float
    devices_per_host: int
    devices_per_chip: int = 1


CHIPS: tuple[Chip, ...] = (
    # 275 TFLOP/s, 32 GiB at 1,200 GB/s [v4]; ICI [isca]; no document gives a v4 host's network card: v5p's is taken.
    Chip("v4", ("TPU v4",), 275e12, int(30.75 * GIB), 1200e9, 300e9, 6, 25e9, 4),
    # 197 TFLOP/s, 16 GB at 819 GB/s, ICI 400 GB/s both ways over 4 ports; 2 x 100 Gbit/s for 8 chips, hence half of it for
    # a process of 4 [v5e].
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, int(15.75 * GIB), 819e9, 200e9, 4, 12.5e9, 4),
    # 459 TFLOP/s, 95 GiB at 2,765 GB/s, ICI 1,200 GB/s both ways, 3D torus, DCN 50 Gbit/s a chip [v5p].
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, int(95.74 * GIB), 2765e9, 600e9, 6, 25e9, 4),
    # 918 TFLOP/s, 32 GB at 1,638 GB/s, ICI 800 GB/s both ways over 4 ports; 4 x 200 Gbit/s for 8 chips [v6e].
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, int(31.25 * GIB), 1638e9, 400e9, 4, 50e9, 4),
    # A chip of two devices: 2,307 TFLOP/s, 192 GiB at 7,380 GB/s, ICI 1,200 GB/s both ways, DCN 100 Gbit/s [tpu7x].
    Chip("tpu7x", ("TPU7x", "TPU v7x"), 1153.5e12, int(94.75 * GIB), 3690e9, 300e9, 6, 50e9, 8, 2),
    # GPUs: memory is all of the card's; DCN is a node of eight with 400 (A100: 200) Gbit/s a GPU, as in DGX systems [nvidia].
    Chip(
        "a100-40gb",
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
        312e12,
        40 * GIB,
        1555e9,
        300e9,
        1,
        200e9,
        8,
    ),
    Chip(
        "a100-80gb",
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
        312e12,
        80 * GIB,
        2039e9,
        300e9,
        1,
        200e9,
        8,
    ),
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989.4e12, 80 * GIB, 3350e9, 450e9, 1, 400e9, 8),
    Chip("h100-pcie", ("NVIDIA H100 PCIe",), 756e12, 80 * GIB, 2000e9, 300e9, 1, 400e9, 8),
    Chip("h200", ("NVIDIA H200",), 989.4e12, int(141e9), 4800e9, 450e9, 1, 400e9, 8),
)


def find_chip(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None for one that the table lacks (a CPU, a newer chip)."""
    return next((chip for chip in CHIPS if device_kind in chip.device_kinds), None)


def chip_named(name: str) -> Chip | None:
    """The chip of a name like "v5e"."""
    return next((chip for chip in CHIPS if chip.name == name), None)
