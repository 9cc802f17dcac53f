"""Names of TPU slices: what they mean, and what a wrong one is told."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from avlm_jax.aot import topologies
from avlm_jax.aot.topologies import TopologyError, parse_slice


@pytest.mark.parametrize(
    ("name", "meaning", "chips", "devices", "rented"),
    [
        ("v5e:4x4", "v5e:4x4", 16, 16, "v5litepod-16"),
        ("v5litepod-256", "v5e:16x16", 256, 256, "v5litepod-256"),
        ("v5e-16", "v5e:4x4", 16, 16, "v5litepod-16"),
        ("V6E-8", "v6e:2x4", 8, 8, "v6e-8"),
        ("v5p-8", "v5p:2x2x1", 4, 4, "v5p-8"),
        ("v5:2x2x1", "v5p:2x2x1", 4, 4, "v5p-8"),
        ("v5p-128", "v5p:4x4x4", 64, 64, "v5p-128"),
        ("v4-8", "v4:2x2x1", 4, 4, "v4-8"),
        ("v5e:1x1", "v5e:1x1", 1, 1, "v5litepod-1"),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 4, 8, "tpu7x-8"),
    ],
)
def test_names(name: str, meaning: str, chips: int, devices: int, rented: str) -> None:
    found = parse_slice(name)
    assert (found.name, found.chips, found.num_devices, found.rented) == (meaning, chips, devices, rented)


def test_several_slices() -> None:
    found = parse_slice("v5e:4x4", 2)
    assert (found.name, found.chips) == ("2 x v5e:4x4", 32)
    with pytest.raises(TopologyError, match="--slices is 0"):
        parse_slice("v5e:4x4", 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "write it as one of v5e:4x4"),
        ("v5g:4x4", "unknown TPU 'v5g'; did you mean 'v5"),
        ("h100:4x4", "known: v4, v5e, v5p, v6e, tpu7x"),
        ("v5e-12", "counts chips.*v5e-4, v5e-8, v5e-16"),
        ("v5p-4", "counts cores, two a chip.*v5p-8, v5p-16"),
        ("v5p-9", "there is no slice"),
        ("v5p:4x4", "v5p has 3 dimensions, e.g. v5p:2x2x2"),
        ("v6e:2x2x2", "v6e has 2 dimensions, e.g. v6e:2x4"),
        ("v5e:0x4", "0 chips"),
    ],
)
def test_a_wrong_name_is_told_the_right_ones(name: str, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        parse_slice(name)


@pytest.mark.parametrize(
    ("name", "wraps"),
    [
        ("v5e:1x1", (False, False)),
        ("v5e:2x4", (False, False)),
        ("v5e:16x16", (True, True)),
        ("v5e:8x16", (False, True)),
        ("v5p:4x4x4", (True, True, True)),
        ("v5p:2x2x4", (False, False, False)),
    ],
)
def test_only_full_dimensions_close_to_a_ring(name: str, wraps: tuple[bool, ...]) -> None:
    assert parse_slice(name).wraps == wraps


def test_without_libtpu_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TopologyError, match=r"pip install -e '\.\[tpu\]'"):
        topologies.describe_topology(parse_slice("v5e:4x4"))


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [
        ("v4-8", 1, "TPU v4"),
        ("v5p-16", 1, "TPU v5"),
        ("v5e:1x1", 1, "TPU v5 lite"),
        ("v5e:16x16", 1, "TPU v5 lite"),
        ("v6e-8", 2, "TPU v6 lite"),
        ("tpu7x:2x2x1", 1, "TPU7x"),
    ],
)
def test_libtpu_knows_them(name: str, count: int, kind: str) -> None:
    wanted = parse_slice(name, count)
    devices = topologies.describe_topology(wanted).devices
    assert len(devices) == wanted.num_devices
    assert devices[0].device_kind == kind and kind in wanted.chip.device_kinds
    assert len({device.slice_index for device in devices if count > 1}) == (count if count > 1 else 0)


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_shape_that_libtpu_does_not_know() -> None:
    with pytest.raises(TopologyError, match="libtpu does not know the slice v5e:3x5"):
        topologies.describe_topology(parse_slice("v5e:3x5"))


def test_naming_a_slice_loads_neither_jax_nor_libtpu() -> None:
    code = "import sys; from avlm_jax.aot.topologies import parse_slice; parse_slice('v5p-8'); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
