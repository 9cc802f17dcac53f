"""How long a step takes at least: compute, memory and links, each at what programs of this kind attain.

    compute   hardware FLOPs / (peak x attained)
    memory    bytes that the program's kernels read and write in HBM / (bandwidth x attained)
    ici, dcn  per collective, bytes on the wire / bandwidth of the links its groups have

A step lies between `fastest` (all of them overlap) and `slowest` (collectives wait for compute and it for them). Attained
shares of the peak are what MaxText publishes as MFU of dense language models on each chip (AI-Hypercomputer/maxtext,
src/maxtext/configs/tpu/{v4,v5e,v5p}/README: 22B on v4-128, 16B on v5e-256, 32B to 128B on v5p; tpu-recipes,
training/trillium and training/ironwood: Llama3.1-8B on v6e, 70B on TPU7x); they were measured on other models, so the
estimate is no promise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from avlm_jax.aot.hlo import Collective
from avlm_jax.aot.topologies import Slice
from avlm_jax.chips import Chip

ATTAINED_FLOPS = {"v4": 0.567, "v5e": 0.611, "v5p": 0.70, "v6e": 0.455, "tpu7x": 0.49}
# Streaming kernels reach nine tenths of the memory's peak, gathers and short rows less.
ATTAINED_HBM = 0.8
ATTAINED_LINK = 0.8


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over one set of axes of the mesh, together.

    Attributes:
        kind: "all-gather", ...
        axes: names of the mesh's axes that vary within a group, "data+fsdp"; "one device" for groups of one.
        link: "ici", or "dcn" where a group spans slices.
        count: runs per step.
        bytes: that a device sends per step.
        seconds: that they take at the link's attained bandwidth.
    """

    kind: str
    axes: str
    link: str
    count: float
    bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds per optimizer step, by what bounds them."""

    compute: float
    memory: float
    ici: float
    dcn: float

    @property
    def fastest(self) -> float:
        return max(self.compute, self.memory, self.ici, self.dcn)

    @property
    def slowest(self) -> float:
        return max(self.compute, self.memory) + self.ici + self.dcn

    @property
    def bound(self) -> str:
        """What the fastest step waits for."""
        return max(("compute", "memory", "ici", "dcn"), key=lambda name: getattr(self, name))


def roofline(chip: Chip, flops: float, hbm_bytes: float, traffic: Sequence[Traffic]) -> Roofline:
    """Args:
    chip: of the slice.
    flops, hbm_bytes: of one device and one optimizer step.
    traffic: of one optimizer step.
    """
    return Roofline(
        compute=flops / (chip.peak_flops * ATTAINED_FLOPS[chip.name]),
        memory=hbm_bytes / (chip.hbm_bandwidth * ATTAINED_HBM),
        ici=sum(item.seconds for item in traffic if item.link == "ici"),
        dcn=sum(item.seconds for item in traffic if item.link == "dcn"),
    )


def summarise(collectives: Sequence[Collective], runs: int, mesh: Any, slice_: Slice) -> list[Traffic]:
    """Gathers collectives by kind, axes and link, the most seconds first.

    Args:
        collectives: of a program.
        runs: of that program per optimizer step.
        mesh: `jax.sharding.Mesh` of the slice's devices.
        slice_: which slice.
    """
    sums: dict[tuple[str, str, str], list[float]] = {}
    for item in collectives:
        axes = axes_of(item, mesh)
        link, seconds = link_seconds(item, mesh, slice_)
        times = runs * item.times
        entry = sums.setdefault((item.kind, axes, link), [0.0, 0.0, 0.0])
        for index, value in enumerate((times, times * item.wire_bytes, times * seconds)):
            entry[index] += value
    traffic = [Traffic(*key, *values) for key, values in sums.items()]
    return sorted(traffic, key=lambda item: (-item.seconds, item.kind, item.axes))


def axes_of(item: Collective, mesh: Any) -> str:
    """Names of the axes along which a collective's groups extend."""
    import numpy as np

    shape = tuple(mesh.shape[name] for name in mesh.axis_names)
    varying: set[str] = set()
    for group in item.groups:
        places = np.array(np.unravel_index(np.array(group), shape))
        varying.update(
            name for name, row in zip(mesh.axis_names, places, strict=True) if len(set(row.tolist())) > 1
        )
    return "+".join(name for name in mesh.axis_names if name in varying) or "one device"


def link_seconds(item: Collective, mesh: Any, slice_: Slice) -> tuple[str, float]:
    """("ici" or "dcn", seconds of one run): the group with the fewest links counts.

    Within a slice a group has the links of the torus dimensions it extends along, two a dimension that it fills and that
    closes to a ring, else one (the end of a line has one). Across slices it shares its host's network card with the host's
    other devices, and only what differs between slices crosses it.
    """
    chip = slice_.chip
    devices = mesh.devices.reshape(-1)
    link, worst = "ici", 0.0
    for group in item.groups[:64]:  # Groups of a mesh are alike; sixty-four show all of their kinds.
        members = [devices[number] for number in group]
        slices = len({getattr(device, "slice_index", None) for device in members})
        if slices > 1:
            share = item.wire_bytes
            if item.kind != "collective-permute":
                n = len(members)
                share = item.wire_bytes * (slices - 1) / (n - 1)
            per_device = chip.dcn_bandwidth / chip.devices_per_host
            link, seconds = "dcn", share / (per_device * ATTAINED_LINK)
        elif len(members) < 2:
            seconds = 0.0
        else:
            links = links_of([tuple(device.coords) for device in members], slice_)
            seconds = item.wire_bytes / (chip.ici_bandwidth / chip.ici_links * links * ATTAINED_LINK)
        worst = max(worst, seconds)
    return link, worst


def links_of(coords: Sequence[tuple[int, ...]], slice_: Slice) -> int:
    """Links that the chip at the edge of a group of chips at `coords` has into it."""
    shape = (*slice_.shape, 1, 1)[:3]
    wraps = (*slice_.wraps, False, False)[:3]
    links = 0
    for dimension in range(3):
        extent = len({place[dimension] for place in coords})
        if extent > 1:
            links += 2 if wraps[dimension] and extent == shape[dimension] else 1
    # Both cores of one TPU7x chip: they share what the chip has.
    return links or slice_.chip.ici_links


def utilisation(flops: float, seconds: float, chip: Chip, devices: int) -> float:
    """FLOPs of all devices in a step as a share of what their peaks allow: MFU of model FLOPs, HFU of hardware FLOPs."""
    return flops / (seconds * devices * chip.peak_flops) if seconds and not math.isinf(seconds) else 0.0
