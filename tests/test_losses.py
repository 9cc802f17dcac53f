"""The chunked cross-entropy against the plain formula, in value and gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avlm_jax.losses import masked_cross_entropy

B, L, D, V = 2, 11, 8, 37


def inputs(seed: int = 0, dtype: jnp.dtype = jnp.float32) -> tuple:
    generator = np.random.default_rng(seed)
    hidden = jnp.asarray(generator.normal(size=(B, L, D)), dtype)
    head = jnp.asarray(generator.normal(size=(D, V)), dtype)
    targets = jnp.asarray(generator.integers(0, V, (B, L)), jnp.int32)
    mask = jnp.asarray(generator.random((B, L)) < 0.5)
    return hidden, head, targets, mask


def full(hidden: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    log_probabilities = jax.nn.log_softmax(jnp.einsum("bld,dv->blv", hidden, head)[:, :-1])
    picked = jnp.take_along_axis(log_probabilities, targets[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(mask[:, 1:], picked, 0.0))


@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
def test_equals_full_cross_entropy_and_its_gradient(chunk: int) -> None:
    hidden, head, targets, mask = inputs()

    def chunked(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return masked_cross_entropy(hidden, head, targets, mask, chunk=chunk)[0]

    value, gradients = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(hidden, head)
    expected, expected_gradients = jax.value_and_grad(full, argnums=(0, 1))(hidden, head, targets, mask)
    # fp32; only the order of the sums differs.
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_counts_and_correct_answers() -> None:
    hidden, head, targets, mask = inputs()
    best = jnp.argmax(jnp.einsum("bld,dv->blv", hidden, head), axis=-1)
    targets = targets.at[:, 1:6].set(best[:, :5])  # token j is what position j - 1 predicts
    mask = jnp.zeros_like(mask).at[:, 0].set(True).at[:, 1:8].set(True)
    _, count, correct = masked_cross_entropy(hidden, head, targets, mask, chunk=4)
    right = int(jnp.sum(best[:, :7] == targets[:, 1:8]))
    assert (int(count), int(correct)) == (B * 7, right) and B * 5 <= right < B * 7


def test_a_target_is_predicted_from_the_position_before_it() -> None:
    hidden, head, targets, mask = inputs()
    mask = jnp.zeros_like(mask).at[0, 5].set(True)
    gradient = jax.grad(lambda h: masked_cross_entropy(h, head, targets, mask, chunk=3)[0])(hidden)
    touched = np.argwhere(np.abs(gradient).sum(axis=-1) > 0)
    np.testing.assert_array_equal(touched, [[0, 4]])


def test_untargeted_tokens_do_not_matter_even_outside_the_vocabulary() -> None:
    hidden, head, targets, mask = inputs()
    wild = jnp.where(mask, targets, V + 1000)
    loss = lambda h, t: masked_cross_entropy(h, head, t, mask, chunk=4)[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(hidden, targets)
    wild_value, wild_gradient = jax.value_and_grad(loss)(hidden, wild)
    assert value == wild_value
    np.testing.assert_array_equal(gradient, wild_gradient)


def test_bf16_states_give_fp32_sums() -> None:
    hidden, head, targets, mask = inputs(dtype=jnp.bfloat16)
    value, _, _ = masked_cross_entropy(hidden, head, targets, mask, chunk=4)
    assert value.dtype == jnp.float32
    exact = full(hidden.astype(jnp.float32), head.astype(jnp.float32), targets, mask)
    # The products of bf16 numbers are exact in fp32, so only the order of the sums differs.
    np.testing.assert_allclose(value, exact, rtol=1e-5)


def test_whole_logits_never_exist() -> None:
    hidden, head, targets, mask = inputs()
    loss = lambda h, w: masked_cross_entropy(h, w, targets, mask, chunk=2)[0]  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, head))
    assert f"f32[{B},2,{V}]" in text
    chunks = -(-L // 2)
    for shape in (f"[{B},{L},{V}]", f"[{chunks},{B},2,{V}]", f"[{B},{2 * chunks},{V}]"):
        assert shape not in text


def test_shapes_that_disagree_are_refused() -> None:
    hidden, head, targets, mask = inputs()
    with pytest.raises(ValueError, match="targets"):
        masked_cross_entropy(hidden, head, targets[:, 1:], mask, chunk=4)
    with pytest.raises(ValueError, match="chunk is 0"):
        masked_cross_entropy(hidden, head, targets, mask, chunk=0)
