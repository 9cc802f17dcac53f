"""The decoder's behaviour: what a position can see, padding, the cache, adapters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avlm_jax.layers import dropout
from avlm_jax.layers.dropout import keep_mask
from avlm_jax.layers.mask import AttentionMask, causal_mask
from avlm_jax.llm.decoder import Decoder, DecoderConfig, KVCache
from avlm_jax.lora import LoraConfig

CONFIG = DecoderConfig(
    vocab_size=50,
    width=32,
    depth=2,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=48,
    tie_embeddings=False,
    dtype="float32",
    remat="none",
    lora=LoraConfig(rank=4, alpha=8.0, dropout=0.0),
)
LENGTH = 10


def run(model: Decoder, embeddings, segment_ids):
    positions = jnp.broadcast_to(jnp.arange(embeddings.shape[1])[None], embeddings.shape[:2])
    hidden, _ = model(embeddings, positions, causal_mask(segment_ids))
    return hidden @ model.head_kernel()


@pytest.fixture(scope="module")
def decoder():
    model = Decoder(CONFIG)
    x = jax.random.normal(jax.random.key(1), (2, LENGTH, CONFIG.width))
    params = model.init(jax.random.key(0), x, jnp.ones((2, LENGTH), jnp.int32), method=run)["params"]
    # A fresh adapter is zero and would hide mistakes; give B values.
    params = jax.tree_util.tree_map_with_path(
        lambda path, v: v + 0.1 if path[-1].key == "lora_b" else v, params
    )
    return model, params, x


def test_causality_by_gradient(decoder):
    """The logits at position p depend on every input up to p and on none after it."""
    model, params, x = decoder
    ones = jnp.ones((2, LENGTH), jnp.int32)

    @jax.jit
    def sensitivity(position):
        def at(x):
            return jnp.sum(run(model.bind({"params": params}), x, ones)[0, position] ** 2)

        return jnp.abs(jax.grad(at)(x)).sum(axis=-1)

    for position in (0, 4, LENGTH - 1):
        reach = np.asarray(sensitivity(position))
        assert (reach[0, : position + 1] > 0).all()
        assert (reach[0, position + 1 :] == 0).all()
        assert (reach[1] == 0).all()  # Rows of a batch do not meet.


def test_padding_and_packing_cannot_be_seen(decoder):
    model, params, x = decoder
    bound = model.bind({"params": params})
    segments = jnp.asarray([[1] * 6 + [0] * 4, [1] * 4 + [2] * 6])
    base = run(bound, x, segments)
    changed = run(bound, x.at[0, 6:].set(7.0).at[1, :4].set(-3.0), segments)
    np.testing.assert_array_equal(base[0, :6], changed[0, :6])
    np.testing.assert_array_equal(base[1, 4:], changed[1, 4:])
    assert not np.allclose(base[1, :4], changed[1, :4])
    # The first segment of a packed row is what it is alone.
    alone = run(bound, x[1:, :4], segments[1:, :4])
    np.testing.assert_allclose(base[1, :4], alone[0], atol=1e-5)


@pytest.mark.parametrize("chunks", [(10,), (4, 1, 1, 1, 1, 1, 1), (3, 7)])
def test_cached_equals_uncached(decoder, chunks):
    model, params, x = decoder
    bound = model.bind({"params": params})
    full = run(bound, x, jnp.ones((2, LENGTH), jnp.int32))
    cache = KVCache.zeros(CONFIG, 2, LENGTH + 3)
    outputs, begin = [], 0
    for size in chunks:
        positions = jnp.broadcast_to(jnp.arange(begin, begin + size)[None], (2, size))
        mask = AttentionMask(causal=True, slot=cache.index)
        hidden, cache = bound(x[:, begin : begin + size], positions, mask, cache)
        outputs.append(hidden @ bound.head_kernel())
        begin += size
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), full, atol=2e-5)
    assert int(cache.index) == LENGTH


def test_fresh_adapter_changes_nothing_and_dropout_needs_a_key(decoder):
    model, params, x = decoder
    ones = jnp.ones((2, LENGTH), jnp.int32)
    zeroed = jax.tree_util.tree_map_with_path(
        lambda path, v: jnp.zeros_like(v) if path[-1].key == "lora_b" else v, params
    )
    bare = Decoder(DecoderConfig(**{**CONFIG.__dict__, "lora": LoraConfig(rank=0)}))
    names = ("lora_a", "lora_b")

    def strip(tree):
        return {k: strip(v) if isinstance(v, dict) else v for k, v in tree.items() if k not in names}

    expected = run(bare.bind({"params": strip(zeroed)}), x, ones)
    np.testing.assert_array_equal(run(model.bind({"params": zeroed}), x, ones), expected)
    assert not np.allclose(run(model.bind({"params": params}), x, ones), expected)

    dropping = Decoder(
        DecoderConfig(**{**CONFIG.__dict__, "lora": LoraConfig(rank=4, alpha=8.0, dropout=0.5)})
    )
    still = dropping.apply({"params": params}, x, ones, method=run)
    np.testing.assert_array_equal(still, model.apply({"params": params}, x, ones, method=run))
    dropped = dropping.apply({"params": params}, x, ones, method=run, rngs={"dropout": jax.random.key(3)})
    assert not np.allclose(still, dropped)


def test_every_projection_of_every_layer_has_a_dropout_mask_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scan splits the rng by layer, and each module folds its path in."""
    words: list[tuple[int, ...]] = []

    def spy(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
        jax.debug.callback(lambda data: words.append(tuple(data.tolist())), jax.random.key_data(key))
        return keep_mask(key, rate, shape)

    monkeypatch.setattr(dropout, "keep_mask", spy)
    lora = LoraConfig(rank=4, alpha=8.0, dropout=0.5)
    model = Decoder(DecoderConfig(**{**CONFIG.__dict__, "depth": 3, "lora": lora}))
    x, ones = jnp.ones((1, LENGTH, CONFIG.width)), jnp.ones((1, LENGTH), jnp.int32)
    params = model.init(jax.random.key(0), x, ones, method=run)["params"]
    model.apply({"params": params}, x, ones, method=run, rngs={"dropout": jax.random.key(1)})
    jax.effects_barrier()
    assert len(words) == len(set(words)) == 3 * len(lora.targets)


@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_a_dropout_that_is_none_is_an_error(rate: float) -> None:
    with pytest.raises(ValueError, match="lora.dropout is"):
        LoraConfig(dropout=rate)
