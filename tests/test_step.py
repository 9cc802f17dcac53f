"""A step: the same in micro-batches as at once, untouched by what is not finite, in place, without hidden transfers."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avlm_jax.losses import masked_cross_entropy
from avlm_jax.models.api import System
from avlm_jax.optim import OptimConfig
from avlm_jax.sharding import make_mesh
from avlm_jax.state import TrainState, Tree, flatten, split
from avlm_jax.step import (
    IN_FLIGHT,
    InFlight,
    TrainStep,
    abstract_inputs,
    count_micro_batches,
    create_state,
    make_step,
)
from avlm_jax.weights.placement import place_params
from input_pipeline.spec import MediaSpec

ROWS, LENGTH, VOCABULARY, WIDTH = 8, 24, 32, 16
OPTIM = OptimConfig(lr=0.0)
TRAINED = ("connector/.*", "head/.*")


class Bag(System):
    """The least that has a frozen and a trained part and reads a batch: what a step is does not depend on the system, and
    SAVEnVideo takes a minute to compile.
    """

    @nn.compact
    def loss_sums(self, batch: dict, chunk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = nn.Embed(VOCABULARY, WIDTH, name="llm")(batch["tokens"])
        time = nn.Dense(WIDTH, name="connector")(batch["duration"][:, None])
        kernel = self.param("head", lambda key: {"kernel": jax.random.normal(key, (WIDTH, VOCABULARY))})
        hidden = jnp.tanh(x + time[:, None])
        return masked_cross_entropy(
            hidden, kernel["kernel"], batch["tokens"], batch["loss_mask"], chunk=chunk
        )


SYSTEM = Bag(media_token_id=0)


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    """Eight rows that differ in their number of targets."""
    rng = np.random.default_rng(0)
    targets = np.arange(LENGTH)[None] < 3 * np.arange(1, ROWS + 1)[:, None]
    return {
        "tokens": rng.integers(0, VOCABULARY, (ROWS, LENGTH)).astype(np.int32),
        "loss_mask": targets & (np.arange(LENGTH) > 0),
        "segment_ids": (np.arange(LENGTH) < LENGTH - np.arange(ROWS)[:, None]).astype(np.int32),
        "duration": rng.uniform(1, 2, ROWS).astype(np.float32),
    }


@pytest.fixture(scope="module")
def params(batch: dict) -> Tree:
    return SYSTEM.init(jax.random.key(0), batch, 8, method="loss_sums")["params"]


@pytest.fixture(scope="module")
def trees(params: Tree) -> tuple[Tree, Tree]:
    return split(params, TRAINED)


@pytest.fixture(scope="module")
def step() -> TrainStep:
    return make_step(SYSTEM, OPTIM, 8)


def new_state(trees: tuple[Tree, Tree]) -> TrainState:
    mesh = make_mesh(devices=jax.devices()[:1])
    trainable = place_params(jax.tree.map(jnp.array, trees[0]), mesh)
    return create_state(trainable, OPTIM, 0, mesh)


def in_parts(batch: dict[str, np.ndarray], count: int) -> list[dict[str, np.ndarray]]:
    rows = ROWS // count
    return [{key: value[i : i + rows] for key, value in batch.items()} for i in range(0, ROWS, rows)]


@pytest.mark.parametrize("count", [2, 4])
def test_micro_batches_make_the_same_step(
    step: TrainStep, trees: tuple[Tree, Tree], batch: dict, count: int
) -> None:
    whole, expected = step(new_state(trees), trees[1], [batch], 0.01)
    found, metrics = step(new_state(trees), trees[1], in_parts(batch, count), 0.01, count)
    assert float(metrics["targets"]) == batch["loss_mask"].sum() and int(found.step) == 1
    assert float(metrics["tokens"]) == batch["segment_ids"].sum() == ROWS * LENGTH - sum(range(ROWS))
    # fp32: sums are taken in another order; the loss is the mean over all targets, not a mean of means.
    for name in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=2e-6, err_msg=name)
    # Adam's first step is sign(gradient) * rate: only where the gradient is all rounding may it turn around.
    for path, leaf in flatten(found.opt_state[1].mu).items():
        other = flatten(whole.opt_state[1].mu)[path]
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-6 * np.abs(other).max(), err_msg=path)


@pytest.mark.parametrize("where", ["first", "last"])
def test_what_is_not_finite_changes_nothing_but_the_counts(
    step: TrainStep, trees: tuple[Tree, Tree], batch: dict, where: str
) -> None:
    before = jax.device_get(new_state(trees))
    parts = in_parts(batch, 2)
    bad = parts[0 if where == "first" else 1]
    bad["duration"] = bad["duration"] * np.float32("nan")
    state, metrics = step(new_state(trees), trees[1], parts, 0.01, 2)
    assert np.isnan(metrics["loss"]) and float(metrics["skipped"]) == 1
    assert (int(state.step), int(state.skipped)) == (1, 1)
    for ours, theirs in zip(
        jax.tree.leaves((state.trainable, state.opt_state)),
        jax.tree.leaves((before.trainable, before.opt_state)),
        strict=True,
    ):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    state, metrics = step(state, trees[1], [batch], 0.01)
    assert np.isfinite(metrics["loss"]) and (int(state.step), int(state.skipped)) == (2, 1)


def test_an_infinite_gradient_of_a_finite_loss_is_skipped(
    step: TrainStep, trees: tuple[Tree, Tree], batch: dict
) -> None:
    state = new_state(trees)
    huge = jax.tree.map(lambda leaf: jnp.full_like(leaf, 3e38), state.trainable)
    _, totals = step.accumulate(state, trees[1], None, None, batch)
    state, metrics = step.finish(state, trees[1], huge, totals, batch, np.float32(0.01))
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"]) and int(state.skipped) == 1


def test_no_more_micro_batches_are_taken_than_may_wait(step: TrainStep, trees: tuple[Tree, Tree]) -> None:
    """Each holds its pictures on the devices; the step must not run ahead of them."""
    taken, done = [], []

    class Scalar:
        def __init__(self, number: int) -> None:
            self.loss = self
            self.number = number

        def block_until_ready(self) -> Scalar:
            done.append(self.number)
            return self

    def accumulate(state, frozen, gradients, totals, batch):
        taken.append(batch)
        assert len(taken) - len(done) <= IN_FLIGHT + 1
        return gradients, Scalar(batch)

    def finish(state, frozen, gradients, totals, batch, lr):
        accumulate(state, frozen, gradients, totals, batch)
        return None, {"loss": Scalar(batch)}

    fake, batches, in_flight = TrainStep(accumulate, finish), iter(range(20)), InFlight()
    for step in range(2):  # They are counted from step to step.
        fake(None, None, batches, 0.1, 9, in_flight)
        assert taken == list(range(9 * step + 9)) and done == taken[:-IN_FLIGHT]


def abstract(params: Tree, **changes: object) -> object:
    mesh = make_mesh(devices=jax.devices()[:1])
    changes = {"frozen_dtype": "float32", **changes}
    return abstract_inputs(params, TRAINED, OPTIM, mesh, MediaSpec(), rows=ROWS, length=LENGTH, **changes)


def test_state_and_gradients_are_taken_over_in_place(params: Tree, batch: dict) -> None:
    """Of the compiled programs: every buffer of the donated arguments is an output's."""
    inputs = abstract(params)
    step = make_step(SYSTEM, OPTIM, 8, inputs.state)
    inputs = inputs._replace(batch={key: inputs.batch[key] for key in batch})

    def size(tree: object) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    first = (inputs.state, inputs.frozen, inputs.gradients, inputs.totals, inputs.batch)
    memory = step.accumulate.lower(*first).compile().memory_analysis()
    assert memory.alias_size_in_bytes == size(inputs.gradients)
    memory = step.finish.lower(*first, inputs.lr).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size(inputs.state)


def test_how_many_micro_batches() -> None:
    class Mesh:
        shape = {"data": 2, "fsdp": 4, "tensor": 2}

    assert count_micro_batches(1024, 4, Mesh) == 32
    assert count_micro_batches(1024, 0, Mesh) == count_micro_batches(16, 4, Mesh) == 1
    with pytest.raises(ValueError, match="batch_size 12 does not divide among 8 devices"):
        count_micro_batches(12, 1, Mesh)
    with pytest.raises(
        ValueError, match="48 rows on each of 8 devices, which rows_per_device 5 does not divide"
    ):
        count_micro_batches(384, 5, Mesh)


def test_learning_rate_and_batches_are_the_only_transfers(
    step: TrainStep, trees: tuple[Tree, Tree], batch: dict
) -> None:
    state, frozen = new_state(trees), jax.device_put(trees[1])
    placed, lr = jax.device_put(batch), jax.device_put(np.float32(0.01))
    with jax.transfer_guard("disallow"):
        state, metrics = step(state, frozen, [placed], lr)
    with pytest.raises(Exception, match="[Dd]isallowed host-to-device"), jax.transfer_guard("disallow"):
        step(state, frozen, [placed], np.float32(0.01))


def test_abstract_inputs_are_what_the_loop_has(params: Tree, trees: tuple[Tree, Tree]) -> None:
    inputs, state = abstract(params, frozen_dtype="bfloat16"), new_state(trees)
    assert jax.tree.structure(inputs.state) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(inputs.state), jax.tree.leaves(state), strict=True):
        assert (ours.shape, ours.dtype, ours.sharding) == (theirs.shape, theirs.dtype, theirs.sharding)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(inputs.frozen)} == {"bfloat16"}
    assert inputs.batch["tokens"].shape == (ROWS, LENGTH)
    assert set(inputs.frozen) == {"llm"} and not abstract(params, without=("llm",)).frozen
