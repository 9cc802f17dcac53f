"""BEATs, the audio transformer (Chen et al. 2022; microsoft/unilm: beats/).

Parameter tree of `BeatsEncoder`, L = depth, d = width, e = embed_dim, h = heads:

    patch_embed/kernel [patch*patch e]  rows in (time, mel) order, no bias
    patch_ln {scale, bias} [e]            proj {kernel [e d], bias [d]}  absent if e = d
    pos_conv/v [taps d/groups d]   pos_conv/g [taps]   pos_conv/bias [d]   weight-norm kept factored:
                                          tap k of the kernel is g[k] * v[k] / |v[k]|
    pos_ln {scale, bias} [d]              rel_pos/embedding [buckets h]  shared by all layers, owned once
    layers/attn/{q,k,v,o} {kernel [L d d], bias [L d]}
    layers/attn/gate {kernel [L d/h 8], bias [L 8]}   layers/attn/gate_scale [L h]   absent without gru_gate
    layers/ln1, layers/ln2 {scale, bias} [L d]        after attention, after the perceptron
    layers/mlp/{fc1,fc2} {kernel, bias}

`BeatsClassifier` has, in addition, predictor {kernel [d classes], bias [classes]}.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from avlm_jax.layers.attention import attention
from avlm_jax.layers.mask import AttentionMask
from avlm_jax.layers.mlp import Mlp
from avlm_jax.layers.norms import LayerNorm
from avlm_jax.sharding import constrain

_gelu = functools.partial(jax.nn.gelu, approximate=False)
_LN_EPS = 1e-5  # torch.nn.LayerNorm's default, which unilm keeps.


@dataclasses.dataclass(frozen=True)
class BeatsConfig:
    """Sizes of a BEATs encoder. The defaults are the `cfg` of the released iter3+ checkpoints.

    Attributes:
        num_mel: mel bins of the filterbank; patch_size: side and stride of a patch (frames and mel bins).
        embed_dim: width of the patch embedding, before the projection to `width`.
        width, depth, num_heads, mlp_dim: of the transformer.
        conv_pos_kernel, conv_pos_groups: of the convolutional positions.
        num_buckets, max_distance: of the relative position bias. Released checkpoints say 320 and 800
            (the class default 1280 of unilm is overridden by each of them).
        gru_gate: gate the bias by the query (`gru_rel_pos`).
        deep_norm: multiply residuals by (2 depth)^(1/4) and start with the matching small weights.
        mask: "time_patch" masks a 16-frame column when all its frames are padding and blanks the padding of a
            column that is partly valid; "unilm" reshapes the frame mask to the token count as the original
            does, so that the column at the border can be masked for some mel rows only. Use it for parity.
        dtype: of activations and matrix products; norms, position bias and softmax stay fp32.
        backend: of `avlm_jax.layers.attention.attention`. Splash takes no position bias: on a TPU "auto" is the reference.
        chunk: windows of each row that are encoded at a time, 0 = all; see `avlm_jax.encoders.frozen`.

    Raises:
        ValueError: sizes that do not divide, or an unknown mask.
    """

    num_mel: int = 128
    patch_size: int = 16
    embed_dim: int = 512
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    conv_pos_kernel: int = 128
    conv_pos_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800
    gru_gate: bool = True
    deep_norm: bool = True
    mask: str = "time_patch"
    dtype: str = "float32"
    backend: str = "auto"
    chunk: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name = field.name
            least = 0 if name == "chunk" else 1
            if field.type == "int" and getattr(self, name) < least:
                raise ValueError(f"audio.{name} is {getattr(self, name)}; it must be at least {least}")
        for whole, part in (("num_mel", "patch_size"), ("width", "num_heads"), ("width", "conv_pos_groups")):
            size, divisor = getattr(self, whole), getattr(self, part)
            if size % divisor:
                raise ValueError(f"audio.{whole} {size} does not divide by audio.{part} {divisor}")
        if self.num_buckets % 4:
            raise ValueError(f"audio.num_buckets is {self.num_buckets}; it must be a multiple of 4")
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"audio.max_distance {self.max_distance} must exceed a quarter of audio.num_buckets "
                f"{self.num_buckets}, the exact buckets of one direction"
            )
        if self.mask not in ("time_patch", "unilm"):
            raise ValueError(f"audio.mask is {self.mask!r}; use 'time_patch' or 'unilm'")

    @property
    def mel_rows(self) -> int:
        """Tokens per time step: 8."""
        return self.num_mel // self.patch_size

    def num_tokens(self, num_frames: int) -> int:
        """Tokens of `num_frames` filterbank frames: 98 -> 48, 998 -> 496, 2998 -> 1496."""
        return num_frames // self.patch_size * self.mel_rows

    @property
    def residual_scale(self) -> float:
        """Deep norm's alpha, (2 depth)^(1/4): 2.2134 for 12 layers; 1 without deep_norm."""
        return (2.0 * self.depth) ** 0.25 if self.deep_norm else 1.0

    @property
    def init_gain(self) -> float:
        """Deep norm's beta, (8 depth)^(-1/4), the gain of v, o, fc1 and fc2 at initialisation."""
        return (8.0 * self.depth) ** -0.25 if self.deep_norm else 1.0


def _xavier_normal(gain: float) -> nn.initializers.Initializer:
    return nn.initializers.variance_scaling(gain**2, "fan_avg", "normal")


def relative_buckets(distance: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """T5's bidirectional buckets of key position minus query position, int32 of the same shape.

    Half of the buckets for each sign; half of those exact, the others logarithmic up to max_distance
    (google-research/text-to-text-transfer-transformer; unilm: beats/backbone.py).
    """
    half = num_buckets // 2
    exact = half // 2
    magnitude = np.abs(distance)
    # fp32 and this order of operations decide which side of a bucket's border a distance falls on.
    ratio = np.log(np.maximum(magnitude, 1).astype(np.float32) / np.float32(exact))
    log_part = ratio / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + log_part.astype(np.int32), half - 1)
    return (np.where(distance > 0, half, 0) + np.where(magnitude < exact, magnitude, far)).astype(np.int32)


class RelativePosition(nn.Module):
    """The bias [h t t] that every layer gates and adds to its logits. Parameters: embedding [buckets h]."""

    config: BeatsConfig

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "h t t"]:
        c = self.config
        # unilm starts at torch.nn.Embedding's std 1, which drowns the content of a small model at first.
        table = self.param("embedding", nn.initializers.normal(0.02), (c.num_buckets, c.num_heads))
        buckets = relative_buckets(np.arange(-length + 1, length), c.num_buckets, c.max_distance)
        by_distance = table.astype(jnp.float32)[buckets].T  # [h 2t-1]: t^2 gathers become 2t-1
        index = jnp.arange(length)[None, :] - jnp.arange(length)[:, None] + length - 1
        return by_distance[:, index]


class ConvPositions(nn.Module):
    """Grouped, weight-normalised convolution over time whose GELU is added to the stream as position."""

    config: BeatsConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        c = self.config
        taps, fan_in = c.conv_pos_kernel, c.width // c.conv_pos_groups
        std = (4.0 / (taps * c.width)) ** 0.5  # unilm: beats/backbone.py, with dropout 0
        v = self.param("v", nn.initializers.normal(std), (taps, fan_in, c.width))

        def norm(kernel: jax.Array) -> jax.Array:
            return jnp.sqrt(jnp.square(kernel.astype(jnp.float32)).sum(axis=(1, 2)))

        g = self.param("g", lambda _: norm(v))  # a fresh kernel equals v, as torch's weight_norm starts
        bias = self.param("bias", nn.initializers.zeros, (c.width,))
        kernel = v.astype(jnp.float32) * (g.astype(jnp.float32) / norm(v))[:, None, None]
        # "Same" padding; of an even kernel's taps / 2 on both sides, unilm drops the last output (SamePad).
        y = jax.lax.conv_general_dilated(
            x, kernel.astype(x.dtype), (1,), [(taps // 2, (taps - 1) // 2)],
            dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=c.conv_pos_groups,
        )  # fmt: skip
        return _gelu(y + bias.astype(x.dtype)[None, None])


class GatedAttention(nn.Module):
    """Self-attention whose position bias is scaled per query and head by a gate that reads q."""

    config: BeatsConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "n t d"], position_bias: Float[Array, "h t t"], mask: Bool[Array, "n t"]
    ) -> Float[Array, "n t d"]:
        c = self.config

        def project(name: str, gain: float) -> jax.Array:
            y = nn.Dense(c.width, dtype=c.dtype, kernel_init=_xavier_normal(gain), name=name)(x)
            return y.reshape(*y.shape[:-1], c.num_heads, c.width // c.num_heads)

        q, k, v = project("q", 1.0), project("k", 1.0), project("v", c.init_gain)
        bias = position_bias[None]
        if c.gru_gate:
            scale = self.param("gate_scale", nn.initializers.ones, (c.num_heads,)).astype(jnp.float32)
            # The gate reads q before the 1/sqrt(head) scale; 8 outputs are two gates of four summands each.
            logits = nn.Dense(8, dtype=c.dtype, name="gate")(q).astype(jnp.float32)
            a, b = jnp.moveaxis(jax.nn.sigmoid(logits.reshape(*logits.shape[:-1], 2, 4).sum(-1)), -1, 0)
            gate = a * (b * scale[None, None] - 1.0) + 2.0  # [n t h]
            bias = bias * gate.transpose(0, 2, 1)[..., None]
        # unilm computes softmax(32 (l / 32 - max)), which is a softmax of l; fp32 logits need no such trick.
        mixed = attention(q, k, v, mask=AttentionMask(kv_valid=mask), bias=bias, backend=c.backend)
        return nn.Dense(c.width, dtype=c.dtype, kernel_init=_xavier_normal(c.init_gain), name="o")(
            mixed.reshape(x.shape)
        )


class EncoderLayer(nn.Module):
    """One post-norm layer with deep norm, in the (carry, x) -> (carry, y) form of `nn.scan`."""

    config: BeatsConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "n t d"], position_bias: Float[Array, "h t t"], mask: Bool[Array, "n t"]
    ) -> tuple[Float[Array, "n t d"], None]:
        c = self.config
        h = GatedAttention(c, name="attn")(x, position_bias, mask)
        x = LayerNorm(_LN_EPS, name="ln1")(x * c.residual_scale + h)
        h = Mlp(c.mlp_dim, _gelu, c.dtype, _xavier_normal(c.init_gain), name="mlp")(x)
        x = LayerNorm(_LN_EPS, name="ln2")(x * c.residual_scale + h)
        return constrain(x, ("batch", "tensor")), None


def token_mask(frame_mask: Bool[Array, "n f"], config: BeatsConfig) -> Bool[Array, "n tokens"]:
    """Which tokens are valid, given which filterbank frames are; see `BeatsConfig.mask` for the two rules."""
    n, frames = frame_mask.shape
    tokens = config.num_tokens(frames)
    if config.mask == "time_patch":
        columns = frame_mask[:, : frames // config.patch_size * config.patch_size]
        columns = columns.reshape(n, -1, config.patch_size).any(axis=-1)
        return jnp.repeat(columns, config.mel_rows, axis=1)
    # unilm: BEATs.forward_padding_mask, which knows only the two lengths and cuts the mask into equal runs.
    used = frames - frames % tokens
    return frame_mask[:, :used].reshape(n, tokens, used // tokens).any(axis=-1)


class BeatsEncoder(nn.Module):
    """Audio features from a normalised filterbank. See the module's text for the parameters."""

    config: BeatsConfig

    @nn.compact
    def __call__(
        self, fbank: Float[Array, "n f mel"], frame_mask: Bool[Array, "n f"]
    ) -> tuple[Float[Array, "n tokens d"], Bool[Array, "n tokens"]]:
        """Features and their mask; token = 8 * time step + mel row, 16 frames (160 ms) per time step.

        Args:
            fbank: `beats_normalize(kaldi_fbank(waveform))`. Frames after the last whole patch are dropped.
            frame_mask: True where a frame holds sound, False where it is padding.

        Returns:
            Features, zero where masked, and the token mask.

        Raises:
            ValueError: fewer frames than one patch, or another number of mel bins than config.num_mel.
        """
        return self._encode(fbank, frame_mask)

    def _encode(self, fbank: jax.Array, frame_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = self.config
        n, frames, mel = fbank.shape
        if mel != c.num_mel:
            raise ValueError(f"BEATs got {mel} mel bins, expected audio.num_mel = {c.num_mel}")
        if frames < c.patch_size:
            raise ValueError(
                f"BEATs got {frames} filterbank frames; one patch needs {c.patch_size} "
                f"({25 + 10 * (c.patch_size - 1)} ms of audio)"
            )
        mask = token_mask(frame_mask, c)
        steps = frames // c.patch_size
        # Windows do not mix: all devices share them, those of a tensor group as well.
        x = constrain(fbank[:, : steps * c.patch_size].astype(c.dtype), ("batch", "tensor"))
        if c.mask == "time_patch":
            # Padding inside a partly valid column becomes the mean spectrum, so that it carries nothing.
            x = jnp.where(frame_mask[:, : steps * c.patch_size, None], x, 0.0)
        x = x.reshape(n, steps, c.patch_size, c.mel_rows, c.patch_size).transpose(0, 1, 3, 2, 4)
        x = x.reshape(n, steps * c.mel_rows, c.patch_size**2)
        x = nn.Dense(c.embed_dim, use_bias=False, dtype=c.dtype, name="patch_embed")(x)
        x = LayerNorm(_LN_EPS, name="patch_ln")(x)
        if c.embed_dim != c.width:
            x = nn.Dense(c.width, dtype=c.dtype, name="proj")(x)
        # Zeroed before the convolution, which would otherwise mix masked tokens into their neighbours.
        x = jnp.where(mask[:, :, None], x, 0.0)
        x = LayerNorm(_LN_EPS, name="pos_ln")(x + ConvPositions(c, name="pos_conv")(x))
        position_bias = RelativePosition(c, name="rel_pos")(x.shape[1])
        layers = nn.scan(
            EncoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=c.depth,
        )
        x, _ = layers(c, name="layers")(x, position_bias, mask)
        return jnp.where(mask[:, :, None], x, 0.0), mask


class BeatsClassifier(BeatsEncoder):
    """BEATs fine-tuned to tag sounds, as the `cpt2` checkpoints are; a superset of `BeatsEncoder`.

    Attributes:
        num_classes: 527 for AudioSet.
    """

    num_classes: int = 527

    @nn.compact
    def __call__(
        self, fbank: Float[Array, "n f mel"], frame_mask: Bool[Array, "n f"]
    ) -> Float[Array, "n classes"]:
        """Logits: the predictor's, averaged over valid tokens (BEATs.py, `extract_features`); the
        probability of a class is their sigmoid. A clip without any valid token gets zeros.
        """
        x, mask = self._encode(fbank, frame_mask)
        logits = nn.Dense(self.num_classes, dtype=self.config.dtype, name="predictor")(x).astype(jnp.float32)
        weight = mask[:, :, None].astype(jnp.float32)
        return (logits * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1.0)
