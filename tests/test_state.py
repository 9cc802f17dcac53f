"""Splitting, merging and counting of parameter trees; the frozen half never reaches the optimizer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avlm_jax import optim, state


def params() -> dict:
    return {
        "llm": {"layers": {"q": {"kernel": jnp.ones((2, 3, 4)), "lora_a": jnp.ones((2, 3, 1))}}},
        "connector": {"proj": {"kernel": jnp.full((3, 4), 0.5), "bias": jnp.zeros((4,))}},
        "vision": {"table": jnp.arange(6, dtype=jnp.int8)},
    }


def test_flatten_is_sorted_and_invertible() -> None:
    flat = state.flatten(params())
    assert list(flat) == sorted(flat)
    assert "llm/layers/q/lora_a" in flat
    assert jax.tree.structure(state.unflatten(flat)) == jax.tree.structure(params())


def test_flatten_refuses_a_slash_in_a_key() -> None:
    with pytest.raises(ValueError, match="a/b"):
        state.flatten({"x": {"a/b": 1}})


@pytest.mark.parametrize("paths", [("a", "a/b"), ("a/b", "a")])
def test_unflatten_refuses_a_leaf_that_is_a_folder(paths: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="'a'"):
        state.unflatten(dict.fromkeys(paths, 1))


def test_split_is_disjoint_complete_and_matches_whole_paths() -> None:
    trainable, frozen = state.split(params(), ["connector/.*", ".*/lora_[ab]"])
    assert set(state.flatten(trainable)) == {
        "connector/proj/kernel", "connector/proj/bias", "llm/layers/q/lora_a",
    }  # fmt: skip
    assert set(state.flatten(frozen)) == {"llm/layers/q/kernel", "vision/table"}
    merged = state.merge(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params())
    with pytest.raises(ValueError, match="matches no parameter path"):
        state.split(params(), ["connector"])  # a prefix is not the whole path


def test_a_scale_goes_with_its_kernel() -> None:
    """A pattern meant for norms takes no scale of a frozen int8 kernel, and cannot name one."""
    layer = {"kernel": jnp.ones((2, 2), jnp.int8), "kernel_scale": jnp.ones(2)}
    tree = {"q": layer, "norm": {"scale": jnp.ones(2)}}
    assert state.flatten(state.split(tree, [".*scale"])[0]).keys() == {"norm/scale"}
    assert state.flatten(state.split(tree, ["q/kernel"])[1]).keys() == {"norm/scale"}
    with pytest.raises(ValueError, match="matches no parameter path"):
        state.split(tree, ["q/kernel_scale"])


def test_a_pattern_without_a_match_names_the_nearest_path() -> None:
    with pytest.raises(ValueError, match="nearest paths: connector/proj/kernel"):
        state.split(params(), [r"connector/projection/kernel"])
    with pytest.raises(ValueError, match="not a regular expression"):
        state.split(params(), ["llm/("])


def test_merge_refuses_a_path_in_both_trees() -> None:
    trainable, _ = state.split(params(), ["connector/.*"])
    with pytest.raises(ValueError, match="connector/proj/bias"):
        state.merge(trainable, params())


def test_no_gradient_and_no_optimizer_leaf_for_a_frozen_path() -> None:
    trainable, frozen = state.split(params(), ["connector/.*", ".*/lora_a"])
    optimizer = optim.make_optimizer(optim.OptimConfig(weight_decay=0.1))
    train_state = state.TrainState.create(trainable, optimizer, seed=0)

    def loss(trainable: dict) -> jax.Array:
        merged = state.merge(trainable, jax.lax.stop_gradient(frozen))
        q = merged["llm"]["layers"]["q"]
        return jnp.sum(q["kernel"]) * jnp.sum(q["lora_a"]) * jnp.sum(merged["connector"]["proj"]["kernel"])

    gradients = jax.grad(loss)(trainable)
    names = {"kernel", "bias", "lora_a"}
    assert set(state.flatten(gradients)) == set(state.flatten(trainable))
    frozen_paths = set(state.flatten(frozen))
    leaves = jax.tree_util.tree_leaves_with_path((gradients, train_state.opt_state))
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    assert not [path for path in paths for frozen in frozen_paths if path.endswith(frozen)]
    # One gradient, two moments per trainable leaf, and Adam's counter; nothing else exists.
    assert len(paths) == 3 * len(state.flatten(trainable)) + 1
    assert {path.split("/")[-1] for path in paths} == names | {"count"}


def test_step_key_follows_the_step_alone() -> None:
    optimizer = optim.make_optimizer(optim.OptimConfig())
    first = state.TrainState.create({"a": jnp.ones(1)}, optimizer, seed=7)
    again = state.TrainState.create({"a": jnp.zeros(1)}, optimizer, seed=7)
    later = first.replace(step=first.step + 1)

    def data(train_state: state.TrainState) -> np.ndarray:
        return np.asarray(jax.random.key_data(train_state.step_key()))

    assert (data(first) == data(again)).all()
    assert (data(first) != data(later)).any()
    assert first.rng.dtype == jnp.uint32 and first.rng.shape == (2,)


def test_describe_counts_abstract_and_concrete_leaves_alike() -> None:
    trainable, frozen = state.split(params(), ["connector/.*"])
    sizes = state.describe(trainable, frozen)
    assert sizes["connector"] == state.ModuleSize(16, 0, 64, 0)
    assert sizes["vision"] == state.ModuleSize(0, 6, 0, 6)
    assert sizes["total"] == state.ModuleSize(16, 24 + 6 + 6, 64, 30 * 4 + 6)
    abstract = jax.eval_shape(lambda: (trainable, frozen))
    assert state.describe(*abstract) == sizes
    table = state.format_sizes(sizes).splitlines()
    assert len({len(line) for line in table}) == 1 and len(table) == 5
