"""Bytes that a program's kernels read and write in HBM, from its scheduled text.

As XLA's cost analysis counts, but with loops at their trip counts and without what stays in the core's own memory (the layout's
S(1)): every kernel reads its operands and writes its results once. A slice of a stack of layers counts as the slice, an update
in place as the update. Kernels that read an operand several times (attention) are undercounted.
"""

from __future__ import annotations

from collections.abc import Iterable

from avlm_jax.aot.hlo import Computation, Instruction, Module, Shape

_FREE = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "opt-barrier"),
    *("while", "conditional", "call", "partition-id", "replica-id", "add-dependency"),
}
_SLICES = ("dynamic-slice", "slice", "gather")
HBM = 0


def hbm_bytes(module: Module) -> float:
    """Bytes per run of the program."""
    return sum(
        times
        * sum(moved(item, module.computations[name], module) for item in module.computations[name].values())
        for name, times in module.runs.items()
    )


def moved(item: Instruction, computation: Computation, module: Module) -> int:
    """Bytes that one instruction reads and writes in HBM."""
    if item.opcode in _FREE or item.opcode.endswith(("-done", "-update")):
        return 0
    if item.opcode == "copy-start":  # (destination, source, context)
        return _in_hbm(item.shapes[:2])
    if item.opcode in ("slice-start", "dynamic-slice-start"):  # ((source, indices...), part, context)
        part = item.shapes[len(item.operands)]
        return part.bytes * ((item.shapes[0].space == HBM) + (part.space == HBM))
    if item.opcode in _SLICES:
        return 2 * _in_hbm(item.shapes)
    if item.opcode == "dynamic-update-slice":
        return 2 * _in_hbm(_shapes(item.operands[1:2], computation))
    inner = module.computations.get(item.called()[0], {}) if item.called() else {}
    if item.opcode in ("fusion", "async-start") and inner:
        return _fusion(item, computation, inner)
    if item.opcode.endswith("-start") and item.operands:  # Collectives: results repeat the operands.
        operands = _shapes(item.operands, computation)
        return _in_hbm(operands) + _in_hbm(item.shapes[len(operands) : 2 * len(operands)] or item.shapes)
    return _in_hbm(_shapes(item.operands, computation)) + _in_hbm(item.shapes)


def _fusion(item: Instruction, computation: Computation, inner: Computation) -> int:
    total = 0
    parameters = {int(i.argument): i for i in inner.values() if i.opcode == "parameter"}
    for number, name in enumerate(item.operands):
        whole = _in_hbm(_shapes([name], computation))
        if whole and number in parameters:
            total += min(whole, _read(parameters[number], inner, whole))
        else:
            total += whole
    root = next((i for i in inner.values() if i.root), None)
    results = [inner.get(name) for name in root.operands] if root and root.opcode == "tuple" else [root]
    if item.opcode == "async-start" or len(results) != len(item.shapes):
        written = [shape.bytes for shape in (results[0].shapes if results[0] else ())]
        return total + sum(written[: len(item.shapes)])
    for shape, result in zip(item.shapes, results, strict=True):
        if shape.space == HBM:
            total += min(shape.bytes, _written(result, inner, shape.bytes))
    return total


def _read(parameter: Instruction, inner: Computation, whole: int) -> int:
    """What a fused computation reads of a parameter."""
    total = 0
    for user in inner.values():
        if parameter.name not in user.operands:
            continue
        if user.opcode in _SLICES and user.operands[0] == parameter.name:
            total += sum(shape.bytes for shape in user.shapes)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
            continue
        elif user.opcode == "bitcast":
            total += _read(user, inner, whole)
        else:
            return whole
    return total


def _written(result: Instruction | None, inner: Computation, whole: int) -> int:
    while result is not None and result.opcode == "bitcast" and result.operands:
        result = inner.get(result.operands[0])
    if result is not None and result.opcode == "dynamic-update-slice":
        update = inner.get(result.operands[1])
        return sum(shape.bytes for shape in update.shapes) if update else whole
    return whole


def _shapes(names: Iterable[str], computation: Computation) -> list[Shape]:
    return [shape for name in names if name in computation for shape in computation[name].shapes]


def _in_hbm(shapes: Iterable[Shape]) -> int:
    return sum(shape.bytes for shape in shapes if shape.space == HBM)
