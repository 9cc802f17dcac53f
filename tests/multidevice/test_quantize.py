"""The int8 base on eight devices: what is fetched from the others are int8 kernels, and the gradients are one device's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import math, re
import flax.linen as nn
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from avlm_jax.lora import LoraConfig, LoraDense
from avlm_jax.quantize import quantise
from avlm_jax.sharding import batch_sharding, make_mesh, param_shardings
from avlm_jax.state import flatten, split, merge, unflatten

WIDTH, HIDDEN, LAYERS = 64, 96, 3

class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        def dense(name, features):
            return LoraDense(features, lora=LoraConfig(2, 4.0, 0.0), dtype=jnp.float32, name=name)
        return x + dense("down", WIDTH)(nn.silu(dense("up", HIDDEN)(x))), None

class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(nn.remat(Layer, prevent_cse=False), variable_axes={"params": 0},
                         split_rngs={"params": True}, length=LAYERS)
        return layers(name="mlp")(x, None)[0]

stack, x = Stack(), jnp.asarray(np.random.default_rng(0).normal(size=(8, 16, WIDTH)), jnp.float32)
drawn = flatten(jax.jit(stack.init)(jax.random.key(0), x)["params"])
tree = {}
for path, leaf in drawn.items():  # As the decoder's paths are, which the sharding rules match.
    path = f"llm/layers/{path}"
    if path.endswith("kernel"):
        tree[path], tree[path + "_scale"] = quantise(leaf)
    else:
        tree[path] = np.random.default_rng(len(path)).normal(0, 0.3, leaf.shape).astype(np.float32)
tree = unflatten(tree)
mine, frozen = split(tree, ["llm/.*/lora_[ab]"])

def loss(mine, frozen, x):
    params = merge(mine, frozen)["llm"]["layers"]
    return jnp.square(stack.apply({"params": params}, x)).mean()

expected = None
for sizes in ((1, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)):
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    placed = [jax.device_put(part, param_shardings(part, mesh)) for part in (mine, frozen)]
    with jax.set_mesh(mesh):
        program = jax.jit(jax.value_and_grad(loss)).lower(*placed, jax.device_put(x, batch_sharding(mesh))).compile()
    found = jax.device_get(program(*placed, jax.device_put(x, batch_sharding(mesh))))
    if expected is None:
        expected = found
        continue
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    kernels = {frozenset((WIDTH, HIDDEN // sizes[2]))}
    gathered = [(dtype, [int(n) for n in shape.split(",") if n and n != "1"])
                for dtype, shape in re.findall(r"= ([a-z0-9]+)[[]([0-9,]*)[]][^ ]* all-gather", program.as_text())]
    of_kernels = [dtype for dtype, shape in gathered if frozenset(shape) in kernels]
    assert len(of_kernels) >= 4 and set(of_kernels) == {"s8"}, (sizes, gathered)  # Two kernels, forwards and back.
print("int8 is fetched")
"""


@pytest.mark.multidevice
def test_kernels_are_fetched_as_int8_and_gradients_are_those_of_one_device() -> None:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    process = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert process.returncode == 0 and "int8 is fetched" in process.stdout, process.stderr
