"""Parameters as one nested dict, its trainable and frozen halves, and the state a training step carries.

Parameter paths ("llm/layers/attn/q/kernel") are an API: stages, sharding rules and weight tables match on
them. A stage names its trainable parameters by regexes; gradients, optimizer state and checkpoints exist only
for those, because the frozen half is another tree that the optimizer never sees.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, UInt32

Tree = dict[str, Any]  # nested dicts with string keys; leaves are arrays or jax.ShapeDtypeStruct


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts as {"a/b/c": leaf}, sorted by path. Empty dicts vanish.

    Raises:
        ValueError: a key is not a string, is empty or holds "/".
    """
    return dict(sorted(_walk(tree, "")))


def _walk(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if not isinstance(key, str) or not key or "/" in key:
            raise ValueError(f"key {key!r} under {prefix!r} must be a non-empty string without '/'")
        path = f"{prefix}/{key}" if prefix else key
        if isinstance(value, Mapping):
            yield from _walk(value, path)
        else:
            yield path, value


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`.

    Raises:
        ValueError: one path is a folder of another ("a" and "a/b").
    """
    tree: Tree = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = tree
        for depth, folder in enumerate(folders):
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                raise ValueError(f"{'/'.join(folders[: depth + 1])!r} is a leaf and the folder of {path!r}")
        if name in node:
            raise ValueError(f"{path!r} is a leaf and the folder of other paths")
        node[name] = leaf
    return tree


def split(params: Mapping[str, Any], patterns: Sequence[str]) -> tuple[Tree, Tree]:
    """Parts parameters into (trainable, frozen), two nested dicts with disjoint paths.

    The scale of a quantised kernel goes with its kernel, whatever matches it.

    Args:
        params: nested dicts.
        patterns: regexes; a parameter is trainable if one of them matches its whole path. No patterns: all
            frozen.

    Raises:
        ValueError: a pattern is no regex or matches no path; the message names the nearest paths.
    """
    flat = flatten(params)
    trainable_paths: set[str] = set()
    for pattern in patterns:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"trainable pattern {pattern!r} is not a regular expression: {error}") from error
        matched = [path for path in flat if regex.fullmatch(_owner(path))]
        if not matched:
            nearest = ", ".join(nearest_paths(pattern, flat)) or "none"
            raise ValueError(
                f"trainable pattern {pattern!r} matches no parameter path (the whole path must match); "
                f"nearest paths: {nearest}"
            )
        trainable_paths.update(matched)
    trainable = {path: leaf for path, leaf in flat.items() if path in trainable_paths}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trainable_paths}
    return unflatten(trainable), unflatten(frozen)


def _owner(path: str) -> str:
    """A parameter's own path; of a quantised kernel's scale its kernel's (see `avlm_jax.quantize`)."""
    return path.removesuffix("_scale") if path.endswith("/kernel_scale") else path


def nearest_paths(pattern: str, paths: Sequence[str] | Mapping[str, Any], count: int = 3) -> list[str]:
    """The paths that look most like `pattern` with its regex signs taken away; for error messages."""
    plain = re.sub(r"\\.|[\^$*+?()\[\]{}|.]", "", pattern)
    return difflib.get_close_matches(plain, list(paths), n=count, cutoff=0.0)


def merge(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> Tree:
    """Joins what `split` parted: merge(*split(params, patterns)) == params.

    Raises:
        ValueError: a path is in both trees.
    """
    flat_trainable, flat_frozen = flatten(trainable), flatten(frozen)
    both = sorted(flat_trainable.keys() & flat_frozen.keys())
    if both:
        raise ValueError(f"{len(both)} paths are both trainable and frozen, the first is {both[0]!r}")
    return unflatten(flat_trainable | flat_frozen)


@flax.struct.dataclass
class TrainState:
    """What a training step reads and replaces, and all that a checkpoint holds of the model.

    Attributes:
        step: i32 [], steps done so far.
        trainable: nested dict of the trainable parameters.
        opt_state: the optimizer's state; its moments mirror `trainable`.
        skipped: i32 [], how many of those steps changed nothing, their loss or gradient not being finite.
        rng: u32 [2], data of a threefry key. It never changes: `step_key` folds the step in, so that a
            continued run draws what the undisturbed one draws.
    """

    step: Int[Array, ""]
    trainable: Tree
    opt_state: optax.OptState
    skipped: Int[Array, ""]
    rng: UInt32[Array, "key=2"]

    @classmethod
    def create(cls, trainable: Tree, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
        """A state at step 0."""
        return cls(
            step=jnp.zeros((), jnp.int32),
            trainable=trainable,
            opt_state=optimizer.init(trainable),
            skipped=jnp.zeros((), jnp.int32),
            rng=jax.random.key_data(jax.random.key(seed, impl="threefry2x32")),
        )

    def step_key(self) -> jax.Array:
        """The random key of the current step."""
        return jax.random.fold_in(jax.random.wrap_key_data(self.rng, impl="threefry2x32"), self.step)


@dataclasses.dataclass(frozen=True)
class ModuleSize:
    """Parameters and bytes of one top-level module ("vision", "llm")."""

    trainable_count: int = 0
    frozen_count: int = 0
    trainable_bytes: int = 0
    frozen_bytes: int = 0

    def __add__(self, other: ModuleSize) -> ModuleSize:
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return ModuleSize(*(a + b for a, b in zip(mine, theirs, strict=True)))


def describe(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, ModuleSize]:
    """Sizes per top-level module, in order of name, and their sum under "total". Abstract leaves will do."""
    sizes: dict[str, ModuleSize] = {}
    for tree, kind in ((trainable, "trainable"), (frozen, "frozen")):
        for path, leaf in flatten(tree).items():
            size = ModuleSize(
                **{f"{kind}_count": leaf.size, f"{kind}_bytes": leaf.size * leaf.dtype.itemsize}
            )
            module = path.split("/")[0]
            sizes[module] = sizes.get(module, ModuleSize()) + size
    sizes = dict(sorted(sizes.items()))
    return sizes | {"total": sum(sizes.values(), ModuleSize())}


def format_sizes(sizes: Mapping[str, ModuleSize]) -> str:
    """The table of `describe` as text, one line per module."""
    rows = [("module", "trainable", "frozen", "trainable MB", "frozen MB")]
    for module, size in sizes.items():
        megabytes = (f"{n / 1e6:,.2f}" for n in (size.trainable_bytes, size.frozen_bytes))
        rows.append((module, f"{size.trainable_count:,}", f"{size.frozen_count:,}", *megabytes))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def fields_of(state: TrainState) -> dict[str, Any]:
    """By name, as they are."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def flatten_state(tree: Any) -> dict[str, Any]:
    """{path: leaf}; unlike `flatten` it walks the optimizer's named tuples too."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
