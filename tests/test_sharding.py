"""Mesh, rules and fallback by their specs; one process with eight forced devices does the real placing."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from avlm_jax import optim, sharding
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
    assert found == {"a": PartitionSpec(None, "tensor")}
    assert "a: dimension of 6" in caplog.text


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
        assert moments["a"].spec == PartitionSpec("fsdp", None) and moments["b"].spec == PartitionSpec()
    assert found.step.spec == found.rng.spec == adam.count.spec == PartitionSpec()


def test_mesh_sizes_must_fit_the_devices() -> None:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    for sizes in ({"data": 3}, {"data": -1, "fsdp": -1}, {"fsdp": 0}, {"data": -1, "fsdp": 2}):
        with pytest.raises(ValueError, match="does not fit 1 devices"):
            sharding.make_mesh(**sizes, devices=jax.devices()[:1])


def test_one_device_batch_keeps_its_values() -> None:
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    batch = {"tokens": np.arange(6, dtype=np.int32).reshape(2, 3), "mask": np.ones((2,), np.bool_)}
    placed = sharding.put_batch(batch, mesh)
    for name, value in batch.items():
        assert placed[name].dtype == value.dtype
        np.testing.assert_array_equal(placed[name], value)


EIGHT_DEVICES = """
import sys
import jax, numpy as np
from jax.sharding import PartitionSpec
from avlm_jax import optim, sharding
from avlm_jax.checkpoint import Checkpointer
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
    placed = sharding.shard_params(params, mesh, rules)
    state = TrainState.create(placed, optimizer, seed=0)
    return jax.device_put(state, sharding.state_shardings(
        state, mesh, sharding.param_shardings(params, mesh, rules)))

one = sharding.make_mesh(devices=jax.devices()[:1])
expected, expected_loss = jax.jit(step)(start(one), sharding.put_batch(batch, one), 0.1)
for sizes in ((8, 1, 1), (2, 4, 1), (2, 2, 2)):
    mesh = sharding.make_mesh(*sizes)
    state = start(mesh)
    kernel = state.trainable["head"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (16 // sizes[1], 32 // sizes[2])
    placed = sharding.put_batch(batch, mesh)
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
