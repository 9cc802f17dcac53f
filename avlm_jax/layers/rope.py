"""Rotary position embedding in the half-split layout of LLaMA and Qwen2."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@functools.cache
def inverse_frequencies(width: int, theta: float) -> np.ndarray:
    """f32[width / 2], 1 / theta^(2i / width), rounded as the checkpoints' own code rounds them.

    At position 30,000 an error in the last bit of a frequency is an angle of a thousandth of a radian. The power is
    therefore taken here, once and exactly, rounded to fp32 and only then inverted (transformers: modeling_qwen2,
    `compute_default_rope_parameters`), and not on the device, where `pow` is off by several bits.
    """
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return np.float32(1) / (theta ** exponents.astype(np.float64)).astype(np.float32)


def rotate(x: Float[Array, "b t h d"], positions: Int[Array, "b t"], theta: float) -> Float[Array, "b t h d"]:
    """Rotates each pair (x[i], x[i + d/2]) by positions * theta^(-2i/d), in fp32.

    Half-split pairing as in Hugging Face's checkpoints (transformers: modeling_qwen2, `rotate_half`); `theta` is 1e6 for
    Qwen2 and 1e4 for LLaMA-2.
    """
    inverse = jnp.asarray(inverse_frequencies(x.shape[-1], theta))
    angles = positions[:, :, None, None].astype(jnp.float32) * inverse[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
