"""Adapters as trees: merged in fp32, retired for a fresh one, and the same function before and after."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from avlm_jax.layers.mask import causal_mask
from avlm_jax.llm.decoder import Decoder, DecoderConfig
from avlm_jax.lora import (
    LoraConfig,
    LoraDense,
    is_lora,
    merge_kernel,
    merge_lora,
    merge_stacked,
    retire,
    retired_updates,
)
from avlm_jax.state import flatten, unflatten

LORA = LoraConfig(rank=3, alpha=12.0, dropout=0.0)
CONFIG = DecoderConfig(
    vocab_size=40, width=16, depth=2, num_heads=4, num_kv_heads=2, mlp_dim=24, dtype="float32", remat="none",
    lora=LORA,
)  # fmt: skip


@pytest.fixture(scope="module")
def params() -> dict:
    """A decoder's, adapters included, none of them zero."""
    decoder, tokens = Decoder(CONFIG), jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), *inputs(decoder, tokens), method=run))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes["params"])


def inputs(decoder: Decoder, tokens: jax.Array) -> tuple:
    return tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), jnp.ones_like(tokens)


def run(decoder: Decoder, tokens: jax.Array, positions: jax.Array, segments: jax.Array) -> jax.Array:
    hidden, _ = decoder(decoder.embed(tokens), positions, causal_mask(segments))
    return hidden @ decoder.head_kernel()


def logits(config: DecoderConfig, params: dict) -> np.ndarray:
    decoder = Decoder(config)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 40, (2, 6)))
    return np.asarray(decoder.apply({"params": params}, *inputs(decoder, tokens), method=run))


def test_merging_changes_the_tree_and_not_the_function(params: dict) -> None:
    merged = merge_lora(params, LORA)
    assert flatten(merged).keys() == {path for path in flatten(params) if not is_lora(path)}
    plain = dataclasses.replace(CONFIG, lora=LoraConfig(rank=0))
    expected = logits(CONFIG, params)
    np.testing.assert_allclose(logits(plain, merged), expected, atol=1e-5 * np.abs(expected).max())
    zeroed = unflatten({path: leaf * (not path.endswith("lora_b")) for path, leaf in flatten(params).items()})
    assert np.abs(logits(CONFIG, zeroed) - expected).max() > 0.1  # The adapters do something.


def test_a_kernel_is_rounded_once() -> None:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(8, 6)).astype(ml_dtypes.bfloat16)
    pairs = [
        (rng.normal(0, 0.1, (8, 2)).astype(np.float32), rng.normal(0, 0.1, (2, 6)).astype(np.float32))
        for _ in range(3)
    ]
    exact = kernel.astype(np.float64) + sum(a.astype(np.float64) @ b.astype(np.float64) for a, b in pairs) * 2
    merged = merge_kernel(kernel, pairs, 2.0)
    assert merged.dtype == kernel.dtype
    np.testing.assert_array_equal(merged, exact.astype(np.float32).astype(ml_dtypes.bfloat16))


def test_stacked_kernels_on_devices_merge_alike() -> None:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4, 8, 6)).astype(ml_dtypes.bfloat16)
    a, b = rng.normal(size=(4, 8, 2)).astype(np.float32), rng.normal(size=(4, 2, 6)).astype(np.float32)
    found = merge_stacked(jnp.asarray(kernel), ((a, b),), scale=0.5, dtype="float32")
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, merge_kernel(kernel, [(a, b)], 0.5).astype(np.float32))


def test_merge_and_attach_a_fresh_one_is_the_identity(params: dict) -> None:
    expected = logits(CONFIG, params)
    fresh = flatten(params) | flatten(merge_lora(params, LORA))
    fresh = {path: np.zeros_like(leaf) if path.endswith("lora_b") else leaf for path, leaf in fresh.items()}
    np.testing.assert_allclose(logits(CONFIG, unflatten(fresh)), expected, atol=1e-5 * np.abs(expected).max())


def test_adapters_of_a_lineage_apply_in_order(params: dict) -> None:
    """Two retired adapters and a current one are the three updates one after the other."""
    rng = np.random.default_rng(2)

    def adapter() -> dict:
        flat = flatten(params)
        return {
            f"llm/{path}": rng.normal(0, 0.2, flat[path].shape).astype(np.float32)
            for path in filter(is_lora, flat)
        }

    first, second, third = adapter(), adapter(), adapter()
    scale = LORA.alpha / LORA.rank
    learnt = retire(unflatten({"connector/bias": np.ones(2, np.float32), **first}), scale)
    assert flatten(learnt).keys() == {"connector/bias"} | {f"merged/0/{path}" for path in first}
    learnt = retire(unflatten(flatten(learnt) | second), 0.5)  # Trained at another rank and alpha.
    flat = flatten(unflatten(flatten(learnt) | third))
    assert {path.split("/")[1] for path in flat if path.startswith("merged/")} == {"0", "1"}
    updates = retired_updates(flat)
    path = "llm/layers/mlp/up/kernel"
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    step = kernel
    for adapter_of, its_scale in ((first, scale), (second, 0.5)):
        pair = (adapter_of["llm/layers/mlp/up/lora_a"], adapter_of["llm/layers/mlp/up/lora_b"])
        step = merge_kernel(step, [pair], its_scale)
    at_once = merge_kernel(kernel, updates[path], 1.0)
    np.testing.assert_allclose(at_once, step, rtol=1e-5, atol=1e-6)


def test_a_learnt_kernel_takes_its_adapter_in_when_that_retires() -> None:
    rng = np.random.default_rng(0)
    kernel, a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 3), (4, 2), (2, 3)))
    learnt = retire(
        unflatten({"q/kernel": kernel, "q/lora_a": a, "q/lora_b": b, "k/lora_a": a, "k/lora_b": b}), 3.0
    )
    flat = flatten(learnt)
    assert flat.keys() == {"q/kernel", "merged/0/k/lora_a", "merged/0/k/lora_b"}
    np.testing.assert_array_equal(flat["q/kernel"], merge_kernel(kernel, [(a, b)], 3.0))
    np.testing.assert_array_equal(flat["merged/0/k/lora_b"], b * np.float32(3))


def test_half_an_adapter_is_refused(params: dict) -> None:
    flat = flatten(params)
    del flat["layers/attn/q/lora_b"]
    with pytest.raises(ValueError, match="layers/attn/q/lora_a has no layers/attn/q/lora_b"):
        merge_lora(unflatten(flat), LORA)
    with pytest.raises(ValueError, match="merged/0: llm/q/kernel"):
        retired_updates({"merged/0/llm/q/lora_a": np.zeros((2, 2))})


def test_a_fresh_adapter_changes_nothing_and_a_is_drawn_as_peft_does() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 400)), jnp.float32)
    layer = LoraDense(5, lora=LoraConfig(rank=64, alpha=128.0))
    params = layer.init(jax.random.key(0), x)["params"]
    np.testing.assert_allclose(layer.apply({"params": params}, x), x @ params["kernel"], rtol=1e-6)
    assert not params["lora_b"].any()
    bound = 400**-0.5  # kaiming_uniform_(a=sqrt(5)): sqrt(6 / ((1 + 5) fan_in))
    assert 0.99 * bound < float(jnp.abs(params["lora_a"]).max()) <= bound
    np.testing.assert_allclose(float(params["lora_a"].std()), bound / 3**0.5, rtol=0.02)


def test_dropout_keeps_the_expectation_and_spares_the_base() -> None:
    x = jnp.ones((1, 200))
    layer = LoraDense(4, lora=LoraConfig(rank=2, alpha=2.0, dropout=0.5))
    params = nn.unbox(layer.init(jax.random.key(0), x)["params"])
    params["lora_b"] = jnp.ones_like(params["lora_b"])
    params["lora_a"] = jnp.ones_like(params["lora_a"]) / 200
    base = np.asarray(x @ params["kernel"])
    draws = np.stack(
        [
            layer.apply({"params": params}, x, rngs={"dropout": jax.random.key(seed)}) - base
            for seed in range(50)
        ]
    )
    assert draws.std() > 0.02
    np.testing.assert_allclose(draws.mean(), 2.0, rtol=0.05)  # two ranks, each one on average
