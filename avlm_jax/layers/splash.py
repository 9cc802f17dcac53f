"""Attention by JAX's Pallas "splash" kernel for TPUs (jax/experimental/pallas/ops/tpu/splash_attention).

The kernel takes one row, causality known at compile time, and equality of segment ids. All else is brought into that form:
key validity as ids, lengths that no block divides by padding of id 0, a cache as in `_from_cache`.
"""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from avlm_jax.layers.mask import AttentionMask

RESIDUALS = (
    "attention"  # Name of what the kernel keeps for its backward pass: its output and the log of its sums.
)
LANES = 128  # Blocks are multiples of a vector register's lanes.
BLOCKS = (
    512,
    384,
    256,
    LANES,
)  # A tile of 512 x 512 fp32 logits takes 1 MiB of a core's 16 MiB of scoped vmem (v5e).
MAX_PADDING = 1.15  # Smaller blocks cost more than padding up to this.
MAX_HEAD_DIM = 256

logger = logging.getLogger(__name__)


def refusal(
    platform: str, q: jax.Array, k: jax.Array, mask: AttentionMask, bias: jax.Array | None
) -> str | None:
    """What of this call the kernel cannot take, and what to do; None: it can take it."""
    if platform != "tpu":
        return f"platform {platform!r}: it is a TPU kernel; use backend 'auto' or 'reference'"
    if bias is not None:
        return "a bias; use backend 'reference'"
    if mask.dense is not None:
        return "a dense boolean mask; say it as causality, segment ids or key validity, or use backend 'reference'"
    if q.shape[3] > MAX_HEAD_DIM or q.shape[3] % 8:
        return (
            f"head dimension {q.shape[3]} (multiples of 8 up to {MAX_HEAD_DIM} only); use backend 'reference'"
        )
    if q.dtype not in (jnp.bfloat16, jnp.float32) or k.dtype != q.dtype:
        return f"queries of {q.dtype} with keys of {k.dtype} (bfloat16 or float32 alike only); convert them first"
    if jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1:
        return "arrays of unknown sharding on several devices; call it under `jax.set_mesh(mesh)`"
    return None


def splash_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s hk d"],
    v: Float[Array, "b s hk d"],
    mask: AttentionMask,
    scale: float,
    *,
    interpret: bool = False,
) -> Float[Array, "b t h d"]:
    """See `avlm_jax.layers.attention.attention`; for calls that `refusal` has nothing against.

    Under a mesh each device works on its rows (data, fsdp) and heads (tensor); an axis that does not divide them repeats
    the work on all of its devices, which is logged. The scale goes into the queries, which rounds bf16 ones once more.

    Args:
        q, k, v, mask, scale: as there.
        interpret: run the kernel's program in plain XLA, slowly, on any device: for tests.
    """
    b, t, h, _ = q.shape
    s, hk = k.shape[1:3]
    sees, ids, kind = mask.sees(t, s), mask.ids(b, t, s), "causal" if mask.causal else "full"
    if mask.slot is not None:
        k, v, ids = _from_cache(k, v, ids, mask.slot, t)
        kind = "cache"
    run = functools.partial(_on_one_device, kind=kind, scale=scale, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:  # Within a shard_map the arrays are one device's already.
        out = run(q, k, v, ids)
    else:
        rows = _dividing(mesh, ("data", "fsdp"), b, "rows")
        heads = _dividing(mesh, ("tensor",), hk, "key/value heads")
        wide, long = PartitionSpec(rows, None, heads), PartitionSpec(rows)
        sharded = jax.shard_map(
            run,
            in_specs=(wide, wide, wide, None if ids is None else (long, long)),
            out_specs=wide,
            check_vma=False,  # pallas_call says nothing about how its outputs vary over the mesh.
        )
        out = sharded(q, k, v, ids)
    return out if sees is None else jnp.where(sees, out, 0)


def _dividing(
    mesh: jax.sharding.AbstractMesh, names: tuple[str, ...], size: int, what: str
) -> tuple[str, ...] | None:
    """Those of `names` that the mesh has, or None if their devices do not divide `size` evenly."""
    present = tuple(name for name in names if name in mesh.shape)
    devices = int(np.prod([mesh.shape[name] for name in present], dtype=int))
    if size % devices:
        logger.warning(
            "splash attention: %d %s over %d devices of %s; each does all", size, what, devices, present
        )
        return None
    return present or None


def _from_cache(
    k: jax.Array, v: jax.Array, ids: tuple[jax.Array, jax.Array] | None, slot: jax.Array, t: int
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """Keys so that a mask known at compile time does: the t new ones first (causal), then all (those before `slot`)."""
    b, s = k.shape[:2]
    queries, keys = (jnp.ones((b, t), jnp.int32), jnp.ones((b, s), jnp.int32)) if ids is None else ids

    def with_new(x: jax.Array, old: jax.Array) -> jax.Array:
        # Padded, as dynamic_slice would move a slice that runs over the end.
        padded = jnp.pad(x, [(0, 0), (0, t)] + [(0, 0)] * (x.ndim - 2))
        return jnp.concatenate([jax.lax.dynamic_slice_in_dim(padded, slot, t, axis=1), old], axis=1)

    before = jnp.where((jnp.arange(s) < slot)[None], keys, 0)
    return with_new(k, k), with_new(v, v), (queries, with_new(keys, before))


def _block(length: int) -> tuple[int, int]:
    """(block, padded length): the largest block that does not pad by more than MAX_PADDING."""
    for block in BLOCKS:
        padded = -(-length // block) * block
        if padded <= MAX_PADDING * length or block == LANES:
            return block, padded
    raise AssertionError("the last block is always taken")


def _on_one_device(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s hk d"],
    v: Float[Array, "b s hk d"],
    ids: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None,
    *,
    kind: str,
    scale: float,
    interpret: bool,
) -> Float[Array, "b t h d"]:
    b, t, h, _ = q.shape
    s = k.shape[1]
    (block_q, queries), (block_kv, keys) = _block(t), _block(s)
    if ids is None and (queries, keys) != (t, s):
        ids = jnp.ones((b, t), jnp.int32), jnp.ones((b, s), jnp.int32)
    if ids is not None:
        ids = kernels.SegmentIds(
            jnp.pad(ids[0], ((0, 0), (0, queries - t))), jnp.pad(ids[1], ((0, 0), (0, keys - s)))
        )

    def by_head(x: jax.Array, length: int) -> jax.Array:
        return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, length - x.shape[1]), (0, 0)))

    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([_static_mask(kind, t, queries, keys)] * h),
        block_sizes=kernels.BlockSizes(
            block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv,
            block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=block_kv,
            block_q_dq=block_q, block_kv_dq=block_kv,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )  # fmt: skip
    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    out = jax.vmap(kernel)(by_head(scaled, queries), by_head(k, keys), by_head(v, keys), ids)
    return out[:, :, :t].transpose(0, 2, 1, 3)


def _static_mask(kind: str, t: int, queries: int, keys: int) -> masks.Mask:
    """Of padded lengths; padding is kept away by ids."""
    if kind == "causal":
        return masks.CausalMask((queries, keys))
    if kind == "full":
        return masks.FullMask((queries, keys))
    allowed = np.ones((queries, keys), bool)
    allowed[:t, :t] = np.tril(np.ones((t, t), bool))
    return masks.NumpyMask(allowed)
