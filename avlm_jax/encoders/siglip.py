"""SigLIP's vision transformer (Zhai et al. 2023, google-research/big_vision; released by Google on the hub).

Parameter tree of `SiglipEncoder`, L = layers that feed the selected feature, d = width:

    patch_embed/kernel [patch*patch*3 d]  rows in (row, column, channel) order     patch_embed/bias [d]
    pos_embed [p d]
    layers/ln1, layers/ln2 {scale, bias} [L d]
    layers/attn/{q,k,v,o} {kernel [L d d], bias [L d]}
    layers/mlp/fc1 {kernel [L d m], bias [L m]}      layers/mlp/fc2 {kernel [L m d], bias [L d]}

`SiglipPooledModel` has all layers and, in addition,

    post_ln {scale, bias} [d]
    head/probe [1 d]     head/attn/{q,k,v,o}     head/ln {scale, bias}     head/mlp/{fc1,fc2}
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from avlm_jax.layers.attention import attention
from avlm_jax.layers.mlp import Mlp
from avlm_jax.layers.norms import LayerNorm
from avlm_jax.sharding import constrain

_gelu = functools.partial(jax.nn.gelu, approximate=True)  # "gelu_pytorch_tanh" in the released config.json.


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """Sizes of a SigLIP vision tower. The defaults are google/siglip-so400m-patch14-384's config.json.

    Attributes:
        image_size: height and width in pixels.
        patch_size: side and stride of the patch convolution; pixels that fill no whole patch are dropped
            (384 / 14: the last 6 of each side).
        width, depth, mlp_dim, num_heads: of the transformer.
        feature_layer: which hidden state `SiglipEncoder` returns, counted like transformers'
            `hidden_states`: 0 = embeddings, depth or -1 = output of the last layer. -2, LLaVA-OneVision's
            choice (LLaVA-VL/LLaVA-NeXT: siglip_encoder.py), is the output of layer depth - 1 without any
            final norm.
        ln_eps: of every layer norm.
        dtype: of activations and matrix products; norms and softmax stay fp32.
        backend: of `avlm_jax.layers.attention.attention`.
        chunk: frames of each row that are encoded at a time, 0 = all; see `avlm_jax.encoders.frozen`.

    Raises:
        ValueError: a size is not positive, width does not divide by num_heads, the image is smaller than a
            patch, or feature_layer names no hidden state.
    """

    image_size: int = 384
    patch_size: int = 14
    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    feature_layer: int = -2
    ln_eps: float = 1e-6
    dtype: str = "float32"
    backend: str = "auto"
    chunk: int = 0

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "width", "depth", "mlp_dim", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"vision.{name} is {getattr(self, name)}; it must be at least 1")
        if self.chunk < 0:
            raise ValueError(f"vision.chunk is {self.chunk}; it must be at least 0 (all frames at once)")
        if self.width % self.num_heads:
            raise ValueError(
                f"vision.width {self.width} does not divide by vision.num_heads {self.num_heads}"
            )
        if self.image_size < self.patch_size:
            raise ValueError(
                f"vision.image_size {self.image_size} is smaller than vision.patch_size {self.patch_size}"
            )
        if not -self.depth - 1 <= self.feature_layer <= self.depth:
            raise ValueError(
                f"vision.feature_layer is {self.feature_layer}; a tower of depth {self.depth} has hidden "
                f"states 0 to {self.depth}, or -{self.depth + 1} to -1 counted from the end"
            )

    @property
    def grid(self) -> int:
        """Patches per side: 27 for so400m/14 at 384 pixels."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """p, tokens per image: 729 for so400m/14 at 384 pixels."""
        return self.grid**2

    @property
    def feature_depth(self) -> int:
        """Layers that the selected hidden state needs: 26 of 27 for feature_layer = -2."""
        return self.feature_layer if self.feature_layer >= 0 else self.depth + 1 + self.feature_layer


class MultiHeadAttention(nn.Module):
    """Projected attention with biases everywhere. Parameters: {q,k,v,o}/{kernel [d d], bias [d]}."""

    num_heads: int
    dtype: str = "float32"
    backend: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"], memory: Float[Array, "n s d"]) -> Float[Array, "n t d"]:
        width = x.shape[-1]
        dense = functools.partial(
            nn.Dense, width, dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform()
        )

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:-1], self.num_heads, width // self.num_heads)

        mixed = attention(
            heads(dense(name="q")(x)),
            heads(dense(name="k")(memory)),
            heads(dense(name="v")(memory)),
            backend=self.backend,
        )
        return dense(name="o")(mixed.reshape(x.shape))


class EncoderLayer(nn.Module):
    """One pre-norm transformer layer, in the (carry, x) -> (carry, y) form of `nn.scan`."""

    config: SiglipConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n p d"], _: None) -> tuple[Float[Array, "n p d"], None]:
        c = self.config
        h = LayerNorm(c.ln_eps, name="ln1")(x)
        x = x + MultiHeadAttention(c.num_heads, c.dtype, c.backend, name="attn")(h, h)
        h = LayerNorm(c.ln_eps, name="ln2")(x)
        return constrain(x + Mlp(c.mlp_dim, _gelu, c.dtype, name="mlp")(h), ("batch", "tensor")), None


class AttentionPooling(nn.Module):
    """SigLIP's pooling head: one learned query attends to all patches, then a residual perceptron."""

    config: SiglipConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n p d"]) -> Float[Array, "n d"]:
        c = self.config
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, c.width))
        query = jnp.broadcast_to(probe.astype(x.dtype)[None], (x.shape[0], 1, c.width))
        pooled = MultiHeadAttention(c.num_heads, c.dtype, c.backend, name="attn")(query, x)
        h = LayerNorm(c.ln_eps, name="ln")(pooled)
        return (pooled + Mlp(c.mlp_dim, _gelu, c.dtype, name="mlp")(h))[:, 0]


def patchify(images: Float[Array, "n h w c"], patch_size: int) -> Float[Array, "n p k"]:
    """Non-overlapping square patches, row by row; k = patch*patch*c in (row, column, channel) order.

    Rows and columns that fill no whole patch are dropped, as a valid strided convolution drops them.
    """
    n, height, width, channels = images.shape
    rows, columns = height // patch_size, width // patch_size
    x = images[:, : rows * patch_size, : columns * patch_size]
    x = x.reshape(n, rows, patch_size, columns, patch_size, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, rows * columns, patch_size * patch_size * channels)


class SiglipEncoder(nn.Module):
    """Patch features of images. Layers above the selected one have no parameters here."""

    config: SiglipConfig

    @nn.compact
    def __call__(self, images: UInt8[Array, "n h w 3"]) -> Float[Array, "n p d"]:
        """Features of `images` (RGB, uint8) at config.feature_layer.

        Raises:
            ValueError: the images are not of config.image_size or not RGB.
        """
        return self._hidden_state(images, self.config.feature_depth)

    def _hidden_state(self, images: jax.Array, num_layers: int) -> jax.Array:
        c = self.config
        expected = (c.image_size, c.image_size, 3)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(f"SigLIP got images {list(images.shape)}, expected {['n', *expected]}")
        # SiglipImageProcessor: rescale by 1/255, mean = std = 0.5 (preprocessor_config.json of the release).
        pixels = ((images.astype(jnp.float32) / 255.0 - 0.5) / 0.5).astype(c.dtype)
        # The strided convolution as one matrix product: the same sum, and fast on every device.
        x = nn.Dense(c.width, dtype=c.dtype, name="patch_embed")(patchify(pixels, c.patch_size))
        pos_embed = self.param("pos_embed", nn.initializers.normal(c.width**-0.5), (c.num_patches, c.width))
        x = constrain(x + pos_embed.astype(x.dtype)[None], ("batch", "tensor"))  # Pictures do not mix.
        if num_layers:
            layers = nn.scan(
                EncoderLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=num_layers
            )
            x, _ = layers(c, name="layers")(x, None)
        return x


class SiglipPooledModel(SiglipEncoder):
    """The whole tower with its attention-pooling head; a superset of `SiglipEncoder`'s parameters."""

    @nn.compact
    def __call__(self, images: UInt8[Array, "n h w 3"]) -> Float[Array, "n d"]:
        """One vector per image; transformers calls it `pooler_output`."""
        x = self._hidden_state(images, self.config.depth)
        x = LayerNorm(self.config.ln_eps, name="post_ln")(x)
        return AttentionPooling(self.config, name="head")(x)
