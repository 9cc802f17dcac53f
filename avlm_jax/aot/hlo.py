"""Reads XLA's optimised program as text: how often each part runs, which collectives it holds, what it moves.

XLA's own cost analysis counts the body of a loop once, and a scan over 28 layers is a loop; here a body counts as often as it
runs: XLA's note `known_trip_count`, or (libtpu leaves none) what the loop's counter starts with, adds and is compared to. The
program is that of one device (SPMD), so all bytes are bytes per device.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator

BITS = {
    "pred": 8,
    **{f"{kind}{bits}": bits for kind in "su" for bits in (2, 4, 8, 16, 32, 64)},
    **{"bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128},
    **{name: 8 for name in ("f8e4m3fn", "f8e5m2", "f8e4m3b11fnuz", "f8e4m3fnuz", "f8e5m2fnuz", "f8e4m3", "f8e8m0fnu")},
    "token": 0,
    "opaque": 0,
}  # fmt: skip

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Between slices libtpu hands each device's part to its host, by a `send` that names what shall come back by a `recv`.
BETWEEN_SLICES = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}


class HloError(ValueError):
    """Text that is not an optimised HLO module."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: element type, dimensions, memory space of its layout (0 is HBM, 1 the core's own memory, 5 the host)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        """Without the padding of the tiling."""
        size = BITS.get(self.dtype)
        if size is None:
            raise HloError(f"element type {self.dtype!r} is unknown")
        for dim in self.dims:
            size *= dim
        return -(-size // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = shapes opcode(operands), attributes`; a tuple's shapes are its arrays in order."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    argument: str  # What stands between the parentheses: a parameter's number, a constant's value.
    root: bool = False

    def called(self) -> tuple[str, ...]:
        """Names of the computations that this instruction runs."""
        return tuple(
            name
            for group in re.findall(
                r"(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation|"
                r"called_computations)=(\{[^}]*\}|%?[\w.\-]+)",
                self.attributes,
            )
            for name in re.findall(r"[\w.\-]+", group)
        )


_COPIES = ("copy", "bitcast", "copy-start", "copy-done")

Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A parsed program.

    Attributes:
        computations: by name; instructions in order.
        entry: name of the one that runs.
    """

    computations: dict[str, Computation]
    entry: str

    @functools.cached_property
    def runs(self) -> dict[str, float]:
        """How often a step runs each computation that is scheduled by itself; fused ones are part of their fusion.

        A branch of a conditional counts as taken, a loop without a known trip count once (see `unknown_loops`).
        """
        runs: dict[str, float] = {}

        def visit(name: str, times: float) -> None:
            runs[name] = runs.get(name, 0.0) + times
            for instruction in self.computations[name].values():
                if instruction.opcode == "while":
                    count = self.trip_count(instruction, self.computations[name])
                    visit(_attribute(instruction, "body"), times * (1 if count is None else count))
                elif instruction.opcode in ("conditional", "call"):
                    for called in instruction.called():
                        visit(called, times)

        visit(self.entry, 1.0)
        return runs

    @property
    def unknown_loops(self) -> list[str]:
        """Loops that run, whose trip count XLA does not know."""
        return [
            instruction.name
            for name in self.runs
            for instruction in self.computations[name].values()
            if instruction.opcode == "while" and self.trip_count(instruction, self.computations[name]) is None
        ]

    def trip_count(self, loop: Instruction, caller: Computation) -> int | None:
        """How often a `while` of computation `caller` runs its body; None if it is no plain counter."""
        if note := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(note[1])
        condition = self.computations[_attribute(loop, "condition")]
        body = self.computations[_attribute(loop, "body")]
        test = _root(condition)
        if test.opcode != "compare" or "direction=LT" not in test.attributes or len(test.operands) != 2:
            return None
        counter, bound = condition.get(test.operands[0]), _constant(condition, test.operands[1])
        place = _element(counter)
        if place is None or bound is None:
            return None
        start = _constant(caller, _item(caller, loop.operands[0], place))
        step = _step(body, place)
        if start is None or not step:
            return None
        return max(0, -(-(bound - start) // step))

    def within(self, instruction: Instruction) -> Iterator[Instruction]:
        """Instructions of the computations that a fusion or an asynchronous wrapper holds, to any depth."""
        for name in instruction.called():
            for inner in self.computations.get(name, {}).values():
                yield inner
                yield from self.within(inner)


def _attribute(instruction: Instruction, name: str) -> str:
    found = re.search(rf"{name}=%?([\w.\-]+)", instruction.attributes)
    if found is None:
        raise HloError(f"{instruction.name} has no {name}")
    return found[1]


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.root)


def _element(instruction: Instruction | None) -> int | None:
    """Which item of a loop's tuple an instruction takes out."""
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    found = re.search(r"index=(\d+)", instruction.attributes)
    return int(found[1]) if found else None


def _item(computation: Computation, name: str, place: int) -> str:
    """Name of what lies at `place` of the tuple `name`; empty if that is no tuple."""
    made = computation.get(name)
    if made is None or made.opcode != "tuple" or place >= len(made.operands):
        return ""
    return made.operands[place]


def _origin(computation: Computation, name: str) -> Instruction | None:
    """What an instruction is a copy of."""
    made = computation.get(name)
    while made is not None and made.opcode in _COPIES and made.operands:
        made = computation.get(made.operands[0])
    return made


def _constant(computation: Computation, name: str) -> int | None:
    """The whole number that an instruction is a copy of."""
    made = _origin(computation, name)
    if made is None or made.opcode != "constant" or not re.fullmatch(r"-?\d+", made.argument):
        return None
    return int(made.argument)


def _step(body: Computation, place: int) -> int | None:
    """What a loop's body adds to its counter, the item at `place` of its tuple."""
    made = _origin(body, _item(body, _root(body).name, place))
    if made is None or made.opcode != "add":
        return None
    constants = [_constant(body, name) for name in made.operands]
    taken = [_element(_origin(body, name)) for name in made.operands]
    return next((number for number in constants if number is not None), None) if place in taken else None


_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*\)\s*->.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+)\s+=\s+(.*)$")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")


def parse(text: str) -> Module:
    """Parses `jax.stages.Compiled.as_text()`.

    Raises:
        HloError: no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation | None = None
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.rstrip() == "}":  # A line "}}, ..." ends an attribute of a kernel, which runs over several.
            current = None
        elif found := _LINE.match(line):
            instruction = _instruction(found[2], found[3], bool(found[1]))
            current[instruction.name] = instruction
    if not entry:
        raise HloError("the text has no ENTRY computation; it is not an HLO module")
    return Module(computations, entry)


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ") - 1
    kind, rest = rest[: end + 1], rest[end + 1 :].lstrip()
    shapes = tuple(
        Shape(
            dtype,
            tuple(int(re.sub(r"\D", "", dim)) for dim in dims.split(",") if dim),
            int(space[1]) if (space := _SPACE.search(layout)) else 0,
        )
        for dtype, dims, layout in _ARRAY.findall(kind)
    )
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest, 0) - 1
    argument = rest[:end]
    operands = tuple(re.findall(r"%([\w.\-]+)", argument))
    return Instruction(name, shapes, opcode.strip(), operands, rest[end + 1 :], argument, root)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise HloError(f"unbalanced parentheses: {text[:80]!r}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
        kind: of COLLECTIVES.
        times: how often a step runs it.
        payload: bytes of the whole array that is gathered, reduced or exchanged, of one run.
        groups: device numbers (positions in the mesh, row by row) that talk to each other.
        name: of the instruction.
    """

    kind: str
    times: float
    payload: int
    groups: tuple[tuple[int, ...], ...]
    name: str = ""

    @property
    def group_size(self) -> int:
        return max((len(group) for group in self.groups), default=1)

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends (and receives) in one run, by the ring algorithms: an all-reduce is a reduce-scatter
        and an all-gather, hence twice."""
        n = self.group_size
        if self.kind == "collective-permute":
            return float(self.payload)
        return self.payload * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)


def collectives(module: Module, devices: int, slices: int = 1) -> list[Collective]:
    """Every collective that a step runs, in the order of the text.

    An asynchronous one counts once. libtpu spreads it over several fused kernels, which begin, advance and end it and all
    show it whole, under one channel; those that advance it may stand in a loop, that which begins it does not.

    Args:
        module: from `parse`.
        devices: of the mesh; instructions without groups join them all.
        slices: that they lie in, one after the other, as `sharding.make_mesh` lays them.

    Raises:
        HloError: a transfer between slices of an unknown kind.
    """
    found: dict[str, Collective] = {}
    for name, times in module.runs.items():
        for instruction in module.computations[name].values():
            for inner in (instruction, *(module.within(instruction) if _wraps(instruction) else ())):
                kind = inner.opcode.removesuffix("-start")
                if kind == "send" and "_xla_megascale_transfer_type" in inner.attributes:
                    found[inner.name] = _between_slices(inner, times, devices, slices)
                if kind not in COLLECTIVES:
                    continue
                channel = re.search(r"channel_id=(\d+)", inner.attributes)
                key = f"{kind} {channel[1]}" if channel and inner is not instruction else inner.name
                if key not in found or times < found[key].times:
                    groups = _groups(inner.attributes, devices)
                    found[key] = Collective(kind, times, _payload(inner, kind, groups), groups, inner.name)
    return list(found.values())


def _between_slices(send: Instruction, times: float, devices: int, slices: int) -> Collective:
    """What a transfer does whose local part, if it has one, is a collective of its own: devices at the same place of each
    slice talk to each other.
    """
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
    if transfer is None or transfer[1] not in BETWEEN_SLICES or slices < 2:
        raise HloError(f"{send.name}: a transfer between slices of an unknown kind: {send.attributes[:200]}")
    kind = BETWEEN_SLICES[transfer[1]]
    payload = send.shapes[0].bytes * (slices if kind == "all-gather" else 1)
    within = devices // slices
    return Collective(
        kind,
        times,
        payload,
        tuple(tuple(range(first, devices, within)) for first in range(within)),
        send.name,
    )


def count_kernels(module: Module) -> int:
    """Calls of hand-written TPU kernels (Pallas) that one run of the program makes."""
    return int(
        sum(
            times
            for name, times in module.runs.items()
            for instruction in module.computations[name].values()
            for inner in (instruction, *(module.within(instruction) if _wraps(instruction) else ()))
            if 'custom_call_target="tpu_custom_call"' in inner.attributes
        )
    )


def _wraps(instruction: Instruction) -> bool:
    return instruction.opcode in ("fusion", "async-start", "custom-call")


def _payload(instruction: Instruction, kind: str, groups: tuple[tuple[int, ...], ...]) -> int:
    sizes = [shape.bytes for shape in instruction.shapes]
    if (
        instruction.opcode.endswith("-start")
        and kind in ("all-gather", "collective-permute")
        and len(sizes) > 1
    ):
        # (inputs, outputs, ...flags): the outputs are the second half of the arrays.
        operands = len(instruction.operands)
        return sum(sizes[operands : 2 * operands])
    total = sum(sizes)
    return total * max(map(len, groups)) if kind == "reduce-scatter" else total


@functools.lru_cache(maxsize=256)
def _parse_iota(text: str) -> tuple[tuple[int, ...], ...]:
    """ "[2,4]<=[4,2]T(1,0)": numbers 0.. of that shape, transposed, in rows of the first shape."""
    import numpy as np

    found = re.fullmatch(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if found is None:
        raise HloError(f"cannot read the replica groups {text!r}")
    rows, columns = int(found[1]), int(found[2])
    dims = [int(dim) for dim in found[3].split(",")]
    ids = np.arange(rows * columns).reshape(dims)
    if found[4]:
        ids = ids.transpose([int(axis) for axis in found[4].split(",")])
    return tuple(tuple(int(i) for i in row) for row in ids.reshape(rows, columns))


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Who talks to whom; `replica_groups={}`, as none at all, means all devices together."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", pairs[1] + "}"))
    if iota := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _parse_iota(iota[1])
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return tuple(
            tuple(int(i) for i in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", listed[1])
        )
    return (tuple(range(devices)),)
