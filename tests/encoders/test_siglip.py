import dataclasses
import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avlm_jax.encoders.siglip import SiglipConfig, SiglipEncoder, SiglipPooledModel, patchify

TINY = SiglipConfig(image_size=30, patch_size=8, width=16, depth=3, mlp_dim=24, num_heads=2)


@pytest.fixture(scope="module", autouse=True)
def no_silent_broadcasting():
    with jax.numpy_rank_promotion("raise"):
        yield


@functools.partial(jax.jit, static_argnums=0)
def initial(model, images) -> dict:
    return model.init(jax.random.key(0), images)["params"]


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, images):
    return model.apply({"params": params}, images)


def images(n: int = 2, size: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def shapes_of(model, config: SiglipConfig) -> dict[str, tuple[int, ...]]:
    image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.uint8)
    params = jax.eval_shape(model(config).init, jax.random.key(0), image)["params"]
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items()}


def test_released_size_in_the_abstract():
    config = SiglipConfig()
    image = jax.ShapeDtypeStruct((2, 384, 384, 3), jnp.uint8)
    features, variables = jax.eval_shape(SiglipEncoder(config).init_with_output, jax.random.key(0), image)
    assert features.shape == (2, 729, 1152)
    shapes = shapes_of(SiglipEncoder, config)
    assert shapes["layers/mlp/fc1/kernel"] == (26, 1152, 4304)  # layer 27 of 27 does not exist
    assert shapes["pos_embed"] == (729, 1152) and shapes["patch_embed/kernel"] == (588, 1152)
    # 428,225,600 is the whole released tower with its head; a layer has 15,239,504 parameters.
    whole = sum(int(np.prod(shape)) for shape in shapes_of(SiglipPooledModel, config).values())
    assert whole == 428_225_600
    head_and_last = 15_239_504 + 2 * 1152 + (1152 + 15_239_504 - 2 * 1152)
    assert whole - sum(int(np.prod(shape)) for shape in shapes.values()) == head_and_last


def test_the_pooled_model_contains_the_encoder():
    encoder, pooled = shapes_of(SiglipEncoder, TINY), shapes_of(SiglipPooledModel, TINY)
    assert encoder.keys() < pooled.keys()
    for path, shape in encoder.items():
        stacked = path.startswith("layers/")
        assert pooled[path] == ((3, *shape[1:]) if stacked else shape), path
        assert not stacked or shape[0] == 2


def test_feature_layers_are_prefixes_of_the_tower():
    """Cutting the tower after k layers gives hidden state k, counted from either end."""
    params = initial(SiglipEncoder(dataclasses.replace(TINY, feature_layer=-1)), images())
    seen: list[np.ndarray] = []
    for k, same in ((0, -4), (1, -3), (2, -2), (3, -1)):
        config = dataclasses.replace(TINY, feature_layer=k)
        assert config.feature_depth == dataclasses.replace(TINY, feature_layer=same).feature_depth == k
        kept = {path: value for path, value in params.items() if path != "layers"}
        if k:
            kept["layers"] = jax.tree.map(lambda x: x[:k], params["layers"])  # noqa: B023
        found = np.asarray(apply(SiglipEncoder(config), kept, images()))
        assert all(np.abs(found - lower).max() > 1e-3 for lower in seen)
        seen.append(found)


def test_patches_are_those_of_a_valid_strided_convolution():
    pixels = np.random.default_rng(1).normal(size=(2, 30, 30, 3)).astype(np.float32)
    kernel = np.random.default_rng(2).normal(size=(8, 8, 3, 5)).astype(np.float32)
    expected = jax.lax.conv_general_dilated(
        pixels, kernel, (8, 8), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert expected.shape == (2, 3, 3, 5)
    found = patchify(jnp.asarray(pixels), 8) @ kernel.reshape(-1, 5)
    np.testing.assert_allclose(found, expected.reshape(2, 9, 5), atol=1e-4)


def test_pixels_that_fill_no_patch_do_not_matter():
    model = SiglipEncoder(TINY)
    params = initial(model, images())
    border, inside = images(), images()
    border[:, 24:] = 0
    border[:, :, 24:] = 0
    inside[:, 23, 0] ^= 255
    expected = apply(model, params, images())
    np.testing.assert_array_equal(apply(model, params, border), expected)
    assert np.abs(apply(model, params, inside) - expected).max() > 1e-4


def test_normalisation_maps_bytes_to_plus_minus_one():
    config = dataclasses.replace(TINY, feature_layer=0)
    model = SiglipEncoder(config)
    params = {
        "patch_embed": {"kernel": jnp.full((192, 16), 1 / 192), "bias": jnp.zeros(16)},
        "pos_embed": jnp.zeros((9, 16)),
    }
    for byte, value in ((0, -1.0), (255, 1.0), (51, -0.6)):
        out = apply(model, params, np.full((1, 30, 30, 3), byte, np.uint8))
        np.testing.assert_allclose(out, np.full((1, 9, 16), value), atol=1e-5)


def test_bfloat16_stays_close_to_fp32():
    model = SiglipEncoder(TINY)
    params = initial(model, images())
    exact = apply(model, params, images())
    half = apply(SiglipEncoder(dataclasses.replace(TINY, dtype="bfloat16")), params, images())
    assert half.dtype == jnp.bfloat16
    # bf16 keeps 8 bits; a few roundings in a row cost about 2 % of the scale.
    assert np.abs(np.asarray(half, np.float32) - exact).max() < 0.03 * np.abs(exact).max()


def test_the_probe_sees_every_patch_and_the_head_can_be_trained():
    model = SiglipPooledModel(TINY)
    params = initial(model, images())
    out = apply(model, params, images())
    assert out.shape == (2, 16)
    grads = jax.grad(lambda p: jnp.square(apply(model, p, images())).sum())(params)
    # k's bias shifts all logits of a query alike, so its gradient is zero by construction.
    dead = {
        path
        for path, g in flax.traverse_util.flatten_dict(grads, sep="/").items()
        if float(jnp.abs(g).max()) < 1e-7 and not path.endswith("attn/k/bias")
    }
    assert not dead


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(num_heads=3), "width 16 does not divide by vision.num_heads 3"),
        (dict(patch_size=31), "image_size 30 is smaller"),
        (dict(feature_layer=4), "feature_layer is 4.*0 to 3"),
        (dict(feature_layer=-5), "feature_layer is -5"),
        (dict(depth=0), "vision.depth is 0"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 31, 31, 3\].*30"):
        SiglipEncoder(TINY).init(jax.random.key(0), images(size=31))
