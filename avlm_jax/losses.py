"""Next-token cross-entropy whose logits never exist whole.

At 8,192 tokens and Qwen2's 152,064 vocabulary rows the fp32 logits alone are 4.6 GiB. Here a scan walks along
the sequence, and each chunk's logits are recomputed in the backward pass instead of stored.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from avlm_jax.sharding import constrain


def masked_cross_entropy(
    hidden: Float[Array, "b l d"],
    head: Float[Array, "d v"],
    targets: Int[Array, "b l"],
    mask: Bool[Array, "b l"],
    *,
    chunk: int,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Summed negative log-likelihood of the target tokens.

    The shift is done here: mask[:, j] True says that token j is to be predicted, and it is predicted from the
    hidden state of position j - 1. mask[:, 0] counts for nothing, as nothing precedes it. In a packed row the
    first token of a segment must not be a target (its predecessor is another sample's last token); the loader
    sees to that.

    The chunks run along the sequence and keep the batch axis whole, so that a batch sharded over devices
    stays so.

    Args:
        hidden: the decoder's last (normalised) states.
        head: output embedding; multiplied in `hidden`'s dtype, with sums and all that follows in fp32.
        targets: the tokens themselves, not shifted.
        mask: which tokens are targets.
        chunk: positions per row whose logits exist at a time; peak memory is about b * chunk * v * 8 bytes.

    Returns:
        (sum of losses in nats, number of targets, number of targets that are the arg max), all f32 [].

    Raises:
        ValueError: chunk is below 1, or shapes disagree.
    """
    b, length, d = hidden.shape
    if chunk < 1:
        raise ValueError(f"loss chunk is {chunk}; it must be at least 1 position")
    if targets.shape != (b, length) or mask.shape != (b, length) or head.shape[0] != d:
        raise ValueError(
            f"shapes do not agree: hidden {hidden.shape}, head {head.shape}, targets {targets.shape}, "
            f"mask {mask.shape}"
        )
    # Shifting the integers is cheaper than shifting the states: position p answers for token p + 1.
    chunk = min(chunk, length)
    chunks = -(-length // chunk)
    padding = chunks * chunk - length
    targets = jnp.pad(targets[:, 1:], ((0, 0), (0, padding + 1)))
    mask = jnp.pad(mask[:, 1:], ((0, 0), (0, padding + 1)))
    # Media placeholders may lie beyond the head's rows; no gather may see them.
    targets = jnp.where(mask, targets, 0)
    hidden = jnp.pad(constrain(hidden, "batch"), ((0, 0), (0, padding), (0, 0)))
    head = constrain(head.astype(hidden.dtype), None, "tensor")  # Fetched once and not by every chunk.

    # prevent_cse is only needed outside of scan; within it would only block fusion.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk_sums(hidden: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array) -> tuple:
        logits = jnp.einsum("bcd,dv->bcv", hidden, head, preferred_element_type=jnp.float32)
        logits = constrain(logits, "batch", None, "tensor")
        log_normaliser = jax.nn.logsumexp(logits, axis=-1)
        target_logits = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
        losses = jnp.where(mask, log_normaliser - target_logits, 0.0)
        correct = mask & (jnp.argmax(logits, axis=-1) == targets)
        return losses.sum(), mask.sum(dtype=jnp.float32), correct.sum(dtype=jnp.float32)

    def body(sums: tuple, inputs: tuple) -> tuple[tuple, None]:
        hidden, targets, mask = inputs
        return jax.tree.map(jnp.add, sums, chunk_sums(hidden, head, targets, mask)), None

    def by_chunk(x: jax.Array) -> jax.Array:
        return constrain(jnp.moveaxis(x.reshape(b, chunks, chunk, *x.shape[2:]), 1, 0), None, "batch")

    zero = jnp.zeros((), jnp.float32)
    sums, _ = jax.lax.scan(body, (zero, zero, zero), (by_chunk(hidden), by_chunk(targets), by_chunk(mask)))
    return sums
