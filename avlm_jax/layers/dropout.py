"""Dropout whose mask is hashed from positions, not drawn from `jax.random`.

A mask of threefry is 20 rounds per element, in every layer once forward and once or twice backward: of the time that XLA
takes to compile a 7B LoRA step for a TPU more than a third. JAX's cheaper generator (`unsafe_rbg`) is no elementwise
operation, so whole words of random bits lie in HBM. This hash is elementwise: it is fused into what reads the mask, of which
nothing lies in memory where the layer is recomputed (`avlm_jax.llm.remat`), and an element's bits depend on nothing but key
and position, so that a sharded mask is the same on every mesh.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

# Multipliers and shifts of lowbias32, a permutation of 32-bit words that was searched for an even avalanche (C. Wellons,
# "Prospecting for Hash Functions", 2018; public domain).
SHIFTS, LAST_SHIFT = (16, 15), 16
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
GOLDEN = 0x9E3779B9  # 2**32 / golden ratio, odd: spreads consecutive rows over all words.


def mix(words: UInt32[Array, "*s"]) -> UInt32[Array, "*s"]:
    """lowbias32 of every element."""
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS, strict=True):
        words = (words ^ (words >> shift)) * jnp.uint32(multiplier)
    return words ^ (words >> LAST_SHIFT)


def hash_bits(key: Array, shape: tuple[int, ...]) -> UInt32[Array, "*s"]:
    """A word for each position of `shape`, which has one axis at least.

    Args:
        key: of `jax.random`, of any implementation; its first two words are read, which `split` and `fold_in` have made.
        shape: of the result; what of it lies beyond 2**32 rows repeats.
    """
    first, second = jax.random.key_data(key).astype(jnp.uint32).reshape(-1)[:2]
    # One word for each row and one for each column, which meet last.
    rows, columns = (*shape[:-1], 1), (*(1 for _ in shape[:-1]), shape[-1])
    row = jnp.zeros(rows, jnp.uint32)
    for axis, size in enumerate(shape[:-1]):
        row = row * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, rows, axis)
    column = jax.lax.broadcasted_iota(jnp.uint32, columns, len(shape) - 1)
    return mix(mix(column + first) ^ (row * jnp.uint32(GOLDEN) + second))


def keep_mask(key: Array, rate: float, shape: tuple[int, ...]) -> Bool[Array, "*s"]:
    """True with probability 1 - rate (to 2**-32), independently for each position."""
    return hash_bits(key, shape) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


class Dropout(nn.Module):
    """Inverted dropout, as `flax.linen.Dropout`, on the rng "dropout"; without that rng it does nothing.

    Attributes:
        rate: share of elements that become 0, 0 to below 1; the others grow by 1 / (1 - rate).
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        if not 0 <= self.rate < 1:
            raise ValueError(f"dropout rate is {self.rate}; it is at least 0 and below 1")
        if self.rate == 0 or not self.has_rng("dropout"):
            return x
        keep = keep_mask(self.make_rng("dropout"), self.rate, x.shape)
        return jnp.where(keep, x / (1 - self.rate), 0)
