"""The table of accelerators: names are unique, figures of a plausible size, published ratios right."""

from __future__ import annotations

import pytest

from avlm_jax.chips import CHIPS, GIB, Chip, chip_named, find_chip


def test_no_name_and_no_device_kind_stands_twice() -> None:
    names = [chip.name for chip in CHIPS]
    kinds = [kind for chip in CHIPS for kind in chip.device_kinds]
    assert len(set(names)) == len(names) and len(set(kinds)) == len(kinds)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_figures_have_the_right_unit(chip: Chip) -> None:
    assert 1e14 < chip.peak_flops < 1e16
    assert 15 * GIB < chip.hbm_bytes < 200 * GIB
    assert 8e11 <= chip.hbm_bandwidth < 1e13
    # A link is slower than memory and faster than the share of the network.
    assert chip.dcn_bandwidth / chip.devices_per_host < chip.ici_bandwidth < chip.hbm_bandwidth
    assert find_chip(chip.device_kinds[0]) is chip and chip_named(chip.name) is chip


def test_machines_it_does_not_know() -> None:
    assert find_chip("cpu") is None and chip_named("v9") is None
