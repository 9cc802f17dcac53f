"""The count of operations agrees with the products that the step really holds, and with published anchors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

from avlm_jax.config import load_config
from avlm_jax.flops import PARTS, count, decoder_work, siglip_work, step_flops
from avlm_jax.models.api import abstract_params, build_system, init_params
from avlm_jax.models.savenvideo import SaveNVideo
from avlm_jax.state import flatten, merge, split, unflatten
from input_pipeline.spec import FeatureShapes
from tests.tiny_system import CONFIG, SIZES

ROWS, LENGTH = 2, 48
ADAPTERS = ("llm/.*/lora_[ab]",)


def system_of(*overrides: str, size: str = "demo", remat: str = "none") -> SaveNVideo:
    sizes = SIZES if size == "demo" else ()
    system = build_system(load_config(f"{CONFIG}:size={size}", (*sizes, *overrides)), 1)
    return system.clone(llm_config=dataclasses.replace(system.llm_config, remat=remat))


def abstract(system: SaveNVideo, features: FeatureShapes) -> tuple[dict, dict]:
    shapes = system.spec.batch_shapes(ROWS, LENGTH, features=features)
    batch = {key: jax.ShapeDtypeStruct(shape, dtype) for key, (shape, dtype) in shapes.items()}
    return batch, jax.eval_shape(lambda batch: init_params(system, batch, 0), batch)


def gradient(system: SaveNVideo, trainable: Any, frozen: Any, batch: Any) -> Any:
    def loss(trainable: Any) -> jax.Array:
        return system.apply({"params": merge(trainable, frozen)}, batch, LENGTH, method="loss_sums")[0]

    return jax.value_and_grad(loss)(trainable)


def products(jaxpr: Jaxpr, times: int = 1) -> Iterator[tuple[str, float]]:
    """(what, operations) of every product and convolution; bodies of scans as often as they run, of a cond the longer."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            yield "dot", 2.0 * times * depth * eqn.outvars[0].aval.size
        elif eqn.primitive.name == "conv_general_dilated":
            taps, into, _ = eqn.invars[1].aval.shape
            yield "convolution", 2.0 * times * taps * into * eqn.outvars[0].aval.size
        bodies = [list(products(body, times * eqn.params.get("length", 1))) for body in inner(eqn.params)]
        if eqn.primitive.name == "cond":
            bodies = [max(bodies, key=lambda body: sum(flops for _, flops in body))]
        for body in bodies:
            yield from body


def inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def counted(system: SaveNVideo, patterns: tuple[str, ...], features: FeatureShapes) -> float:
    batch, params = abstract(system, features)
    trainable, frozen = split(params, patterns)

    def step(trainable: Any, frozen: Any, batch: Any) -> Any:
        return gradient(system, trainable, frozen, batch)

    jaxpr = jax.make_jaxpr(step)(trainable, frozen, batch).jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return sum(flops for _, flops in products(jaxpr))


def fbank_flops(system: SaveNVideo) -> float:
    """What the formula leaves out: the filterbank, as a TPU computes it. At 7B that is half a percent of the encoder."""
    frames = ROWS * system.spec.max_windows * system.spec.window_frames
    return 2.0 * frames * (2 * 400 * 257 + 257 * 128)


STAGES = load_config(f"{CONFIG}:size=demo").stage


@pytest.mark.parametrize(
    ("stage", "overrides", "cached"),
    [
        ("1a", (), False),
        ("1b", (), False),
        ("2a", (), False),
        ("2a", ("model.llm.tie_embeddings=False",), True),
        ("2a", ("model.avts.scope=global", "model.avts.time_scope=all", "model.avts.freq_pool=none"), True),
        ("2a", ("model.avts.resampler=mlp", "model.time.source=both"), True),
        ("2a", ("model.avts.attention=plain", "model.time.f=scalar"), True),
    ],
)
def test_the_formula_counts_every_product_of_the_step(
    stage: str, overrides: tuple[str, ...], cached: bool
) -> None:
    check_count(system_of(*overrides), stage, cached)


@pytest.mark.parametrize("remat", ["full", "minimal", "offload"])
@pytest.mark.parametrize("stage", ["1b", "2a"])
def test_what_rematerialisation_runs_again_is_counted(stage: str, remat: str) -> None:
    check_count(system_of(remat=remat), stage, cached=True)


def check_count(system: SaveNVideo, stage: str, cached: bool) -> None:
    patterns = tuple(STAGES[stage].trainable)
    features = FeatureShapes()
    if cached:
        features = FeatureShapes(system.encoders["video"].shape, system.encoders["audio"].shape)
    trainable = flatten(split(abstract(system, features)[1], patterns)[0])
    media = {"video": "features", "audio": "features"} if cached else {}
    flops = step_flops(system, trainable, rows=ROWS, length=LENGTH, backend="reference", **media)
    beside = 0.0 if cached else fbank_flops(system)
    assert flops.hardware + beside == pytest.approx(counted(system, patterns, features), rel=1e-9)
    assert (flops.parts["vision"].hardware == 0) == cached


def test_xla_counts_the_same_where_nothing_is_scanned() -> None:
    """Depth 1, whose scans run once; the loss's only chunk is not computed again, as XLA merges it with the first.

    XLA also counts what is no product (norms, softmax, activations): 3.5 % at this size.
    """
    wide = ("width=96", "mlp_dim=384", "num_heads=2", "num_kv_heads=1", "vocab_size=1024", "depth=1")
    system = system_of(*(f"model.llm.{size}" for size in wide), "model.llm.lora.rank=16", remat="full")
    features = FeatureShapes(system.encoders["video"].shape, system.encoders["audio"].shape)
    batch, params = abstract(system, features)
    trainable, frozen = split(params, tuple(STAGES["2a"].trainable))
    step = jax.jit(lambda *arguments: gradient(system, *arguments))
    found = step.lower(trainable, frozen, batch).compile().cost_analysis()["flops"]
    media = {"video": "features", "audio": "features"}
    flops = step_flops(system, flatten(trainable), rows=ROWS, length=LENGTH, backend="reference", **media)
    assert found == pytest.approx(flops.hardware - flops.parts["head"].recomputed, rel=0.05)
    assert found > 1.2 * flops.model  # What is computed again is more than the tolerance.


def full_size() -> tuple[SaveNVideo, list[str]]:
    system = system_of(size="7b", remat="full")
    return system, list(flatten(abstract_params(system)))


def test_a_token_on_a_frozen_base_costs_four_operations_a_weight() -> None:
    """58 TFLOP for 2,048 tokens of Qwen2-7B, whose layers and head have 7.07 billion weights; six with full remat."""
    system = system_of("model.llm.lora.rank=1", size="7b", remat="full")
    layers = decoder_work(system.llm_config, 1, 1)[1]
    adapters = [matmul.path for matmul in layers.matmuls if "/lora_" in matmul.path]
    # Rows of one token, so that attention is next to nothing.
    flops = step_flops(system, adapters, rows=2048, length=1, clips=0)
    assert flops.model == pytest.approx(57.9e12, rel=2e-3)
    weights = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18_944) + 3584 * 152_064
    assert flops.model == pytest.approx(4 * 2048 * weights, rel=2e-3)
    down = 28 * 3584 * 18_944  # What nobody reads is not computed again, so it is a little less than 6 N.
    assert flops.hardware == pytest.approx(2048 * (6 * weights - 2 * down), rel=2e-3)


def test_a_picture_costs_siglip_two_thirds_of_a_teraflop() -> None:
    """0.69 with the 27th layer and the head; the features come from layer 26."""
    config = system_of(size="7b").vision_config
    parts = count([siglip_work(config, 1)], ()).parts
    assert parts["vision"].model == parts["vision"].hardware == pytest.approx(0.64e12, rel=0.01)
    whole = dataclasses.replace(config, feature_layer=-1)
    assert count([siglip_work(whole, 1)], ()).model == pytest.approx(0.69e12, rel=0.05)


def test_parts_of_the_full_step() -> None:
    system, paths = full_size()
    config = load_config(f"{CONFIG}:size=7b")
    flops = {}
    for stage in ("1a", "2a"):
        trainable = flatten(split(unflatten(dict.fromkeys(paths)), config.stage[stage].trainable)[0])
        flops[stage] = step_flops(
            system, trainable, rows=1, length=2048, audio="none" if stage == "1a" else "samples"
        )
    assert list(flops["2a"].parts) == list(PARTS)
    # Alignment trains no adapter, but the gradient passes the whole language model on its way to the connector.
    assert flops["1a"].parts["llm"].weight_gradient == flops["1a"].parts["audio"].forward == 0
    assert flops["1a"].parts["llm"].input_gradient > 0.99 * flops["1a"].parts["llm"].forward
    assert flops["1a"].model < flops["2a"].model
    assert flops["2a"].parts["vision"].model == 16 * count([siglip_work(system.vision_config, 1)], ()).model
    assert flops["2a"].model < flops["2a"].hardware < 1.5 * flops["2a"].model


def test_batches_cost_in_proportion_and_text_alone_has_no_media() -> None:
    system, paths = full_size()
    trainable = {path for path in paths if "/lora_" in path}
    one = step_flops(system, trainable, rows=1, length=512)
    many = step_flops(system, trainable, rows=64, length=512)
    assert many.model == pytest.approx(64 * one.model) and many.hardware == pytest.approx(64 * one.hardware)
    text = step_flops(system, trainable, rows=1, length=512, clips=0)
    assert all(text.parts[part].hardware == 0 for part in ("vision", "audio", "connector"))
    assert text.parts["llm"] == one.parts["llm"] and "TFLOP" in str(text)
