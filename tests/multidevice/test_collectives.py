"""What devices send each other for the two ends of the vocabulary, which are a seventh of the 7B model's parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS, LENGTH, VOCABULARY, WIDTH = 16, 128, 4096, 256

PROGRAM = f"""
import json, os, sys
import jax, jax.numpy as jnp, re
from avlm_jax.layers.mask import AttentionMask
from avlm_jax.llm.decoder import Decoder, DecoderConfig
from avlm_jax.lora import LoraConfig
from avlm_jax.losses import masked_cross_entropy
from avlm_jax.sharding import batch_sharding, make_mesh, param_shardings
from avlm_jax.state import merge, split

decoder = Decoder(DecoderConfig(vocab_size={VOCABULARY}, width={WIDTH}, depth=2, num_heads=8, num_kv_heads=4, mlp_dim=512,
                                dtype="float32", lora=LoraConfig(16, 32.0, 0.0)))

def loss(module, tokens):
    positions = jnp.broadcast_to(jnp.arange({LENGTH})[None], tokens.shape)
    hidden, _ = module(module.embed(tokens), positions, AttentionMask(causal=True))
    return masked_cross_entropy(hidden, module.head_kernel(), tokens, tokens > 0, chunk=32)[0]

tokens = jnp.zeros(({ROWS}, {LENGTH}), jnp.int32)
params = {{"llm": jax.eval_shape(lambda: decoder.init(jax.random.key(0), tokens, method=loss))["params"]}}
found = {{}}
for sizes in sys.argv[1:]:
    mesh = make_mesh(*map(int, sizes.split("x")))
    placed = jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
                          params, param_shardings(params, mesh))
    mine, frozen = split(placed, ["llm/.*/lora_[ab]"])
    step = jax.value_and_grad(lambda mine, frozen, tokens: decoder.apply(
        {{"params": merge(mine, frozen)["llm"]}}, tokens, method=loss))
    batch = jax.ShapeDtypeStruct(tokens.shape, tokens.dtype, sharding=batch_sharding(mesh))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, mine)
    with jax.set_mesh(mesh):
        program = jax.jit(step, out_shardings=(None, shardings)).lower(mine, frozen, batch).compile().as_text()
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    calls = re.findall(rf"= (.*?) ({{kinds}})(?:-start)?[(].*?op_name=\\"([^\\"]*)\\"", program)
    found[sizes] = [(kind, [[int(n) for n in shape.split(",") if n] for shape in re.findall(r"[[]([0-9,]*)[]]", result)], name)
                    for result, kind, name in calls]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def collectives() -> dict[str, list]:
    """Mesh -> (kind, shapes of the results on a device, name of the operation) of each collective in a step."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    command = [sys.executable, "-c", PROGRAM, "1x8x1", "2x2x2"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.multidevice
@pytest.mark.parametrize(("mesh", "tensor"), [("1x8x1", 1), ("2x2x2", 2)])
def test_the_head_is_fetched_once_and_the_embedding_table_never(
    mesh: str, tensor: int, collectives: dict[str, list]
) -> None:
    large = [
        (kind, shape, name)
        for kind, shapes, name in collectives[mesh]
        for shape in shapes
        if VOCABULARY // tensor in shape
    ]
    # Once, before the scan over chunks; a gather in its body would repeat with each, and logits are never fetched.
    assert [(kind, shape) for kind, shape, _ in large] == [("all-gather", [WIDTH, VOCABULARY // tensor])]
    assert "while" not in large[0][2]
    assert any(kind == "all-to-all" and "embed" in name for kind, _, name in collectives[mesh])
    # The parts of rows that a device looks up for the others and gets from them, not the rows of all devices.
    looked_up = [shape for kind, shapes, name in collectives[mesh] if "embed" in name for shape in shapes]
    assert all(len(shape) < 3 or shape[-1] < WIDTH for shape in looked_up)


@pytest.mark.multidevice
def test_with_fsdp_alone_only_parameters_and_their_gradients_travel(collectives: dict[str, list]) -> None:
    for kind, shapes, name in collectives["1x8x1"]:
        if "embed" not in name:
            activations = [shape for shape in shapes if LENGTH in shape and len(shape) > 2]
            assert not activations, f"{kind} {activations} of {name}"
