"""From files straight into sharded arrays: a host reads what its own devices hold, one device's slice at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avlm_jax.lora import Updates, merge_kernel
from avlm_jax.quantize import quantise
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


def place_quantised(
    leaf: Any, sharding: NamedSharding, scale_sharding: NamedSharding, updates: Updates = ()
) -> tuple[jax.Array, jax.Array]:
    """A stacked kernel [layers in out] in eight bits on its devices, and its scales [layers out].

    Beyond the int8 array the devices hold one layer in the leaf's precision at a time, the host one device's slice of
    that. Channels whose inputs lie on several devices get one scale all the same, so that the numbers do not depend on the
    mesh.

    Args:
        leaf: as in `place`.
        sharding, scale_sharding: of the kernel and of the scales.
        updates: adapters on the devices that are added to the kernel first, in fp32: it is rounded once.
    """
    set_layer = _layer_setter(sharding, scale_sharding)
    kernel, scale = _empty(tuple(leaf.shape), sharding, scale_sharding)
    of_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    for number in range(leaf.shape[0]):
        one = place(leaf.layer(number) if isinstance(leaf, StoredLeaf) else leaf[number], of_layer)
        kernel, scale = set_layer(kernel, scale, one, tuple(updates), np.int32(number))
    return kernel, scale


def _empty(
    shape: tuple[int, ...], sharding: NamedSharding, scale_sharding: NamedSharding
) -> tuple[jax.Array, jax.Array]:
    def zeros() -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(shape, jnp.int8), jnp.zeros((shape[0], shape[-1]), jnp.float32)

    return jax.jit(zeros, out_shardings=(sharding, scale_sharding))()


@functools.lru_cache(maxsize=16)
def _layer_setter(
    sharding: NamedSharding, scale_sharding: NamedSharding
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(kernels, scales, one layer's kernel, updates of all layers, its number) -> kernels and scales with that layer set."""

    def set_layer(
        kernels: jax.Array, scales: jax.Array, one: jax.Array, updates: Updates, number: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        pairs = [(a[number], b[number]) for a, b in updates]
        with jax.default_matmul_precision("highest"):  # A TPU would otherwise multiply in bf16.
            kernel, scale = quantise(merge_kernel(one.astype(jnp.float32), pairs, 1.0))
        return kernels.at[number].set(kernel), scales.at[number].set(scale)

    return jax.jit(set_layer, donate_argnums=(0, 1), out_shardings=(sharding, scale_sharding))


def _key(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(axis.indices(size) for axis, size in zip(index, shape, strict=True))
