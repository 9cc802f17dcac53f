"""Low-rank adaptation: a Dense layer whose frozen kernel carries a trainable low-rank update."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

# Every linear layer of a Qwen2/LLaMA block; the LLaVA family adapts all but the output head (haotian-liu/LLaVA).
ALL_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")

# PEFT draws A by torch's kaiming_uniform_(a=sqrt(5)), which is uniform within 1/sqrt(fan in) (tuners/lora/layer.py).
A_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Rank 0 switches LoRA off: no LoRA parameter exists then.

    Attributes:
        rank, alpha: the update is alpha / rank * A B. 128/256 is the public Qwen2 + SigLIP recipe (video-SALMONN2,
            VideoLLaMA2); the SAVEn-Vid paper does not state its own.
        dropout: on the input of A, only while training (when a "dropout" rng is given).
        targets: names of the layers that get an update.
    """

    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ALL_TARGETS

    def __post_init__(self) -> None:
        unknown = set(self.targets) - set(ALL_TARGETS)
        if unknown:
            raise ValueError(f"lora.targets names {sorted(unknown)}; known: {', '.join(ALL_TARGETS)}")


class LoraDense(nn.Module):
    """y = x W + b + alpha/r * dropout(x) A B, with A random and B zero, so that a fresh adapter changes nothing.

    Parameters: kernel [in out], bias [out] (if `use_bias`), lora_a [in r], lora_b [r out] (if `lora` is given).
    """

    features: int
    use_bias: bool = False
    lora: LoraConfig | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        width = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (width, self.features))
        x = x.astype(self.dtype)
        y = x @ kernel.astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        if self.lora is not None and self.lora.rank > 0:
            a = self.param("lora_a", A_INIT, (width, self.lora.rank))
            b = self.param("lora_b", nn.initializers.zeros, (self.lora.rank, self.features))
            z = nn.Dropout(self.lora.dropout, deterministic=not self.has_rng("dropout"))(x)
            y = y + (z @ a.astype(self.dtype)) @ b.astype(self.dtype) * (self.lora.alpha / self.lora.rank)
        return y
