"""Temporal Linear Projection and the resampler: formulas, masks, scopes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avlm_jax.connectors.avts import AvtsConfig, PositionedAttention, Resampler, Tokens, half_grid, share_of
from avlm_jax.connectors.time import TemporalLinearProjection, TimeConfig, time_tokens
from avlm_jax.layers.mask import AttentionMask

B, FRAMES, PATCHES, STEPS, WIDTH = 2, 4, 9, 8, 16


def tokens(key: int, count: int, seconds, mask=None) -> Tokens:
    features = jax.random.normal(jax.random.key(key), (B, count, WIDTH))
    mask = jnp.ones((B, count), bool) if mask is None else mask
    return Tokens(features, jnp.broadcast_to(jnp.asarray(seconds, jnp.float32), (B, count)), mask)


@pytest.fixture()
def kinds():
    visual = tokens(1, FRAMES * PATCHES, np.repeat(np.arange(FRAMES) + 0.5, PATCHES))
    audio = tokens(2, STEPS, np.arange(STEPS) * 0.5 + 0.25)
    time = tokens(3, 2, [0.0, 4.0])
    return visual, audio, time, jnp.full((B,), 4.0)


def resampler(**changes) -> Resampler:
    config = AvtsConfig(num_queries=8, d_model=WIDTH, num_heads=4, dtype="float32", **changes)
    return Resampler(config, WIDTH, 24, FRAMES)


@pytest.mark.parametrize("scope", ["global", "per_frame"])
def test_masked_keys_cannot_change_the_output(kinds, scope):
    visual, audio, time, duration = kinds
    model = resampler(scope=scope)
    audio = dataclasses.replace(audio, mask=jnp.zeros((B, STEPS), bool))
    params = model.init(jax.random.key(0), visual, audio, time, duration)
    out, mask = model.apply(params, visual, audio, time, duration)
    loud = dataclasses.replace(audio, features=jnp.full_like(audio.features, jnp.nan))
    again, _ = model.apply(params, visual, loud, time, duration)
    assert out.shape == (B, 8, 24) and bool(mask.all())
    np.testing.assert_array_equal(out, again)

    grads = jax.grad(
        lambda f: model.apply(params, visual, dataclasses.replace(audio, features=f), time, duration)[0].sum()
    )
    assert not np.asarray(grads(audio.features)).any()


def test_without_media_every_token_is_masked(kinds):
    visual, audio, time, duration = kinds
    none = [dataclasses.replace(t, mask=jnp.zeros_like(t.mask)) for t in (visual, audio)]
    model = resampler()
    params = model.init(jax.random.key(0), *none, time, duration)
    out, mask = model.apply(params, *none, time, duration)
    assert not bool(mask.any()) and bool(jnp.isfinite(out).all())


def test_per_frame_groups_read_their_own_moment_only(kinds):
    visual, audio, time, duration = kinds
    model = resampler(scope="per_frame", num_layers=1)
    params = model.init(jax.random.key(0), visual, audio, time, duration)

    def group(index: int, visual: Tokens, audio: Tokens):
        _, state = model.apply(params, visual, audio, time, duration, mutable=["intermediates"])
        weights = state["intermediates"]["layer_0"]["cross"]["weights"][0]
        return np.asarray(weights[0, 2 * index : 2 * index + 2])

    weights = group(1, visual, audio)
    readable = np.zeros(FRAMES * PATCHES + STEPS + 2, bool)
    readable[PATCHES : 2 * PATCHES] = True  # Frame 1,
    readable[FRAMES * PATCHES + 2 : FRAMES * PATCHES + 4] = True  # the sound of its quarter (1 s to 2 s),
    readable[-2:] = True  # and all times.
    assert (weights[:, readable] > 0).all() and (weights[:, ~readable] == 0).all()
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)


def test_plain_attention_is_the_papers_equation():
    config = AvtsConfig(d_model=WIDTH, num_heads=4, attention="plain", dtype="float32")
    q = jax.random.normal(jax.random.key(0), (1, 3, WIDTH))
    x = jax.random.normal(jax.random.key(1), (1, 5, WIDTH))
    zero = jnp.zeros((1, 1, WIDTH))
    module = PositionedAttention(config, WIDTH)
    out = module.apply({}, q, zero, x, zero, AttentionMask())
    scores = np.asarray(q[0] @ x[0].T, np.float64)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ np.asarray(x[0], np.float64)
    np.testing.assert_allclose(out[0], expected, atol=1e-5)


def test_positions_enter_keys_but_not_values(kinds):
    """Two keys with the same features at different times: attention may tell them apart, what is read is the same."""
    config = AvtsConfig(d_model=WIDTH, num_heads=4, dtype="float32")
    module = PositionedAttention(config, WIDTH)
    x = jax.random.normal(jax.random.key(0), (1, 2, WIDTH))
    keys = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (1, 1, WIDTH)), (1, 6, WIDTH))
    pos = jax.random.normal(jax.random.key(2), (1, 6, WIDTH))
    mask = AttentionMask()
    params = module.init(jax.random.key(3), x, jnp.zeros((1, 2, WIDTH)), keys, pos, mask)
    out = module.apply(params, x, jnp.zeros((1, 2, WIDTH)), keys, pos, mask)
    other = module.apply(params, x, jnp.zeros((1, 2, WIDTH)), keys, -3 * pos, mask)
    np.testing.assert_allclose(out, other, atol=1e-5)


def test_mlp_ablation_passes_every_token_on(kinds):
    visual, audio, time, duration = kinds
    model = resampler(resampler="mlp")
    params = model.init(jax.random.key(0), visual, audio, time, duration)
    out, mask = model.apply(params, visual, audio, time, duration)
    assert out.shape == (B, FRAMES * PATCHES + STEPS + 2, 24) and bool(mask.all())


def test_time_projection_is_linear_in_its_features():
    """h(t) = W f(t) + b with the 129 values of the default f, computed here with numpy."""
    model = TemporalLinearProjection(TimeConfig(), 8)
    seconds, duration = jnp.asarray([[0.0, 12.5, 3661.25]]), jnp.asarray([7322.5])
    params = model.init(jax.random.key(0), seconds, duration)["params"]
    assert params["kernel"].shape == (129, 8)
    t = np.asarray(seconds, np.float64)[0]
    angles = 2 * np.pi * t[:, None] / np.geomspace(1.0, 7200.0, 64)[None]
    features = np.concatenate([t[:, None] / 7322.5, np.sin(angles), np.cos(angles)], axis=1)
    expected = features @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"])
    # fp32 sine of 2 pi * 3661 keeps about four digits at the one-second period.
    np.testing.assert_allclose(model.apply({"params": params}, seconds, duration)[0], expected, atol=2e-3)


@pytest.mark.parametrize(("source", "count"), [("query", 4), ("frames", 3), ("both", 7)])
def test_time_tokens_come_from_the_question_or_the_frames(source, count):
    batch = {
        "intervals": jnp.asarray([[[1.0, 2.0], [5.0, 5.0]]]),
        "interval_mask": jnp.asarray([[True, False]]),
        "frame_times": jnp.asarray([[0.5, 1.5, 2.5]]),
        "frame_mask": jnp.asarray([[True, True, False]]),
    }
    seconds, spans, mask = time_tokens(batch, source)
    assert seconds.shape == mask.shape == (1, count) and spans.shape == (1, count, 2)
    if source != "frames":
        np.testing.assert_array_equal(seconds[0, :4], [1.0, 2.0, 5.0, 5.0])
        np.testing.assert_array_equal(mask[0, :4], [True, True, False, False])
        np.testing.assert_array_equal(spans[0, :4], [[1, 2], [1, 2], [5, 5], [5, 5]])


def test_groups_outside_an_interval_do_not_read_its_time(kinds):
    visual, audio, time, duration = kinds
    span = jnp.broadcast_to(jnp.asarray([1.2, 2.9]), (B, 2, 2))
    time = dataclasses.replace(time, spans=span)
    model = resampler(scope="per_frame", time_scope="inside", num_layers=1)
    params = model.init(jax.random.key(0), visual, audio, time, duration)
    _, state = model.apply(params, visual, audio, time, duration, mutable=["intermediates"])
    weights = np.asarray(state["intermediates"]["layer_0"]["cross"]["weights"][0])[0, :, -2:]
    reads = (weights > 0).all(axis=-1).reshape(FRAMES, 2)
    np.testing.assert_array_equal(reads, [[False] * 2, [True] * 2, [True] * 2, [False] * 2])
    with pytest.raises(ValueError, match="per_frame"):
        AvtsConfig(scope="global", time_scope="inside")


def test_half_grid_and_shares():
    grid = jnp.arange(27 * 27, dtype=jnp.float32).reshape(1, 1, 27 * 27, 1)
    assert half_grid(grid, 27).shape == (1, 1, 196, 1)
    ramp = jnp.broadcast_to(jnp.arange(4.0)[None, :], (4, 4)).reshape(1, 1, 16, 1)
    # Antialiased bilinear halving of a ramp keeps its mean and its order.
    halved = half_grid(ramp, 4).reshape(2, 2)
    np.testing.assert_allclose(halved.mean(), 1.5, atol=1e-6)
    assert (halved[:, 0] < halved[:, 1]).all()
    shares = share_of(jnp.asarray([[0.0, 0.9, 1.0, 3.99, 4.0]]), jnp.asarray([4.0]), 4)
    np.testing.assert_array_equal(shares, [[0, 0, 1, 3, 3]])
    np.testing.assert_array_equal(share_of(jnp.zeros((1, 3)), jnp.zeros((1,)), 4), [[0, 0, 0]])
