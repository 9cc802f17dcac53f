"""Mesh, rules and fallback by their specs; one process with eight forced devices does the real placing."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from avlm_jax import optim, sharding
from avlm_jax.config import ConfigError
from avlm_jax.state import TrainState, flatten

MESH = AbstractMesh((2, 4, 2), sharding.AXES)  # enough to decide specs; no device is needed


def shapes(**leaves: tuple[int, ...]) -> dict:
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


def specs(tree: dict, **kwargs: object) -> dict[str, PartitionSpec]:
    return {
        path: found.spec for path, found in flatten(sharding.param_shardings(tree, MESH, **kwargs)).items()
    }


def test_first_matching_rule_decides() -> None:
    rules = [("q/kernel", PartitionSpec("fsdp", "tensor")), (".*/kernel", PartitionSpec(None, "tensor"))]
    tree = {"q": shapes(kernel=(8, 4), bias=(4,)), "k": shapes(kernel=(8, 4))}
    assert specs(tree, rules=rules) == {
        "q/kernel": PartitionSpec("fsdp", "tensor"),
        "k/kernel": PartitionSpec(None, "tensor"),
        "q/bias": PartitionSpec(),
    }


def test_an_axis_that_does_not_divide_is_left_out_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    found = specs(shapes(a=(6, 4)), rules=[("a", PartitionSpec(("data", "fsdp"), "tensor"))])
    assert found == {"a": PartitionSpec("data", "tensor")}
    assert "a: dimension of 6 is not divisible by data=2 x fsdp=4; left whole along fsdp" in caplog.text


def test_fsdp_moves_to_another_dimension_of_what_is_large_but_never_to_that_of_the_layers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rules = [(".*", PartitionSpec(None, "fsdp", "tensor"))]
    tree = {"x": {"layers": shapes(moves=(4, 6, 16), stays=(4, 6, 4), small=(4, 6, 8))}}
    with caplog.at_level(logging.INFO, logger="avlm_jax.sharding"):
        found = specs(tree, rules=rules, fallback=96)
    assert found == {
        "x/layers/moves": PartitionSpec(None, None, ("tensor", "fsdp")),
        "x/layers/stays": PartitionSpec(None, None, "tensor"),
        "x/layers/small": PartitionSpec(None, None, ("tensor", "fsdp")),
    }
    assert "x/layers/moves [4, 6, 16]: no rule splits it over fsdp; falls back to" in caplog.text
    assert "x/layers/stays [4, 6, 4]: no rule" in caplog.text and "holds it whole" in caplog.text


def test_scales_of_quantised_kernels_lie_as_what_comes_out_of_them() -> None:
    llm = {"layers": {"attn": {name: shapes(kernel=(3, 8, 8), kernel_scale=(3, 8)) for name in "qo"}}}
    head = shapes(kernel=(8, 8), kernel_scale=(8,))
    found = specs({"llm": {**llm, "head": head}, "other": shapes(kernel_scale=(8,))})
    assert found == {
        "llm/head/kernel": PartitionSpec("fsdp", "tensor"),
        "llm/head/kernel_scale": PartitionSpec("tensor"),
        "llm/layers/attn/q/kernel": PartitionSpec(None, "fsdp", "tensor"),
        "llm/layers/attn/q/kernel_scale": PartitionSpec(None, "tensor"),
        "llm/layers/attn/o/kernel": PartitionSpec(None, "tensor", "fsdp"),
        "llm/layers/attn/o/kernel_scale": PartitionSpec(None, "fsdp"),
        "other/kernel_scale": PartitionSpec(),
    }


def test_rules_that_cannot_apply_are_errors() -> None:
    with pytest.raises(ValueError, match="more dimensions"):
        specs(shapes(a=(8,)), rules=[("a", PartitionSpec(None, "fsdp"))])
    with pytest.raises(ValueError, match="'model'"):
        specs(shapes(a=(8,)), rules=[("a", PartitionSpec("model"))])


def test_large_leftovers_fall_back_to_fsdp_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    tree = shapes(large=(8, 30, 12), odd=(9, 33), small=(4,))
    with caplog.at_level(logging.INFO, logger="avlm_jax.sharding"):
        found = specs(tree, fallback=100)
    # 30 is the largest dimension, but 4 devices do not divide it; 12 is next.
    assert found == {
        "large": PartitionSpec(None, None, "fsdp"), "odd": PartitionSpec(), "small": PartitionSpec()
    }  # fmt: skip
    assert "large [8, 30, 12]" in caplog.text and "odd [9, 33]" in caplog.text and "small" not in caplog.text
    assert set(specs(tree, fallback=None).values()) == {PartitionSpec()}


def test_moments_lie_as_their_parameters_do() -> None:
    trainable = shapes(a=(8, 4), b=(4,))
    optimizer = optim.make_optimizer(optim.OptimConfig(weight_decay=0.1))
    state = jax.eval_shape(lambda: TrainState.create(
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), trainable), optimizer, seed=0
    ))  # fmt: skip
    placed = sharding.param_shardings(trainable, MESH, [("a", PartitionSpec("fsdp"))])
    found = sharding.state_shardings(state, MESH, placed)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    adam = next(part for part in found.opt_state if isinstance(part, optax.ScaleByAdamState))
    for moments in (adam.mu, adam.nu):
        assert moments["a"].spec == PartitionSpec("fsdp") and moments["b"].spec == PartitionSpec()
    assert found.step.spec == found.rng.spec == adam.count.spec == PartitionSpec()


def test_mesh_sizes_must_fit_the_devices() -> None:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    for sizes in ({"data": 3}, {"data": -1, "fsdp": -1}, {"fsdp": 0}, {"data": -1, "fsdp": 2}):
        with pytest.raises(ConfigError, match="does not fit 1 devices"):
            sharding.make_mesh(**sizes, devices=jax.devices()[:1])


@dataclasses.dataclass(frozen=True)
class Chip:
    """What `make_mesh` and `share_of_batch` ask of a device: here a TPU v5e of slices of four with a process each."""

    id: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"

    @property
    def slice_index(self) -> int:
        return self.id // 4

    process_index = slice_index

    @property
    def coords(self) -> tuple[int, int, int]:
        return self.id % 4 % 2, self.id % 4 // 2, 0

    core_on_chip = 0


def test_the_data_axis_runs_across_slices_and_the_others_stay_inside_of_one() -> None:
    chips = [Chip(number) for number in (5, 0, 7, 2, 1, 4, 3, 6)]
    for sizes in ({"data": 2, "fsdp": 4}, {"data": 4, "fsdp": -1}, {"data": 2, "fsdp": 2, "tensor": 2}):
        mesh = sharding.make_mesh(**sizes, devices=chips)
        assert mesh.axis_names == sharding.AXES and mesh.devices.size == 8
        for row, group in enumerate(mesh.devices):
            assert {chip.slice_index for chip in group.flat} == {row * 2 // len(mesh.devices)}
    for sizes in ({"data": 1, "fsdp": -1}, {"data": 1, "fsdp": 4, "tensor": 2}):
        with pytest.raises(ConfigError, match="set config.mesh.data to 2 or a multiple"):
            sharding.make_mesh(**sizes, devices=chips)
    gpus = [Chip(number, platform="gpu", device_kind="H100") for number in range(8)]
    assert sharding.make_mesh(data=1, fsdp=8, devices=gpus).shape["fsdp"] == 8


def test_a_tensor_group_gets_whole_heads() -> None:
    qwen2 = {"model.llm.num_heads": 28, "model.llm.num_kv_heads": 4}
    for tensor in (1, 2, 4):
        sharding.check_heads(qwen2, AbstractMesh((1, 1, tensor), sharding.AXES))
    for tensor, wrong in (
        (8, "num_heads = 28, model.llm.num_kv_heads = 4"),
        (7, "model.llm.num_kv_heads = 4"),
    ):
        with pytest.raises(ConfigError, match=rf"tensor is {tensor}.*{wrong}; use 1 or 2 or 4"):
            sharding.check_heads(qwen2, AbstractMesh((1, 1, tensor), sharding.AXES))


def of_processes(shape: tuple[int, int, int], processes: list[int]) -> Any:
    """A mesh whose devices, in order, belong to these processes."""
    devices = np.empty(len(processes), object)
    devices[:] = [types.SimpleNamespace(process_index=process) for process in processes]
    return types.SimpleNamespace(
        devices=devices.reshape(shape), shape=dict(zip(sharding.AXES, shape, strict=True))
    )


@pytest.mark.parametrize(
    ("shape", "processes", "shares"),
    [
        ((2, 2, 1), [0, 0, 0, 0], {0: (0, 1)}),
        ((2, 2, 1), [0, 0, 1, 1], {0: (0, 2), 1: (1, 2)}),
        ((2, 2, 1), [0, 1, 0, 1], {0: (0, 2), 1: (1, 2)}),  # Not one run of the batch each.
        ((1, 2, 2), [0, 0, 1, 1], {0: (0, 2), 1: (1, 2)}),
        (
            (1, 2, 2),
            [0, 1, 2, 3],
            {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)},
        ),  # A tensor group on two hosts.
        ((1, 1, 4), [0, 1, 2, 3], {process: (0, 1) for process in range(4)}),
        ((1, 4, 2), [0, 1, 0, 1, 3, 2, 3, 2], {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)}),
    ],
)
def test_processes_load_the_rows_that_their_devices_hold(
    shape: tuple[int, int, int], processes: list[int], shares: dict[int, tuple[int, int]]
) -> None:
    mesh = of_processes(shape, processes)
    assert {process: sharding.share_of_batch(mesh, process) for process in shares} == shares


def test_overlapping_shares_are_refused() -> None:
    with pytest.raises(ConfigError, match="do not fall into equal shares for the 3 processes"):
        sharding.share_of_batch(of_processes((1, 3, 2), [0, 0, 0, 1, 1, 2]), 0)


def test_constraints_do_nothing_without_a_mesh_and_refuse_too_many_axes() -> None:
    x = jnp.ones((2, 3))
    assert sharding.constrain(x, "batch", "tensor") is x
    with pytest.raises(ValueError, match="3 axes"):
        sharding.constrain(x, "batch", None, None)


def test_constraints_leave_out_what_does_not_divide() -> None:
    def spec(shape: tuple[int, ...], *axes: Any) -> PartitionSpec:
        with jax.sharding.use_abstract_mesh(MESH):
            jaxpr = jax.make_jaxpr(lambda x: sharding.constrain(x, *axes))(
                jax.ShapeDtypeStruct(shape, jnp.float32)
            )
        return jaxpr.eqns[0].params["sharding"].spec

    assert spec((16, 4), "batch", "tensor") == PartitionSpec(("data", "fsdp"), "tensor")
    assert spec((16, 4), ("batch", "tensor")) == PartitionSpec(sharding.AXES)
    assert spec((4, 3), "batch", "tensor") == PartitionSpec("data")
    assert spec((1, 4), "batch") == PartitionSpec()


def test_one_device_batch_keeps_its_values() -> None:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    batch = {"tokens": np.arange(6, dtype=np.int32).reshape(2, 3), "mask": np.ones((2,), np.bool_)}
    with jax.transfer_guard("disallow"):  # As in the loop.
        placed = sharding.put_batch(batch, mesh)
    for name, value in batch.items():
        assert placed[name].dtype == value.dtype
        np.testing.assert_array_equal(placed[name], value)


EIGHT_DEVICES = """
import sys
import jax, numpy as np
from jax.sharding import PartitionSpec
from avlm_jax import optim, sharding
from avlm_jax.checkpoints.checkpoint import Checkpointer
from avlm_jax.losses import masked_cross_entropy
from avlm_jax.state import TrainState

assert jax.device_count() == 8
generator = np.random.default_rng(0)
params = {"head": {"kernel": generator.normal(size=(16, 32)).astype(np.float32)}}
batch = {"hidden": generator.normal(size=(8, 6, 16)).astype(np.float32),
         "tokens": generator.integers(0, 32, (8, 6)).astype(np.int32),
         "mask": generator.random((8, 6)) < 0.7}
optimizer = optim.make_optimizer(optim.OptimConfig())
rules = [("head/kernel", PartitionSpec("fsdp", "tensor"))]

def step(state, batch, lr):
    def mean_loss(params):
        total, count, _ = masked_cross_entropy(
            batch["hidden"], params["head"]["kernel"], batch["tokens"], batch["mask"], chunk=4)
        return total / count
    loss, gradients = jax.value_and_grad(mean_loss)(state.trainable)
    trainable, opt_state = optim.apply_updates(optimizer, gradients, state.opt_state, state.trainable, lr)
    return state.replace(step=state.step + 1, trainable=trainable, opt_state=opt_state), loss

def start(mesh):
    state = TrainState.create(params, optimizer, seed=0)
    return jax.device_put(state, sharding.state_shardings(
        state, mesh, sharding.param_shardings(params, mesh, rules)))

one = sharding.make_mesh(devices=jax.devices()[:1])
expected, expected_loss = jax.jit(step)(start(one), sharding.put_batch(batch, one), 0.1)
for sizes in ((8, 1, 1), (2, 4, 1), (2, 2, 2)):
    mesh = sharding.make_mesh(*sizes)
    state = start(mesh)
    kernel = state.trainable["head"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (16 // sizes[1], 32 // sizes[2])
    with jax.transfer_guard("disallow"):
        placed = sharding.put_batch(batch, mesh)
    np.testing.assert_array_equal(placed["tokens"], batch["tokens"])
    assert placed["tokens"].addressable_shards[0].data.shape == (8 // (sizes[0] * sizes[1]), 6)
    state, loss = jax.jit(step)(state, placed, 0.1)
    # fp32: the devices' partial sums are added in another order.
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for ours, theirs in zip(*map(jax.tree.leaves, (state.trainable, expected.trainable)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)

# Saved on 2 x 2 x 2, restored on 1 x 4 x 2 and on one device, to the bit.
checkpointer = Checkpointer(sys.argv[1])
checkpointer.save(1, state, {}, {})
for mesh in (sharding.make_mesh(1, 4, 2), one):
    wanted = start(mesh)
    found, _, _ = checkpointer.restore_latest(wanted)
    for ours, theirs, place in zip(*map(jax.tree.leaves, (found, state, wanted)), strict=True):
        assert ours.sharding == place.sharding
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
checkpointer.close()

try:
    sharding.put_batch({"tokens": np.zeros((6, 2))}, sharding.make_mesh())
except ValueError as error:
    assert "6 rows" in str(error)
else:
    raise AssertionError("6 rows on 8 devices went through")
print("eight devices agree")
"""


@pytest.mark.multidevice
def test_eight_devices_compute_and_restore_what_one_does(tmp_path: Path) -> None:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    process = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0 and "eight devices agree" in process.stdout, process.stderr
