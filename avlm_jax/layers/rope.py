"""Rotary position embedding in the half-split layout of LLaMA and Qwen2."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(x: Float[Array, "b t h d"], positions: Int[Array, "b t"], theta: float) -> Float[Array, "b t h d"]:
    """Rotates each pair (x[i], x[i + d/2]) by positions * theta^(-2i/d), in fp32.

    Half-split pairing as in Hugging Face's checkpoints (transformers: modeling_qwen2, `rotate_half`); `theta` is 1e6 for
    Qwen2 and 1e4 for LLaMA-2.
    """
    half = x.shape[-1] // 2
    inverse = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * inverse[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
