"""AdamW whose learning rate is an argument of the step.

The rate is computed on the host and fed in, because a schedule inside the optimizer bakes its constants
(peak, warm-up, length) into the compiled program: stages that differ only in these could then not share one
compiled step.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from avlm_jax.state import flatten

SCHEDULES = ("cosine", "constant")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How a stage is optimised.

    The SAVEn-Vid paper prints the rates (2e-3 for alignment, 2e-4 for fine-tuning) and leaves the rest open.
    The defaults are the LLaVA family's (haotian-liu/LLaVA:scripts/v1_5/finetune.sh: cosine, warm-up ratio
    0.03, weight decay 0; betas, epsilon and clipping norm are the Hugging Face Trainer's, which it runs on).

    Attributes:
        lr: peak learning rate.
        warmup_ratio: share of the steps in which the rate climbs linearly to `lr`.
        schedule: after warm-up, "cosine" falls to 0 at the last step, "constant" stays.
        weight_decay: decoupled decay; biases and norm scales are never decayed.
        b1, b2, eps: Adam's.
        clip: largest global norm of the gradient; 0 = no clipping.
        lr_scale: (regex, factor) pairs; the first regex that matches a parameter's whole path scales its
            rate.
    """

    lr: float = 2e-4
    warmup_ratio: float = 0.03
    schedule: str = "cosine"
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0
    lr_scale: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optim.schedule is {self.schedule!r}; use one of {', '.join(SCHEDULES)}")
        if not 0.0 <= self.warmup_ratio <= 1.0:
            raise ValueError(f"optim.warmup_ratio is {self.warmup_ratio}; it is a share of the steps, 0 to 1")
        for name in ("lr", "weight_decay", "clip"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; it must not be negative")
        for name in ("b1", "b2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; it must be in [0, 1)")
        # ConfigDict hands tuples of tuples over as it likes; hashing and compiling need real tuples.
        object.__setattr__(
            self, "lr_scale", tuple((str(regex), float(factor)) for regex, factor in self.lr_scale)
        )
        for regex, _ in self.lr_scale:
            re.compile(regex)


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> np.float32:
    """The rate of the update that follows `step` finished ones (step 0 is the first of `total_steps`).

    Warm-up takes ceil(warmup_ratio * total_steps) steps as in the Hugging Face Trainer; unlike there, the
    first step's rate is lr / warm-up steps and not 0, so that no step is spent on changing nothing.

    Raises:
        ValueError: step is not in [0, total_steps).
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is outside of a run of {total_steps} steps")
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return np.float32(config.lr * (step + 1) / warmup)
    if config.schedule == "constant":
        return np.float32(config.lr)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return np.float32(config.lr * 0.5 * (1.0 + math.cos(math.pi * progress)))


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Clipping by global norm, Adam's scaling, decoupled weight decay; all of AdamW but the learning rate."""
    parts = [optax.clip_by_global_norm(config.clip)] if config.clip > 0 else []
    parts.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
    if config.weight_decay > 0:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=decayed))
    return optax.chain(*parts)


def decayed(params: Any) -> Any:
    """Which parameters weight decay touches: all but biases and norm scales (as in the Hugging Face Trainer).

    Told by name and not by rank, because scanned layers give a bias a leading layer axis.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("bias", "scale"), params)


def apply_updates(
    optimizer: optax.GradientTransformation,
    gradients: Any,
    opt_state: optax.OptState,
    params: Any,
    lr: Float[Array, ""],
    lr_scale: tuple[tuple[str, float], ...] = (),
) -> tuple[Any, optax.OptState]:
    """One update.

    Args:
        optimizer: from `make_optimizer`.
        gradients: tree like `params`.
        opt_state: the optimizer's state.
        params: nested dict of trainable parameters.
        lr: learning rate, a traced scalar.
        lr_scale: as in `OptimConfig`.

    Returns:
        (new params, new optimizer state); dtypes are those of the old ones.
    """
    directions, opt_state = optimizer.update(gradients, opt_state, params)
    factors = lr_factors(params, lr_scale)

    def move(path: tuple, parameter: jax.Array, direction: jax.Array) -> jax.Array:
        factor = factors["/".join(key.key for key in path)]
        rate = lr if factor == 1.0 else lr * factor
        return (parameter - rate * direction).astype(parameter.dtype)

    return jax.tree_util.tree_map_with_path(move, params, directions), opt_state


def lr_factors(params: Any, lr_scale: tuple[tuple[str, float], ...]) -> dict[str, float]:
    """The learning-rate factor of every path; 1 where no regex matches.

    Raises:
        ValueError: a regex matches no path: a factor that is silently not applied.
    """
    paths = list(flatten(params))
    for regex, _ in lr_scale:
        if not any(re.fullmatch(regex, path) for path in paths):
            raise ValueError(
                f"optim.lr_scale: {regex!r} matches no trainable path; paths begin with {paths[:3]}"
            )
    return {
        path: next((factor for regex, factor in lr_scale if re.fullmatch(regex, path)), 1.0) for path in paths
    }


def global_norm(tree: Any) -> Float[Array, ""]:
    """The Euclidean norm over all leaves, in fp32; what clipping compares with `clip`."""
    return optax.global_norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree))
