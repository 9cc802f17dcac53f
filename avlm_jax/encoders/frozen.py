"""Frozen encoders inside a training step: nothing is kept for a backward pass, which none of them has, and only part of the
frames or windows is encoded at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Shaped


def encode_frozen(
    module: nn.Module, *inputs: Shaped[Array, "b n ..."], encode: Callable[..., Array], chunk: int = 0
) -> Float[Array, "b n k d"]:
    """Features of n frames or windows a row; no gradient comes back from them.

    The chunks run along n and keep the batch axis whole, so that a batch sharded over devices stays so: a device encodes
    `chunk` times its rows at a time. Weights that are split over devices are gathered once for every chunk. Frames that
    are encoded together do not meet, but how sums over them are rounded may depend on how many they are.

    Args:
        module: whose parameters `encode` reads.
        inputs: arrays alike in b and n.
        encode: encode(module, *inputs [m ...]) gives features [m k d], each independent of the others.
        chunk: how many of n at a time; the last chunk is filled up with zeros. 0: all.
    """

    def encode_part(module: nn.Module, *parts: Array) -> Array:
        b, n = parts[0].shape[:2]
        features = encode(module, *(part.reshape(b * n, *part.shape[2:]) for part in parts))
        return stop_gradient(features.reshape(b, n, *features.shape[1:]))

    n = inputs[0].shape[1]
    if module.is_initializing() or not 0 < chunk < n:
        return encode_part(module, *inputs)
    steps = -(-n // chunk)

    def by_step(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, steps * chunk - n)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], steps, chunk, *x.shape[2:]), 1, 0)

    scan = nn.scan(
        lambda module, carry, parts: (carry, encode_part(module, *parts)),
        variable_broadcast="params",
        split_rngs={"params": False},
    )
    _, features = scan(module, (), tuple(map(by_step, inputs)))
    features = jnp.moveaxis(features, 0, 1)
    return features.reshape(features.shape[0], steps * chunk, *features.shape[3:])[:, :n]


def encode_present(
    module: nn.Module,
    mask: Bool[Array, "b n"],
    *inputs: Shaped[Array, "b n ..."],
    encode: Callable[..., Array],
    chunk: int = 0,
) -> Float[Array, "b n k d"]:
    """`encode_frozen`, or zeros in its place without any computation if the whole batch lacks the modality.

    Stage 1a shows no sound and its encoder is a third of a step; masks keep the zeros from being read as silence.
    """
    run = functools.partial(encode_frozen, encode=encode, chunk=chunk)
    if module.is_initializing():
        return run(module, *inputs)
    shape = jax.eval_shape(lambda *x: run(module, *x), *inputs)
    return nn.cond(jnp.any(mask), run, lambda *_: jnp.zeros(shape.shape, shape.dtype), module, *inputs)
