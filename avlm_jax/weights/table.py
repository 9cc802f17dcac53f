"""One table per backbone says which of their tensors is which of our parameters; import and export read it.

A row pairs a parameter path of ours with a tensor name of theirs. `{i}` in the name is a layer number; the
parameter is then stacked over layers on a leading axis, as `nn.scan` wants it. Nothing is skipped silently:
every tensor is used, or declared as ignored with a reason, or an error.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import ml_dtypes
import numpy as np

from avlm_jax.weights.stored import Deferred, LoadReport, StoredLeaf, make_report
from input_pipeline.errors import UserError

_FLOATS = tuple(map(np.dtype, (np.float32, ml_dtypes.bfloat16, np.float16, np.float64)))


class WeightError(UserError, ValueError):
    """Tensors and parameters do not fit. `problems` lists every one of them, not only the first."""

    def __init__(self, table: str, problems: list[str]):
        self.problems = problems
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        super().__init__(f"{table} weights: {count}\n" + "\n".join(f"  {problem}" for problem in problems))


@dataclasses.dataclass(frozen=True)
class Transform:
    """An invertible change of layout.

    Attributes:
        ours: one tensor of theirs to as many arrays as the row has paths; ValueError if it does not fit.
        theirs: those arrays, as positional arguments, to the one tensor.
    """

    ours: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    theirs: Callable[..., np.ndarray]


IDENTITY = Transform(lambda x: (x,), lambda x: x)
TRANSPOSE = Transform(
    lambda x: (_rank(x, 2).T,), lambda x: x.T
)  # torch.nn.Linear keeps [out in], we [in out]


def _rank(x: np.ndarray, rank: int) -> np.ndarray:
    if x.ndim != rank:
        raise ValueError(f"expected {rank} axes")
    return x


def reshape(theirs: tuple[int, ...], ours: tuple[int, ...]) -> Transform:
    """The same elements under another shape."""

    def to_ours(x: np.ndarray) -> tuple[np.ndarray, ...]:
        if x.shape != theirs:
            raise ValueError(f"expected {list(theirs)}")
        return (x.reshape(ours),)

    return Transform(to_ours, lambda x: x.reshape(theirs))


def permute(*axes: int) -> Transform:
    """Axes of theirs in the order of ours."""
    inverse = tuple(int(axis) for axis in np.argsort(axes))
    return Transform(lambda x: (_rank(x, len(axes)).transpose(axes),), lambda x: x.transpose(inverse))


def patch_kernel(patch_size: int, channels: int) -> Transform:
    """Conv2d [out channels rows columns] to a matrix [rows*columns*channels out]."""
    theirs_shape = (channels, patch_size, patch_size)

    def to_ours(x: np.ndarray) -> tuple[np.ndarray, ...]:
        if x.ndim != 4 or x.shape[1:] != theirs_shape:
            raise ValueError(f"expected {['out', *theirs_shape]}")
        return (x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),)

    def to_theirs(x: np.ndarray) -> np.ndarray:
        return x.reshape(patch_size, patch_size, channels, -1).transpose(3, 2, 0, 1)

    return Transform(to_ours, to_theirs)


def split(parts: int, transpose: bool) -> Transform:
    """One tensor of theirs, stacked along its first axis, to `parts` of ours, each transposed or not."""

    def to_ours(x: np.ndarray) -> tuple[np.ndarray, ...]:
        pieces = np.split(_rank(x, 2 if transpose else 1), parts)  # ValueError if uneven
        return tuple(piece.T if transpose else piece for piece in pieces)

    def to_theirs(*pieces: np.ndarray) -> np.ndarray:
        return np.concatenate([piece.T if transpose else piece for piece in pieces])

    return Transform(to_ours, to_theirs)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        ours: parameter path, or several if their tensor fuses several of ours.
        theirs: tensor name; `{i}` stands for the layer number. Export writes this name.
        transform: of one layer's tensor.
        aliases: other names under which published files hold the same tensor. Two at once are an error.
        shared: our parameter has no layer axis though their name has `{i}`: every layer repeats one tensor.
            Import wants layer 0's and checks that any other is equal to the bit; export repeats it.
    """

    ours: str | tuple[str, ...]
    theirs: str
    transform: Transform = IDENTITY
    aliases: tuple[str, ...] = ()
    shared: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def stacked(self) -> bool:
        return "{i}" in self.theirs and not self.shared


@dataclasses.dataclass(frozen=True)
class Ignored:
    """Tensors that are left out by design: a regular expression for their full names, and the reason."""

    pattern: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Attributes: name of the backbone for messages; rows; ignored; depth, the layers that `{i}` counts."""

    name: str
    rows: tuple[Row, ...]
    ignored: tuple[Ignored, ...]
    depth: int

    def __post_init__(self) -> None:
        paths = [path for row in self.rows for path in row.paths]
        twice = sorted({path for path in paths if paths.count(path) > 1})
        if twice:
            raise WeightError(self.name, [f"{path}: set by two rows of the table" for path in twice])


@dataclasses.dataclass(frozen=True)
class ImportPlan:
    """Every check passed: leaves by path, copies (name -> name it must equal), ignored (reason -> names)."""

    table: Table
    leaves: dict[str, StoredLeaf]
    copies: dict[str, str]
    ignored: dict[str, tuple[str, ...]]
    tensors: Mapping[str, Any] = dataclasses.field(repr=False)

    def read(self) -> dict[str, Any]:
        """All parameters as a nested dict of numpy arrays in the stored dtype."""
        return unflatten({path: leaf.read() for path, leaf in self.leaves.items()})

    def report(self, label: str = "") -> LoadReport:
        """Counts and hashes the tensors used, under the table's names: one value for the same weights, however their
        files name and share them. Reads every byte, a piece at a time; with a label it shows its progress."""
        used = canonical_tensors(self.table, self)
        return make_report(used, used, self.ignored, label)


def _stand_in(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of a shape that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def _describe(tensors: Mapping[str, Any], name: str) -> str:
    file = getattr(tensors[name], "file", None)
    return f"{name} ({file})" if file is not None else name


def plan_import(table: Table, tensors: Mapping[str, Any], expected: Mapping[str, Any]) -> ImportPlan:
    """Matches names, shapes and dtypes without reading any data.

    Args:
        table: the backbone's.
        tensors: name -> anything with `shape` and `dtype`.
        expected: nested dict of the parameters, leaves with `shape` (as `jax.eval_shape` returns).

    Raises:
        WeightError: lists every unknown, missing, doubly set and mis-shaped tensor, every tensor that is not
            floating-point, and every parameter whose layers differ in dtype.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(expected).items()}
    problems: list[str] = []
    used: set[str] = set()
    leaves: dict[str, StoredLeaf] = {}
    copies: dict[str, str] = {}
    for row in table.rows:
        names = _row_names(table, row, tensors, used, copies, problems)
        for part, path in enumerate(row.paths):
            if path not in shapes:
                problems.append(f"{path}: the table sets it, but the model has no such parameter")
            elif names is not None:
                leaf = _leaf_plan(row, part, path, names, tensors, shapes[path], problems)
                if leaf is not None:
                    leaves[path] = leaf
    in_table = {path for row in table.rows for path in row.paths}
    problems += [f"{path}: the model has it, but no row sets it" for path in sorted(shapes.keys() - in_table)]
    ignored: dict[str, list[str]] = {}
    for name in sorted(tensors.keys() - used):
        reason = next((item.reason for item in table.ignored if re.fullmatch(item.pattern, name)), None)
        if reason is None:
            problems.append(f"unknown tensor {_describe(tensors, name)} of shape {list(tensors[name].shape)}")
        else:
            ignored.setdefault(reason, []).append(name)
    if problems:
        raise WeightError(table.name, problems)
    left_out = {reason: tuple(names) for reason, names in ignored.items()}
    return ImportPlan(table, leaves, copies, left_out, tensors)


def open_params(table: Table, tensors: Mapping[str, Any], expected: Mapping[str, Any]) -> ImportPlan:
    """`plan_import`, and the few tensors that must equal others are compared. Afterwards any leaf can be read.

    Raises:
        WeightError: as `plan_import`, or repeated copies of a shared tensor differ.
    """
    plan = plan_import(table, tensors, expected)
    problems: list[str] = []
    for copy, original in plan.copies.items():
        first, second = np.asarray(tensors[original]), np.asarray(tensors[copy])
        if first.dtype != second.dtype or first.shape != second.shape or first.tobytes() != second.tobytes():
            problems.append(f"{_describe(tensors, copy)} must equal {original}, of which it is a copy")
    if problems:
        raise WeightError(table.name, problems)
    return plan


def _row_names(
    table: Table,
    row: Row,
    tensors: Mapping[str, Any],
    used: set[str],
    copies: dict[str, str],
    problems: list[str],
) -> tuple[str, ...] | None:
    """The tensor of each layer, or None after adding to `problems`. Updates `used` and `copies`."""
    names: list[str] = []
    complete = True
    for layer in range(table.depth if "{i}" in row.theirs else 1):
        candidates = [template.replace("{i}", str(layer)) for template in (row.theirs, *row.aliases)]
        present = [name for name in candidates if name in tensors]
        used.update(present)
        if len(present) > 1:
            both = " and ".join(_describe(tensors, name) for name in present)
            problems.append(f"{', '.join(row.paths)}: set twice, by {both}")
            complete = False
        elif present and row.shared and layer:
            if names:
                copies[present[0]] = names[0]
        elif present:
            names.append(present[0])
        elif not (row.shared and layer):
            problems.append(f"missing tensor {candidates[0]} (for {', '.join(row.paths)})")
            complete = False
    return tuple(names) if complete else None


def _leaf_plan(
    row: Row,
    part: int,
    path: str,
    names: tuple[str, ...],
    tensors: Mapping[str, Any],
    shape: tuple[int, ...],
    problems: list[str],
) -> StoredLeaf | None:
    expected = (len(names), *shape[1:]) if row.stacked else shape
    if expected != shape:
        problems.append(f"{path}: the model stacks {shape[0]} layers, the table {len(names)}")
        return None
    before = len(problems)
    for name in names:
        tensor = tensors[name]
        if np.dtype(tensor.dtype) not in _FLOATS:
            problems.append(
                f"{_describe(tensors, name)} is {tensor.dtype}; {path} needs floating-point numbers"
            )
            continue
        try:
            found = row.transform.ours(_stand_in(tensor.shape, tensor.dtype))[part].shape
        except ValueError as error:
            problems.append(
                f"{_describe(tensors, name)} has shape {list(tensor.shape)}: {error} (for {path})"
            )
            continue
        if found != (shape[1:] if row.stacked else shape):
            wanted = list(shape[1:] if row.stacked else shape)
            problems.append(
                f"{_describe(tensors, name)} has shape {list(tensor.shape)}, which gives {path} "
                f"{list(found)}; the model expects {wanted}"
            )
    dtypes = {np.dtype(tensors[name].dtype) for name in names}
    if len(dtypes) > 1:
        problems.append(
            f"{path}: its layers are stored as {', '.join(sorted(map(str, dtypes)))}; use one dtype"
        )
    if len(problems) > before:
        return None
    return StoredLeaf(shape, dtypes.pop(), names, row.stacked, row.transform, part, tensors)


def import_params(
    table: Table, tensors: Mapping[str, Any], expected: Mapping[str, Any]
) -> tuple[dict[str, Any], LoadReport]:
    """Parameters as a nested dict of numpy arrays in the stored dtype, one tensor being read at a time.

    Arguments and errors are `open_params`'.
    """
    plan = open_params(table, tensors, expected)
    return plan.read(), plan.report()


def canonical_tensors(table: Table, plan: ImportPlan) -> dict[str, Any]:
    """The tensors that a plan uses, under the table's own names, still unread."""
    found: dict[str, Any] = {}
    for row in table.rows:
        names = plan.leaves[row.paths[0]].names
        for layer in range(table.depth if "{i}" in row.theirs else 1):
            # A shared tensor's copies are equal to layer 0's, which was checked.
            found[row.theirs.replace("{i}", str(layer))] = plan.tensors[names[0 if row.shared else layer]]
    return found


def export_params(table: Table, params: Mapping[str, Any]) -> dict[str, Deferred]:
    """Tensors under their names, each made when it is asked for; the inverse of `import_params`.

    Args:
        table: the backbone's.
        params: nested dict; leaves are arrays or `StoredLeaf`s.

    Raises:
        WeightError: lists every parameter that no row writes, that is missing, or whose layer axis is not the
            table's depth.
    """
    leaves = flatten(params)
    in_table = {path for row in table.rows for path in row.paths}
    problems = [f"{path}: no row of the table writes it" for path in sorted(leaves.keys() - in_table)]
    problems += [f"{path}: missing from the parameters" for path in sorted(in_table - leaves.keys())]
    for row in table.rows:
        for path in row.paths:
            if row.stacked and path in leaves and tuple(leaves[path].shape[:1]) != (table.depth,):
                problems.append(
                    f"{path}: shape {list(leaves[path].shape)} does not stack {table.depth} layers"
                )
    if problems:
        raise WeightError(table.name, problems)
    return {
        row.theirs.replace("{i}", str(layer)): _defer(row, [leaves[path] for path in row.paths], layer)
        for row in table.rows
        for layer in range(table.depth if "{i}" in row.theirs else 1)
    }


def _defer(row: Row, leaves: list[Any], layer: int) -> Deferred:
    shapes = [tuple(leaf.shape[1:] if row.stacked else leaf.shape) for leaf in leaves]
    dtype = np.dtype(leaves[0].dtype)
    shape = row.transform.theirs(*(_stand_in(shape, dtype) for shape in shapes)).shape

    def make() -> np.ndarray:
        parts = (np.asarray(leaf[layer] if row.stacked else leaf) for leaf in leaves)
        return row.transform.theirs(*parts)

    return Deferred(shape, dtype, make)


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": x}} to {"a/b": x}."""
    return flax.traverse_util.flatten_dict(dict(tree), sep="/")


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} to {"a": {"b": x}}."""
    return flax.traverse_util.unflatten_dict(dict(leaves), sep="/")
