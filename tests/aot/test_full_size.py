"""The 7B step, compiled for TPU slices on this machine: what it needs, what it sends, what it takes to find out.

The figures are libtpu's for this step. Another release may differ by a little; a change of the step that makes one of them grow
is what these tests are for.
"""

from __future__ import annotations

import importlib.util
import resource
from collections import Counter

import pytest

from avlm_jax.aot.compiled import Program, compile_step, prepare
from avlm_jax.aot.report import Report, make_report
from avlm_jax.aot.topologies import parse_slice
from avlm_jax.chips import GIB
from avlm_jax.config import load_config

pytestmark = [
    pytest.mark.aot,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; `make aot` has it"),
]
CONFIG = "configs/savenvideo.py:size=7b"


def preflight(stage: str, slice_: str, **options: object) -> Report:
    setup = prepare(load_config(CONFIG), stage, parse_slice(slice_), **options)
    return make_report(setup, compile_step(setup, only_last=True))


@pytest.fixture(scope="module")
def lora_on_v5e_8() -> Report:
    """Stage 2a, 4 rows of 2,048 positions a chip, on the smallest slice of v5e that holds it."""
    return preflight("2a", "v5e:2x4", rows=4)
