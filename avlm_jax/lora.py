"""Low-rank adaptation: a Dense layer whose frozen kernel carries a trainable low-rank update.

As trees: an adapter is the leaves `.../lora_a` and `.../lora_b` beside a kernel. `merge_lora` adds it to the kernel;
`retire` keeps it as one that later stages merge before they attach a fresh one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from avlm_jax.layers.dropout import Dropout
from avlm_jax.quantize import SCALE, int8_matmul

# Every linear layer of a Qwen2/LLaMA block; the LLaVA family adapts all but the output head (haotian-liu/LLaVA).
ALL_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")

# Of these the inputs are split over the mesh's "tensor" axis, of the others the outputs; see `sharding.LLM`.
ROW_PARALLEL = ("o", "down")

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
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; it is at least 0 and below 1")


class LoraDense(nn.Module):
    """y = x W + b + alpha/r * dropout(x) A B, with A random and B zero, so that a fresh adapter changes nothing.

    Parameters: kernel [in out], bias [out] (if `use_bias`), lora_a [in r], lora_b [r out] (if `lora` is given). The kernel of a
    frozen base may be int8, with its kernel_scale [out] beside it; see `avlm_jax.quantize`.
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
        if kernel.dtype == jnp.int8:
            scale = self.param("kernel_scale", nn.initializers.ones, (self.features,))
            axes = ("tensor", None) if self.name in ROW_PARALLEL else (None, "tensor")
            y = int8_matmul(x, kernel, scale, axes)
        else:
            y = x @ kernel.astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        if self.lora is not None and self.lora.rank > 0:
            a = self.param("lora_a", A_INIT, (width, self.lora.rank))
            b = self.param("lora_b", nn.initializers.zeros, (self.lora.rank, self.features))
            z = Dropout(self.lora.dropout)(x)
            y = y + (z @ a.astype(self.dtype)) @ b.astype(self.dtype) * (self.lora.alpha / self.lora.rank)
        return y


MERGED = "merged"  # merged/<n>/llm/...: the n-th adapter of a lineage, which belongs to the base by now.
Updates = Sequence[tuple[Float[Array, "*layers in r"], Float[Array, "*layers r out"]]]


def merge_kernel(
    kernel: Float[Array, "*layers in out"], updates: Updates, scale: float
) -> Float[Array, "*layers in out"]:
    """kernel + scale * sum of A B, summed in fp32 and rounded once, to the kernel's dtype. Numpy or JAX arrays."""
    total = kernel.astype(jnp.float32)
    for a, b in updates:
        total = total + (a.astype(jnp.float32) @ b.astype(jnp.float32)) * scale
    return total.astype(kernel.dtype)


@functools.partial(jax.jit, static_argnames=("scale", "dtype"), donate_argnums=0)
def merge_stacked(kernel: jax.Array, updates: Updates, scale: float, dtype: str) -> jax.Array:
    """`merge_kernel` on sharded arrays with a layer axis, one layer at a time, then converted to `dtype`."""

    def one(layer: tuple[jax.Array, Updates]) -> jax.Array:
        with jax.default_matmul_precision("highest"):  # A TPU would otherwise multiply in bf16.
            return merge_kernel(*layer, scale).astype(dtype)

    return jax.lax.map(one, (kernel, tuple(updates)))


def merge_lora(params: Mapping[str, Any], config: LoraConfig) -> dict[str, Any]:
    """A nested tree of parameters with every adapter added to its kernel, and no lora_a and lora_b left.

    Raises:
        ValueError: an adapter without its other half or without a kernel, or beside a quantised kernel.
    """
    flat = flatten_dict(dict(params), sep="/")
    merged = {path: leaf for path, leaf in flat.items() if not is_lora(path)}
    for path in filter(is_lora, flat):
        layer = path.rpartition("/")[0]
        parts = [f"{layer}/{name}" for name in ("kernel", "lora_a", "lora_b")]
        if missing := [part for part in parts if part not in flat]:
            raise ValueError(f"{path} has no {', '.join(missing)} beside it")
        if parts[0] + SCALE in flat:
            raise ValueError(
                f"{parts[0]} is int8; merge adapters into the kernels as released (`Assembly.parameters` does it for "
                "retired ones), since rounding a rounded kernel again would lose accuracy twice"
            )
        kernel, a, b = (flat[part] for part in parts)
        merged[parts[0]] = merge_kernel(kernel, [(a, b)], config.alpha / config.rank)
    return unflatten_dict(merged, sep="/")


def is_lora(path: str) -> bool:
    """Whether a parameter path is half of an adapter."""
    return path.rpartition("/")[2] in ("lora_a", "lora_b")


def retire(learnt: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """What a stage has learnt, for a stage that begins with a fresh adapter: adapters move to merged/<n>/.

    The base stays as released and the file stays small: whoever loads the checkpoint adds merged/0, merged/1, ... to
    the base (`retired_updates`).

    Args:
        learnt: nested tree of a stage checkpoint. A kernel in it holds all that was retired before it was learnt.
        scale: alpha / rank that the adapters were trained with; it goes into lora_b, so that no later stage's own rank
            and alpha can change what they mean.
    """
    flat = flatten_dict(dict(learnt), sep="/")
    number = 1 + max((int(path.split("/")[1]) for path in flat if path.startswith(f"{MERGED}/")), default=-1)
    moved = {path: leaf for path, leaf in flat.items() if not is_lora(path) or path.startswith(f"{MERGED}/")}
    for path in flat.keys() - moved.keys():
        layer = path.rpartition("/")[0]
        if f"{layer}/kernel" in flat:  # Learnt itself, so it is stored with its adapter in.
            pair = (flat[f"{layer}/lora_a"], flat[f"{layer}/lora_b"])
            moved[f"{layer}/kernel"] = merge_kernel(flat[f"{layer}/kernel"], [pair], scale)
        else:
            scaled = flat[path] * np.float32(scale) if path.endswith("/lora_b") else flat[path]
            moved[f"{MERGED}/{number}/{path}"] = scaled
    return unflatten_dict(moved, sep="/")


def retired_updates(flat: Mapping[str, Any]) -> dict[str, list[tuple[Any, Any]]]:
    """Kernel path -> (A, scaled B) of every retired adapter in a flat tree, oldest first; to be merged with scale 1.

    Raises:
        ValueError: half of an adapter is missing.
    """
    updates: dict[str, dict[int, dict[str, Any]]] = {}
    for path, leaf in flat.items():
        if path.startswith(f"{MERGED}/"):
            _, number, rest = path.split("/", 2)
            layer, _, name = rest.rpartition("/")
            updates.setdefault(f"{layer}/kernel", {}).setdefault(int(number), {})[name] = leaf
    for kernel, numbered in updates.items():
        for number, halves in numbered.items():
            if halves.keys() != {"lora_a", "lora_b"}:
                raise ValueError(f"{MERGED}/{number}: {kernel} has {sorted(halves)}, not lora_a and lora_b")
    return {
        kernel: [(numbered[n]["lora_a"], numbered[n]["lora_b"]) for n in sorted(numbered)]
        for kernel, numbered in updates.items()
    }
