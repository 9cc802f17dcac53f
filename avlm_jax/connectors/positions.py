"""Fixed sinusoidal codes of time and place, all computed in fp32."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SHORTEST_PERIOD, LONGEST_PERIOD = 1.0, 7200.0  # seconds: from one frame a second to a two-hour film.


def geometric_periods(
    count: int, shortest: float = SHORTEST_PERIOD, longest: float = LONGEST_PERIOD
) -> np.ndarray:
    """`count` periods from `shortest` to `longest` in equal ratios, f64 [count]."""
    return np.geomspace(shortest, longest, count)


def sinusoid(values: Float[Array, "*b"], periods: np.ndarray) -> Float[Array, "*b two_periods"]:
    """sin and cos of 2 pi value / period, for each period: [..., 2 * len(periods)]."""
    frequencies = jnp.asarray(2 * np.pi / periods, jnp.float32)
    angles = values.astype(jnp.float32)[..., None] * frequencies.reshape((1,) * values.ndim + (-1,))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def seconds_code(seconds: Float[Array, "*b"], width: int) -> Float[Array, "*b width"]:
    """The code of an absolute time in seconds that keys of any modality and queries share; values carry none."""
    return sinusoid(seconds, geometric_periods(width // 2))


def grid_code(rows: int, columns: int, width: int) -> np.ndarray:
    """Two-dimensional sine-cosine code of a grid, f32 [rows * columns, width]; half of the width codes the row.

    Periods run from 2 pi to 2 pi * 10,000 as in Transformer and ViT codes (Vaswani et al. 2017; MAE, Qwen-VL).
    """
    quarter = width // 4
    omega = 1.0 / 10_000 ** (np.arange(quarter) / max(quarter, 1))

    def code(places: np.ndarray) -> np.ndarray:
        angles = places[:, None] * omega[None]
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.divmod(np.arange(rows * columns), columns)
    both = np.concatenate([code(row.astype(np.float64)), code(column.astype(np.float64))], axis=1)
    return np.pad(both, ((0, 0), (0, width - both.shape[1]))).astype(np.float32)
