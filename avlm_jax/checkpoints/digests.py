"""sha256 of array trees that lie spread over devices and processes: no process holds more than its own blocks.

A leaf is hashed by blocks. A block is what one device holds of it (of several copies, that of replica 0), and its
sha256 is over its row-major bytes. The leaf's own sha256 is that of its only block, or, if it has several, over the
list of their places and sums. Blocks can be checked on any other mesh and any number of processes: `damaged_leaves` puts
them together from the shards of one process, and gathers a leaf only if a block of it lies in no process as a whole.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

Box = tuple[tuple[int, int], ...]  # First and one-past-last index of every dimension.

THREADED_BYTES = 2**24  # Below, starting threads costs more than it saves.
# hashlib frees the interpreter lock. More threads would take the cores that the loader needs beside a save.
THREADS = min(8, max(1, (os.cpu_count() or 1) // 2))


def owned_blocks(flat: Mapping[str, Any]) -> dict[str, list[tuple[Box, np.ndarray]]]:
    """{path: [(place, values in host memory)]} of what this process answers for: replica 0 of its shards.

    The values stay as they are when the arrays are donated afterwards. A numpy leaf is process 0's.
    """
    shards = {path: _owned_shards(leaf) for path, leaf in flat.items()}
    for _, data in itertools.chain.from_iterable(shards.values()):
        if isinstance(data, jax.Array):
            data.copy_to_host_async()
    return {path: [(box, np.asarray(data)) for box, data in found] for path, found in shards.items()}


def _owned_shards(leaf: Any) -> list[tuple[Box, Any]]:
    if not isinstance(leaf, jax.Array):
        return [(_box((), leaf.shape), leaf)] if jax.process_index() == 0 else []
    return [(_box(s.index, leaf.shape), s.data) for s in leaf.addressable_shards if s.replica_id == 0]


def hash_blocks(blocks: Mapping[str, list[tuple[Box, np.ndarray]]]) -> dict[str, list[dict[str, Any]]]:
    """{path: [{"index": place, "sha256": of the bytes there}]}, JSON values; reads memory and nothing else."""
    jobs = [(path, box, data) for path, found in blocks.items() for box, data in found]
    sums = _hashed([functools.partial(_sha256, data) for _, _, data in jobs], [d.nbytes for *_, d in jobs])
    hashed: dict[str, list[dict[str, Any]]] = {path: [] for path in blocks}
    for (path, box, _), digest in zip(jobs, sums, strict=True):
        hashed[path].append({"index": [list(extent) for extent in box], "sha256": digest})
    return hashed


def merge_blocks(
    shapes: Mapping[str, tuple[tuple[int, ...], str]], parts: Iterable[Mapping[str, list[dict[str, Any]]]]
) -> dict[str, dict[str, Any]]:
    """What `hash_blocks` gave in every process, as {path: {shape, dtype, sha256, blocks}}.

    Args:
        shapes: {path: (shape, dtype's name)}.
        parts: one mapping per process.

    Raises:
        ValueError: the blocks of a leaf do not make up the leaf.
    """
    parts = list(parts)
    leaves = {}
    for path, (shape, dtype) in shapes.items():
        blocks = sorted((block for part in parts for block in part.get(path, ())), key=lambda b: b["index"])
        places = {tuple(map(tuple, block["index"])) for block in blocks}
        if len(places) != len(blocks) or sum(map(_volume, places)) != math.prod(shape):
            raise ValueError(f"the processes' blocks do not make up {path} {list(shape)}: {sorted(places)}")
        leaves[path] = {
            "shape": list(shape),
            "dtype": dtype,
            "sha256": blocks[0]["sha256"] if len(blocks) == 1 else digest_json(blocks),
            "blocks": blocks,
        }
    return leaves


def first_misfit(leaves: Mapping[str, Mapping[str, Any]], flat: Mapping[str, Any]) -> str | None:
    """The first path at which the shapes or types of `flat` are not those of `leaves`, in words; None if all fit."""
    saved = {path: f"{leaf['dtype']}{leaf['shape']}" for path, leaf in leaves.items()}
    wanted = {path: f"{leaf.dtype.name}{list(leaf.shape)}" for path, leaf in flat.items()}
    for path in sorted(saved.keys() | wanted.keys()):
        there, here = saved.get(path, "absent"), wanted.get(path, "absent")
        if there != here:
            return f"{path} is {there} in the checkpoint and {here} in this run"
    return None


def damaged_leaves(leaves: Mapping[str, Mapping[str, Any]], flat: Mapping[str, Any]) -> list[str]:
    """Which leaves of `flat` hold, in what this process sees of them, other bytes than `leaves` says.

    Every process calls it with the same `leaves`; each checks the blocks that it can put together, so that together
    they check all.

    Args:
        leaves: from `merge_blocks`.
        flat: {path: array}, laid out over devices in whatever way.

    Returns:
        What to tell of each bad block: "path [place]".
    """
    names, expected, readers, sizes = [], [], [], []
    for path, leaf in flat.items():
        local = _local_shards(leaf)
        gathered: np.ndarray | None = None
        for block in leaves[path]["blocks"]:
            box = tuple(map(tuple, block["index"]))
            if _covers(local, box):
                reader = functools.partial(_assemble, local, box, leaf.dtype)
            elif not any(_covers(boxes, box) for boxes in _boxes_by_process(leaf)):
                gathered = to_host(leaf) if gathered is None else gathered
                reader = functools.partial(_cut, gathered, box)
            else:
                continue
            names.append(f"{path} {json.dumps(block['index'])}" if len(leaves[path]["blocks"]) > 1 else path)
            expected.append(block["sha256"])
            readers.append(lambda reader=reader: _sha256(reader()))
            sizes.append(_volume(box) * leaf.dtype.itemsize)
    found = _hashed(readers, sizes)
    return [name for name, one, two in zip(names, expected, found, strict=True) if one != two]


def leaf_digests(flat: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """{path: {shape, dtype, sha256}} of arrays in host memory; the hash is over all row-major bytes."""
    leaves = [np.asarray(leaf) for leaf in flat.values()]
    sums = _hashed([functools.partial(_sha256, leaf) for leaf in leaves], [leaf.nbytes for leaf in leaves])
    return {
        path: {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "sha256": digest}
        for path, leaf, digest in zip(flat, leaves, sums, strict=True)
    }


def to_host(leaf: Any) -> np.ndarray:
    """The whole leaf in the host memory of every process, to the bit; every process calls it."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    # As unsigned integers: however a compiler gathers them, -0.0 and the payload of a NaN come through.
    bits = np.dtype(f"uint{8 * leaf.dtype.itemsize}")
    raw = leaf.view(bits) if leaf.dtype != jnp.bool_ else leaf.astype(bits)
    host = np.asarray(multihost_utils.process_allgather(raw, tiled=True))
    return host.view(leaf.dtype) if leaf.dtype != jnp.bool_ else host.astype(leaf.dtype)


def canonical(value: Any) -> str:
    """JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def json_values(value: Mapping, name: str) -> Any:
    """`value` as JSON gives it back (tuples become lists): its hash agrees with the one after reading."""
    try:
        return json.loads(canonical(value))
    except (TypeError, ValueError) as error:
        raise TypeError(f"checkpoint {name} must hold JSON values only: {error}") from error


def digest_json(value: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def _sha256(data: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(data).reshape(-1).view(np.uint8)).hexdigest()


def _hashed(jobs: list[Callable[[], str]], sizes: list[int]) -> list[str]:
    if sum(sizes) < THREADED_BYTES:
        return [job() for job in jobs]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    extents = [part.indices(size)[:2] for part, size in zip(index, shape, strict=False)]
    return tuple(extents) + tuple((0, size) for size in shape[len(extents) :])


def _volume(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def _common(one: Box, two: Box) -> Box | None:
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, two, strict=True))
    return both if all(start < stop for start, stop in both) else None


def _covers(boxes: Iterable[Box], box: Box) -> bool:
    """Whether disjoint `boxes` hold all of `box`."""
    parts = (_common(box, other) for other in boxes)
    return sum(_volume(part) for part in parts if part is not None) == _volume(box)


def _local_shards(leaf: Any) -> dict[Box, Any]:
    """{place: values} of what this process has, one copy of each."""
    if not isinstance(leaf, jax.Array):
        return {_box((), leaf.shape): leaf}
    return {_box(shard.index, leaf.shape): shard.data for shard in leaf.addressable_shards}


def _boxes_by_process(leaf: Any) -> list[set[Box]]:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return []
    boxes: dict[int, set[Box]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        boxes.setdefault(device.process_index, set()).add(_box(index, leaf.shape))
    return list(boxes.values())


def _assemble(local: Mapping[Box, Any], box: Box, dtype: np.dtype) -> np.ndarray:
    if box in local:
        return np.asarray(local[box])
    block = np.empty([stop - start for start, stop in box], dtype)
    for place, data in local.items():
        if (part := _common(box, place)) is not None:
            _cut(block, part, box)[...] = _cut(np.asarray(data), part, place)
    return block


def _cut(data: np.ndarray, part: Box, place: Box | None = None) -> np.ndarray:
    """`part` of an array whose first element stands at the beginning of `place`."""
    beginnings = [start for start, _ in place] if place else [0] * len(part)
    return data[tuple(slice(a - at, b - at) for (a, b), at in zip(part, beginnings, strict=True))]


def nonfinite_leaves(flat: Mapping[str, Any]) -> list[str]:
    """Paths of floating-point leaves that hold a NaN or an infinity; looked for on the devices."""
    floating = {p: leaf for p, leaf in flat.items() if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size}
    if not floating:
        return []
    leaves = list(floating.values())
    sharding = getattr(leaves[0], "sharding", None)
    finite = jax.device_get(
        _all_finite(sharding.mesh if isinstance(sharding, NamedSharding) else None)(leaves)
    )
    return [path for path, good in zip(floating, finite, strict=True) if not good]


@functools.lru_cache(maxsize=8)
def _all_finite(mesh: jax.sharding.Mesh | None) -> Callable[[list[Any]], jax.Array]:
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        lambda leaves: jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]), out_shardings=everywhere
    )
