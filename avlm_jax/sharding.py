"""Where arrays lie: one mesh with the axes "data", "fsdp" and "tensor", and one readable rule table on paths.

A batch is split over data x fsdp; parameters are replicated over data, split over fsdp, and over tensor where
a rule says so. One device is the 1 x 1 x 1 mesh; nothing else in the project asks how many there are.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avlm_jax.state import Tree, flatten, unflatten

logger = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
Rules = Sequence[tuple[str, PartitionSpec]]
FALLBACK_SIZE = 2**20  # Elements; below, the all-gather's latency costs more than the memory it saves.


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all devices (or the given ones), laid out by JAX to follow the machine's links.

    Args:
        data, fsdp, tensor: devices along each axis; one of them may be -1 and takes what the others leave.
        devices: a subset to use.

    Raises:
        ValueError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    open_axes = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    bad = len(open_axes) > 1 or known < 1 or any(size < 1 and size != -1 for size in sizes.values())
    if not bad and open_axes and len(devices) % known == 0:
        sizes[open_axes[0]] = len(devices) // known
    if bad or math.prod(sizes.values()) != len(devices):
        spelled = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"mesh {spelled} does not fit {len(devices)} devices; the sizes must multiply to that number, "
            f"and one of them may be -1"
        )
    return jax.make_mesh(
        tuple(sizes[name] for name in AXES),
        AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
        devices=devices,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over data x fsdp, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(
    tree: Mapping[str, Any], mesh: Mesh, rules: Rules = (), fallback: int | None = FALLBACK_SIZE
) -> Tree:
    """The sharding of every parameter.

    Args:
        tree: nested dict of arrays or abstract shapes.
        mesh: from `make_mesh`.
        rules: (regex, PartitionSpec); the first regex that matches a parameter's whole path decides. An axis
            of the mesh that does not divide its dimension is left out, which is logged.
        fallback: parameters without a rule and with at least that many elements are split over "fsdp" along
            their largest divisible dimension, which is logged; smaller ones are replicated. None: replicate
            them all.

    Returns:
        A nested dict like `tree` of `NamedSharding`.

    Raises:
        ValueError: a rule has more dimensions than the parameter it matches, or names an axis the mesh lacks.
    """
    compiled = [(re.compile(regex), regex, spec) for regex, spec in rules]
    shardings = {}
    for path, leaf in flatten(tree).items():
        rule = next(((regex, spec) for pattern, regex, spec in compiled if pattern.fullmatch(path)), None)
        if rule is not None:
            spec = _fit(path, leaf.shape, rule, mesh)
        elif fallback is not None and leaf.size >= fallback and mesh.shape["fsdp"] > 1:
            spec = _largest_dimension(path, leaf.shape, mesh)
        else:
            spec = PartitionSpec()
        shardings[path] = NamedSharding(mesh, spec)
    return unflatten(shardings)


def _fit(path: str, shape: tuple[int, ...], rule: tuple[str, PartitionSpec], mesh: Mesh) -> PartitionSpec:
    regex, spec = rule
    if len(spec) > len(shape):
        raise ValueError(f"sharding rule {regex!r} = {spec} has more dimensions than {path} {list(shape)}")
    fitted = []
    for size, axes in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec)), strict=True):
        names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        unknown = [name for name in names if name not in mesh.shape]
        if unknown:
            raise ValueError(
                f"sharding rule {regex!r} names axis {unknown[0]!r}; the mesh has {', '.join(AXES)}"
            )
        if size % math.prod(mesh.shape[name] for name in names):
            logger.warning("%s: dimension of %d is not divisible by %s; left whole", path, size, names)
            axes = None
        fitted.append(axes)
    return PartitionSpec(*fitted)


def _largest_dimension(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    for dimension in sorted(range(len(shape)), key=lambda index: shape[index], reverse=True):
        if shape[dimension] % mesh.shape["fsdp"] == 0:
            spec = PartitionSpec(*(("fsdp" if index == dimension else None) for index in range(len(shape))))
            logger.info("%s %s has no sharding rule; falls back to %s", path, list(shape), spec)
            return spec
    logger.warning("%s %s has no sharding rule and no dimension fsdp divides; replicated", path, list(shape))
    return PartitionSpec()


def shard_params(
    tree: Mapping[str, Any], mesh: Mesh, rules: Rules = (), fallback: int | None = FALLBACK_SIZE
) -> Tree:
    """Puts parameters where `param_shardings` says. Every process holds the same host values beforehand."""
    shardings = flatten(param_shardings(tree, mesh, rules, fallback))
    return unflatten({path: _put(leaf, shardings[path]) for path, leaf in flatten(tree).items()})


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def state_shardings(state: Any, mesh: Mesh, param_shardings: Tree) -> Any:
    """Shardings of a `TrainState` (or an abstract one): moments lie as their parameters do, the rest is
    replicated.

    Args:
        state: with fields step, trainable, opt_state, skipped, rng.
        mesh: from `make_mesh`.
        param_shardings: of `state.trainable`.
    """
    structure = jax.tree.structure(state.trainable)

    def mirrors(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    def place(node: Any) -> Any:
        return param_shardings if mirrors(node) else jax.tree.map(lambda _: replicated(mesh), node)

    return state.replace(
        step=replicated(mesh),
        trainable=param_shardings,
        opt_state=jax.tree.map(place, state.opt_state, is_leaf=mirrors),
        skipped=replicated(mesh),
        rng=replicated(mesh),
    )


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows as its share of global arrays, split over data x fsdp.

    Raises:
        ValueError: the rows do not divide among this process's devices.
    """
    sharding = batch_sharding(mesh)
    local = max(1, mesh.shape["data"] * mesh.shape["fsdp"] // jax.process_count())
    placed = {}
    for name, value in batch.items():
        if value.shape[0] % local:
            raise ValueError(
                f"batch[{name!r}] has {value.shape[0]} rows, which the {local} data x fsdp devices of this "
                f"process do not divide; choose a batch size that is a multiple"
            )
        placed[name] = jax.make_array_from_process_local_data(sharding, value)
    return placed
