"""AVTS: the Audio-Visual Time-Spatial resampler (SAVEn-Vid paper, section 4.1.3), and its MLP ablation (Table 4).

Two perceptrons take the frozen encoders' features to one width; learned queries then read visual, audio and time tokens,
laid side by side, in a small non-causal transformer decoder. Time tokens skip the perceptrons (architecture figure).
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from avlm_jax.config import ConfigError
from avlm_jax.connectors.positions import grid_code, seconds_code
from avlm_jax.layers.attention import MASKED, attention
from avlm_jax.layers.mask import AttentionMask
from avlm_jax.layers.mlp import Mlp
from avlm_jax.layers.norms import LayerNorm

_LN_EPS = 1e-6
_exact_gelu = functools.partial(jax.nn.gelu, approximate=False)  # "mlp2x_gelu" of the LLaVA family.


@dataclasses.dataclass(frozen=True)
class AvtsConfig:
    """Sizes of the resampler. The paper leaves most of them unsaid; a field's default is our choice where it does.

    Attributes:
        resampler: "avts", or "mlp": no resampling, the tokens behind the two perceptrons go to the language model.
        num_queries: M, media tokens that reach the language model.
        scope: "global": every query reads every token (paper, Eq. 2); "per_frame": the queries form as many groups as
            there are frames; group i reads frame i, the sound of its share of the duration, and all time tokens.
        time_scope: with "per_frame": "all" groups read every time token; "inside": a group reads the times of an interval
            that touches its share of the duration, and is masked if no asked interval does. Without a time in the question
            the interval is the whole duration.
        num_layers, d_model, num_heads, mlp_ratio: of the decoder. d_model 0 means the language model's width.
        attention: "mha" projected and scaled; "plain" the paper's literal Eq. 2-3: no projections, no scale.
        type_embed: a learned vector per modality, zero at first, added to keys: else nothing tells visual from audio.
        visual_pool: "none"; "bilinear2": the patch grid halved (rounded up) as LLaVA-OneVision does for video;
            "frame": one token a frame, the mean of its patches.
        freq_pool: "mean" over the mel rows of an audio time step; "none"; "window": one token a window, the mean of all.
        dtype: of activations and matrix products.
        backend: of `avlm_jax.layers.attention.attention`. What a query of scope "per_frame" may read is a dense mask, which
            splash does not take.
    """

    resampler: str = "avts"
    num_queries: int = 256
    scope: str = "global"
    time_scope: str = "all"
    num_layers: int = 2
    d_model: int = 1024
    num_heads: int = 16
    mlp_ratio: int = 4
    attention: str = "mha"
    type_embed: bool = True
    visual_pool: str = "none"
    freq_pool: str = "mean"
    dtype: str = "bfloat16"
    backend: str = "auto"

    def __post_init__(self) -> None:
        allowed = {
            "resampler": ("avts", "mlp"),
            "scope": ("global", "per_frame"),
            "time_scope": ("all", "inside"),
            "attention": ("mha", "plain"),
            "visual_pool": ("none", "bilinear2", "frame"),
            "freq_pool": ("mean", "none", "window"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"avts.{name} is {getattr(self, name)!r}; use one of {', '.join(values)}")
        if self.scope == "global" and self.time_scope != "all":
            raise ValueError(
                "avts.time_scope 'inside' needs avts.scope 'per_frame': global queries have no share of the time"
            )
        if self.d_model % self.num_heads:
            raise ValueError(
                f"avts.d_model {self.d_model} does not divide by avts.num_heads {self.num_heads}"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens of one modality on their way into the resampler.

    Attributes:
        features: [b k e].
        seconds: when, f32 [b k].
        mask: which tokens exist, bool [b k].
        place: fixed code of the row and column (patch) or mel row inside one moment, f32 [k d], or None.
        spans: of time tokens, the interval (seconds) each stands for.
    """

    features: Float[Array, "b k e"]
    seconds: Float[Array, "b k"]
    mask: Bool[Array, "b k"]
    place: Float[Array, "k d"] | None = None
    spans: Float[Array, "b k 2"] | None = None


def touches(
    spans: Float[Array, "b k 2"], duration: Float[Array, " b"], groups: int
) -> Bool[Array, "b groups k"]:
    """Whether an interval (seconds) has a moment in common with each of `groups` equal shares of the duration."""
    first, last = share_of(spans[..., 0], duration, groups), share_of(spans[..., 1], duration, groups)
    group = jnp.arange(groups)[None, :, None]
    return (first[:, None] <= group) & (group <= last[:, None])


class Perceptron(nn.Module):
    """Linear, exact GELU, Linear to one width. Parameters: fc1/{kernel,bias}, fc2/{kernel,bias}."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b k e"]) -> Float[Array, "b k d"]:
        hidden = nn.Dense(self.width, dtype=self.dtype, name="fc1")(x)
        return nn.Dense(self.width, dtype=self.dtype, name="fc2")(_exact_gelu(hidden))


class PositionedAttention(nn.Module):
    """Attention with positions on queries and keys, never on values (as in DETR and Qwen-VL's resampler)."""

    config: AvtsConfig
    width: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b m d"],
        x_pos: Float[Array, "#b m d"],
        keys: Float[Array, "b k d"],
        keys_pos: Float[Array, "#b k d"],
        mask: AttentionMask,
    ) -> Float[Array, "b m d"]:
        c = self.config
        q, k, v = x + x_pos.astype(x.dtype), keys + keys_pos.astype(keys.dtype), keys
        if c.attention == "plain":  # Eq. 2-3 to the letter: softmax(q . k) v over the raw vectors.
            heads, scale = 1, 1.0
        else:
            q, k, v = (
                nn.Dense(self.width, dtype=c.dtype, name=n)(y) for n, y in (("q", q), ("k", k), ("v", v))
            )
            heads, scale = c.num_heads, (self.width // c.num_heads) ** -0.5

        def split(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], heads, self.width // heads)

        if self.is_mutable_collection(
            "intermediates"
        ):  # For pictures of what a query looks at: mean over heads.
            logits = jnp.einsum("bmhd,bkhd->bhmk", split(q), split(k)).astype(jnp.float32) * scale
            allowed = mask.matrix(*logits.shape[2:])
            logits = logits if allowed is None else jnp.where(allowed, logits, MASKED)
            self.sow("intermediates", "weights", jax.nn.softmax(logits).mean(1))
        y = attention(split(q), split(k), split(v), mask=mask, scale=scale, backend=c.backend).reshape(
            x.shape
        )
        return y if c.attention == "plain" else nn.Dense(self.width, dtype=c.dtype, name="o")(y)


class ResamplerBlock(nn.Module):
    """Self-attention, cross-attention, perceptron; each behind a norm and with a residual."""

    config: AvtsConfig
    width: int

    @nn.compact
    def __call__(self, x, x_pos, keys, keys_pos, self_mask, cross_mask):
        c = self.config
        h = LayerNorm(_LN_EPS, name="ln_self")(x)
        x = x + PositionedAttention(c, self.width, name="self")(h, x_pos, h, x_pos, self_mask)
        h = LayerNorm(_LN_EPS, name="ln_cross")(x)
        x = x + PositionedAttention(c, self.width, name="cross")(h, x_pos, keys, keys_pos, cross_mask)
        h = LayerNorm(_LN_EPS, name="ln_mlp")(x)
        return x + Mlp(c.mlp_ratio * self.width, _exact_gelu, c.dtype, name="mlp")(h)


def half_grid(features: Float[Array, "b t p e"], grid: int) -> Float[Array, "b t q e"]:
    """Bilinear halving of a square patch grid, sides rounded up: 27 x 27 -> 14 x 14."""
    b, t, _, e = features.shape
    side = -(-grid // 2)
    square = features.reshape(b * t, grid, grid, e)
    return jax.image.resize(square, (b * t, side, side, e), "bilinear").reshape(b, t, side * side, e)


def share_of(seconds: Float[Array, "b k"], duration: Float[Array, " b"], groups: int) -> Int[Array, "b k"]:
    """Which of `groups` equal shares of the duration a time falls into, 0..groups-1; 0 for an image."""
    relative = seconds / jnp.maximum(duration, 1e-6)[:, None]
    return jnp.clip(jnp.floor(relative * groups), 0, groups - 1).astype(jnp.int32)


class Resampler(nn.Module):
    """Visual, audio and time tokens to media tokens for the language model.

    Parameters: queries [M d] (per_frame: slots [M/t d] and groups [t d]), query_pos [M d], type_embed [3 d],
    layer_i/..., ln_out, out/{kernel,bias}. With resampler "mlp" only out.
    """

    config: AvtsConfig
    width: int  # d: the resampler's own
    out_width: int  # the language model's
    groups: int  # t: frames per video; used by scope "per_frame"

    @nn.compact
    def __call__(
        self, visual: Tokens, audio: Tokens, time: Tokens, duration: Float[Array, " b"]
    ) -> tuple[Float[Array, "b n o"], Bool[Array, "b n"]]:
        """Media tokens and which of them mean anything: a token that could read no picture and no sound is masked.

        Args:
            visual, audio: features behind their perceptrons, [b k d].
            time: tokens of the Temporal Linear Projection, [b k d].
            duration: of the media, seconds.
        """
        c = self.config
        kinds = (visual, audio, time)
        keys = jnp.concatenate([t.features.astype(c.dtype) for t in kinds], axis=1)
        mask = jnp.concatenate([t.mask for t in kinds], axis=1)
        # A masked token's content must not matter, not even through 0 * NaN.
        keys = jnp.where(mask[:, :, None], keys, 0)
        if c.resampler == "mlp":
            return nn.Dense(self.out_width, dtype=c.dtype, name="out")(keys), mask
        keys, keys_pos = self._position(keys, kinds)
        x, x_pos, readable = self._queries(kinds, duration)
        is_media = jnp.concatenate(
            [jnp.broadcast_to(i < 2, t.mask.shape) for i, t in enumerate(kinds)], axis=1
        )
        # Global queries all read the same keys; that is said by the keys alone, which every kernel takes.
        allowed = mask[:, None, :] if readable is None else readable & mask[:, None, :]
        cross_mask = (
            AttentionMask(kv_valid=mask) if readable is None else AttentionMask(dense=allowed[:, None])
        )
        valid = jnp.broadcast_to(jnp.any(allowed & is_media[:, None, :], axis=-1), x.shape[:2])
        if (
            c.time_scope == "inside"
        ):  # The question is not about this group's share of the time: nothing to tell.
            valid &= jnp.any(allowed & ~is_media[:, None, :], axis=-1)
        self_mask = AttentionMask(kv_valid=valid)
        for layer in range(c.num_layers):
            block = ResamplerBlock(c, self.width, name=f"layer_{layer}")
            x = block(x, x_pos, keys, keys_pos, self_mask, cross_mask)
        x = LayerNorm(_LN_EPS, name="ln_out")(x)
        return nn.Dense(self.out_width, dtype=c.dtype, name="out")(x), valid

    def _position(self, keys: jax.Array, kinds: tuple[Tokens, ...]) -> tuple[jax.Array, jax.Array]:
        """Adds the modality's vector to the keys; their positions are seconds plus the place within a moment."""
        codes = []
        for kind in kinds:
            code = seconds_code(kind.seconds, self.width)
            codes.append(code if kind.place is None else code + kind.place[None])
        if self.config.type_embed:
            types = self.param("type_embed", nn.initializers.zeros, (3, self.width))
            which = jnp.concatenate([jnp.full(t.seconds.shape[1], i) for i, t in enumerate(kinds)])
            keys = keys + types[which][None].astype(keys.dtype)
        return keys, jnp.concatenate(codes, axis=1)

    def _queries(
        self, kinds: tuple[Tokens, ...], duration: jax.Array
    ) -> tuple[Float[Array, "b m d"], Float[Array, "b m d"], Bool[Array, "b m k"] | None]:
        """First queries, their positions, and which keys each may read; None: all."""
        c, b = self.config, duration.shape[0]
        init = nn.initializers.truncated_normal(0.02)  # Qwen-VL's resampler.
        learnt_pos = self.param("query_pos", init, (c.num_queries, self.width))[None]
        if c.scope == "global":
            queries = self.param("queries", init, (c.num_queries, self.width))[None]
            x = jnp.broadcast_to(queries, (b, c.num_queries, self.width))
            return x.astype(c.dtype), learnt_pos, None
        slots = c.num_queries // self.groups
        if slots * self.groups != c.num_queries:
            raise ConfigError(
                f"model.avts.num_queries {c.num_queries} must be a multiple of media.num_frames {self.groups} "
                "with model.avts.scope per_frame"
            )
        # A group's queries differ by slot, the groups by one vector each: what a slot learns on one frame serves all.
        slot = self.param("slots", nn.initializers.normal(1.0), (slots, self.width))
        group = self.param("groups", nn.initializers.normal(1.0), (self.groups, self.width))
        x = (group[:, None] + slot[None]).reshape(1, c.num_queries, self.width)
        moments = (jnp.arange(self.groups) + 0.5)[None] / self.groups * duration[:, None]
        pos = jnp.repeat(seconds_code(moments, self.width), slots, axis=1) + learnt_pos
        shares = [share_of(t.seconds, duration, self.groups) for t in kinds[:2]]
        own = (
            jnp.repeat(jnp.arange(self.groups), slots)[None, :, None]
            == jnp.concatenate(shares, axis=1)[:, None, :]
        )
        times = jnp.ones((b, self.groups, kinds[2].seconds.shape[1]), bool)
        if c.time_scope == "inside":
            times = touches(kinds[2].spans, duration, self.groups)
        times = jnp.repeat(times, slots, axis=1)
        x = jnp.broadcast_to(x, (b, c.num_queries, self.width))
        return x.astype(c.dtype), pos, jnp.concatenate([own, times], axis=2)


def pooled_grid(grid: int, pool: str) -> int:
    """Visual tokens per side of a frame after `AvtsConfig.visual_pool`."""
    return {"none": grid, "bilinear2": -(-grid // 2), "frame": 1}[pool]


def pool_patches(features: Float[Array, "b t p e"], grid: int, pool: str) -> Float[Array, "b t q e"]:
    """The patches of each frame after `AvtsConfig.visual_pool`."""
    if pool == "bilinear2":
        return half_grid(features, grid)
    return features.mean(axis=2, keepdims=True) if pool == "frame" else features


def pool_audio(
    features: Float[Array, "b w n r e"],
    mask: Bool[Array, "b w n r"],
    seconds: Float[Array, "b w n"],
    pool: str,
) -> tuple[Float[Array, "b k e"], Bool[Array, "b k"], Float[Array, "b k"]]:
    """Audio tokens after `AvtsConfig.freq_pool`: (features, mask, seconds); only valid tokens enter a mean.

    Args:
        features: w windows of n time steps of r mel rows.
        mask, seconds: which tokens are sound, and when a step is.
        pool: "none", "mean" or "window".
    """
    b, rows = features.shape[0], features.shape[3]
    if pool == "none":
        return (
            features.reshape(b, -1, features.shape[-1]),
            mask.reshape(b, -1),
            jnp.repeat(seconds.reshape(b, -1), rows, axis=1),
        )
    axes = (3,) if pool == "mean" else (2, 3)
    count = jnp.maximum(mask.sum(axis=axes), 1)[..., None].astype(features.dtype)
    pooled = jnp.where(mask[..., None], features, 0).sum(axis=axes) / count
    steps = mask.any(axis=3)
    if pool == "window":
        weight = jnp.maximum(steps.sum(axis=2), 1).astype(seconds.dtype)
        seconds = jnp.where(steps, seconds, 0.0).sum(axis=2) / weight
        steps = steps.any(axis=2)
    return pooled.reshape(b, -1, features.shape[-1]), steps.reshape(b, -1), seconds.reshape(b, -1)


def num_key_tokens(
    config: AvtsConfig, *, frames: int, grid: int, windows: int, steps: int, rows: int, time_tokens: int
) -> tuple[int, int, int]:
    """Visual, audio and time tokens that the resampler reads of one clip.

    Args:
        config: the resampler.
        frames: t; grid: patches per side of a frame; windows: w, of `steps` time steps of `rows` mel rows each;
        time_tokens: of the Temporal Linear Projection.
    """
    per_window = {"none": steps * rows, "mean": steps, "window": 1}[config.freq_pool]
    return frames * pooled_grid(grid, config.visual_pool) ** 2, windows * per_window, time_tokens


def num_media_tokens(config: AvtsConfig, keys: tuple[int, int, int]) -> int:
    """n, the length of the media run in the prompt; `keys`: see `num_key_tokens`."""
    return config.num_queries if config.resampler == "avts" else sum(keys)


def patch_places(grid: int, width: int) -> jax.Array:
    """Codes of the patches of one frame, [grid * grid width]."""
    return jnp.asarray(grid_code(grid, grid, width))


def mel_places(rows: int, width: int) -> jax.Array:
    """Codes of the mel rows of one audio time step, [rows width]."""
    return jnp.asarray(grid_code(rows, 1, width))
