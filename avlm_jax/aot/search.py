"""Looks for the batch and the remat policy under which a stage's step is fastest on a slice.

Tried are rows per device (a device's share of the batch is cut into so many micro-batches as that takes) and policies, from
the one that keeps least. A policy is not tried with more rows once it did not fit, nor with more than one that keeps less
takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from avlm_jax.aot.compiled import Progress, compile_step, prepare, quiet
from avlm_jax.aot.report import Report, make_report
from avlm_jax.aot.topologies import Slice
from avlm_jax.chips import GIB

POLICIES = ("offload", "full", "minimal", "none")  # From the one that keeps least on the device.


@dataclasses.dataclass(frozen=True)
class Trial:
    """One combination and what came of it."""

    remat: str
    rows: int
    report: Report

    @property
    def fits(self) -> bool:
        return self.report.memory.fits

    def to_dict(self) -> dict[str, Any]:
        found = self.report.to_dict()
        keep = (
            "rows_per_device",
            "micro_batches",
            "fits",
            "hbm",
            "seconds",
            "mfu",
            "hfu",
            "samples_per_second",
        )
        return {"remat": self.remat, **{key: found[key] for key in keep if key in found}}


def search(
    config: ConfigDict,
    name: str,
    slice_: Slice,
    *,
    rows: Sequence[int] | None = None,
    policies: Sequence[str] = POLICIES,
    mesh: Mapping[str, int] | None = None,
    length: int | None = None,
    cache: Path | None = None,
    progress: Progress = quiet,
) -> list[Trial]:
    """Tries combinations, in the order in which they were compiled.

    Args:
        config, name, slice_, mesh, length, cache, progress: see `compiled.prepare` and `compiled.compile_step`.
        rows: per device; None takes all powers of two that divide a device's share of the batch, and the whole share.
        policies: of model.llm.remat, from the one that keeps least.

    Raises:
        ConfigError: see `compiled.prepare`.
    """
    if rows is None:
        rows = candidates(prepare(config, name, slice_, mesh=mesh, length=length, rows=0).rows)
    trials: list[Trial] = []
    most = max(rows, default=0)  # That a policy which keeps less could take.
    for remat in policies:
        fitting = 0
        for count in sorted(rows):
            if count > most:
                break
            setup = prepare(config, name, slice_, mesh=mesh, length=length, rows=count, remat=remat)
            report = make_report(setup, compile_step(setup, cache=cache, progress=progress))
            trials.append(Trial(remat, count, report))
            if not trials[-1].fits:
                break
            fitting = count
        most = fitting
    return trials


def candidates(share: int) -> tuple[int, ...]:
    """Rows per device that may be tried, of a device's `share` of the batch."""
    powers = [2**n for n in range(share.bit_length()) if share % 2**n == 0]
    return tuple(sorted({*powers, share}))


def best(trials: Sequence[Trial]) -> Trial | None:
    """The one whose slowest step is shortest; None if none fits.

    "offload" only where nothing else fits: the estimate lets its transfers to the host and back take no time.
    """
    ranked = [
        (trial.remat == "offload", trial.report.time.slowest, trial)
        for trial in trials
        if trial.fits and trial.report.time is not None
    ]
    return min(ranked, key=lambda found: found[:2])[2] if ranked else None


def format_trials(trials: Sequence[Trial]) -> str:
    """A table, the best marked."""
    chosen = best(trials)
    lines = [
        f"{'remat':<9} {'rows':>5} {'micro-batches':>14} {'GiB':>7} {'of':>6}  {'s a step':>15} {'MFU':>7}"
    ]
    for trial in trials:
        memory, time = trial.report.memory, trial.report.time
        seconds = f"{time.fastest:.2f} to {time.slowest:.2f}" if time and trial.fits else "does not fit"
        lines.append(
            f"{trial.remat:<9} {trial.rows:>5} {trial.report.setup.micro_batches:>14} {memory.needed / GIB:>7.2f} "
            f"{memory.limit / GIB:>6.2f}  {seconds:>15} {trial.report.mfu[0]:>7.1%}{'  <- best' if trial is chosen else ''}"
        )
    return "\n".join(lines)
