"""Where arrays lie: one mesh with the axes "data", "fsdp" and "tensor", and one readable rule table per backbone.

A batch is split over data x fsdp; parameters are whole along data, split along fsdp, and along tensor as the tables below
say. One device is the 1 x 1 x 1 mesh; nothing else in the project asks how many there are.
"""

from __future__ import annotations

import collections
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from avlm_jax.config import ConfigError
from avlm_jax.state import Tree, flatten, unflatten

logger = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # What the rows of a batch are split over.
Rules = Sequence[tuple[str, P]]
FALLBACK_SIZE = 2**20  # Elements; below, the all-gather's latency costs more than the memory it saves.

# (regex, spec): the first regex that matches a parameter's whole path decides; None keeps a dimension whole. What is under
# "layers/" has a leading axis [L] that `nn.scan` walks along and that is never split: each device would have to fetch every
# layer. A `kernel_scale` (of an int8 kernel) has no line of its own: it lies as its kernel's output dimension does.

# The encoders are frozen and small, and their pictures and windows are many: these are split over all three axes (see
# `constrain`), and the parameters are fetched layer by layer. So "tensor" is only one more axis to store them along. Splash
# attention alone wants its rows along data x fsdp and its heads along tensor: where tensor > 1, every layer that uses it
# exchanges queries, keys and values along tensor before it, and its output after it.
STORED = ("fsdp", "tensor")
VISION: Rules = (
    (r"vision/layers/(attn/[qkvo]|mlp/fc1)/kernel", P(None, STORED, None)),
    (r"vision/layers/mlp/fc2/kernel", P(None, None, STORED)),  # Its width: 1152 has more factors than 4304.
    (r"vision/patch_embed/kernel", P(None, STORED)),
    (r"vision/pos_embed", P(None, STORED)),
    (r"vision/.*/(bias|scale)", P()),
)
AUDIO: Rules = (
    (r"audio/layers/(attn/[qkvo]|mlp/fc1)/kernel", P(None, STORED, None)),
    (r"audio/layers/mlp/fc2/kernel", P(None, None, STORED)),
    (r"audio/(patch_embed|proj)/kernel", P(None, STORED)),
    (r"audio/pos_conv/v", P(None, None, STORED)),
    (r"audio/pos_conv/g|audio/rel_pos/embedding|audio/layers/attn/gate(/kernel|_scale)", P()),
    (r"audio/.*/(bias|scale)", P()),
)

# Tensor parallelism as in Megatron-LM (Shoeybi et al. 2019, section 3): a column-parallel layer splits what goes out, the
# row-parallel one behind it what comes in, and one sum over "tensor" joins them.
CONNECTOR: Rules = (
    (r"connector/.*/(fc1|[qkv])/kernel", P("fsdp", "tensor")),
    (r"connector/.*/(fc1|[qkv])/bias", P("tensor")),
    (r"connector/.*/(fc2|o)/kernel", P("tensor", "fsdp")),
    (r"connector/resampler/out/kernel", P("fsdp", "tensor")),
    (r"connector/resampler/out/bias", P("tensor")),
    (r"connector/tlp/table", P(None, "fsdp")),
    (r"connector/tlp/kernel|connector/resampler/(queries|slots|groups|query_pos|type_embed)", P()),
    (r"connector/.*/(bias|scale)", P()),
)
COLUMN, ROW = r"llm/layers/(attn/[qkv]|mlp/(gate|up))", r"llm/layers/(attn/o|mlp/down)"
LLM: Rules = (
    (r"llm/embed/embedding", P("tensor", "fsdp")),
    (r"llm/head/kernel", P("fsdp", "tensor")),
    (rf"{COLUMN}/kernel", P(None, "fsdp", "tensor")),
    (rf"{COLUMN}/bias", P(None, "tensor")),
    (rf"{COLUMN}/lora_a", P(None, "fsdp", None)),
    # The rank is never split: few of its values divide. Tensor comes first, so that fetching over fsdp leaves its parts.
    (rf"{COLUMN}/lora_b", P(None, None, ("tensor", "fsdp"))),
    (rf"{ROW}/kernel", P(None, "tensor", "fsdp")),
    (rf"{ROW}/bias", P()),
    (rf"{ROW}/lora_a", P(None, ("tensor", "fsdp"), None)),
    (rf"{ROW}/lora_b", P(None, None, "fsdp")),
    (r"llm/(.*/)?norm[12]?/scale", P()),
)
RULES: Rules = (*VISION, *AUDIO, *CONNECTOR, *LLM)


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all devices (or the given ones), laid out by JAX to follow the machine's links.

    TPU slices are joined by the data-centre network, which is far slower than the links inside of a slice. So "data" runs
    across slices, and a group of fsdp x tensor devices lies within one.

    Args:
        data, fsdp, tensor: devices along each axis; one of them may be -1 and takes what the others leave.
        devices: a subset to use.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices, or would have fsdp or tensor cross slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    spelled = ", ".join(f"{name}={size}" for name, size in sizes.items())
    open_axes = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    bad = len(open_axes) > 1 or known < 1 or any(size < 1 and size != -1 for size in sizes.values())
    if not bad and open_axes and len(devices) % known == 0:
        sizes[open_axes[0]] = len(devices) // known
    if bad or math.prod(sizes.values()) != len(devices):
        raise ConfigError(
            f"mesh {spelled} does not fit {len(devices)} devices; the sizes must multiply to that number, "
            f"and one of them may be -1"
        )
    slices = _slices(devices)
    if sizes["data"] % slices:
        raise ConfigError(
            f"mesh {spelled}: {len(devices)} devices in {slices} slices, and fsdp={sizes['fsdp']} x tensor={sizes['tensor']} "
            f"would cross from one to the next over the data-centre network; set config.mesh.data to {slices} or a multiple "
            f"of it, and fsdp=-1"
        )
    within = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    # An axis may take a part of a side of the torus: else 4 x 4 chips are no 8 x 2.
    if slices == 1:
        placed = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    else:
        placed = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: Sequence[jax.Device]) -> int:
    """TPU slices. On GPUs JAX calls a node a slice, but the network between nodes is made for sharding across it."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def check_heads(heads: Mapping[str, int], mesh: Mesh) -> None:
    """Raises ConfigError unless every device of a tensor group gets whole attention heads, keys and values included.

    Qwen2-7B has 28 query and 4 key/value heads: tensor may be 1, 2 or 4.

    Args:
        heads: number of heads by config key.
        mesh: from `make_mesh`.
    """
    tensor = mesh.shape["tensor"]
    if any(count % tensor for count in heads.values()):
        common = math.gcd(*heads.values())
        possible = [str(size) for size in range(1, common + 1) if common % size == 0]
        raise ConfigError(
            f"config.mesh.tensor is {tensor}, which does not divide "
            + ", ".join(f"{key} = {count}" for key, count in heads.items() if count % tensor)
            + f"; use {' or '.join(possible)}, and give the other devices to config.mesh.fsdp"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over data x fsdp, everything else whole."""
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, P())


def put_replicated(value: np.generic, mesh: Mesh) -> jax.Array:
    """A number that every process has, as an array on all devices.

    `jax.device_put` would, where there are several processes, compare what each has: a collective, which waits for the step.
    """
    sharding = replicated(mesh)
    devices = list(sharding.addressable_devices)
    return jax.make_array_from_single_device_arrays(
        (), sharding, jax.device_put([value] * len(devices), devices)
    )


def param_shardings(
    tree: Mapping[str, Any], mesh: Mesh, rules: Rules = RULES, fallback: int | None = FALLBACK_SIZE
) -> Tree:
    """The sharding of every parameter.

    Args:
        tree: nested dict of arrays or abstract shapes.
        mesh: from `make_mesh`.
        rules: see the tables above. An axis of the mesh that does not divide its dimension is left out, which is logged.
        fallback: parameters that no rule splits over "fsdp" although one wants to, or for which there is no rule, are
            split over it along their largest divisible dimension, which is logged, if they have at least that many
            elements. None: they stay whole.

    Returns:
        A nested dict like `tree` of `NamedSharding`.

    Raises:
        ValueError: a rule has more dimensions than the parameter it matches, or names an axis the mesh lacks.
    """
    compiled = [(re.compile(regex), regex, spec) for regex, spec in rules]
    shardings = {}
    for path, leaf in flatten(tree).items():
        shape, (regex, spec) = tuple(leaf.shape), _rule(path, compiled)
        if spec is None:
            axes, lacking = [()] * len(shape), True
        else:
            axes, lacking = _fit(path, shape, regex, spec, mesh)
        if lacking and fallback is not None and leaf.size >= fallback and mesh.shape["fsdp"] > 1:
            axes = _fall_back(path, shape, axes, mesh)
        shardings[path] = NamedSharding(mesh, _spec(axes))
    return unflatten(shardings)


def _rule(path: str, compiled: Sequence[tuple[re.Pattern[str], str, P]]) -> tuple[str, P | None]:
    """(regex, spec) for a path, or ("", None)."""
    scale = path.endswith("/kernel_scale")
    path = path.removesuffix("_scale") if scale else path
    regex, spec = next(
        ((regex, spec) for found, regex, spec in compiled if found.fullmatch(path)), ("", None)
    )
    # The kernel's dimensions are [.. in out], the scale's [.. out].
    return regex, P(*spec[:-2], *spec[-1:]) if scale and spec is not None else spec


def _fit(path: str, shape: tuple[int, ...], regex: str, spec: P, mesh: Mesh) -> tuple[list[tuple], bool]:
    """Axes of each dimension as far as they divide it, and whether "fsdp" had to be left out."""
    if len(spec) > len(shape):
        raise ValueError(f"sharding rule {regex!r} = {spec} has more dimensions than {path} {list(shape)}")
    fitted, lacking = [], False
    for size, wanted in zip(shape, tuple(spec) + (None,) * (len(shape) - len(spec)), strict=True):
        names = () if wanted is None else (wanted,) if isinstance(wanted, str) else tuple(wanted)
        for name in names:
            if name not in mesh.shape:
                raise ValueError(
                    f"sharding rule {regex!r} names axis {name!r}; the mesh has {', '.join(AXES)}"
                )
        axes = _dividing(size, names, mesh.shape)
        if left := [name for name in names if name not in axes]:
            lacking |= "fsdp" in left
            sizes = " x ".join(f"{name}={mesh.shape[name]}" for name in names)
            logger.warning(
                "%s: dimension of %d is not divisible by %s; left whole along %s",
                path,
                size,
                sizes,
                " and ".join(left),
            )
        fitted.append(axes)
    return fitted, lacking


def _dividing(size: int, names: Sequence[str], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Those of the axes, in order, whose product divides `size`."""
    axes: tuple[str, ...] = ()
    for name in names:
        if size % math.prod(sizes[axis] for axis in (*axes, name)) == 0:
            axes = (*axes, name)
    return axes


def _fall_back(path: str, shape: tuple[int, ...], axes: list[tuple], mesh: Mesh) -> list[tuple]:
    first = 1 if "/layers/" in f"/{path}" else 0
    for dimension in sorted(range(first, len(shape)), key=lambda index: shape[index], reverse=True):
        names = (*axes[dimension], "fsdp")
        if _dividing(shape[dimension], names, mesh.shape) == names:
            axes = [names if index == dimension else taken for index, taken in enumerate(axes)]
            logger.warning(
                "%s %s: no rule splits it over fsdp; falls back to %s", path, list(shape), _spec(axes)
            )
            return axes
    logger.warning(
        "%s %s: no rule splits it over fsdp, and fsdp=%d divides none of its dimensions; every device of fsdp holds it whole",
        *(path, list(shape), mesh.shape["fsdp"]),
    )
    return axes


def _spec(axes: Sequence[tuple[str, ...]]) -> P:
    """Written as JAX writes that of a result: without Nones at the end."""
    entries = [names if len(names) > 1 else names[0] if names else None for names in axes]
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Says inside of a traced program how an activation lies on the mesh in context (`jax.set_mesh`); without one, nothing.

    Args:
        x: any array.
        axes: one entry per dimension, missing ones are None: "batch" (data x fsdp), "tensor", a tuple of both, or None for
            whole. What does not divide a dimension is left out: one question on eight devices lies on all of them.

    Raises:
        ValueError: more entries than dimensions.
    """
    if len(axes) > x.ndim:
        raise ValueError(f"{len(axes)} axes for an array {list(x.shape)}")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or set(mesh.axis_names) != set(AXES) or mesh.manual_axes:
        return x  # Also within `shard_map`, where each device sees its own part.
    spec = []
    for size, entry in zip(x.shape, (*axes, *(None,) * (x.ndim - len(axes))), strict=True):
        entries = () if entry is None else (entry,) if isinstance(entry, str) else entry
        names = [name for entry in entries for name in (BATCH if entry == "batch" else (entry,))]
        spec.append(_dividing(size, names, mesh.shape))
    return jax.lax.with_sharding_constraint(x, _spec(spec))


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


def _blocks(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """Which of the data x fsdp parts of a batch each process's devices hold, ascending."""
    held: dict[int, set[int]] = collections.defaultdict(set)
    for block, devices in enumerate(mesh.devices.reshape(-1, mesh.shape["tensor"])):
        for device in devices:
            held[device.process_index].add(block)
    return {process: tuple(sorted(blocks)) for process, blocks in held.items()}


def share_of_batch(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """(index, count): the rows of a global batch that a process loads are the index-th of `count` equal shares.

    Processes between which a tensor group is divided need the same rows and get the same index.

    Args:
        mesh: from `make_mesh`.
        process: its number; None is this one.

    Raises:
        ConfigError: the devices of processes hold overlapping, but not the same, parts of a batch.
    """
    blocks = _blocks(mesh)
    process = jax.process_index() if process is None else process
    shares = sorted(set(blocks.values()))
    if sum(map(len, shares)) != mesh.shape["data"] * mesh.shape["fsdp"] or len(set(map(len, shares))) > 1:
        spelled = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
        raise ConfigError(
            f"mesh {spelled}: the rows of a batch do not fall into equal shares for the {len(blocks)} processes; let "
            f"config.mesh.tensor divide the devices of a process, or be a multiple of their number"
        )
    return shares.index(blocks[process]), len(shares)


def rows_of_process(mesh: Mesh, rows: int) -> np.ndarray:
    """i32 [rows]: which rows of the global arrays are those that `put_batch` was given in this process."""
    mine = _blocks(mesh)[jax.process_index()]
    size = rows // len(mine)
    return np.concatenate([np.arange(block * size, (block + 1) * size, dtype=np.int32) for block in mine])


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows (`share_of_batch`) as its share of global arrays, split over data x fsdp.

    Raises:
        ConfigError: the rows do not divide among this process's devices.
    """
    sharding, (_, count) = batch_sharding(mesh), share_of_batch(mesh)
    mine = _blocks(mesh)[jax.process_index()]
    placed = {}
    for name, value in batch.items():
        rows, rest = divmod(len(value), len(mine))
        if rest:
            raise ConfigError(
                f"batch[{name!r}] has {len(value)} rows, which the {len(mine)} data x fsdp devices of this "
                f"process do not divide; choose a batch size that is a multiple"
            )

        def part(where: tuple[slice, ...], value: np.ndarray = value, rows: int = rows) -> np.ndarray:
            begin = mine.index((where[0].start or 0) // rows) * rows
            return value[begin : begin + rows]

        shape = (len(value) * count, *value.shape[1:])
        devices = sharding.addressable_devices_indices_map(shape)
        # Put there by name: `make_array_from_callback` counts as a hidden transfer, which the loop forbids.
        parts = jax.device_put([part(where) for where in devices.values()], list(devices))
        placed[name] = jax.make_array_from_single_device_arrays(shape, sharding, parts)
    return placed
