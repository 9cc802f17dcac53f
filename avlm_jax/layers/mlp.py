"""The two-layer perceptron of the transformer encoders."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
from jaxtyping import Array, Float


class Mlp(nn.Module):
    """Linear, activation, Linear back to the width of the input. Both have a bias.

    Parameters: fc1/{kernel [d hidden], bias [hidden]}, fc2/{kernel [hidden d], bias [d]}.

    Attributes:
        hidden: width between the two layers.
        activation: SigLIP uses tanh-GELU, BEATs the exact GELU.
        dtype: dtype of the matrix products.
        kernel_init: initialiser of both kernels.
    """

    hidden: int
    activation: Callable[[jax.Array], jax.Array]
    dtype: str = "float32"
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        hidden = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=self.kernel_init, name="fc1")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=self.kernel_init, name="fc2")(
            self.activation(hidden)
        )
