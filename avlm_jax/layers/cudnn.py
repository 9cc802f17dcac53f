"""Attention by cuDNN's fused kernel for NVIDIA GPUs, through `jax.nn.dot_product_attention`.

A boolean mask costs the kernel a bias [b 1 t s] (and, in its backward pass, that bias's gradient); causality and one length
per row cost nothing. Rows that are right-padded, which is all rows unless they are packed or lack media, take the second
form: which one it is is decided from the mask's content when the step runs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from avlm_jax.layers.mask import AttentionMask

IMPLEMENTATION = "cudnn"  # Of `jax.nn.dot_product_attention`.
MAX_HEAD_DIM = (
    128  # Of every supported GPU; Hopper could take 256 (jax/_src/cudnn/fused_attention_stablehlo.py).
)


def refusal(
    platform: str, q: jax.Array, k: jax.Array, mask: AttentionMask, bias: jax.Array | None
) -> str | None:
    """What of this call the kernel cannot take, and what to do; None: it can take it."""
    if platform != "gpu":
        return f"platform {platform!r}: it is a kernel of NVIDIA GPUs; use backend 'auto' or 'reference'"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or k.dtype != q.dtype:
        return f"queries of {q.dtype} with keys of {k.dtype} (bfloat16 or float16 alike only); set dtype to bfloat16"
    if q.shape[3] > MAX_HEAD_DIM or q.shape[3] % 8:
        return (
            f"head dimension {q.shape[3]} (multiples of 8 up to {MAX_HEAD_DIM} only); use backend 'reference'"
        )
    return None


def cudnn_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s hk d"],
    v: Float[Array, "b s hk d"],
    mask: AttentionMask,
    bias: Float[Array, "#b #h t s"] | None,
    scale: float,
) -> Float[Array, "b t h d"]:
    """See `avlm_jax.layers.attention.attention`; for calls that `refusal` has nothing against.

    A bias is rounded to q's dtype.
    """
    t, s = q.shape[1], k.shape[1]
    sees = mask.sees(t, s)
    if mask.causal and mask.slot is None and mask.dense is None and bias is None and t < s:
        # No query sees the keys behind the last one; with as many keys as queries no kernel can place its triangle
        # otherwise than we do.
        k, v, mask, s = k[:, :t], v[:, :t], _first_keys(mask, t), t
    run = functools.partial(jax.nn.dot_product_attention, scale=scale, implementation=IMPLEMENTATION)
    masked = functools.partial(_masked, run, mask=mask, bias=bias)
    if bias is not None or mask.dense is not None or mask.slot is not None or (mask.causal and t != s):
        out = masked(q, k, v)
    elif (ids := mask.ids(q.shape[0], t, s)) is None:
        out = run(q, k, v, is_causal=mask.causal)
    else:
        lengths, padded = right_padded(*ids)
        plain = functools.partial(_right_padded, run, lengths=lengths, causal=mask.causal)
        out = jax.lax.cond(padded, plain, masked, q, k, v)
    return out if sees is None else jnp.where(sees, out, 0)


def right_padded(
    queries: Int[Array, "b t"], keys: Int[Array, "b s"]
) -> tuple[Int[Array, " b"], Bool[Array, ""]]:
    """(keys per row, whether these say it all): ids of keys are ones, then zeros, and no query has another id than 0 or 1."""
    lengths = jnp.sum(keys > 0, axis=1, dtype=jnp.int32)
    expected = (jnp.arange(keys.shape[1])[None] < lengths[:, None]).astype(keys.dtype)
    return lengths, jnp.all(keys == expected) & jnp.all(queries <= 1)


def _first_keys(mask: AttentionMask, t: int) -> AttentionMask:
    """The mask of the first t keys."""
    return AttentionMask(
        causal=mask.causal,
        segments=mask.segments,
        kv_segments=None if mask.kv_segments is None else mask.kv_segments[:, :t],
        kv_valid=None if mask.kv_valid is None else mask.kv_valid[:, :t],
    )


def _right_padded(run, q, k, v, *, lengths: jax.Array, causal: bool) -> jax.Array:
    # The kernel does not promise what it leaves in the gradient of keys beyond a row's length; `where` makes them zeros.
    # A row without any key reads its first one instead, and its output is dropped by the caller.
    exists = (jnp.arange(k.shape[1])[None] < lengths[:, None])[:, :, None, None]
    k, v = jnp.where(exists, k, 0), jnp.where(exists, v, 0)
    return run(q, k, v, is_causal=causal, key_value_seq_lengths=jnp.maximum(lengths, 1))


def _masked(run, q, k, v, *, mask: AttentionMask, bias: jax.Array | None) -> jax.Array:
    t, s = q.shape[1], k.shape[1]
    allowed = mask.matrix(t, s)
    if allowed is not None:
        allowed = jnp.broadcast_to(allowed, (*allowed.shape[:2], t, s))
    if bias is not None:
        bias = bias.astype(q.dtype)
    # With a bias cuDNN trains on even lengths only. One query is a decoding step, which nobody trains.
    odd_t, odd_s = (t % 2, s % 2) if t > 1 else (0, 0)
    if odd_t or odd_s:
        if allowed is None:
            allowed = jnp.ones((1, 1, t, s), bool)
        q = jnp.pad(q, ((0, 0), (0, odd_t), (0, 0), (0, 0)))
        k, v = (jnp.pad(x, ((0, 0), (0, odd_s), (0, 0), (0, 0))) for x in (k, v))
        allowed = jnp.pad(allowed, ((0, 0), (0, 0), (0, odd_t), (0, odd_s)))
        if bias is not None:
            bias = jnp.pad(bias, ((0, 0), (0, 0), (0, odd_t), (0, odd_s)))
    return run(q, k, v, bias=bias, mask=allowed)[:, :t]
