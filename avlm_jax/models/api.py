"""The one interface between the loop and a system: a system turns a batch into media tokens, all else is shared.

A system is a Linen module with two submodules or methods: `media_tokens(batch) -> MediaTokens` and the attribute `llm`, a
`Decoder`. Splicing, decoding, the loss, prefill and extension of a cache are the functions below, the same for every system.
Each system's file offers `build(config) -> System` and is named by `config.system`.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8
from ml_collections import ConfigDict

from avlm_jax.config import ConfigError
from avlm_jax.flops import Segment
from avlm_jax.layers.mask import AttentionMask, causal_mask
from avlm_jax.llm.decoder import Decoder, KVCache
from avlm_jax.losses import masked_cross_entropy
from avlm_jax.sharding import constrain

SYSTEMS = ("savenvideo",)


class MediaTokens(NamedTuple):
    """What the language model gets in place of the media placeholders; masked tokens are seen by nobody."""

    embeddings: Float[Array, "c n d"]
    mask: Bool[Array, "c n"]

    def by_row(self, rows: int) -> MediaTokens:
        """Those of a row's clips end to end, [b k*n d]: row r has the clips r k .. r k + k - 1 (see `Batch`)."""
        _, _, width = self.embeddings.shape
        return MediaTokens(self.embeddings.reshape(rows, -1, width), self.mask.reshape(rows, -1))


class EncoderSpec(NamedTuple):
    """A frozen encoder whose output may be cached.

    Attributes:
        part: its subtree of the parameters, and its section of config.init.
        shape: (tokens, width) of its features of one frame or one window.
        config: its frozen dataclass.
    """

    part: str
    shape: tuple[int, int]
    config: Any


class System(nn.Module):
    """Base of all systems: subclasses define `llm` and `media_tokens` in `setup`-style Linen.

    A system whose encoders' features may be cached (`avlm cache-features`) also defines `encoders`, `encode_frames` and
    `encode_audio`, and takes batches with frame_features in place of frames, audio_features in place of audio.

    Attributes:
        media_token_id: the reserved id that stands once per media token in `batch["tokens"]`; it needs no row in the
            language model's table.
    """

    media_token_id: int

    @property
    def encoders(self) -> dict[str, EncoderSpec]:
        """The encoder of each modality, "video" and "audio"."""
        raise NotImplementedError(f"{type(self).__name__} has no encoders whose features may be cached")

    def encode_frames(self, frames: UInt8[Array, "n h w 3"]) -> Float[Array, "n p d"]:
        """Features of pictures as `media_tokens` takes them, each independent of the others."""
        raise NotImplementedError(f"{type(self).__name__} must encode pictures")

    def encode_audio(
        self, audio: Float[Array, "n s"], spans: Float[Array, "n 2"], mask: Bool[Array, " n"]
    ) -> Float[Array, "n k d"]:
        """Features of audio windows as `media_tokens` takes them, each independent of the others.

        Args:
            audio: 16 kHz in [-1, 1]; what lies beyond a window's span is padding.
            spans: start and end of the sound in seconds.
            mask: False for a window that is none.
        """
        raise NotImplementedError(f"{type(self).__name__} must encode audio windows")

    @property
    def heads(self) -> dict[str, int]:
        """Attention heads that tensor parallelism divides among devices (see `sharding.RULES`), by their config keys."""
        raise NotImplementedError(f"{type(self).__name__} must say which heads tensor parallelism divides")

    def media_work(self, clips: int, *, video: str, audio: str) -> list[Segment]:
        """What `media_tokens` of so many clips multiplies, in its order; see `flops.step_flops` for the arguments."""
        raise NotImplementedError(f"{type(self).__name__} must tell what its media cost")

    def media_tokens(self, batch: dict[str, Array]) -> MediaTokens:
        raise NotImplementedError(f"{type(self).__name__} must turn a batch into media tokens")

    def spliced(self, batch: dict[str, Array]) -> tuple[Float[Array, "b l d"], Int[Array, "b l"]]:
        """Input embeddings with the media in place, and segment ids in which masked media are padding."""
        llm: Decoder = self.llm
        tokens = batch["tokens"]
        media = self.media_tokens(batch).by_row(tokens.shape[0])
        # The placeholder's row, which splice would overwrite, may not exist.
        text = jnp.where(tokens == self.media_token_id, 0, tokens)
        return splice(llm.embed(text), tokens, batch["segment_ids"], media, self.media_token_id)

    def loss_sums(self, batch: dict[str, Array], chunk: int) -> tuple[Array, Array, Array]:
        """(summed loss, number of targets, number predicted right) over `batch["loss_mask"]`, fp32 scalars."""
        embeddings, segment_ids = self.spliced(batch)
        hidden, _ = self.llm(embeddings, batch["positions"], causal_mask(segment_ids))
        return masked_cross_entropy(
            hidden, self.llm.head_kernel(), batch["tokens"], batch["loss_mask"], chunk=chunk
        )

    def logits(self, batch: dict[str, Array]) -> Float[Array, "b l v"]:
        """Full fp32 logits; for tests and short inputs, training never builds them whole."""
        embeddings, segment_ids = self.spliced(batch)
        hidden, _ = self.llm(embeddings, batch["positions"], causal_mask(segment_ids))
        return hidden.astype(jnp.float32) @ self.llm.head_kernel().astype(jnp.float32)

    def prefill(
        self, batch: dict[str, Array], slots: int
    ) -> tuple[Float[Array, "b v"], KVCache, Bool[Array, "b s"]]:
        """Reads the prompts of a batch into a fresh cache of `slots` positions.

        Returns:
            fp32 logits after each row's last prompt token, the cache, and which of its slots hold a real token.
        """
        llm: Decoder = self.llm
        embeddings, segment_ids = self.spliced(batch)
        b, length = batch["tokens"].shape
        keys = jnp.pad(segment_ids, ((0, 0), (0, slots - length)))
        mask = AttentionMask(causal=True, segments=segment_ids, kv_segments=keys)
        cache = KVCache.zeros(llm.config, b, slots)
        hidden, cache = llm(embeddings, batch["positions"], mask, cache)
        last = jnp.sum(batch["segment_ids"] > 0, axis=1) - 1  # Rows are right-padded.
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return self._head(hidden), cache, keys > 0

    def extend(
        self, tokens: Int[Array, " b"], positions: Int[Array, " b"], cache: KVCache, seen: Bool[Array, "b s"]
    ) -> tuple[Float[Array, "b v"], KVCache, Bool[Array, "b s"]]:
        """One more token per row: fp32 logits for the next one, the advanced cache and its filled slots."""
        llm: Decoder = self.llm
        seen = seen | (jnp.arange(seen.shape[1]) == cache.index)[None]
        hidden, cache = llm(
            llm.embed(tokens[:, None]), positions[:, None], AttentionMask(kv_valid=seen), cache
        )
        return self._head(hidden[:, 0]), cache, seen

    def _head(self, hidden: Float[Array, "b d"]) -> Float[Array, "b v"]:
        return hidden.astype(jnp.float32) @ self.llm.head_kernel().astype(jnp.float32)


def splice(
    embeddings: Float[Array, "b l d"],
    tokens: Int[Array, "b l"],
    segment_ids: Int[Array, "b l"],
    media: MediaTokens,
    media_token_id: int,
) -> tuple[Float[Array, "b l d"], Int[Array, "b l"]]:
    """Writes the i-th media token over the i-th placeholder of its row.

    Masked media tokens become padding (segment 0), so that no other position can look at them. The loader guarantees
    either no placeholder or exactly n per segment, and that segment j has the row's clip j; slots without a clip
    come last.
    """
    here = tokens == media_token_id
    index = jnp.clip(jnp.cumsum(here, axis=1) - 1, 0, media.embeddings.shape[1] - 1)
    spliced = jnp.take_along_axis(media.embeddings.astype(embeddings.dtype), index[:, :, None], axis=1)
    valid = jnp.take_along_axis(media.mask, index, axis=1)
    # where, not a product: a masked token's content cannot leak even if it is not finite.
    keep = here & valid
    embeddings = jnp.where(keep[:, :, None], spliced, jnp.where(here[:, :, None], 0, embeddings))
    return constrain(embeddings, "batch"), jnp.where(here & ~valid, 0, segment_ids)


def build_system(config: ConfigDict, media_token_id: int) -> System:
    """The system that `config.system` names.

    Raises:
        ConfigError: unknown system.
    """
    if config.system not in SYSTEMS:
        raise ConfigError(f"config.system is {config.system!r}; known systems: {', '.join(SYSTEMS)}")
    module = importlib.import_module(f"avlm_jax.models.{config.system}")
    return module.build(config, media_token_id)


def init_params(system: System, batch: dict[str, jax.Array], seed: int) -> dict:
    """All parameters of a system, freshly drawn; under `jax.eval_shape` their shapes for free."""

    def touch(module: System, batch: dict[str, jax.Array]) -> jax.Array:
        return module.loss_sums(batch, chunk=64)[0]

    return system.init(jax.random.key(seed), batch, method=touch)["params"]


def smallest_batch(system: System) -> dict[str, jax.Array]:
    """One row of zeros, just long enough for its media: what drawing parameters needs of a batch."""
    shapes = system.spec.batch_shapes(1, system.num_media_tokens + 8)
    return {key: jnp.zeros(shape, dtype) for key, (shape, dtype) in shapes.items()}


def abstract_params(system: System) -> dict:
    """Shape and dtype of every parameter as it is drawn; nothing is computed."""
    return jax.eval_shape(lambda: init_params(system, smallest_batch(system), 0))
