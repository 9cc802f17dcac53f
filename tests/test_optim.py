"""The schedule's values and AdamW's arithmetic, against optax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avlm_jax import optim


def test_cosine_schedule_values() -> None:
    config = optim.OptimConfig(lr=2.0, warmup_ratio=0.03)
    rates = [optim.learning_rate(config, step, 100) for step in range(100)]
    np.testing.assert_allclose(rates[:4], [2 / 3, 4 / 3, 2.0, 2.0], rtol=1e-6)
    # Half way between warm-up and end: step 3 + 97 / 2 = 51.5 lies between two steps around lr / 2.
    assert rates[51] > 1.0 > rates[52]
    assert 0 < rates[99] < 1e-3
    assert np.all(np.diff(rates[3:]) < 0)
    assert all(isinstance(rate, np.float32) for rate in rates)


def test_constant_schedule_and_no_warmup() -> None:
    config = optim.OptimConfig(lr=0.5, warmup_ratio=0.0, schedule="constant")
    assert [float(optim.learning_rate(config, step, 3)) for step in range(3)] == [0.5] * 3


def test_warmup_over_the_whole_run_and_steps_outside() -> None:
    config = optim.OptimConfig(lr=1.0, warmup_ratio=1.0)
    np.testing.assert_allclose([optim.learning_rate(config, step, 2) for step in range(2)], [0.5, 1.0])
    with pytest.raises(ValueError, match="step 2"):
        optim.learning_rate(config, 2, 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [("schedule", "linear"), ("warmup_ratio", 1.5), ("lr", -1.0), ("b2", 1.0), ("clip", float("nan"))],
)
def test_bad_config_names_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"optim.{field}"):
        optim.OptimConfig(**{field: value})


def random_tree(seed: int) -> dict:
    generator = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(generator.normal(size=shape), jnp.float32)  # noqa: E731
    return {"a": {"kernel": draw(3, 4), "bias": draw(2, 4)}, "b": {"scale": draw(5)}}


@pytest.mark.parametrize(("weight_decay", "clip"), [(0.0, 1.0), (0.1, 0.0)])
def test_equals_optax_adamw(weight_decay: float, clip: float) -> None:
    config = optim.OptimConfig(lr=0.1, warmup_ratio=0.5, weight_decay=weight_decay, clip=clip)
    rates = [optim.learning_rate(config, step, 5) for step in range(5)]
    peer = optax.adamw(lambda count: jnp.asarray(rates)[count], weight_decay=weight_decay, mask=optim.decayed)
    if clip:
        peer = optax.chain(optax.clip_by_global_norm(clip), peer)
    ours = optim.make_optimizer(config)
    params = peer_params = random_tree(0)
    opt_state, peer_state = ours.init(params), peer.init(params)
    step = jax.jit(lambda *args: optim.apply_updates(ours, *args))
    for number, rate in enumerate(rates):
        gradients = random_tree(number + 1)
        params, opt_state = step(gradients, opt_state, params, rate)
        updates, peer_state = peer.update(gradients, peer_state, peer_params)
        peer_params = optax.apply_updates(peer_params, updates)
    # Same formula; jit may fuse multiply and add, hence the last digit.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-7), params, peer_params)
    assert step._cache_size() == 1  # five rates, one program


def test_decay_spares_biases_and_scales() -> None:
    optimizer = optim.make_optimizer(optim.OptimConfig(weight_decay=0.5))
    params = random_tree(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    moved, _ = optim.apply_updates(optimizer, zeros, optimizer.init(params), params, jnp.float32(1.0))
    np.testing.assert_allclose(moved["a"]["kernel"], 0.5 * params["a"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(moved["a"]["bias"], params["a"]["bias"])
    np.testing.assert_array_equal(moved["b"]["scale"], params["b"]["scale"])


def test_lr_scale_first_match_wins_and_idle_ones_are_refused() -> None:
    params = random_tree(0)
    factors = optim.lr_factors(params, (("a/kernel", 0.0), ("a/.*", 0.5)))
    assert factors == {"a/kernel": 0.0, "a/bias": 0.5, "b/scale": 1.0}
    with pytest.raises(ValueError, match="vision"):
        optim.lr_factors(params, (("vision/.*", 0.1),))
    optimizer = optim.make_optimizer(optim.OptimConfig())
    moved, _ = optim.apply_updates(
        optimizer, random_tree(1), optimizer.init(params), params, jnp.float32(0.1), (("a/kernel", 0.0),)
    )
    np.testing.assert_array_equal(moved["a"]["kernel"], params["a"]["kernel"])
    assert (moved["a"]["bias"] != params["a"]["bias"]).all()


def test_clipping_bounds_the_first_moment() -> None:
    config = optim.OptimConfig(clip=1.0, b1=0.0)
    optimizer = optim.make_optimizer(config)
    params = random_tree(0)
    gradients = jax.tree.map(lambda leaf: 100.0 * leaf, random_tree(1))
    assert optim.global_norm(gradients) > 100
    _, opt_state = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(optim.global_norm(opt_state[1].mu), 1.0, rtol=1e-5)
