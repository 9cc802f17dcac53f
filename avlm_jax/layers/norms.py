"""Normalisation layers; statistics in fp32 whatever the dtype of the stream."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, computed in fp32, returned in the dtype of the input.

    Parameters: scale [d], bias [d].

    Attributes:
        epsilon: added to the variance; every backbone states its own (SigLIP 1e-6, BEATs 1e-5).
    """

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        width = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (width,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        wide = x.astype(jnp.float32)
        # Two passes: E[x^2] - E[x]^2 cancels badly for streams with a large mean, as SigLIP's has.
        centred = wide - wide.mean(axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + self.epsilon)
        shape = (1,) * (x.ndim - 1) + (width,)
        normed = normed * scale.astype(jnp.float32).reshape(shape) + bias.astype(jnp.float32).reshape(shape)
        return normed.astype(x.dtype)
