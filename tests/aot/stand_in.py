"""A preflight without libtpu: this machine's CPU stands in for a chip, and for the compiler a rule of thumb."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from avlm_jax.aot import compiled
from avlm_jax.aot.compiled import OutOfMemory, Program, Setup, bytes_per_device
from avlm_jax.aot.hlo import Collective
from avlm_jax.aot.topologies import Slice
from avlm_jax.chips import GIB

PER_ROW = {"offload": GIB, "full": 2 * GIB, "minimal": 5 * GIB, "none": 9 * GIB}


def use_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of one chip are this machine's CPU."""

    def describe(slice_: Slice) -> SimpleNamespace:
        return SimpleNamespace(devices=jax.devices()[: slice_.num_devices])

    monkeypatch.setattr(compiled, "describe_topology", describe)


def compile_step(setup: Setup, **_: object) -> Program | OutOfMemory:
    """Temporaries in proportion to rows; more than the chip has is refused as XLA refuses it."""
    inputs = setup.inputs
    temporaries = PER_ROW[setup.config.model.llm.remat] * setup.rows
    limit = setup.slice_.chip.hbm_bytes
    if temporaries > limit:
        return OutOfMemory("finish", temporaries, limit, "RESOURCE_EXHAUSTED: so much", 1.0)
    arguments = bytes_per_device((inputs.state, inputs.frozen, inputs.batch, inputs.gradients))
    kept = bytes_per_device(inputs.state)
    return Program(
        name="finish",
        runs=setup.micro_batches,
        arguments=arguments,
        outputs=kept,
        aliased=kept,
        temporaries=temporaries,
        code=2**20,
        peak=arguments + temporaries,
        collectives=(Collective("all-gather", 28.0, 10**6, ((0,),)),),
        traffic=float(arguments),
        kernels=3,
        unknown_loops=(),
        seconds=12.0,
    )
