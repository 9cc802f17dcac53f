"""Temporal Linear Projection: time as a modality of its own (SAVEn-Vid paper, section 4.1.2)."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from avlm_jax.connectors.positions import geometric_periods, sinusoid


@dataclasses.dataclass(frozen=True)
class TimeConfig:
    """h(t) = W f(t) + b; the paper does not say what f is.

    Attributes:
        f: "sinusoid" [t/D, sin and cos of the seconds at 64 geometric periods of 1 s to 7200 s] = 129 values: absolute
            and relative time, neither of which a linear layer alone makes out of the other; "scalar" t/D;
            "seconds" the seconds alone; "table" a learnt row per whole second, the last one for all later.
        source: "query" two tokens (start, end) per interval named by the question; "frames" one token per frame time;
            "both".
        periods: of "sinusoid"; table_size: rows of "table" (two hours).
    """

    f: str = "sinusoid"
    source: str = "query"
    periods: int = 64
    table_size: int = 7200

    def __post_init__(self) -> None:
        if self.f not in ("sinusoid", "scalar", "seconds", "table"):
            raise ValueError(f"time.f is {self.f!r}; use 'sinusoid', 'scalar', 'seconds' or 'table'")
        if self.source not in ("query", "frames", "both"):
            raise ValueError(f"time.source is {self.source!r}; use 'query', 'frames' or 'both'")


def _by_part(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """LeCun's normal for the first row (one value in) and for the rest, each by its own fan-in.

    Drawn as one of 129 values the relative time would start as a hundredth of a token's variance.
    """
    kernel = jax.random.normal(key, shape)
    return kernel.at[1:].multiply(max(shape[0] - 1, 1) ** -0.5)


class TemporalLinearProjection(nn.Module):
    """Times in seconds to time tokens. Parameters: kernel [f d], bias [d] (for "table": table [rows d])."""

    config: TimeConfig
    width: int

    @nn.compact
    def __call__(self, seconds: Float[Array, "b n"], duration: Float[Array, " b"]) -> Float[Array, "b n d"]:
        """fp32 tokens; `duration` in seconds makes the relative part t/D (0 for an image, whose duration is 0)."""
        c = self.config
        if c.f == "table":
            table = self.param("table", nn.initializers.zeros, (c.table_size, self.width))
            return table[jnp.clip(jnp.floor(seconds), 0, c.table_size - 1).astype(jnp.int32)]
        relative = seconds / jnp.maximum(duration, 1e-6)[:, None]
        if c.f == "scalar":
            features = relative[..., None]
        elif c.f == "seconds":
            features = seconds[..., None]
        else:
            features = jnp.concatenate(
                [relative[..., None], sinusoid(seconds, geometric_periods(c.periods))], -1
            )
        kernel = self.param("kernel", _by_part, (features.shape[-1], self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        return (
            features.astype(jnp.float32) @ kernel.astype(jnp.float32) + bias.astype(jnp.float32)[None, None]
        )


def time_tokens(
    batch: dict[str, jax.Array], source: str
) -> tuple[Float[Array, "b n"], Float[Array, "b n 2"], Bool[Array, "b n"]]:
    """Which times become tokens: (seconds, the interval each stands for in seconds, mask).

    An interval gives its start and its end; with "frames" or "both" every valid frame gives its time, an interval of no
    length.
    """
    seconds, spans, masks = [], [], []
    if source in ("query", "both"):
        b, i, _ = batch["intervals"].shape
        seconds.append(batch["intervals"].reshape(b, 2 * i))
        spans.append(jnp.repeat(batch["intervals"], 2, axis=1))
        masks.append(jnp.repeat(batch["interval_mask"], 2, axis=1))
    if source in ("frames", "both"):
        seconds.append(batch["frame_times"])
        spans.append(jnp.repeat(batch["frame_times"][..., None], 2, axis=-1))
        masks.append(batch["frame_mask"])
    return jnp.concatenate(seconds, axis=1), jnp.concatenate(spans, axis=1), jnp.concatenate(masks, axis=1)
