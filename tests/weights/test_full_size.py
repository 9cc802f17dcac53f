"""The published sizes, by shape alone: every parameter is counted, and decoder and table expect the same ones.

tests/parity/test_full_size.py finds the same numbers in the peers' own models.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest

from avlm_jax.encoders.beats import BeatsConfig
from avlm_jax.encoders.siglip import SiglipConfig
from avlm_jax.layers.mask import causal_mask
from avlm_jax.llm.decoder import Decoder
from avlm_jax.weights import beats, qwen2, siglip
from avlm_jax.weights.table import flatten
from tests.weights.published import BEATS, LANGUAGE, SIGLIP, decoder_config


def shapes(tree) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}


def count(tree) -> int:
    return sum(math.prod(shape) for shape in shapes(tree).values())


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models(name):
    config, total = LANGUAGE[name]
    expected = qwen2.expected_params(config)
    assert count(expected) == total
    decoder = Decoder(decoder_config(config))
    embeddings, positions = jnp.zeros((1, 2, config["hidden_size"])), jnp.zeros((1, 2), jnp.int32)
    made = jax.eval_shape(decoder.init, jax.random.key(0), embeddings, positions, causal_mask(positions + 1))
    assert shapes(made["params"]) == shapes(expected)


@pytest.mark.parametrize("name", SIGLIP)
def test_siglip(name):
    """The whole tower; the encoder is what remains of it below the selected feature."""
    sizes, total, tokens = SIGLIP[name]
    config = SiglipConfig(**sizes)
    whole = siglip.expected_params(config, pooled=True)
    assert count(whole) == total
    assert config.num_patches == tokens
    encoder = shapes(siglip.expected_params(config))
    cut = {
        path: shape for path, shape in shapes(whole).items() if path.split("/")[0] not in ("head", "post_ln")
    }
    assert encoder == {
        path: (config.depth - 1, *shape[1:]) if path.startswith("layers/") else shape
        for path, shape in cut.items()
    }


@pytest.mark.parametrize("num_classes", BEATS)
def test_beats(num_classes):
    assert count(beats.expected_params(BeatsConfig(), num_classes)) == BEATS[num_classes]
