"""From files straight into sharded arrays: a host reads what its own devices hold, one device's slice at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from avlm_jax.sharding import param_shardings
from avlm_jax.state import Tree, flatten, unflatten
from avlm_jax.weights.stored import StoredLeaf


def place(leaf: Any, sharding: NamedSharding, dtype: Any = None) -> jax.Array:
    """A parameter on its devices.

    Beyond the array itself the host holds one slice (that of one device) at a time, so a model need not fit
    into the memory of a host. Every process calls this and reads its own devices' slices.

    Args:
        leaf: `StoredLeaf`, numpy or JAX array; every process has the same.
        sharding: where it goes.
        dtype: to convert to on the way; None keeps the leaf's.
    """
    dtype = np.dtype(leaf.dtype if dtype is None else dtype)
    shape = tuple(leaf.shape)
    if isinstance(leaf, jax.Array):
        return jax.device_put(jnp.asarray(leaf, dtype), sharding)
    shards, last, host = [], None, None
    devices = sharding.addressable_devices_indices_map(shape)
    # Devices that hold the same slice stand side by side, so that it is read once for all of them.
    for device, index in sorted(devices.items(), key=lambda item: _key(item[1], shape)):
        if _key(index, shape) != last:
            host = None  # Gone before the next one is read.
            last = _key(index, shape)
            host = leaf.read(index, dtype) if isinstance(leaf, StoredLeaf) else leaf[index].astype(dtype)
        # Waiting keeps the transfers from piling up slices of host memory behind them.
        shards.append(jax.device_put(host, device).block_until_ready())
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def place_params(tree: Mapping[str, Any], mesh: Mesh) -> Tree:
    """`place` for a nested dict of parameters, where `param_shardings` says."""
    shardings = flatten(param_shardings(tree, mesh))
    return unflatten({path: place(leaf, shardings[path]) for path, leaf in flatten(tree).items()})


def _key(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(axis.indices(size) for axis, size in zip(index, shape, strict=True))
