"""SigLIP against transformers with random weights, in fp32, through the files that transformers writes."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax.numpy as jnp  # noqa: E402

from avlm_jax.encoders.siglip import SiglipEncoder, SiglipPooledModel  # noqa: E402
from avlm_jax.weights.siglip import load_siglip, save_siglip  # noqa: E402
from tests.parity.peers import assert_same_state, randomise, relative_error  # noqa: E402

pytestmark = pytest.mark.parity

# fp32 on both sides; sums are ordered differently, which costs about 1e-6 of the scale per layer.
TOLERANCE = 1e-5

TINY = dict(
    hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
    image_size=30, patch_size=8,
)  # fmt: skip


def images_of(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (2, size, size, 3), dtype=np.uint8)


def pixel_values(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(((images.astype(np.float32) / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("feature_layer", [-1, -2, 0])
def test_hidden_states_of_a_vision_model(tmp_path, feature_layer):
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TINY)).eval()
    randomise(model, seed=1)
    model.save_pretrained(tmp_path)
    images = images_of(30)
    with torch.no_grad():
        expected = model(pixel_values(images), output_hidden_states=True).hidden_states[feature_layer]
    config, params, report = load_siglip(tmp_path, feature_layer=feature_layer)
    found = SiglipEncoder(config).apply({"params": params}, images)
    error = relative_error(found, expected)
    print(f"SigLIP tiny, hidden state {feature_layer}: {error:.1e} of the scale; {report.count} tensors")
    assert error < TOLERANCE


# Sizes of the released towers; images are small, and 62 pixels leave 6 that fill no patch, as 384 do for 14.
WIDTHS = {
    "so400m/14": dict(
        hidden_size=1152, intermediate_size=4304, num_attention_heads=16, patch_size=14, image_size=62
    ),
    "base/16": dict(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, patch_size=16, image_size=64
    ),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_one_layer_at_the_released_width(tmp_path, name):
    """The feature below the last of two layers, and the head above both."""
    sizes = WIDTHS[name]
    config = transformers.SiglipVisionConfig(num_hidden_layers=2, **sizes)
    model = transformers.SiglipVisionModel(config).eval()
    randomise(model, seed=2)
    model.save_pretrained(tmp_path)
    images = images_of(sizes["image_size"])
    with torch.no_grad():
        output = model(pixel_values(images), output_hidden_states=True)
    config, params, _ = load_siglip(tmp_path)
    found = SiglipEncoder(config).apply({"params": params}, images)
    error = relative_error(found, output.hidden_states[-2])
    print(f"SigLIP {name}, one layer: {error:.1e} of the scale")
    assert error < TOLERANCE
    config, params, _ = load_siglip(tmp_path, pooled=True)
    pooled = relative_error(SiglipPooledModel(config).apply({"params": params}, images), output.pooler_output)
    print(f"SigLIP {name}, two layers and the head: {pooled:.1e} of the scale")
    assert pooled < TOLERANCE


def test_pooled_model_out_of_a_whole_siglip(tmp_path):
    text = TINY | dict(num_hidden_layers=1, vocab_size=50)
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=TINY)).eval()
    randomise(model, seed=3)
    model.save_pretrained(tmp_path)
    images = images_of(30)
    with torch.no_grad():
        expected = model.vision_model(pixel_values(images)).pooler_output
    config, params, report = load_siglip(tmp_path, pooled=True)
    found = SiglipPooledModel(config).apply({"params": params}, jnp.asarray(images))
    error = relative_error(found, expected)
    print(f"SigLIP tiny, pooled: {error:.1e} of the scale")
    assert error < TOLERANCE
    assert set(report.ignored) == {"text tower and contrastive loss"}


def test_transformers_reads_what_we_write(tmp_path):
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TINY)).eval()
    randomise(model, seed=4)
    model.save_pretrained(tmp_path / "theirs")
    config, params, _ = load_siglip(tmp_path / "theirs", pooled=True)
    save_siglip(tmp_path / "ours", config, params)
    again, info = transformers.SiglipVisionModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_state(again, model)
