"""The language model: one decoder for Qwen2 and LLaMA/Vicuna; their differences are config fields."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from avlm_jax.layers.attention import attention
from avlm_jax.layers.mask import AttentionMask
from avlm_jax.layers.rope import rotate
from avlm_jax.llm.remat import BLOCK_INPUT, QKV, check_name, rematerialised
from avlm_jax.lora import LoraConfig, LoraDense
from avlm_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder; the defaults are Qwen2-7B's (Hugging Face config of Qwen2-7B-Instruct).

    Attributes:
        vocab_size: rows of the embedding table, padding rows included.
        head_dim: width of one attention head; null means width / num_heads.
        qkv_bias: Qwen2 has biases on q, k, v (not on o); LLaMA has none.
        tie_embeddings: the output head is the embedding table (Qwen2 0.5B and 1.5B).
        remat: what each block keeps for the backward pass, a name of `avlm_jax.llm.remat`.
        attention_backend: of `avlm_jax.layers.attention.attention`.
        lora: adapters on the block's linear layers; rank 0 = none.

    Raises:
        ValueError: an unknown remat policy.
    """

    vocab_size: int = 152_064
    width: int = 3584
    depth: int = 28
    num_heads: int = 28
    num_kv_heads: int = 4
    head_dim: int | None = None
    mlp_dim: int = 18_944
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    tie_embeddings: bool = False
    dtype: str = "bfloat16"
    remat: str = "full"
    attention_backend: str = "auto"
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        check_name(self.remat)

    @property
    def dim_per_head(self) -> int:
        return self.head_dim or self.width // self.num_heads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers for generation: [L b s hk d]; `index` is the next free slot, the same for all rows."""

    k: Float[Array, "L b s hk d"]
    v: Float[Array, "L b s hk d"]
    index: Int[Array, ""]

    @staticmethod
    def zeros(config: DecoderConfig, batch_size: int, slots: int) -> KVCache:
        shape = (config.depth, batch_size, slots, config.num_kv_heads, config.dim_per_head)
        return KVCache(
            jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype), jnp.zeros((), jnp.int32)
        )


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in fp32 and returned in x's dtype."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions; with a cache it also writes this call's keys and values."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, cache, index, positions, mask):
        c = self.config
        b, t, _ = x.shape

        def project(name: str, heads: int) -> jax.Array:
            y = self._dense(name, heads * c.dim_per_head, c.qkv_bias)(x)
            return y.reshape(b, t, heads, c.dim_per_head)

        q = rotate(project("q", c.num_heads), positions, c.rope_theta)
        k = rotate(project("k", c.num_kv_heads), positions, c.rope_theta)
        v = project("v", c.num_kv_heads)
        if cache is not None:
            k = jax.lax.dynamic_update_slice(cache[0], k.astype(cache[0].dtype), (0, index, 0, 0))
            v = jax.lax.dynamic_update_slice(cache[1], v.astype(cache[1].dtype), (0, index, 0, 0))
            cache = (k, v)
        q, k, v = checkpoint_name((q, k, v), QKV)
        y = attention(q, k, v, mask=mask, backend=c.attention_backend)
        return self._dense("o", c.width, False)(y.reshape(b, t, -1)), cache

    def _dense(self, name: str, features: int, use_bias: bool) -> LoraDense:
        c = self.config
        lora = c.lora if name in c.lora.targets else None
        return LoraDense(features, use_bias, lora, jnp.dtype(c.dtype), name=name)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        c = self.config

        def dense(name: str, features: int) -> LoraDense:
            lora = c.lora if name in c.lora.targets else None
            return LoraDense(features, False, lora, jnp.dtype(c.dtype), name=name)

        return dense("down", c.width)(nn.silu(dense("gate", c.mlp_dim)(x)) * dense("up", c.mlp_dim)(x))


class Block(nn.Module):
    """Pre-norm transformer block in the shape `nn.scan` wants: carry x, scan over this layer's cache."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, cache, index, positions, mask):
        x = checkpoint_name(x, BLOCK_INPUT)
        y, cache = SelfAttention(self.config, name="attn")(
            RMSNorm(self.config.norm_eps, name="norm1")(x), cache, index, positions, mask
        )
        x = x + y
        x = x + GatedMLP(self.config, name="mlp")(RMSNorm(self.config.norm_eps, name="norm2")(x))
        return constrain(x, "batch"), cache


class Decoder(nn.Module):
    """Embeddings in, hidden states out; `embed` and `head_kernel` give the two ends of the vocabulary.

    Parameters: embed/embedding [V d]; layers/... with a leading axis [L]; norm/scale [d]; head/kernel [d V] unless tied.
    Dropout acts exactly when an rng named "dropout" is given.
    """

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param(
            "embed", lambda key: {"embedding": 0.02 * jax.random.normal(key, (c.vocab_size, c.width))}
        )
        self.layers = nn.scan(
            rematerialised(Block, c.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.depth,
        )(c)
        self.norm = RMSNorm(c.norm_eps)
        if not c.tie_embeddings:
            self.head = self.param(
                "head", lambda key: {"kernel": 0.02 * jax.random.normal(key, (c.width, c.vocab_size))}
            )

    def embed(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        """Rows of the embedding table, in the compute dtype; NaN for an id without a row, so that it is noticed."""
        # The table is split along d over fsdp (see `sharding.RULES`), the batch along its rows. Each device looks up its part
        # of d for all rows of its group and then trades parts, which moves the result in place of the table.
        x = jnp.take(self.embedding["embedding"], constrain(tokens, "data"), axis=0).astype(self.config.dtype)
        return constrain(constrain(x, "data", None, "fsdp"), "batch")

    def head_kernel(self) -> Float[Array, "d v"]:
        """The matrix that turns hidden states into logits."""
        return self.embedding["embedding"].T if self.config.tie_embeddings else self.head["kernel"]

    def __call__(
        self,
        embeddings: Float[Array, "b l d"],
        positions: Int[Array, "b l"],
        mask: AttentionMask,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "b l d"], KVCache | None]:
        """Runs all blocks and the final norm.

        Args:
            embeddings: input vectors.
            positions: rotary positions.
            mask: which positions see which keys; without a cache s = l, with one s = the cache's slots.
            cache: where to write this call's keys and values, starting at `cache.index`.

        Returns:
            Normalised hidden states, and the advanced cache (None without one).
        """
        layers = None if cache is None else (cache.k, cache.v)
        index = jnp.zeros((), jnp.int32) if cache is None else cache.index
        x, layers = self.layers(embeddings.astype(self.config.dtype), layers, index, positions, mask)
        if cache is not None:
            cache = KVCache(*layers, index=index + embeddings.shape[1])
        return self.norm(x), cache
