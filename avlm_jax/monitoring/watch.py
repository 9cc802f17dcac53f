"""What a person asked to see of a run beyond its metrics (config.watch)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """The section config.watch; none of it changes what a run computes.

    Attributes:
        wandb: project of Weights & Biases to send metrics to; empty for none. Needs the extra [wandb].
        profile_start: first step, counted from 1 as in the metrics, of which a trace is recorded; 0: none is.
        profile_steps: how many. Their trace lies in <workdir>/<stage>/profile, for TensorBoard and xprof.
    """

    wandb: str = ""
    profile_start: int = 0
    profile_steps: int = 3

    def __post_init__(self) -> None:
        if self.profile_start < 0:
            raise ValueError(
                f"profile_start is {self.profile_start}; it is a step, counted from 1, or 0 for none"
            )
        if self.profile_steps < 1:
            raise ValueError(f"profile_steps is {self.profile_steps}; it must be at least 1")


class Profiler:
    """Records a trace of the chosen steps, and of no others; close it.

    A run that continues behind the first chosen step records those that are left, one that continues behind the last none.

    Args:
        config: which steps.
        directory: where the trace goes.
        enabled: whether this process records.
    """

    def __init__(self, config: WatchConfig, directory: Path, *, enabled: bool = True) -> None:
        chosen = range(config.profile_start, config.profile_start + config.profile_steps)
        self._chosen = chosen if enabled and config.profile_start else range(0)
        self._directory, self._tracing = directory, False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the call that starts step `number`."""
        if number in self._chosen and not self._tracing:
            jax.profiler.start_trace(self._directory)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def started(self, number: int, results: Any) -> None:
        """After step `number` was started; behind the last chosen one its `results` are waited for."""
        if self._tracing and number >= self._chosen[-1]:
            jax.block_until_ready(results)
            self.close()
            print(f"trace of steps up to {number}: {self._directory}", flush=True)

    def close(self) -> None:
        """Ends a trace that is being recorded."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
