"""Rates follow from steps, shapes and seconds; compiling is kept apart; MFU is there where the chip is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avlm_jax.chips import chip_named
from avlm_jax.flops import Flops, PartFlops
from avlm_jax.monitoring.meter import TIMED, CompileClock, Meter, Shape, memory_in_use


@dataclasses.dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def cost(shape: Shape) -> Flops:
    """One TFLOP a row in the forward pass, and half of it computed again."""
    return Flops({"llm": PartFlops(forward=shape.rows * 1e12, recomputed=shape.rows * 0.5e12)})


def batches(rows: int, length: int) -> Iterator[dict[str, np.ndarray]]:
    while True:
        yield {"tokens": np.zeros((rows, length)), "duration": np.zeros(rows)}


@pytest.fixture
def clock() -> Clock:
    return Clock()


def run(meter: Meter, clock: Clock, seconds: list[float], micro_batches: int, ahead: int = 1) -> None:
    """Steps whose metrics arrive `ahead` steps after their batches were taken."""
    source = meter.watch(batches(4, 256))
    for _ in range(ahead * micro_batches):
        next(source)
    for took in seconds:
        clock.now += took
        for _ in range(micro_batches):
            next(source)
        meter.step(tokens=1500.0, samples=8)


def test_rates_are_over_the_whole_window(clock: Clock) -> None:
    chip = chip_named("v5e")
    with Meter(cost, micro_batches=2, devices=16, chip=chip, clock=clock) as meter:
        run(meter, clock, [1.0, 1.0, 4.0], micro_batches=2)
        figures = meter.read(waited=1.5)
        assert figures["tokens_per_s"] == pytest.approx(3 * 1500 / 6)
        assert figures["positions_per_s"] == pytest.approx(3 * 2 * 4 * 256 / 6)
        assert figures["samples_per_s"] == pytest.approx(3 * 8 / 6)
        assert (figures["step_s"], figures["step_s_max"]) == (1.0, 4.0)
        assert figures["data_wait"] == pytest.approx(0.25)
        # Three steps of two micro-batches of four rows.
        assert figures["mfu"] == pytest.approx(24e12 / (6 * 16 * 197e12))
        assert figures["hfu"] == pytest.approx(1.5 * figures["mfu"])
        assert "compile_s" not in figures
        # The next window knows nothing of this one.
        run(meter, clock, [2.0], micro_batches=2, ahead=0)
        figures = meter.read(waited=1.5)
        assert (figures["step_s"], figures["step_s_max"], figures["data_wait"]) == (2.0, 2.0, 0.0)
        assert figures.keys() <= TIMED


def test_no_utilisation_is_told_of_a_device_whose_peak_is_not_known(clock: Clock) -> None:
    with Meter(cost, micro_batches=1, devices=1, chip=None, clock=clock) as meter:
        run(meter, clock, [1.0], micro_batches=1)
        assert not {"mfu", "hfu"} & meter.read(0.0).keys()
        assert "no mfu and hfu" in meter.describe()


def test_the_formula_is_told_with_its_numbers() -> None:
    with Meter(cost, micro_batches=2, devices=16, chip=chip_named("v5e")) as meter:
        next(meter.watch(batches(4, 256)))
        told = meter.describe()
    assert "a step of 8 rows of 256 positions and 8 clips: 8 TFLOP of the model (llm 8), 12 TFLOP" in told
    assert "mfu = 8 TFLOP / (seconds x 16 devices x 197 TFLOP/s [v5e, bf16])" in told


def test_shapes_are_told_apart(clock: Clock) -> None:
    """Buckets: the metrics of a long batch arrive when a short one was taken already."""
    with Meter(cost, micro_batches=1, devices=1, chip=chip_named("v5e"), clock=clock) as meter:
        source = meter.watch(iter([*take(batches(8, 512), 1), *take(batches(2, 64), 1)]))
        next(source), next(source)
        clock.now += 1.0
        meter.step(1.0, 8)
        assert meter.read(0.0)["positions_per_s"] == 8 * 512


def take(source: Iterator, count: int) -> list:
    return [next(source) for _ in range(count)]


def test_compiling_is_in_no_rate() -> None:
    """On the real clock: a first step that compiles is as long as the others without it."""
    with Meter(cost, micro_batches=1, devices=1, chip=None) as meter:
        source = meter.watch(batches(1, 8))
        next(source)
        step = jax.jit(lambda x: jnp.linalg.eigh(x @ x.T)[0].sum() + 0.1)
        step(jnp.ones((9, 9))).block_until_ready()
        meter.step(8.0, 1)
        figures = meter.read(0.0)
        assert figures["compile_s"] > 2 * figures["step_s"] > 0
        next(source)
        step(jnp.ones((9, 9))).block_until_ready()
        meter.step(8.0, 1)
        assert meter.read(0.0).get("compile_s", 0.0) < 0.1 * figures["compile_s"]


def test_what_is_traced_inside_of_something_else_counts_once() -> None:
    clock = CompileClock()
    for begun, ended in ((3.0, 4.0), (2.0, 5.0), (4.5, 6.0), (8.0, 9.0)):
        jax.monitoring.record_event_time_span("/jax/core/compile/jaxpr_trace_duration", begun, ended)
    jax.monitoring.record_event_time_span("/jax/something/else", 0.0, 100.0)
    assert clock.take() == pytest.approx(4.0 + 1.0)
    assert clock.take() == 0.0
    clock.close()
    jax.monitoring.record_event_time_span("/jax/core/compile/jaxpr_trace_duration", 0.0, 1.0)
    assert clock.take() == 0.0


def test_memory_is_the_fullest_devices_or_the_processes_own() -> None:
    @dataclasses.dataclass
    class Device:
        used: int

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_in_use": self.used * 2**30, "peak_bytes_in_use": (self.used + 1) * 2**30}

    assert memory_in_use([Device(2), Device(5)]) == {"memory_gib": 5.0, "memory_peak_gib": 6.0}
    held = np.ones(2**26 // 8)
    figures = memory_in_use(jax.local_devices())
    assert 0.05 < figures["memory_gib"] <= figures["memory_peak_gib"] and held.sum()
