"""Seconds of collectives by their links, and the bounds of a step."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from avlm_jax.aot.hlo import Collective
from avlm_jax.aot.roofline import (
    ATTAINED_FLOPS,
    ATTAINED_HBM,
    ATTAINED_LINK,
    Traffic,
    axes_of,
    link_seconds,
    links_of,
    roofline,
    summarise,
    utilisation,
)
from avlm_jax.aot.topologies import TPUS, parse_slice
from avlm_jax.chips import chip_named


def mesh_of(name: str, shape: tuple[int, int, int], slices: int = 1) -> SimpleNamespace:
    """A mesh as `jax.sharding.Mesh` offers it, of devices that know where they are."""
    one = parse_slice(name).shape
    devices = [
        SimpleNamespace(coords=[*place, 0, 0][:3], slice_index=number if slices > 1 else None)
        for number in range(slices)
        for place in np.ndindex(*one)
    ]
    array = np.empty(len(devices), object)
    array[:] = devices
    axes = ("data", "fsdp", "tensor")
    return SimpleNamespace(
        axis_names=axes,
        shape=dict(zip(axes, shape, strict=True)),
        devices=array.reshape(shape),
        size=len(devices),
    )


def gather(
    *groups: tuple[int, ...], payload: int = 10**9, kind: str = "all-gather", times: float = 1.0
) -> Collective:
    return Collective(kind, times, payload, groups)


def test_axes() -> None:
    mesh = mesh_of("v5e:2x4", (2, 2, 2))
    assert axes_of(gather((0, 1), (2, 3)), mesh) == "tensor"
    assert axes_of(gather((0, 2), (1, 3)), mesh) == "fsdp"
    assert axes_of(gather((0, 2, 4, 6)), mesh) == "data+fsdp"
    assert axes_of(gather((0,), (1,)), mesh) == "one device"


def test_links_of_a_torus() -> None:
    pod = parse_slice("v5e:16x16")
    assert links_of([(x, y, 0) for x in range(16) for y in range(16)], pod) == 4
    assert links_of([(x, 0, 0) for x in range(16)], pod) == 2
    assert links_of([(x, 0, 0) for x in range(8)], pod) == 1
    small = parse_slice("v5e:4x4")
    assert links_of([(x, y, 0) for x in range(4) for y in range(4)], small) == 2
    assert links_of([(0, 0, 0), (0, 0, 0)], parse_slice("tpu7x:2x2x1")) == 6  # Both halves of one chip.


def test_a_gather_over_a_slice_waits_for_its_corner() -> None:
    mesh, slice_ = mesh_of("v5e:4x4", (1, 16, 1)), parse_slice("v5e:4x4")
    link, seconds = link_seconds(gather(tuple(range(16))), mesh, slice_)
    assert link == "ici"
    assert seconds == pytest.approx(1e9 * 15 / 16 / (2 * 50e9 * ATTAINED_LINK))


def test_what_crosses_slices_goes_through_the_hosts_network() -> None:
    mesh, slice_ = mesh_of("v5e:2x2", (2, 4, 1), slices=2), parse_slice("v5e:2x2", 2)
    per_device = 12.5e9 / 4 * ATTAINED_LINK
    # One device of each slice: all of it crosses.
    link, seconds = link_seconds(gather((0, 4), (1, 5), kind="all-reduce"), mesh, slice_)
    assert (link, seconds) == ("dcn", pytest.approx(1e9 * 2 / 2 / per_device))
    # All eight: in a slice it goes over the links, and an eighth of it from each device to the other slice.
    link, seconds = link_seconds(gather(tuple(range(8)), kind="all-reduce"), mesh, slice_)
    assert (link, seconds) == ("dcn", pytest.approx(2e9 / 8 / per_device))
    assert link_seconds(gather((0, 1, 2, 3)), mesh, slice_)[0] == "ici"


def test_a_summary_adds_up_what_is_alike() -> None:
    mesh, slice_ = mesh_of("v5e:2x2", (1, 4, 1)), parse_slice("v5e:2x2")
    everyone = tuple(range(4))
    items = [
        gather(everyone, times=28.0),
        gather(everyone, payload=5 * 10**8),
        gather((0,), (1,)),
    ]
    found = summarise(items, 2, mesh, slice_)
    assert [(item.kind, item.axes, item.count) for item in found] == [
        ("all-gather", "fsdp", 58.0),
        ("all-gather", "one device", 2.0),
    ]
    assert found[0].bytes == pytest.approx((56 + 1) * 1e9 * 3 / 4)
    assert found[1].bytes == found[1].seconds == 0.0


def test_bounds() -> None:
    chip = chip_named("v5e")
    traffic = [
        Traffic("all-gather", "fsdp", "ici", 1, 1e9, 0.5),
        Traffic("all-reduce", "data", "dcn", 1, 1e9, 0.25),
    ]
    found = roofline(chip, 197e12, 819e9, traffic)
    assert found.compute == pytest.approx(1 / ATTAINED_FLOPS["v5e"])
    assert found.memory == pytest.approx(1 / ATTAINED_HBM)
    assert (found.ici, found.dcn, found.bound) == (0.5, 0.25, "compute")
    assert found.fastest == found.compute and found.slowest == pytest.approx(found.compute + 0.75)
    assert utilisation(197e12, 2.0, chip, 1) == 0.5


def test_every_tpu_has_an_attained_share() -> None:
    assert set(ATTAINED_FLOPS) == set(TPUS)
