"""The 7B step, compiled for a TPU slice on this machine: what it needs, what it sends, what it takes to find out.

collectives.json holds how often which collective runs; a change of the step that alters it is meant or it is a defect.
After one that is meant: python -m tests.aot.test_full_size
"""

from __future__ import annotations

import importlib.util
import json
import resource
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


def lora_on_v5e_8() -> Report:
    """Stage 2a with 4 rows of 2,048 positions a chip, on the smallest slice of v5e that holds it."""
    config = load_config(f"{ROOT}/configs/savenvideo.py:size=7b")
    setup = prepare(config, "2a", parse_slice("v5e:2x4"), rows=4, length=2048)
    return make_report(setup, compile_step(setup))


@pytest.fixture(scope="module")
def report() -> Report:
    return lora_on_v5e_8()


@pytest.fixture(scope="module")
def program(report: Report) -> Program:
    (found,) = report.programs
    assert isinstance(found, Program), found
    return found


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
    assert program.aliased >= report.kept_bytes(program) > 0.5 * GIB
    assert report.donated


def test_frozen_parameters_are_gathered_a_layer_at_a_time(report: Report, program: Program) -> None:
    """The head is the largest array that is ever whole: 3,584 x 152,064 in bf16."""
    gathers = [item for item in program.collectives if item.kind == "all-gather"]
    assert max(item.payload for item in gathers) <= 3584 * 152_064 * 2
    # Forward, recomputed, backward: three passes over the frozen 14.2 GiB, and no more.
    sent = sum(item.times * item.wire_bytes for item in program.collectives)
    assert sent < 3.3 * 14.2 * GIB


def test_attention_is_a_kernel(program: Program) -> None:
    """Splash in every layer: 28 forward, 28 recomputed, 2 x 28 backward, and the encoders'."""
    assert program.kernels >= 4 * 28


def test_every_loop_is_counted(program: Program) -> None:
    assert program.unknown_loops == ()


def test_collectives_are_those_that_are_known(program: Program) -> None:
    assert GOLDEN.is_file(), f"{GOLDEN} is missing; write it with `{COMMAND}`"
    assert counts(program) == json.loads(GOLDEN.read_text()), f"if that is meant: `{COMMAND}`"


def test_it_compiles_in_minutes_on_two_cores(program: Program) -> None:
    """Of 2 idle cores and 12 GB. Others that use them make it longer, so this is not run beside anything."""
    assert program.seconds < 180
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 12e9


if __name__ == "__main__":
    (compiled,) = lora_on_v5e_8().programs
    assert isinstance(compiled, Program), compiled
    GOLDEN.write_text(json.dumps(counts(compiled), indent=2) + "\n")
    print(f"wrote {GOLDEN}: {counts(compiled)}, compiled in {compiled.seconds:.0f} s")
