"""Frozen encoders in micro-batches: the same features, nothing of a backward pass, less memory."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avlm_jax.encoders import frozen
from avlm_jax.encoders.frozen import encode_frozen
from avlm_jax.encoders.siglip import SiglipConfig, SiglipEncoder

CONFIG = SiglipConfig(image_size=32, patch_size=4, width=32, depth=2, mlp_dim=256, num_heads=2)
ROWS, FRAMES = 2, 12


class Tower(nn.Module):
    """An encoder with one trained number behind it."""

    chunk: int

    @nn.compact
    def __call__(self, frames: jax.Array) -> jax.Array:
        encoder = SiglipEncoder(CONFIG, name="vision")
        features = encode_frozen(self, frames, encode=lambda _, flat: encoder(flat), chunk=self.chunk)
        return features * self.param("gain", nn.initializers.ones, (1, 1, 1, 1))


FRAMES_SHAPE = jax.ShapeDtypeStruct((ROWS, FRAMES, CONFIG.image_size, CONFIG.image_size, 3), jnp.uint8)


@functools.cache
def inputs() -> tuple[dict, jax.Array]:
    rng = np.random.default_rng(0)
    params = jax.eval_shape(Tower(0).init, jax.random.key(0), FRAMES_SHAPE)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype), params)
    return params, jnp.asarray(rng.integers(0, 256, FRAMES_SHAPE.shape, dtype=np.uint8))


def loss(params: dict, frames: jax.Array, chunk: int) -> jax.Array:
    features = Tower(chunk).apply({"params": params}, frames)
    return jnp.sum(features * jnp.cos(jnp.arange(features.size, dtype=jnp.float32)).reshape(features.shape))


def test_features_do_not_depend_on_the_chunk() -> None:
    params, frames = inputs()

    def features(chunk: int) -> np.ndarray:
        return np.asarray(jax.jit(Tower(chunk).apply)({"params": params}, frames))

    whole = features(0)
    assert whole.shape == (ROWS, FRAMES, CONFIG.num_patches, CONFIG.width)
    # 5 divides 12 frames with two left. fp32; matrix products of other sizes may sum in another order.
    np.testing.assert_allclose(features(5), whole, atol=1e-5)
    np.testing.assert_array_equal(features(FRAMES + 1), whole)


@pytest.mark.parametrize("chunk", [0, 4])
def test_there_is_no_backward_pass(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where someone asks for the gradient of everything: it is zero, and no matrix product is made for it."""
    params, frames = inputs()

    def products(function) -> int:
        return str(jax.make_jaxpr(functools.partial(function, chunk=chunk))(params, frames)).count(
            "dot_general"
        )

    forward = products(loss)
    assert forward >= 6 and products(jax.grad(loss)) == forward
    monkeypatch.setattr(frozen, "stop_gradient", lambda features: features)
    assert (
        products(jax.grad(loss)) >= 3 * forward - 2
    )  # So many it would have: one by input and one by weight.


def test_gradients_stop_at_the_features() -> None:
    gradients = jax.jit(jax.grad(functools.partial(loss, chunk=4)))(*inputs())
    assert np.abs(gradients["gain"]).max() > 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients["vision"]))


def test_memory_falls_with_the_chunk() -> None:
    params, frames = inputs()

    def temporary(chunk: int) -> int:
        step = jax.jit(jax.grad(functools.partial(loss, chunk=chunk)))
        return step.lower(params, frames).compile().memory_analysis().temp_size_in_bytes

    perceptron = (
        ROWS * FRAMES * CONFIG.num_patches * CONFIG.mlp_dim * 4
    )  # Its hidden layer, the widest activation.
    output = ROWS * FRAMES * CONFIG.num_patches * CONFIG.width * 4
    whole, chunked = temporary(0), temporary(2)
    assert whole > perceptron
    assert chunked < whole / 3 + 3 * output  # A sixth of the activations; input and output are there whole.
