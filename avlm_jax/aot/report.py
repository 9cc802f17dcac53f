"""What a compiled step needs and how long it takes, as numbers (`Report.to_dict`) and as text (`format_report`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from avlm_jax.aot.compiled import OutOfMemory, Program, Setup, bytes_per_device
from avlm_jax.aot.roofline import (
    ATTAINED_FLOPS,
    ATTAINED_HBM,
    ATTAINED_LINK,
    Roofline,
    Traffic,
    roofline,
    summarise,
    utilisation,
)
from avlm_jax.chips import GIB
from avlm_jax.flops import Flops, step_flops
from avlm_jax.state import flatten
from avlm_jax.step import IN_FLIGHT


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM of one device, bytes.

    Attributes:
        parts: what holds it, see `memory_of`.
        needed: their sum, or what XLA says where the program does not fit.
        limit: what a program may use.
        refused: XLA refused the program: parts are known but not what it needs beside them.
    """

    parts: Mapping[str, int]
    needed: int
    limit: int
    refused: bool = False

    @property
    def fits(self) -> bool:
        return not self.refused and self.needed <= self.limit

    @property
    def headroom(self) -> int:
        return self.limit - self.needed


@dataclasses.dataclass(frozen=True)
class Report:
    """A preflight's result.

    Attributes:
        setup: what was compiled.
        memory: see there.
        program: what XLA made, or its refusal.
        flops: of one optimizer step over all devices.
        traffic: collectives of one optimizer step of one device; empty if it does not fit.
        time: None if it does not fit.
    """

    setup: Setup
    memory: Memory
    program: Program | OutOfMemory
    flops: Flops
    traffic: tuple[Traffic, ...]
    time: Roofline | None

    @property
    def donated(self) -> bool | None:
        """Whether the new state lies in the old one's buffers; None if nothing was compiled."""
        return self.program.aliased >= self.state_bytes if isinstance(self.program, Program) else None

    @property
    def state_bytes(self) -> int:
        """Of one device's part of the state, which the program returns and should leave where it lay."""
        return bytes_per_device(self.setup.inputs.state)

    @property
    def mfu(self) -> tuple[float, float]:
        """Lowest and highest."""
        return self._share(self.flops.model)

    @property
    def hfu(self) -> tuple[float, float]:
        return self._share(self.flops.hardware)

    def _share(self, flops: float) -> tuple[float, float]:
        if self.time is None:
            return (0.0, 0.0)
        chip, devices = self.setup.slice_.chip, self.setup.slice_.num_devices
        slow, fast = (
            utilisation(flops, seconds, chip, devices) for seconds in (self.time.slowest, self.time.fastest)
        )
        return slow, fast

    @property
    def samples(self) -> int:
        """Clips of an optimizer step."""
        return self.setup.stage.batch_size * self.setup.stage.pack

    def hours(self, samples: float) -> tuple[float, float]:
        """Shortest and longest time for so many samples; 0, 0 if the step does not fit."""
        if self.time is None:
            return (0.0, 0.0)
        steps = samples / self.samples
        return steps * self.time.fastest / 3600, steps * self.time.slowest / 3600

    def to_dict(self, samples: float = 0.0) -> dict[str, Any]:
        """For `--json`: plain numbers, bytes and seconds; `samples`: also the hours that so many take."""
        setup, memory, time = self.setup, self.memory, self.time
        slice_, llm = setup.slice_, setup.config.model.llm
        found: dict[str, Any] = {
            "stage": setup.name,
            "slice": slice_.name,
            "rented": slice_.rented,
            "chips": slice_.chips,
            "devices": slice_.num_devices,
            "mesh": {name: int(size) for name, size in setup.mesh.shape.items()},
            "batch_size": setup.stage.batch_size,
            "rows_per_device": setup.rows,
            "micro_batches": setup.micro_batches,
            "length": setup.length,
            "video": setup.video,
            "audio": setup.audio,
            "remat": llm.remat,
            "frozen_dtype": setup.config.frozen_dtype,
            "fits": memory.fits,
            "hbm": {
                "needed": memory.needed,
                "limit": memory.limit,
                "headroom": memory.headroom,
                "parts": dict(memory.parts),
            },
            "program": _program(self.program),
            "donated": self.donated,
            "collectives": [dataclasses.asdict(item) for item in self.traffic],
            "flops": {
                "model": self.flops.model,
                "hardware": self.flops.hardware,
                "parts": {name: dataclasses.asdict(part) for name, part in self.flops.parts.items()},
            },
            "assumptions": assumptions(self),
        }
        if time is not None:
            low, high = time.fastest, time.slowest
            found["seconds"] = dataclasses.asdict(time) | {
                "fastest": low,
                "slowest": high,
                "bound": time.bound,
            }
            found["mfu"], found["hfu"] = list(self.mfu), list(self.hfu)
            found["samples_per_second"] = [self.samples / high, self.samples / low]
            tokens = setup.stage.batch_size * setup.length
            found["tokens_per_second"] = [tokens / high, tokens / low]
            if samples:
                found |= {"samples": samples, "hours": list(self.hours(samples))}
        return found


def _program(program: Program | OutOfMemory) -> dict[str, Any]:
    found = dataclasses.asdict(program)
    if isinstance(program, Program):
        found["collectives"] = len(program.collectives)
    return found


def make_report(setup: Setup, program: Program | OutOfMemory) -> Report:
    """Adds everything up.

    Args:
        setup: from `compiled.prepare`.
        program: from `compiled.compile_step`.
    """
    flops = flops_of(setup)
    memory = memory_of(setup, program)
    if isinstance(program, OutOfMemory):
        return Report(setup, memory, program, flops, (), None)
    traffic = tuple(summarise(program.collectives, program.runs, setup.mesh, setup.slice_))
    moved = program.runs * program.traffic
    time = roofline(setup.slice_.chip, flops.hardware / setup.slice_.num_devices, moved, traffic)
    return Report(setup, memory, program, flops, traffic, time)


def flops_of(setup: Setup) -> Flops:
    """Operations of an optimizer step over all devices."""
    backend = setup.system.llm_config.attention_backend
    return step_flops(
        setup.system,
        flatten(setup.inputs.state.trainable).keys(),
        rows=setup.stage.batch_size,
        length=setup.length,
        clips=setup.stage.batch_size * setup.stage.pack,
        video=setup.video,
        audio=setup.audio,
        backend="splash" if backend == "auto" else backend,
    )


def memory_of(setup: Setup, program: Program | OutOfMemory) -> Memory:
    """HBM of one device by what holds it, at the worst moment of a step.

    "waiting" are batches that the loop has placed ahead, and those of programs that wait; "padding" is what XLA's tiles add to
    the arguments; "temporaries" are activations, gathered parameters and all else that lives within a program.
    """
    inputs, k = setup.inputs, setup.micro_batches
    batch = bytes_per_device(inputs.batch)
    parts = {
        "frozen": bytes_per_device(inputs.frozen),
        "trainable": bytes_per_device(inputs.state.trainable),
        "optimizer": bytes_per_device(inputs.state.opt_state),
        "gradients": bytes_per_device((inputs.gradients, inputs.totals)) if k > 1 else 0,
        "batch": batch,
        "waiting": batch * (setup.config.loader.prefetch + IN_FLIGHT),
    }
    limit = setup.slice_.chip.hbm_bytes
    if isinstance(program, OutOfMemory):
        return Memory(
            parts, max(program.used, limit + 1) + parts["waiting"], program.limit or limit, refused=True
        )
    known = sum(parts.values()) - parts["waiting"]
    parts["padding"] = max(0, program.arguments - known)
    parts["temporaries"] = program.temporaries + max(0, program.outputs - program.aliased)
    parts["program"] = program.code
    return Memory(parts, sum(parts.values()), limit)


def assumptions(report: Report) -> list[str]:
    """What the estimate rests on, a sentence each."""
    setup = report.setup
    chip = setup.slice_.chip
    told = [
        f"compute: {chip.name} attains {ATTAINED_FLOPS[chip.name]:.0%} of its {chip.peak_flops / 1e12:.0f} TFLOP/s (bf16), "
        "MaxText's published MFU on it",
        f"memory: kernels attain {ATTAINED_HBM:.0%} of {chip.hbm_bandwidth / 1e9:.0f} GB/s, each operand is read once",
        f"links: {ATTAINED_LINK:.0%} of {chip.ici_bandwidth / chip.ici_links / 1e9:.0f} GB/s for each ICI link, of "
        f"{chip.dcn_bandwidth / 1e9:.1f} GB/s for each host's network (DCN)",
        "fastest: compute, memory and links overlap wholly; slowest: links wait and are waited for",
        "both branches of a conditional are counted as run; loading data, logging and checkpoints take no time",
        "transfers to the host's memory (remat offload) and the latency of links take no time",
        "FLOPs: matrix products only; norms, softmax, dropout and the optimizer are not counted",
    ]
    if setup.video == "none" or setup.audio == "none":
        told.append(
            f"FLOPs: no source of stage {setup.name} has {'video' if setup.video == 'none' else 'audio'}, so its encoder does "
            "not run; its memory is counted"
        )
    if isinstance(report.program, Program) and (unknown := report.program.unknown_loops):
        told.append(
            f"loops without a known trip count, whose bodies are counted once: {len(unknown)} ({', '.join(unknown)})"
        )
    return told


def format_report(report: Report, samples: float = 0.0) -> str:
    """Several tables of text; `samples`: also the hours that so many take."""
    setup, slice_ = report.setup, report.setup.slice_
    mesh = " x ".join(f"{name} {size}" for name, size in setup.mesh.shape.items())
    lines = [
        f"stage {setup.name} on {slice_.name} ({slice_.rented}, {slice_.chips} chips): mesh {mesh}",
        f"batch {setup.stage.batch_size} = {setup.micro_batches} micro-batches of {setup.rows} rows a device, "
        f"{setup.length} positions; video {setup.video}, audio {setup.audio}; remat {setup.config.model.llm.remat}, "
        f"frozen {setup.config.frozen_dtype}",
        "",
        *_memory_lines(report),
        "",
        *_time_lines(report, samples),
    ]
    return "\n".join(lines)


def _memory_lines(report: Report) -> list[str]:
    memory, program = report.memory, report.program
    lines = ["HBM of one device, GiB"]
    lines += [f"  {name:<12} {size / GIB:>8.3f}" for name, size in memory.parts.items()]
    lines += [f"  {'needed':<12} {memory.needed / GIB:>8.3f}", f"  {'limit':<12} {memory.limit / GIB:>8.3f}"]
    lines.append(
        f"fits, {memory.headroom / GIB:.2f} GiB are left"
        if memory.fits
        else f"DOES NOT FIT: {-memory.headroom / GIB:.2f} GiB too much"
    )
    if isinstance(program, OutOfMemory):
        return [
            *lines,
            f"XLA refused {program.name}:",
            *(f"  {line}" for line in program.message.splitlines()),
        ]
    return [
        *lines,
        f"{program.name}: {program.runs} a step, compiled in {program.seconds:.0f} s; XLA: arguments "
        f"{program.arguments / GIB:.2f}, temporaries {program.temporaries / GIB:.2f}, peak {program.peak / GIB:.2f} GiB; "
        f"{program.aliased / GIB:.3f} of {report.state_bytes / GIB:.3f} GiB of state updated in place"
        f"{'' if report.donated else ' (NOT all of it)'}; {program.kernels} kernel calls",
    ]


def _time_lines(report: Report, samples: float) -> list[str]:
    setup, time = report.setup, report.time
    parts = ", ".join(
        f"{name} {part.hardware / 1e12:.4g}" for name, part in report.flops.parts.items() if part.hardware
    )
    lines = [
        f"FLOPs of a step over all devices: {report.flops.model / 1e12:.4g} T of the model, "
        f"{report.flops.hardware / 1e12:.4g} T of the hardware ({parts})"
    ]
    if time is None:
        return lines
    lines += [
        "",
        "collectives of one device and step",
        f"  {'kind':<19} {'axes':<12} {'link':<5} {'count':>7} {'GB':>9} {'s':>8}",
    ]
    lines += [
        f"  {item.kind:<19} {item.axes:<12} {item.link:<5} {item.count:>7.0f} {item.bytes / 1e9:>9.3f} {item.seconds:>8.3f}"
        for item in report.traffic
    ]
    tokens = setup.stage.batch_size * setup.length
    low, high = time.fastest, time.slowest
    lines += [
        "",
        f"a step takes {low:.2f} to {high:.2f} s (compute {time.compute:.2f}, memory {time.memory:.2f}, ici {time.ici:.2f}, "
        f"dcn {time.dcn:.2f}; bound by {time.bound})",
        f"MFU {report.mfu[0]:.1%} to {report.mfu[1]:.1%}, HFU {report.hfu[0]:.1%} to {report.hfu[1]:.1%}; "
        f"{report.samples / high:,.1f} to {report.samples / low:,.1f} samples/s, "
        f"{tokens / high:,.0f} to {tokens / low:,.0f} tokens/s",
    ]
    if samples:
        shortest, longest = report.hours(samples)
        lines.append(f"{samples:,.0f} samples: {shortest:,.1f} to {longest:,.1f} h")
    return [*lines, "", "assumptions", *(f"  {line}" for line in assumptions(report))]
