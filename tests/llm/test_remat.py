"""Rematerialisation: every policy gives the same gradients, and keeps what its name promises."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from avlm_jax.config import ConfigError, to_dataclass
from avlm_jax.layers import attention as attention_module
from avlm_jax.layers.mask import causal_mask
from avlm_jax.layers.splash import splash_attention
from avlm_jax.llm.decoder import Decoder, DecoderConfig
from avlm_jax.llm.remat import POLICIES
from avlm_jax.lora import LoraConfig

CONFIG = DecoderConfig(
    vocab_size=20, width=32, depth=3, num_heads=4, num_kv_heads=2, mlp_dim=48, dtype="float32", remat="none",
    lora=LoraConfig(rank=2, alpha=4.0, dropout=0.5),
)  # fmt: skip
ROWS, LENGTH = 5, 10
SEGMENTS = jnp.asarray([[1] * 6 + [0] * 4, [1] * 4 + [2] * 6, *[[1] * 10] * 3])


def shapes_of(config: DecoderConfig) -> tuple:
    x = jax.ShapeDtypeStruct((ROWS, LENGTH, config.width), config.dtype)

    def touch(model: Decoder, x):
        positions = jnp.zeros(x.shape[:2], jnp.int32)
        return model(x, positions, causal_mask(jnp.ones(x.shape[:2], jnp.int32)))[0]

    init = functools.partial(Decoder(config).init, method=touch)
    return jax.eval_shape(init, jax.random.key(0), x)["params"], x


def loss(params, x, *, config: DecoderConfig, segments=SEGMENTS):
    """With dropout: what is computed again must drop the same."""
    positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
    hidden, _ = Decoder(config).apply(
        {"params": params}, x, positions, causal_mask(segments), rngs={"dropout": jax.random.key(5)}
    )
    return jnp.sum(jnp.sin(hidden.astype(jnp.float32)))


def kept(config: DecoderConfig) -> int:
    """Bytes per token and layer that wait for the backward pass, beside weights and masks."""
    params, x = shapes_of(config)
    backward = jax.eval_shape(
        lambda *inputs: jax.vjp(functools.partial(loss, config=config), *inputs)[1], params, x
    )
    stacked = [leaf for leaf in jax.tree.leaves(backward) if leaf.shape[:2] == (config.depth, ROWS)]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in stacked) // (config.depth * ROWS * LENGTH)


def test_gradients_agree() -> None:
    params, x = shapes_of(CONFIG)
    rng = np.random.default_rng(0)
    params, x = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), (params, x)
    )
    found = {
        name: jax.jit(
            jax.grad(functools.partial(loss, config=dataclasses.replace(CONFIG, remat=name)), argnums=(0, 1))
        )(params, x)
        for name in POLICIES
    }
    for name in ("full", "minimal", "offload"):
        # The same operations on the same numbers; how XLA fuses them may differ in the last bits.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found[name], found["none"]
        )
    gradients = (found["none"][0]["layers"], found["none"][1])
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_what_is_kept_is_what_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    size = {name: kept(dataclasses.replace(CONFIG, remat=name)) for name in POLICIES}
    c, fp32 = CONFIG, 4
    qkv = (c.num_heads + 2 * c.num_kv_heads) * c.dim_per_head * fp32
    assert size["full"] == c.width * fp32
    assert size["minimal"] == size["offload"] == size["full"] + qkv
    assert size["none"] > 20 * c.width * fp32

    monkeypatch.setattr(attention_module, "platform", lambda: "tpu")
    monkeypatch.setattr(attention_module, "MIN_QUERIES", 1)
    monkeypatch.setattr(
        attention_module.splash, "splash_attention", functools.partial(splash_attention, interpret=True)
    )
    with_kernel = kept(dataclasses.replace(CONFIG, remat="minimal"))
    # The kernel's output and fp32 sums, of 128 positions where ten were asked for.
    assert with_kernel == size["minimal"] + 128 * c.num_heads * (c.dim_per_head + 1) * fp32 // LENGTH


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="llm.remat is 'everything'; use one of none, full, minimal, offload"
    ):
        to_dataclass(DecoderConfig, {"remat": "everything"}, "model.llm")
    with pytest.raises(ConfigError, match="model.llm.remat"):
        to_dataclass(DecoderConfig, {"remat": True}, "model.llm")


@pytest.mark.aot
def test_offload_compiles_for_a_tpu_and_uses_the_hosts_memory() -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = Mesh(
        np.asarray(devices).reshape(1, 4, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )
    config = dataclasses.replace(
        CONFIG, width=512, depth=4, head_dim=128, mlp_dim=1024, dtype="bfloat16", lora=LoraConfig(rank=0)
    )
    rows, length = 4, 1024
    analysis = {}
    for name in ("minimal", "offload"):
        config = dataclasses.replace(config, remat=name)
        params, _ = shapes_of(config)
        everywhere = NamedSharding(mesh, PartitionSpec())
        place = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=everywhere)
        params = jax.tree.map(lambda leaf, place=place: place(leaf.shape), params)
        by_row = NamedSharding(mesh, PartitionSpec("fsdp"))
        x = jax.ShapeDtypeStruct((rows, length, config.width), jnp.bfloat16, sharding=by_row)
        segments = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=by_row)
        run = jax.grad(lambda p, x, s: loss(p, x, config=config, segments=s), argnums=1)  # noqa: B023
        with jax.set_mesh(mesh):
            analysis[name] = jax.jit(run).lower(params, x, segments).compile().memory_analysis()
    # Per device one row; queries, keys, values, the kernel's output and the block's input.
    offloaded = config.depth * length * 2 * (2 * 512 + 2 * 256 + 512)
    assert analysis["minimal"].host_temp_size_in_bytes == 0
    assert analysis["offload"].host_temp_size_in_bytes >= offloaded
    # The peak counts the host's memory as well.
    device = {name: a.peak_memory_in_bytes - a.host_temp_size_in_bytes for name, a in analysis.items()}
    assert (
        device["minimal"] - device["offload"] > offloaded / 2
    )  # One layer's is on its way out, one's on its way in.
