"""A step over two slices, compiled by libtpu: what goes from one to the other is found in its program."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from avlm_jax.aot.compiled import compile_step, prepare
from avlm_jax.aot.report import bytes_per_device, make_report
from avlm_jax.aot.topologies import parse_slice
from avlm_jax.config import apply_overrides, load_config

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; `make aot` has it"
    ),
]


def test_gradients_are_summed_over_the_network() -> None:
    config = apply_overrides(
        load_config(f"{ROOT}/configs/savenvideo.py:size=demo"), ["stage.2a.batch_size=32"]
    )
    setup = prepare(config, "2a", parse_slice("v5e:2x2", 2), mesh={"data": 2, "fsdp": 4})
    report = make_report(setup, compile_step(setup))
    crossing = [item for item in report.traffic if item.link == "dcn"]
    assert {(item.kind, item.axes) for item in crossing} == {("all-reduce", "data")}
    # By a ring over two, a device sends as much as it holds: each trained value's gradient, and a few sums of metrics.
    trained = bytes_per_device(setup.inputs.state.trainable)
    assert trained <= crossing[0].bytes < 1.1 * trained
    assert report.time is not None and report.time.dcn == crossing[0].seconds > 0
