"""One attention function for every module of the project, and the kernels it chooses from.

    reference  plain XLA, any device, any mask
    cudnn      fused kernel of NVIDIA GPUs (avlm_jax/layers/cudnn.py)
    splash     fused Pallas kernel of TPUs (avlm_jax/layers/splash.py)
    auto       splash where the mesh in context (or, without one, JAX's default backend) is of TPUs, cudnn where it is of
               GPUs, reference elsewhere and wherever that kernel cannot take the call, which is logged once

All give what the reference gives, up to rounding. What a kernel cannot take is refused if it was asked for by name.
"""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avlm_jax.layers import cudnn, splash
from avlm_jax.layers.mask import AttentionMask

MASKED = -1e30  # A finite "minus infinity": a row with every key masked stays finite instead of becoming NaN.
BACKENDS = ("auto", "reference", "cudnn", "splash")
# A decoding step reads every key once and is bound by that; a kernel's block of 128 queries would be padding.
MIN_QUERIES = 16

logger = logging.getLogger(__name__)


def attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s hk d"],
    v: Float[Array, "b s hk d"],
    *,
    mask: AttentionMask | None = None,
    bias: Float[Array, "#b #h t s"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Array, "b t h d"]:
    """Scaled dot-product attention with grouped key/value heads; logits and softmax in fp32.

    Args:
        q: queries; h is a multiple of hk, and query head j reads key/value head j // (h // hk).
        k, v: keys and values.
        mask: where a query may look. A query that may look nowhere gets zeros, not an average.
        bias: added to the scaled logits.
        scale: multiplies the logits; default 1/sqrt(d).
        backend: one of `BACKENDS`.

    Raises:
        ValueError: unknown backend, h is no multiple of hk, the mask does not fit, or the backend cannot take the call.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    b, t, h, d = q.shape
    s, hk = k.shape[1:3]
    if h % hk:
        raise ValueError(f"{h} query heads cannot share {hk} key/value heads evenly")
    mask = mask or AttentionMask()
    mask.check(b, t, s)
    scale = d**-0.5 if scale is None else scale
    chosen = _choose(q, k, mask, bias) if backend == "auto" else backend
    if chosen == "reference":
        return reference(q, k, v, mask, bias, scale)
    if backend != "auto" and (reason := _refusal(chosen, q, k, mask, bias)):
        raise ValueError(f"attention backend {chosen!r} cannot take {reason}")
    if chosen == "cudnn":
        return cudnn.cudnn_attention(q, k, v, mask, bias, scale)
    return splash.splash_attention(q, k, v, mask, scale)


def platform() -> str:
    """What the traced program will run on: "tpu", "gpu" or "cpu" of the mesh in context, else JAX's default."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name == "cuda" else name


def _choose(q: jax.Array, k: jax.Array, mask: AttentionMask, bias: jax.Array | None) -> str:
    kernel = {"tpu": "splash", "gpu": "cudnn"}.get(platform())
    if kernel is None or q.shape[1] < MIN_QUERIES:
        return "reference"
    if reason := _refusal(kernel, q, k, mask, bias):
        _log_once(f"attention {list(q.shape)} x {list(k.shape)}: reference, as {kernel} cannot take {reason}")
        return "reference"
    return kernel


def _refusal(
    kernel: str, q: jax.Array, k: jax.Array, mask: AttentionMask, bias: jax.Array | None
) -> str | None:
    module = {"splash": splash, "cudnn": cudnn}[kernel]
    return module.refusal(platform(), q, k, mask, bias)


@functools.cache
def _log_once(message: str) -> None:
    logger.warning(message)


def reference(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s hk d"],
    v: Float[Array, "b s hk d"],
    mask: AttentionMask,
    bias: Float[Array, "#b #h t s"] | None,
    scale: float,
) -> Float[Array, "b t h d"]:
    """`attention` in plain XLA; the logits of all heads exist whole, [b h t s] in fp32."""
    b, t, h, d = q.shape
    s, hk = k.shape[1:3]
    # Heads become a leading batch axis and the queries of one group one tall matrix: XLA's CPU backend runs this
    # about 1.3 times as fast as a five-dimensional einsum, other backends do not mind.
    grouped = q.reshape(b, t, hk, h // hk, d).transpose(0, 2, 3, 1, 4).reshape(b * hk, (h // hk) * t, d)
    keys = k.transpose(0, 2, 3, 1).reshape(b * hk, d, s)
    values = v.transpose(0, 2, 1, 3).reshape(b * hk, s, d)
    logits = jnp.matmul(grouped, keys, preferred_element_type=jnp.float32).reshape(b, h, t, s) * scale
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    allowed = mask.matrix(t, s)
    if allowed is not None:
        logits = logits + jnp.where(allowed, 0.0, MASKED)
    weights = jax.nn.softmax(logits, axis=-1)
    if allowed is not None:
        weights = weights * jnp.any(allowed, axis=-1, keepdims=True)
    weights = weights.reshape(b * hk, (h // hk) * t, s).astype(v.dtype)
    out = jnp.matmul(weights, values).reshape(b, hk, h // hk, t, d)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, h, d)
