"""The connector as safetensors that torch modules of the same structure take: one row per parameter.

No released file holds a connector, so there are no foreign names to match. The rows follow from the parameter tree
by one rule: "/" becomes ".", a matrix called kernel becomes weight and is transposed (torch.nn.Linear keeps
[out in]), a norm's scale becomes weight, everything else keeps its name:

    resampler/layer_0/self/q/kernel [d d] -> resampler.layer_0.self.q.weight     resampler/queries [M d] -> resampler.queries
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from avlm_jax.weights import safetensors_io
from avlm_jax.weights.table import (
    IDENTITY,
    TRANSPOSE,
    ImportPlan,
    Row,
    Table,
    WeightError,
    export_params,
    flatten,
    open_params,
)

_RENAMED = {"kernel": "weight", "scale": "weight"}


def connector_table(expected: Mapping[str, Any]) -> Table:
    """Rows of a connector.

    Args:
        expected: nested dict of its parameters, without the leading "connector"; leaves with `shape`.

    Raises:
        WeightError: two parameters would share a name, a name holds ".", or a kernel is no matrix.
    """
    rows: list[Row] = []
    problems: list[str] = []
    taken: dict[str, str] = {}
    for path, leaf in sorted(flatten(expected).items()):
        *modules, name = path.split("/")
        theirs = ".".join([*modules, _RENAMED.get(name, name)])
        if "." in path or "{i}" in path:
            problems.append(f"{path}: its name cannot be written with dots between modules")
        if name == "kernel" and len(leaf.shape) != 2:
            problems.append(f"{path}: a kernel of shape {list(leaf.shape)} is no matrix")
        if theirs in taken:
            problems.append(f"{path} and {taken[theirs]} would both be called {theirs}")
        taken[theirs] = path
        rows.append(Row(path, theirs, TRANSPOSE if name == "kernel" else IDENTITY))
    if problems:
        raise WeightError("connector", problems)
    return Table("connector", tuple(rows), (), 1)


def open_connector(directory: str | Path, expected: Mapping[str, Any]) -> ImportPlan:
    """A connector's parameters in a folder, checked and unread.

    Args:
        directory: holds model.safetensors, as `save_connector` writes it.
        expected: see `connector_table`.

    Raises:
        SafetensorsError, WeightError: the file, or what is in it.
    """
    return open_params(connector_table(expected), safetensors_io.read_folder(directory), expected)


def save_connector(directory: str | Path, params: Mapping[str, Any]) -> None:
    """Writes a connector's parameters (nested, without the leading "connector") in the dtypes they have.

    Raises:
        WeightError: see `connector_table`.
    """
    safetensors_io.write_folder(directory, export_params(connector_table(params), params))
