"""The frozen language model in eight bits: weights only, symmetric, one scale per output channel.

A quantised kernel [... in out] is two leaves beside each other, `kernel` int8 [... in out] and `kernel_scale` f32 [... out];
it stands for kernel * kernel_scale. Quantised are the linear layers of the decoder's blocks, nine tenths of a 7B system.
Everything else that is frozen stays in bf16: embeddings, head and norms, because an error there goes into every logit, and the
encoders, so that their features (and caches of them) are the same over every base. What is trained stays in fp32.

An element is off by at most half a step, 1/254 of the largest element of its output channel. Of Gaussian weights the error's
root mean square is 0.86 % of the kernel's at 3,584 inputs and 0.95 % at 18,944; heavy tails cost more, in the channels that
have them. One block at Qwen2-7B's width moves the residual stream by 1.0 %, products in bf16 alone by 0.5 %.
`benchmarks/int8_accuracy.py` measures any weights folder.

An adapter that was trained over an int8 base is exported onto the weights as released, which int8 only stands in for.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from avlm_jax.config import ConfigError
from avlm_jax.sharding import constrain
from avlm_jax.state import flatten, unflatten

Axes = tuple[str | None, str | None]

FROZEN_DTYPES = ("float32", "bfloat16", "int8")  # What config.frozen_dtype may be.
LEVELS = 127  # Of either sign: -128 would have no counterpart.
SCALE = "_scale"  # What a quantised kernel's path and its scale's differ by.

# Every linear layer of a block has a kernel of its own name below llm/layers.
QUANTISED = re.compile(r"llm/layers/.*/kernel")


def check_frozen_dtype(name: Any) -> None:
    """Raises ConfigError unless `name` is a precision that frozen parameters can have."""
    if name not in FROZEN_DTYPES:
        raise ConfigError(
            f"config.frozen_dtype is {name!r}; one of {', '.join(map(repr, FROZEN_DTYPES))} is expected"
        )


def float_dtype(frozen_dtype: str) -> str:
    """What frozen parameters are kept in that are not quantised."""
    return "bfloat16" if frozen_dtype == "int8" else frozen_dtype


def is_quantised(path: str, frozen_dtype: str) -> bool:
    """Whether the parameter `path`, being frozen, is kept in eight bits."""
    return frozen_dtype == "int8" and QUANTISED.fullmatch(path) is not None


def abstract_frozen(tree: Mapping[str, Any], frozen_dtype: str, fp32: Collection[str] = ()) -> dict[str, Any]:
    """Shapes and dtypes of parameters as they are placed: those of `fp32` in single precision, all others frozen.

    Args:
        tree: nested dict of arrays or abstract parameters.
        frozen_dtype: config.frozen_dtype.
        fp32: paths of what is trained.

    Raises:
        ConfigError: see `check_frozen_dtype`.
    """
    check_frozen_dtype(frozen_dtype)
    found = {}
    for path, leaf in flatten(tree).items():
        dtype = leaf.dtype
        if path in fp32 or path.endswith("/kernel" + SCALE):
            dtype = jnp.float32
        elif is_quantised(path, frozen_dtype):
            dtype = jnp.int8
            found[path + SCALE] = jax.ShapeDtypeStruct(leaf.shape[:-2] + leaf.shape[-1:], jnp.float32)
        elif jnp.issubdtype(dtype, jnp.floating):
            dtype = float_dtype(frozen_dtype)
        found[path] = jax.ShapeDtypeStruct(leaf.shape, dtype)
    return unflatten(found)


def quantise(
    kernel: Float[Array, "*layers in out"],
) -> tuple[Int8[Array, "*layers in out"], Float[Array, "*layers out"]]:
    """(int8 values, scales): the nearest multiples of a scale by which the channel's largest element becomes 127.

    A channel of zeros gets a scale of no consequence. A NaN or an infinity makes the whole channel NaN, so that it is noticed.
    """
    kernel = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(kernel), axis=-2)
    scale = jnp.maximum(largest / LEVELS, jnp.finfo(jnp.float32).tiny)
    steps = jnp.round(kernel / jnp.expand_dims(scale, -2))
    scale = jnp.where(jnp.isfinite(largest), scale, jnp.nan)
    return jnp.clip(steps, -LEVELS, LEVELS).astype(jnp.int8), scale


def dequantise(
    kernel: Int8[Array, "*layers in out"], scale: Float[Array, "*layers out"]
) -> Float[Array, "*layers in out"]:
    """The kernel in fp32 that a quantised one stands for. The model never builds it, see `int8_matmul`."""
    return kernel.astype(jnp.float32) * jnp.expand_dims(scale, -2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def int8_matmul(
    x: Float[Array, "... in"],
    kernel: Int8[Array, "in out"],
    scale: Float[Array, " out"],
    axes: Axes = (None, None),
) -> Float[Array, "... out"]:
    """x times the kernel, in x's dtype, in which the int8 values are exact; scaled in fp32 and rounded once.

    The gradient goes to x alone. For it only the int8 values are kept: plain differentiation would keep them as bf16, and a
    scan over layers without rematerialisation those of all layers, which is the memory that int8 is to save.

    Args:
        axes: how the kernel lies on the mesh while it is multiplied, see `sharding.constrain`. It is brought there as int8:
            XLA would fetch it from the other devices after its conversion, which is twice the bytes.
    """
    y = jnp.matmul(x, _fetched(kernel, axes, x.dtype), preferred_element_type=jnp.float32)
    return (y * _over_last(scale, y.ndim)).astype(x.dtype)


def _forward(x: Array, kernel: Array, scale: Array, axes: Axes) -> tuple[Array, tuple[Array, Array]]:
    return int8_matmul(x, kernel, scale, axes), (kernel, scale)


def _backward(axes: Axes, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, np.ndarray, Array]:
    kernel, scale = kept
    scaled = (gradient.astype(jnp.float32) * _over_last(scale, gradient.ndim)).astype(gradient.dtype)
    # Integers have no gradient, which JAX writes as float0; the scale belongs to the frozen kernel.
    return (
        jnp.matmul(scaled, _fetched(kernel, axes, gradient.dtype).T),
        np.zeros(kernel.shape, jax.dtypes.float0),
        jnp.zeros_like(scale),
    )


int8_matmul.defvjp(_forward, _backward)


def _fetched(kernel: Array, axes: Axes, dtype: Any) -> Array:
    return constrain(kernel, *axes).astype(dtype)


def _over_last(scale: Array, ndim: int) -> Array:
    return scale.reshape((1,) * (ndim - 1) + (-1,))
