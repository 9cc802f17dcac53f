"""The 7B step, compiled for a TPU slice on this machine: what it needs, what it sends, what it takes to find out.

collectives.json holds, for stages of the recipe on slices, how often which collective runs in a micro-batch; a change of the
step that alters it is meant or it is a defect. After one that is meant, or for another stage or slice (STAGE@SLICE, else all
that it has):

    python -m tests.aot.test_full_size 2a@v5e:4x4
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
from pathlib import Path

import pytest

from avlm_jax.aot.compiled import Program, compile_step, prepare
from avlm_jax.aot.report import Report, make_report
from avlm_jax.aot.topologies import parse_slice
from avlm_jax.chips import GIB
from avlm_jax.config import load_config

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("collectives.json")
COMMAND = "python -m tests.aot.test_full_size"

pytestmark = [
    pytest.mark.aot,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; `make aot` has it"
    ),
]


def compile_stage(place: str, **options: int) -> Report:
    """Of the recipe at 7B; `place` is STAGE@SLICE."""
    stage, name = place.split("@")
    setup = prepare(load_config(f"{ROOT}/configs/savenvideo.py:size=7b"), stage, parse_slice(name), **options)
    return make_report(setup, compile_step(setup))


def compiled_of(report: Report) -> Program:
    assert isinstance(report.program, Program), report.program
    return report.program


@pytest.fixture(scope="module")
def report() -> Report:
    """Stage 2a with 4 rows of 2,048 positions a chip, on the smallest slice of v5e that holds it."""
    return compile_stage("2a@v5e:2x4", rows=4, length=2048)


@pytest.fixture(scope="module")
def program(report: Report) -> Program:
    return compiled_of(report)


def counts(program: Program) -> dict[str, int]:
    """Runs of each kind of collective in one micro-batch."""
    found: dict[str, float] = {}
    for item in program.collectives:
        found[item.kind] = found.get(item.kind, 0) + item.times
    return {kind: int(times) for kind, times in sorted(found.items())}


def test_it_fits(report: Report) -> None:
    assert report.memory.fits, report.memory
    assert report.memory.limit == int(15.75 * GIB)


def test_state_is_updated_in_place(report: Report, program: Program) -> None:
    assert program.aliased >= report.state_bytes > 0.5 * GIB
    assert report.donated


def test_frozen_parameters_are_gathered_a_layer_at_a_time(report: Report, program: Program) -> None:
    """The head is the largest array that is ever whole: 3,584 x 152,064 in bf16."""
    gathers = [item for item in program.collectives if item.kind == "all-gather"]
    assert max(item.payload for item in gathers) <= 3584 * 152_064 * 2
    # Forward, recomputed, backward: three passes over the frozen 14.2 GiB, and no more.
    sent = sum(item.times * item.wire_bytes for item in program.collectives)
    assert sent < 3.3 * 14.2 * GIB


def test_attention_is_a_kernel(program: Program) -> None:
    """Splash in each of SigLIP's 26 layers for each of 4 chunks of frames, and in each of the language model's 28 layers
    forward, forward again when it is recomputed, and backward for queries (dq) and for keys and values (dkv). The connector has
    some more, so few that none of these could be missing.
    """
    missing_one = 28  # The least that goes when one of those kernels is not one.
    assert 26 * 4 + 4 * 28 <= program.kernels < 26 * 4 + 4 * 28 + missing_one


def test_every_loop_is_counted(program: Program) -> None:
    assert program.unknown_loops == ()


def test_it_compiles_in_minutes_on_two_cores(program: Program) -> None:
    """Of 2 idle cores and 12 GB. Others that use them make it longer, so this is not run beside anything."""
    assert program.seconds < 180
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 12e9


@pytest.mark.parametrize("place", json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else [])
def test_collectives_are_those_that_are_known(place: str) -> None:
    found = counts(compiled_of(compile_stage(place)))
    assert found == json.loads(GOLDEN.read_text())[place], f"if that is meant: `{COMMAND} {place}`"


if __name__ == "__main__":
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    for place in sys.argv[1:] or list(golden):
        golden[place] = counts(compiled_of(compile_stage(place)))
        GOLDEN.write_text(json.dumps(dict(sorted(golden.items())), indent=2) + "\n")
        print(f"{place}: {golden[place]}")
