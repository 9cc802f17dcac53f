"""The table for the documentation: every stage of a recipe on the slices one would rent for it.

Rows a device takes at a time are the recipe's (`avlm preflight --search` looks for others); stages whose programs are the same
(2a and 2b) are compiled once, as their figures are kept while the table is made.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from avlm_jax.aot.compiled import Progress, compile_step, prepare, quiet
from avlm_jax.aot.report import Report, assumptions, make_report
from avlm_jax.aot.topologies import parse_slice
from avlm_jax.chips import GIB

SLICES = ("v5e:4x4", "v5e:16x16", "v6e:2x4", "v5p:2x2x4")

# Clips that the SAVEn-Vid paper's stages see, all epochs together. The paper gives no sizes but SAVEn-Vid's; the others are the
# sets' own: LCS-558K and half a million of Panda-70M's 2M split; AudioSet's train sets 2.06M, AudioCaps 50k, Auto-ACD 1.5M;
# VideoInstruct100K, VGGSound's 184k training clips, and of InternVid the 147k that VTimeLLM selected; SAVEn-Vid 58k twice.
SAMPLES = {"1a": 1_058_000, "1b": 3_610_000, "2a": 431_000, "2b": 116_000}


def write_table(
    config: ConfigDict,
    named: str,
    file: Path,
    cache: Path | None,
    progress: Progress = quiet,
    slices: Sequence[str] = (),
) -> Path:
    """Compiles what is not in `cache` yet and writes the table, anew after each program: that takes hours in all.

    Args:
        config: of a system; all of config.stages are compiled.
        named: as the command line named it, for the table's heading.
        file: Markdown, replaced.
        cache: see `compiled.compile_step`; None takes a folder that is deleted at the end.
        progress: is told what goes on.
        slices: names; empty takes SLICES.
    """
    places = [(stage, name) for stage in config.stages for name in slices or SLICES]
    reports: list[Report] = []
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    with contextlib.ExitStack() as stack:
        kept = cache or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="avlm_preflight_")))
        for stage, name in places:
            setup = prepare(config, stage, parse_slice(name))
            reports.append(make_report(setup, compile_step(setup, cache=kept, progress=progress)))
            part.write_text(format_table(reports, named, places[len(reports) :]), encoding="utf-8")
            part.rename(file)
    return file


def format_table(reports: Sequence[Report], named: str, missing: Sequence[tuple[str, str]] = ()) -> str:
    """Markdown; `missing` are (stage, slice) that have not been compiled yet."""
    lines = [
        "# TPU slices for the recipe",
        "",
        f"Written by `make slices`, that is `avlm preflight --config {named} --table launch/SLICES.md`; not by hand. Every",
        "row is the real training step of that stage (encoders, connector, language model, loss, optimizer), compiled ahead of",
        "time for that slice. HBM is what XLA says; seconds are a roofline estimate between full overlap and none, and have",
        "not been measured. `rows` is how many a device takes at a time (config.stage.*.rows_per_device); a step's batch is",
        "that times the devices times the micro-batches. Hours are for the clips that the stage sees in all.",
        "",
    ]
    if missing:
        told = ", ".join(f"{stage} on {name}" for stage, name in missing)
        lines += [f"Not compiled yet, the same command goes on with them: {told}.", ""]
    for stage in dict.fromkeys(report.setup.name for report in reports):
        mine = [report for report in reports if report.setup.name == stage]
        setup = mine[0].setup
        clips = SAMPLES.get(stage, 0)
        lines += [
            f"## Stage {stage}",
            "",
            f"Batch {setup.stage.batch_size}, {setup.length} text positions, video {setup.video}, audio {setup.audio}, remat "
            f"{setup.config.model.llm.remat}, frozen parameters {setup.config.frozen_dtype}"
            f"{f', {clips:,} clips' if clips else ''}.",
            "",
            "| slice | rented as | rows | micro-batches | HBM GiB | of | fits | s a step | MFU | samples/s | hours |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *(_row(report, clips) for report in mine),
            "",
        ]
    lines += [
        "## Assumptions",
        "",
        *_assumptions(reports),
        "- clips: "
        + "; ".join(f"{stage} {count:,}" for stage, count in SAMPLES.items())
        + ". The paper names the data sets, "
        "not their sizes: LCS-558K and 500k of Panda-70M; AudioSet, AudioCaps and Auto-ACD; VideoInstruct100K, VGGSound and "
        "147k of InternVid; SAVEn-Vid's 58k twice.",
        "",
    ]
    return "\n".join(lines)


def _assumptions(reports: Sequence[Report]) -> list[str]:
    """All that any report rests on, each once and with the chips or stages it holds for if those are not all."""
    held: dict[str, list[Report]] = {}
    for report in reports:
        for line in assumptions(report):
            held.setdefault(line, []).append(report)
    return [f"- {_whose(some, reports)}{line}" for line, some in held.items()]


def _whose(some: Sequence[Report], reports: Sequence[Report]) -> str:
    def chip(report: Report) -> str:
        return report.setup.slice_.chip.name

    def stage(report: Report) -> str:
        return f"stage {report.setup.name}"

    if len(some) == len(reports):
        return ""
    for of in (chip, stage):
        names = dict.fromkeys(map(of, some))
        if sum(of(report) in names for report in reports) == len(some):
            return f"{', '.join(names)}: "
    return ", ".join(f"{stage(report)} on {report.setup.slice_.name}" for report in some) + ": "


def _row(report: Report, clips: int) -> str:
    setup, memory, time = report.setup, report.memory, report.time
    slice_ = setup.slice_
    cells = [
        slice_.name,
        slice_.rented,
        str(setup.rows),
        str(setup.micro_batches),
        f"{memory.needed / GIB:.2f}",
        f"{memory.limit / GIB:.2f}",
        "yes" if memory.fits else "no",
    ]
    if time is None:
        cells += ["", "", "", ""]
    else:
        hours = report.hours(clips)
        cells += [
            f"{time.fastest:.3g} to {time.slowest:.3g}",
            f"{report.mfu[0]:.0%} to {report.mfu[1]:.0%}",
            f"{report.samples / time.slowest:,.3g} to {report.samples / time.fastest:,.3g}",
            f"{hours[0]:,.3g} to {hours[1]:,.3g}" if clips else "",
        ]
    return "| " + " | ".join(cells) + " |"
