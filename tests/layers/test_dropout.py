"""Dropout by a hash of positions: its masks are as random as training needs, and the same wherever they are computed."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avlm_jax.layers.dropout import Dropout, hash_bits, keep_mask, mix

SHAPE = (4, 64, 4096)
COUNT = 4 * 64 * 4096
SIGMAS = 5.0  # Of a fair generator one in two million exceeds it.


def bits(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.asarray(hash_bits(jax.random.key(seed), shape))


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """In standard deviations of the correlation of independent samples."""
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1]) * one.size**0.5


def test_the_hash_is_lowbias32() -> None:
    """Computed apart in Python's integers."""
    for word in (0, 1, 2, 0xDEADBEEF, 2**32 - 1):
        expected = word
        for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            expected = (expected ^ expected >> shift) * multiplier % 2**32
        expected ^= expected >> 16
        assert int(mix(jnp.uint32(word))) == expected


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_the_share_that_is_dropped(rate: float) -> None:
    """Over all of a mask, and in every row and column of it."""
    allowed = SIGMAS * (rate * (1 - rate)) ** 0.5
    for seed in range(8):
        dropped = ~np.asarray(keep_mask(jax.random.key(seed), rate, SHAPE))
        assert abs(dropped.mean() - rate) < allowed / COUNT**0.5
        for axes in ((0, 1), (2,)):
            share = dropped.mean(axes)
            assert np.abs(share - rate).max() < 1.2 * allowed / (COUNT / share.size) ** 0.5


def test_every_bit_is_even_and_no_two_go_together() -> None:
    words = bits().ravel()
    planes = np.stack([(words >> k) & 1 for k in range(32)]).astype(np.float32) - 0.5
    assert np.abs(planes.mean(1)).max() < SIGMAS * 0.5 / COUNT**0.5
    together = planes @ planes.T / (0.25 * COUNT) - np.eye(32)
    assert np.abs(together).max() < SIGMAS / COUNT**0.5


@pytest.mark.parametrize("step", [1, 2, 3, 16, 64])
def test_neighbours_are_independent(step: int) -> None:
    """At a real rate, where a pattern in the high bits would show: rows and columns so many apart, and both."""
    dropped = ~np.asarray(keep_mask(jax.random.key(1), 0.05, (1, 256, 4096)))[0]
    pairs = {
        "rows": (dropped[step:], dropped[:-step]),
        "columns": (dropped[:, step:], dropped[:, :-step]),
        "diagonals": (dropped[step:, step:], dropped[:-step, :-step]),
    }
    for name, (one, other) in pairs.items():
        assert abs(correlation(one, other)) < SIGMAS, name


def test_keys_and_their_children_give_independent_masks() -> None:
    key = jax.random.key(3)
    keys = [key, *jax.random.split(key, 4), *(jax.random.fold_in(jax.random.key(4), k) for k in range(4))]
    masks = [np.asarray(keep_mask(k, 0.05, SHAPE)) for k in keys]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert abs(correlation(one, other)) < SIGMAS


def test_runs_of_kept_elements_are_as_long_as_chance_makes_them() -> None:
    """A chi-square over the gaps between dropped elements along rows; they are geometric."""
    dropped = np.flatnonzero(~np.asarray(keep_mask(jax.random.key(5), 0.05, (256, 4096))).ravel())
    gaps = np.diff(dropped)
    edges = np.arange(1, 101)
    observed = np.array([*(np.sum(gaps == gap) for gap in edges), np.sum(gaps > 100)])
    chances = np.array([*(0.05 * 0.95 ** (edges - 1)), 0.95**100])
    expected = chances * gaps.size
    statistic = np.sum((observed - expected) ** 2 / expected)
    degrees = len(edges)
    assert abs(statistic - degrees) < SIGMAS * (2 * degrees) ** 0.5


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_every_kind_of_key_is_read(impl: str) -> None:
    one, other = (
        np.asarray(keep_mask(jax.random.key(seed, impl=impl), 0.5, (64, 4096))) for seed in range(2)
    )
    assert 0.45 < one.mean() < 0.55
    assert (one != other).mean() > 0.4


ON_EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from avlm_jax.layers.dropout import Dropout
from avlm_jax.sharding import make_mesh

def forward_and_back(x):
    layer = Dropout(0.3)
    apply = lambda x: layer.apply({}, x, rngs={"dropout": jax.random.key(2)})
    return apply(x), jax.grad(lambda x: jnp.square(apply(x)).sum())(x)

x = jax.random.normal(jax.random.key(0), (8, 16, 64))
expected = jax.jit(forward_and_back)(x)
sharding = NamedSharding(make_mesh(data=2, fsdp=2, tensor=2), PartitionSpec(("data", "fsdp"), None, "tensor"))
found = jax.jit(forward_and_back)(jax.device_put(x, sharding))
for ours, theirs in zip(found, expected, strict=True):
    assert len({str(shard.index) for shard in ours.addressable_shards}) == 8
    np.testing.assert_array_equal(ours, theirs)
"""


@pytest.mark.multidevice
def test_a_sharded_input_is_dropped_as_a_whole_one() -> None:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    process = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


def test_the_layer() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 8, 512), jnp.bfloat16)
    layer, rngs = Dropout(0.25), {"dropout": jax.random.key(1)}
    assert layer.apply({}, x) is x  # No rng: not training.
    assert Dropout(0.0).apply({}, x, rngs=rngs) is x
    y = layer.apply({}, x, rngs=rngs)
    assert y.dtype == x.dtype
    kept = np.asarray(y != 0)
    assert abs(kept.mean() - 0.75) < 0.03
    np.testing.assert_array_equal(np.asarray(y)[kept], np.asarray(x / 0.75)[kept])
    # What is dropped forward is dropped backward.
    slope = jax.grad(lambda x: layer.apply({}, x, rngs=rngs).astype(jnp.float32).sum())(x)
    np.testing.assert_array_equal(np.asarray(slope != 0), kept)


@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_a_rate_that_is_none_is_an_error(rate: float) -> None:
    with pytest.raises(ValueError, match="dropout rate is"):
        Dropout(rate).apply({}, jnp.ones((2, 2)), rngs={"dropout": jax.random.key(0)})
