"""Pixels as SigLIP was trained on them: the loader's resize and the encoder's scale against transformers' processor."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from transformers import SiglipImageProcessorPil

from avlm_jax.encoders.siglip import SiglipConfig, SiglipEncoder
from input_pipeline.media import load_media
from input_pipeline.spec import MediaSpec

# Heights and widths: smaller, larger, both at once, extreme aspect ratios, already right.
SIZES = [(1, 1), (2, 3), (17, 999), (999, 17), (360, 640), (383, 385), (384, 384), (224, 224), (1081, 1921)]


def processor(size: int) -> SiglipImageProcessorPil:
    """As the released preprocessor_config.json has it (google/siglip-so400m-patch14-384; base has size 224)."""
    return SiglipImageProcessorPil(
        do_resize=True, size={"height": size, "width": size}, resample=Image.Resampling.BICUBIC,
        do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        do_convert_rgb=True,
    )  # fmt: skip


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise and sharp edges over a slope: what a bicubic kernel overshoots at, and what it smooths."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(0, 255, width)[None, :, None] * np.linspace(0, 1, height)[:, None, None]
    noise = rng.integers(0, 256, (height, width, 3))
    edges = 255 * (np.indices((height, width)).sum(0) // 5 % 2)[..., None]
    thirds = np.indices((height, width))[1] * 3 // max(width, 1)
    return np.choose(thirds[..., None], [slope, noise, edges]).astype(np.uint8)


def ours(path, size: int) -> np.ndarray:
    """uint8 [size size 3] of a picture file, by the loader."""
    (frame,) = load_media(path, MediaSpec(image_size=size)).frames
    return frame


def theirs(path, size: int) -> np.ndarray:
    """f32 [size size 3] in [-1, 1] of the same file."""
    with Image.open(path) as image:
        values = processor(size)(image, return_tensors="np")["pixel_values"]
    return values[0].transpose(1, 2, 0)


def levels(values: np.ndarray) -> np.ndarray:
    """From [-1, 1] back to whole levels of 255."""
    whole = (values * 0.5 + 0.5) * 255
    assert np.abs(whole - np.round(whole)).max() < 1e-3
    return np.round(whole).astype(int)


@pytest.mark.parametrize("size", [384, 224])
@pytest.mark.parametrize("height,width", SIZES)
def test_resize(tmp_path, height, width, size):
    Image.fromarray(picture(height, width)).save(tmp_path / "picture.png")
    difference = np.abs(ours(tmp_path / "picture.png", size) - levels(theirs(tmp_path / "picture.png", size)))
    print(f"{width} x {height} to {size}: off by {difference.max()} of 255 at most")
    assert difference.max() == 0


@pytest.mark.parametrize("mode", ["L", "LA", "P", "P, one colour transparent", "RGBA", "1"])
def test_other_colour_models(tmp_path, mode):
    """Converted to RGB ahead of the resize, with white under what is transparent."""
    image = Image.fromarray(picture(50, 70))
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(picture(50, 70, seed=1)[..., 1]))
    options = {"transparency": 3} if "transparent" in mode else {}
    image.convert(mode.partition(",")[0]).save(tmp_path / "picture.png", **options)
    found, expected = ours(tmp_path / "picture.png", 224), levels(theirs(tmp_path / "picture.png", 224))
    difference = np.abs(found - expected)
    print(f"{mode}: off by {difference.max()} of 255 at most")
    assert difference.max() <= 1


def test_the_encoder_scales_pixels_as_the_processor_does(tmp_path):
    """A tower without layers whose patches are single pixels and whose kernel is the identity shows its input."""
    size = 64
    Image.fromarray(picture(90, 70)).save(tmp_path / "picture.png")
    config = SiglipConfig(
        image_size=size, patch_size=1, width=3, depth=1, mlp_dim=1, num_heads=1, feature_layer=0
    )
    params = {
        "patch_embed": {"kernel": np.eye(3, dtype=np.float32), "bias": np.zeros(3, np.float32)},
        "pos_embed": np.zeros((size * size, 3), np.float32),
    }
    pixels = ours(tmp_path / "picture.png", size)
    found = SiglipEncoder(config).apply({"params": params}, pixels[None])
    expected = theirs(tmp_path / "picture.png", size)
    np.testing.assert_allclose(np.asarray(found[0]).reshape(expected.shape), expected, atol=1e-6)
