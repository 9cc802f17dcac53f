"""How fast a run is and what of the machine it uses, once per logged window of steps.

    tokens_per_s        text positions that are not padding, over all devices       positions_per_s   padding included
    samples_per_s       samples                                    step_s, step_s_max  median and longest time of a step
    mfu, hfu            see `Meter.describe`; absent on a device whose peak `chips` does not know
    data_wait           share of the time that the loop has waited for batches
    compile_s           seconds spent on compiling; in no other figure, and absent where nothing was compiled
    memory_gib, memory_peak_gib  of the fullest device of this process; on a CPU the process's own

Rates are over the whole window: waiting for data and saving checkpoints is part of it.
"""

from __future__ import annotations

import collections
import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from avlm_jax.chips import GIB, Chip
from avlm_jax.flops import Flops

# Metrics that differ between two runs of the same steps; all others are the same to the last bit on the same TPUs or CPUs. GPUs
# sum in another order each time unless XLA is told otherwise (launch/README.md).
TIMED = frozenset(
    {"tokens_per_s", "positions_per_s", "samples_per_s", "step_s", "step_s_max", "mfu", "hfu"}
    | {"data_wait", "compile_s", "memory_gib", "memory_peak_gib"}
)


class Shape(NamedTuple):
    """Of a micro-batch over all devices: rows of text, their positions, clips, and of which media features were read."""

    rows: int
    length: int
    clips: int
    features: tuple[str, ...] = ()


@dataclasses.dataclass
class Window:
    """Sums over the steps since the metrics were last read."""

    begun: float
    waited: float = 0.0
    seconds: list[float] = dataclasses.field(default_factory=list)
    tokens: float = 0.0
    positions: int = 0
    samples: int = 0
    model_flops: float = 0.0
    hardware_flops: float = 0.0
    compiling: float = 0.0


class Meter:
    """Counts steps as their metrics arrive; close it.

    Args:
        flops: operations of one micro-batch.
        micro_batches: of a step.
        devices: over which a step is spread.
        chip: what each of them is; None where that is not known.
        clock: seconds.

    Attributes:
        first: shape of the first micro-batch, once it is there.
    """

    def __init__(
        self,
        flops: Callable[[Shape], Flops],
        *,
        micro_batches: int,
        devices: int,
        chip: Chip | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._flops_of, self._known = flops, dict[Shape, Flops]()
        self._micro_batches, self._devices, self._chip, self._clock = micro_batches, devices, chip, clock
        self._shapes: collections.deque[Shape] = collections.deque()
        self._compiler = CompileClock()
        self.first: Shape | None = None
        self._last = clock()
        self._window = Window(self._last)

    def watch(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The same batches; what they cost is remembered until `step` is told that they are done."""
        for batch in batches:
            shape = self._shape_of(batch)
            self.first = self.first or shape
            self._shapes.append(shape)
            yield batch

    def _shape_of(self, batch: Mapping[str, Any]) -> Shape:
        rows, length = batch["tokens"].shape
        keys = {"frame_features": "video", "audio_features": "audio"}
        features = tuple(modality for key, modality in keys.items() if key in batch)
        return Shape(rows, length, batch["duration"].shape[0], features)

    def step(self, tokens: float, samples: int) -> None:
        """To be called when a step's metrics have come, in order: with them the step is known to be done."""
        now, window = self._clock(), self._window
        compiling = self._compiler.take()
        window.seconds.append(max(now - self._last - compiling, 0.0))
        window.compiling += compiling
        self._last = now
        window.tokens += tokens
        window.samples += samples
        for _ in range(self._micro_batches):
            shape = self._shapes.popleft()
            window.positions += shape.rows * shape.length
            flops = self.flops(shape)
            window.model_flops += flops.model
            window.hardware_flops += flops.hardware

    def flops(self, shape: Shape) -> Flops:
        """Operations of a micro-batch; counted once for each shape."""
        if shape not in self._known:
            self._known[shape] = self._flops_of(shape)
        return self._known[shape]

    def read(self, waited: float) -> dict[str, float]:
        """Figures of the window that ends with the last `step`, by the names of `TIMED`; the next window begins.

        Args:
            waited: seconds that the loop has waited for batches in all so far.
        """
        window = self._window
        elapsed = max(self._last - window.begun, 1e-9)
        self._window = Window(self._last, waited)
        busy = max(elapsed - window.compiling, 1e-9)
        figures = {
            "tokens_per_s": window.tokens / busy,
            "positions_per_s": window.positions / busy,
            "samples_per_s": window.samples / busy,
            "step_s": statistics.median(window.seconds),
            "step_s_max": max(window.seconds),
            "data_wait": min((waited - window.waited) / elapsed, 1.0),
        }
        if window.compiling:
            figures["compile_s"] = window.compiling
        if self._chip is not None:
            peak = busy * self._devices * self._chip.peak_flops
            figures |= {"mfu": window.model_flops / peak, "hfu": window.hardware_flops / peak}
        return figures | memory_in_use(jax.local_devices())

    def describe(self) -> str:
        """The formula of mfu and hfu with the numbers of the first step."""
        shape = self.first
        if shape is None:
            raise ValueError("no batch was seen yet")
        flops, k = self.flops(shape), self._micro_batches
        model, hardware = (f"{k * x / 1e12:.4g}" for x in (flops.model, flops.hardware))
        parts = ", ".join(f"{name} {k * part.model / 1e12:.3g}" for name, part in flops.parts.items())
        told = (
            f"a step of {k * shape.rows} rows of {shape.length} positions and {k * shape.clips} clips: {model} TFLOP of the "
            f"model ({parts}), {hardware} TFLOP of the hardware, which also counts what is computed again"
        )
        if self._chip is None:
            return f"{told}; no mfu and hfu: the peak of this kind of device is not known"
        peak = f"{self._devices} devices x {self._chip.peak_flops / 1e12:g} TFLOP/s [{self._chip.name}, bf16]"
        return f"{told}; mfu = {model} TFLOP / (seconds x {peak}), hfu = {hardware} TFLOP / (the same)"

    def close(self) -> None:
        """Stops listening to the compiler."""
        self._compiler.close()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CompileClock:
    """Seconds that JAX spends on tracing, lowering and compiling, whatever asked for it; close it."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_time_span_listener(self._heard)

    def _heard(self, event: str, begun: float, ended: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self._spans.append((begun, ended))

    def take(self) -> float:
        """Seconds since the last call; what ran inside of or beside something else counts once."""
        spans, self._spans = self._spans, []
        total, reached = 0.0, float("-inf")
        for begun, ended in sorted(spans):
            total += max(ended - max(begun, reached), 0.0)
            reached = max(reached, ended)
        return total

    def close(self) -> None:
        jax.monitoring.unregister_event_time_span_listener(self._heard)


def memory_in_use(devices: Sequence[jax.Device]) -> dict[str, float]:
    """{"memory_gib", "memory_peak_gib"} of the fullest device, or of this process where devices do not tell (the CPU)."""
    found = [stats for device in devices if (stats := device.memory_stats())]
    if found:
        used, peak = (max(stats[key] for stats in found) for key in ("bytes_in_use", "peak_bytes_in_use"))
        return {"memory_gib": used / GIB, "memory_peak_gib": peak / GIB}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
    statm = Path("/proc/self/statm")
    if not statm.exists():  # Only Linux tells what is used now.
        return {"memory_peak_gib": peak}
    used = int(statm.read_text().split()[1]) * resource.getpagesize() / GIB
    return {
        "memory_gib": used,
        "memory_peak_gib": max(peak, used),
    }  # The kernel updates the peak a little late.
