import dataclasses
import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avlm_jax.encoders.beats import (
    BeatsClassifier,
    BeatsConfig,
    BeatsEncoder,
    relative_buckets,
    token_mask,
)

TINY = BeatsConfig(
    num_mel=32, patch_size=8, embed_dim=12, width=16, depth=2, num_heads=2, mlp_dim=24, conv_pos_kernel=6,
    conv_pos_groups=4, num_buckets=16, max_distance=40,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_silent_broadcasting():
    with jax.numpy_rank_promotion("raise"):
        yield


def fbank(n: int = 2, frames: int = 52, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, frames, 32)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def initial(model, *inputs) -> dict:
    return model.init(jax.random.key(0), *inputs)["params"]


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, *inputs):
    return model.apply({"params": params}, *inputs)


def randomised(model, *inputs) -> dict:
    """Parameters away from the constants that norms, gates and biases start at."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape, np.float32), initial(model, *inputs))


@pytest.mark.parametrize("frames,tokens", [(98, 48), (998, 496), (1024, 512), (2998, 1496)])
def test_released_size_in_the_abstract(frames, tokens):
    config = BeatsConfig()
    assert config.num_tokens(frames) == tokens
    inputs = jax.ShapeDtypeStruct((2, frames, 128), jnp.float32), jax.ShapeDtypeStruct((2, frames), jnp.bool_)
    (features, mask), variables = jax.eval_shape(
        BeatsEncoder(config).init_with_output, jax.random.key(0), *inputs
    )
    assert features.shape == (2, tokens, 768) and mask.shape == (2, tokens)
    shapes = {
        path: leaf.shape
        for path, leaf in flax.traverse_util.flatten_dict(variables["params"], sep="/").items()
    }
    assert shapes["layers/attn/q/kernel"] == (12, 768, 768)
    assert shapes["layers/attn/gate/kernel"] == (12, 64, 8)
    assert shapes["rel_pos/embedding"] == (320, 12) and shapes["patch_embed/kernel"] == (256, 512)
    assert shapes["pos_conv/v"] == (128, 48, 768) and shapes["pos_conv/g"] == (128,)


def test_tokens_are_time_major():
    """A change in one patch, before any token mixing, lands on token 4 * time step + mel row."""
    config = dataclasses.replace(TINY, depth=1, conv_pos_kernel=1)
    model = BeatsEncoder(config)
    x, mask = jnp.asarray(fbank(1, 24)), jnp.ones((1, 24), bool)
    params = initial(model, x, mask)
    # Without attention output, perceptron output and convolution every token depends on its own patch alone.
    for path in (("layers", "attn", "o"), ("layers", "mlp", "fc2")):
        leaf = params[path[0]][path[1]][path[2]]
        params[path[0]][path[1]][path[2]] = jax.tree.map(jnp.zeros_like, leaf)
    params["pos_conv"]["g"] = jnp.zeros_like(params["pos_conv"]["g"])
    before = apply(model, params, x, mask)[0]
    after = apply(model, params, x.at[0, 17, 9].add(1.0), mask)[0]
    changed = np.flatnonzero(np.abs(after - before).max(axis=(0, 2)) > 1e-6)
    assert changed.tolist() == [2 * 4 + 1]


def test_masked_frames_cannot_change_unmasked_tokens():
    """Whatever stands in the padding, even NaN: the boundary column of 8 frames is half valid here."""
    model = BeatsEncoder(TINY)
    valid = jnp.arange(52)[None] < jnp.asarray([[52], [29]])
    clean = jnp.asarray(fbank())
    params = randomised(model, clean, valid)
    features, mask = apply(model, params, clean, valid)
    assert mask.sum(axis=1).tolist() == [24, 16]  # 29 frames reach into the fourth of six columns
    dirty = jnp.where(valid[:, :, None], clean, jnp.nan)
    again, _ = apply(model, params, dirty, valid)
    np.testing.assert_array_equal(again, features)
    gradient = jax.grad(lambda x: apply(model, params, x, valid)[0].sum())(clean)
    assert float(jnp.abs(jnp.where(valid[:, :, None], 0.0, gradient)).max()) == 0.0
    assert float(jnp.abs(gradient[1, 28]).max()) > 0.0


def test_padding_to_a_longer_window_changes_nothing():
    model = BeatsEncoder(TINY)
    short = jnp.asarray(fbank(1, 32))
    params = randomised(model, short, jnp.ones((1, 32), bool))
    expected, _ = apply(model, params, short, jnp.ones((1, 32), bool))
    longer = jnp.concatenate([short, jnp.asarray(fbank(1, 24, seed=9))], axis=1)
    found, mask = apply(model, params, longer, jnp.arange(56)[None] < 32)
    assert mask[0].tolist() == [True] * 16 + [False] * 12
    # Sums over more (masked) keys may be ordered differently.
    np.testing.assert_allclose(found[:, :16], expected, atol=2e-6)
    assert float(jnp.abs(found[:, 16:]).max()) == 0.0


def test_an_entirely_masked_window_is_zero_and_finite_in_gradient():
    model = BeatsEncoder(TINY)
    x, none = jnp.asarray(fbank()), jnp.zeros((2, 52), bool)
    params = randomised(model, x, none)
    features, mask = apply(model, params, x, none)
    assert not mask.any() and float(jnp.abs(features).max()) == 0.0
    some = none.at[0, :16].set(True)
    grads = jax.grad(lambda p: jnp.square(apply(model, p, x, some)[0]).sum())(params)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_the_two_mask_rules():
    mask = jnp.arange(52)[None] < 29
    columns = token_mask(mask, TINY)[0].reshape(6, 4)
    assert columns.all(axis=1).tolist() == [True] * 4 + [False] * 2
    # 52 frames and 24 tokens: the original cuts 48 frames into runs of two; 29 frames fill 15 of them.
    unilm = token_mask(mask, dataclasses.replace(TINY, mask="unilm"))[0]
    assert unilm.tolist() == [True] * 15 + [False] * 9


def test_relative_buckets_by_hand():
    # 16 buckets, 8 a side, 4 of them exact, the other four logarithmic from 4 to 40: borders 7.1, 12.6, 22.5.
    distance = np.array([0, 1, 3, 4, 7, 8, 12, 13, 22, 23, 39, 1000, -1, -3, -8, -1000])
    expected = [0, 9, 11, 12, 12, 13, 13, 14, 14, 15, 15, 15, 1, 3, 5, 7]
    assert relative_buckets(distance, 16, 40).tolist() == expected


def test_position_bias_reaches_the_output_through_the_gate():
    model = BeatsEncoder(TINY)
    x, mask = jnp.asarray(fbank()), jnp.ones((2, 52), bool)
    params = randomised(model, x, mask)
    grads = jax.grad(lambda p: jnp.square(apply(model, p, x, mask)[0][:, 5]).sum())(params)
    flat = flax.traverse_util.flatten_dict(grads, sep="/")
    # k's bias shifts all logits of a query alike, so its gradient is zero by construction.
    dead = {p for p, g in flat.items() if float(jnp.abs(g).max()) < 1e-7 and not p.endswith("attn/k/bias")}
    assert not dead
    ungated = dataclasses.replace(TINY, gru_gate=False)
    kept = {p: v for p, v in flax.traverse_util.flatten_dict(params, sep="/").items() if "gate" not in p}
    kept = flax.traverse_util.unflatten_dict(kept, sep="/")
    other = apply(BeatsEncoder(ungated), kept, x, mask)[0]
    assert float(jnp.abs(other - apply(model, params, x, mask)[0]).max()) > 1e-3


def test_weight_norm_makes_the_length_of_v_irrelevant():
    model = BeatsEncoder(TINY)
    x, mask = jnp.asarray(fbank()), jnp.ones((2, 52), bool)
    params = initial(model, x, mask)
    v = params["pos_conv"]["v"]
    np.testing.assert_allclose(params["pos_conv"]["g"], np.sqrt((np.asarray(v) ** 2).sum((1, 2))), rtol=1e-6)
    expected = apply(model, params, x, mask)[0]
    params["pos_conv"] = {**params["pos_conv"], "v": 3.0 * v}
    np.testing.assert_allclose(apply(model, params, x, mask)[0], expected, atol=1e-5)


def test_deep_norm_constants():
    assert BeatsConfig().residual_scale == pytest.approx(2.2134, abs=1e-4)
    assert BeatsConfig().init_gain == pytest.approx(0.3195, abs=1e-4)
    plain = BeatsConfig(deep_norm=False)
    assert plain.residual_scale == plain.init_gain == 1.0


def test_classifier_averages_over_valid_tokens_only():
    model = BeatsClassifier(TINY, num_classes=5)
    valid = jnp.arange(52)[None] < jnp.asarray([[52], [29]])
    x = jnp.asarray(fbank())
    params = randomised(model, x, valid)
    encoder = {name: value for name, value in params.items() if name != "predictor"}
    features, mask = apply(BeatsEncoder(TINY), encoder, x, valid)
    logits = np.asarray(features) @ np.asarray(params["predictor"]["kernel"]) + np.asarray(
        params["predictor"]["bias"]
    ).reshape(1, 1, -1)
    expected = [row[keep].mean(axis=0) for row, keep in zip(logits, np.asarray(mask), strict=True)]
    found = apply(model, params, x, valid)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    silent = apply(model, params, x, jnp.zeros_like(valid))
    assert float(jnp.abs(silent).max()) == 0.0


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(width=18, num_heads=4), "audio.width 18 does not divide by audio.num_heads 4"),
        (dict(num_mel=33), "audio.num_mel 33 does not divide by audio.patch_size 8"),
        (dict(num_buckets=18), "multiple of 4"),
        (dict(max_distance=4), "max_distance 4 must exceed"),
        (dict(mask="none"), "'time_patch' or 'unilm'"),
        (dict(conv_pos_groups=0), "conv_pos_groups is 0"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_too_little_audio_and_other_filterbanks_are_refused():
    with pytest.raises(ValueError, match="15 filterbank frames; one patch needs 16"):
        BeatsEncoder(BeatsConfig()).init(jax.random.key(0), jnp.zeros((1, 15, 128)), jnp.ones((1, 15), bool))
    with pytest.raises(ValueError, match="64 mel bins"):
        BeatsEncoder(TINY).init(jax.random.key(0), jnp.zeros((1, 16, 64)), jnp.ones((1, 16), bool))
