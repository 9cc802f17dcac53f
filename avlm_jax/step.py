"""One optimizer step, in micro-batches: what the loop runs and what is compiled ahead of time for a pod.

A step of k micro-batches is k - 1 times the program `accumulate` and once `finish`, which takes the last micro-batch and
updates the parameters. Only one micro-batch's activations and one fp32 tree of gradients exist at a time, whatever k is.
Gradients and optimizer state exist for `state.trainable` alone: the frozen tree is an argument that is neither
differentiated nor donated.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from avlm_jax.models.api import System
from avlm_jax.optim import OptimConfig, apply_updates, global_norm, make_optimizer
from avlm_jax.quantize import abstract_frozen
from avlm_jax.sharding import batch_sharding, param_shardings, replicated, state_shardings
from avlm_jax.state import TrainState, Tree, flatten, merge, split
from input_pipeline.spec import PIXELS, FeatureShapes, MediaSpec

# Programs that may wait for the device, besides the one that runs, while the host goes on; each holds its micro-batch there.
IN_FLIGHT = 2


class InFlight:
    """Holds the host up, so that it never places more micro-batches than `avlm preflight` counts."""

    def __init__(self) -> None:
        self._results: collections.deque[Array] = collections.deque()

    def add(self, result: Array) -> None:
        """`result` is of the program that was started last; waits until no more than IN_FLIGHT are unfinished."""
        self._results.append(result)
        if len(self._results) > IN_FLIGHT:
            jax.block_until_ready(self._results.popleft())


@flax.struct.dataclass
class Totals:
    """What a step's micro-batches have added up so far, beside their gradients.

    Attributes:
        loss: summed over targets, in nats.
        targets: how many there were.
        hits: how many of them were the arg max.
        tokens: text positions that were not padding.
        micro_batches: how many have been added.
    """

    loss: Float[Array, ""]
    targets: Float[Array, ""]
    hits: Float[Array, ""]
    tokens: Float[Array, ""]
    micro_batches: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The two programs of a step.

    Attributes:
        accumulate: (state, frozen, gradients or None, totals or None, micro-batch) -> (gradients, totals); donates the
            gradients.
        finish: (state, frozen, gradients or None, totals or None, micro-batch, learning rate) -> (state, metrics); donates
            the state.
    """

    accumulate: Callable[..., tuple[Tree, Totals]]
    finish: Callable[..., tuple[TrainState, dict[str, Array]]]

    def __call__(
        self,
        state: TrainState,
        frozen: Tree,
        batches: Iterator[dict[str, Array]] | Sequence[dict[str, Array]],
        lr: Float[Array, ""],
        micro_batches: int = 1,
        in_flight: InFlight | None = None,
    ) -> tuple[TrainState, dict[str, Array]]:
        """One optimizer step.

        Args:
            state: donated.
            frozen: parameters that are not trained.
            batches: its next `micro_batches` items are taken, each only when its turn comes.
            lr: learning rate, on the devices.
            micro_batches: k.
            in_flight: of the steps before; None if nothing of them may be unfinished.

        Returns:
            The next state, and fp32 scalars: loss (mean over the targets of all micro-batches), accuracy, targets,
            tokens (positions that are not padding), grad_norm (before clipping), skipped (steps of the run whose loss or
            gradient was not finite: they leave parameters and moments as they were).
        """
        batches = iter(batches)
        gradients: Tree | None = None
        totals: Totals | None = None
        in_flight = in_flight or InFlight()
        for _ in range(micro_batches - 1):
            gradients, totals = self.accumulate(state, frozen, gradients, totals, next(batches))
            in_flight.add(totals.loss)
        state, metrics = self.finish(state, frozen, gradients, totals, next(batches), lr)
        in_flight.add(metrics["loss"])
        return state, metrics


def make_step(system: System, optim: OptimConfig, chunk: int, state: TrainState | None = None) -> TrainStep:
    """The step of a stage; stages with the same trainable parameters share the compiled programs.

    Args:
        system: the model.
        optim: of the optimizer; its learning rate is not used, that is an argument of the step.
        chunk: positions per row whose logits exist at a time.
        state: arrays or abstract shapes with shardings; the step returns its state in just those, so that every buffer of
            the old one is taken over. None leaves it to the compiler.
    """
    shardings = None
    if state is not None:
        leaves, structure = jax.tree.flatten(jax.tree.map(lambda leaf: leaf.sharding, state))
        shardings = (tuple(leaves), structure)
    return _make_step(system, optim, chunk, shardings)


@functools.lru_cache(maxsize=8)
def _make_step(
    system: System, optim: OptimConfig, chunk: int, shardings: tuple[tuple, Any] | None
) -> TrainStep:
    optimizer = make_optimizer(optim)

    def add(
        state: TrainState,
        frozen: Tree,
        gradients: Tree | None,
        totals: Totals | None,
        batch: dict[str, Array],
    ) -> tuple[Tree, Totals]:
        index = jnp.zeros((), jnp.int32) if totals is None else totals.micro_batches
        key = jax.random.fold_in(state.step_key(), index)

        def loss_fn(trainable: Tree) -> tuple[Array, tuple[Array, Array]]:
            params = merge(trainable, frozen)
            total, count, hits = system.apply(
                {"params": params}, batch, chunk, method="loss_sums", rngs={"dropout": key}
            )
            return total, (count, hits)

        # Of the sum, not the mean: micro-batches differ in their number of targets.
        (loss, (count, hits)), found = jax.value_and_grad(loss_fn, has_aux=True)(state.trainable)
        tokens = jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32)
        one = Totals(loss, count, hits, tokens, jnp.ones((), jnp.int32))
        if gradients is None:
            return found, one
        return jax.tree.map(jnp.add, gradients, found), jax.tree.map(jnp.add, totals, one)

    def finish(
        state: TrainState,
        frozen: Tree,
        gradients: Tree | None,
        totals: Totals | None,
        batch: dict[str, Array],
        lr: Array,
    ) -> tuple[TrainState, dict[str, Array]]:
        gradients, totals = add(state, frozen, gradients, totals, batch)
        targets = jnp.maximum(totals.targets, 1.0)
        gradients = jax.tree.map(lambda gradient: gradient / targets, gradients)
        loss, norm = totals.loss / targets, global_norm(gradients)
        sound = jnp.isfinite(loss) & jnp.isfinite(norm)
        updated = apply_updates(optimizer, gradients, state.opt_state, state.trainable, lr, optim.lr_scale)
        # Selected and not multiplied: 0 * NaN is NaN.
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(sound, new, old), updated, (state.trainable, state.opt_state)
        )
        skipped = state.skipped + jnp.where(sound, 0, 1)
        metrics = {
            "loss": loss,
            "accuracy": totals.hits / targets,
            "targets": totals.targets,
            "tokens": totals.tokens,
            "grad_norm": norm,
            "skipped": skipped.astype(jnp.float32),
        }
        state = state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state, skipped=skipped)
        return state, metrics

    if shardings is None:
        out_add, out_finish = None, None
    else:
        of_state: TrainState = jax.tree.unflatten(shardings[1], shardings[0])
        out_add, out_finish = (of_state.trainable, of_state.step), (of_state, of_state.step)
    return TrainStep(
        accumulate=jax.jit(add, donate_argnums=2, out_shardings=out_add),
        finish=jax.jit(finish, donate_argnums=0, out_shardings=out_finish),
    )


def create_state(trainable: Tree, optim: OptimConfig, seed: int, mesh: Mesh) -> TrainState:
    """A state at step 0; moments lie as their parameters do. The arrays of `trainable` are donated."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(trainable, optim, seed, mesh))

    def create(trainable: Tree) -> TrainState:
        return TrainState.create(trainable, make_optimizer(optim), seed)

    return jax.jit(create, out_shardings=shardings, donate_argnums=0)(trainable)


def abstract_state(trainable: Tree, optim: OptimConfig, seed: int, mesh: Mesh) -> TrainState:
    """What `create_state` would give, without its arrays; `trainable` may be abstract, with shardings."""
    state = jax.eval_shape(lambda tree: TrainState.create(tree, make_optimizer(optim), seed), trainable)
    placed = jax.tree.map(lambda leaf: leaf.sharding, trainable)
    return jax.tree.map(_with_sharding, state, state_shardings(state, mesh, placed))


def count_micro_batches(batch_size: int, rows_per_device: int, mesh: Mesh) -> int:
    """How many micro-batches a step takes.

    Args:
        batch_size: rows of the step, over all devices.
        rows_per_device: rows that a device takes at a time; 0: all at once.
        mesh: its data and fsdp axes share the rows.

    Raises:
        ValueError: the rows do not divide among the devices, or a device's rows not into such runs.
    """
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % shares:
        raise ValueError(
            f"batch_size {batch_size} does not divide among {shares} devices (data x fsdp of the mesh); choose a multiple"
        )
    rows = batch_size // shares
    if rows_per_device < 1 or rows_per_device >= rows:
        return 1
    if rows % rows_per_device:
        raise ValueError(
            f"batch_size {batch_size} is {rows} rows on each of {shares} devices, which rows_per_device {rows_per_device} "
            f"does not divide; choose a divisor, or 0 for all at once"
        )
    return rows // rows_per_device


class StepInputs(NamedTuple):
    """Shapes, dtypes and shardings of a step's arguments; gradients and totals are those between two micro-batches."""

    state: TrainState
    frozen: Tree
    gradients: Tree
    totals: Totals
    batch: dict[str, jax.ShapeDtypeStruct]
    lr: jax.ShapeDtypeStruct


def abstract_inputs(
    params: Mapping[str, Any],
    trainable: Sequence[str],
    optim: OptimConfig,
    mesh: Mesh,
    spec: MediaSpec,
    *,
    rows: int,
    length: int,
    clips_per_row: int = 1,
    features: FeatureShapes = PIXELS,
    frozen_dtype: str = "bfloat16",
    without: Collection[str] = (),
) -> StepInputs:
    """A step's arguments without a single array: for compiling ahead of time, and for tables of where things lie.

    Args:
        params: all parameters, arrays or abstract (`Assembly.abstract_params`).
        trainable: the stage's patterns.
        optim: of the optimizer.
        mesh: where to; devices of a described topology will do.
        spec: of the media.
        rows, length: of a micro-batch's text, over all devices.
        clips_per_row, features: see `MediaSpec.batch_shapes`.
        frozen_dtype: of parameters that are not trained, see `avlm_jax.quantize`.
        without: top-level parts that are not there ("vision" when its features are cached).
    """
    kept = {part: tree for part, tree in params.items() if part not in without}
    trained = flatten(split(kept, trainable)[0])
    mine, others = split(_placed(abstract_frozen(kept, frozen_dtype, trained), mesh), trainable)
    state = abstract_state(mine, optim, 0, mesh)

    def scalar(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh))

    shapes = spec.batch_shapes(rows, length, clips_per_row=clips_per_row, features=features)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
        for name, (shape, dtype) in shapes.items()
    }
    totals = Totals(*(scalar(np.float32) for _ in range(4)), micro_batches=scalar(np.int32))
    return StepInputs(state, others, state.trainable, totals, batch, scalar(np.float32))


def _placed(tree: Tree, mesh: Mesh) -> Tree:
    return jax.tree.map(_with_sharding, tree, param_shardings(tree, mesh))


def _with_sharding(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
