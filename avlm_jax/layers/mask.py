"""What an attention may look at, said in words that every kernel can take its own fast form from."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """A query may look where all that is given here allows it; nothing given: everywhere.

    b rows, t queries, s keys, h heads. A query that may look nowhere gets zeros, and no gradient comes from it.

    Attributes:
        causal: query i looks at keys 0 to i; with `slot`, at keys 0 to slot + i.
        segments: of the queries. A query looks at keys of its own segment only; segment 0 is padding, which sees and is
            seen by none.
        kv_segments: of the keys; None: keys and queries are the same positions (s = t).
        kv_valid: which keys exist.
        slot: where in a cache the first query's own key lies, at least 0; only with `causal`. None means 0, known
            when the program is compiled.
        dense: any other pattern, True where a query may look.
    """

    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    segments: Int[Array, "b t"] | None = None
    kv_segments: Int[Array, "b s"] | None = None
    kv_valid: Bool[Array, "b s"] | None = None
    slot: Int[Array, ""] | None = None
    dense: Bool[Array, "#b #h t s"] | None = None

    def check(self, b: int, t: int, s: int) -> None:
        """Raises ValueError unless the parts fit each other, b rows, t queries and s keys."""
        if self.slot is not None and not self.causal:
            raise ValueError(
                "AttentionMask.slot says where causal queries stand; set causal=True or leave it out"
            )
        if self.kv_segments is not None and self.segments is None:
            raise ValueError("AttentionMask.kv_segments needs segments, those of the queries")
        if self.segments is not None and self.kv_segments is None and t != s:
            raise ValueError(f"AttentionMask.segments of {t} queries need kv_segments for the {s} keys")
        for name, length in (("segments", t), ("kv_segments", s), ("kv_valid", s)):
            part = getattr(self, name)
            if part is not None and part.shape != (b, length):
                raise ValueError(f"AttentionMask.{name} is {list(part.shape)}, expected {[b, length]}")
        if self.dense is not None and (self.dense.ndim != 4 or self.dense.shape[2:] != (t, s)):
            raise ValueError(f"AttentionMask.dense is {list(self.dense.shape)}, expected [b, h, {t}, {s}]")

    def matrix(self, t: int, s: int) -> Bool[Array, "#b #h #t s"] | None:
        """True where a query may look, in the fewest elements that say it; None: everywhere."""
        parts = [] if self.dense is None else [self.dense]
        if self.causal:
            last = jnp.arange(t) if self.slot is None else jnp.arange(t) + self.slot
            parts.append((jnp.arange(s)[None] <= last[:, None])[None, None])
        if self.segments is not None:
            keys = self.segments if self.kv_segments is None else self.kv_segments
            queries = self.segments[:, None, :, None]
            parts.append((queries == keys[:, None, None, :]) & (queries > 0))
        if self.kv_valid is not None:
            parts.append(self.kv_valid[:, None, None, :])
        if not parts:
            return None
        allowed = parts[0]
        for part in parts[1:]:
            allowed = allowed & part
        return allowed

    def sees(self, t: int, s: int) -> Bool[Array, "#b #t #h 1"] | None:
        """Which queries may look anywhere, ready to be broadcast over an output [b t h d]; None: all."""
        if self.dense is None and self.segments is None and self.kv_valid is None:
            return None  # Causal at most, and key 0 is there for every query.
        itself = self.dense is None and self.kv_valid is None and self.slot is None
        if itself and self.kv_segments is None and self.segments is not None:
            return (self.segments > 0)[:, :, None, None]
        return jnp.any(self.matrix(t, s), axis=-1).transpose(0, 2, 1)[..., None]

    def ids(self, b: int, t: int, s: int) -> tuple[Int[Array, "b t"], Int[Array, "b s"]] | None:
        """Segments and key validity as ids alone: a query of an id > 0 may look at keys of the same id. None: no limit."""
        if self.segments is None and self.kv_valid is None:
            return None
        if self.segments is None:
            queries, keys = jnp.ones((b, t), jnp.int32), jnp.ones((b, s), jnp.int32)
        else:
            queries = self.segments
            keys = queries if self.kv_segments is None else self.kv_segments
        if self.kv_valid is not None:
            keys = jnp.where(self.kv_valid, keys, 0)
        return queries.astype(jnp.int32), keys.astype(jnp.int32)


def causal_mask(segment_ids: Int[Array, "b l"]) -> AttentionMask:
    """Each position sees itself and earlier positions of its own segment; padding (segment 0) sees and is seen by none."""
    return AttentionMask(causal=True, segments=segment_ids)
