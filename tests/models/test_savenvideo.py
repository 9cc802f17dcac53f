"""SAVEnVideo as a whole: sizes of the 7B system, what masks hide, what is told apart, which parameters train."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from avlm_jax.assembly import Assembly, assemble
from avlm_jax.config import ConfigError, apply_overrides, load_config
from avlm_jax.encoders import frozen as frozen_encoders
from avlm_jax.features import check_untrained
from avlm_jax.models.api import MediaTokens, System, build_system, init_params, splice
from avlm_jax.optim import OptimConfig, make_optimizer
from avlm_jax.state import TrainState, Tree, flatten, merge, split
from avlm_jax.step import make_step
from input_pipeline.media import LoadedMedia
from tests.tiny_system import CONFIG, make_media, padded, random_params, save_tokenizer, tiny_config

Batch = dict[str, np.ndarray]
# Written out, so that tuning the demo's recipe leaves the golden losses alone.
POOLS = ("model.avts.visual_pool=none", "model.avts.freq_pool=mean")
SYSTEMS = {
    "per_frame": (*POOLS, "model.avts.scope=per_frame", "model.avts.time_scope=all"),
    "global": (*POOLS, "model.avts.time_scope=all", "model.avts.scope=global"),
    "mlp": (*POOLS, "model.avts.resampler=mlp"),
}
STAGES = ("1a", "1b", "2a", "2b")
CHUNK = 64
# Samples of the short window, and how many of them make whole filterbank frames: 17 of the window's 32, so that
# its second patch of 16 frames is partly valid.
VALID = 3040  # Ends in the upper half of a hop: one frame too many would read padding.
READ = 400 + 160 * 16


# The released system, without computing anything
# --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_config() -> ConfigDict:
    return load_config(f"{CONFIG}:size=7b")


@pytest.fixture(scope="module")
def full_system(full_config: ConfigDict) -> System:
    return build_system(full_config, media_token_id=151_650)


@pytest.fixture(scope="module")
def full_batch(full_config: ConfigDict, full_system: System) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = full_system.spec.batch_shapes(2, full_config.text.max_length)
    return {key: jax.ShapeDtypeStruct(shape, dtype) for key, (shape, dtype) in shapes.items()}


@pytest.fixture(scope="module")
def full_params(full_system: System, full_batch: dict) -> Tree:
    return jax.eval_shape(functools.partial(init_params, full_system, seed=0), full_batch)


def test_parameter_counts_of_the_7b_system(full_params: Tree) -> None:
    counts: Counter[str] = Counter()
    for path, leaf in flatten(full_params).items():
        counts["lora" if "/lora_" in path else path.split("/")[0]] += leaf.size
    assert counts == {
        # Qwen2-7B-Instruct's published count.
        "llm": 7_615_616_512,
        # Rank 128 on all seven linear layers of a block: 28 * 128 * sum of (in + out).
        "lora": 28 * 128 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18_944)),
        # so400m/14: patches, positions and the 26 of 27 layers below the selected hidden state; no head.
        "vision": 678_528 + 729 * 1152 + 26 * 15_239_504,
        # BEATs iter3+, 12 layers, without classifier: 90.3 M.
        "audio": 90_311_792,
        # Perceptrons, TLP, two layers, output norm and projection, queries and their positions, type vectors.
        "connector": 2_230_272
        + 1_837_056
        + 133_120
        + 2 * 16_796_672
        + 2_048
        + 3_673_600
        + 2 * 256 * 1024
        + 3 * 1024,
    }
    assert counts["lora"] == 322_961_408 and counts["vision"] == 397_745_440


def test_shapes_of_the_7b_system(full_system: System, full_params: Tree, full_batch: dict) -> None:
    assert full_system.num_media_tokens == 256
    flat = flatten(full_params)
    expected = {
        "llm/embed/embedding": (152_064, 3584),
        "llm/head/kernel": (3584, 152_064),
        "llm/layers/attn/q/kernel": (28, 3584, 3584),
        "llm/layers/attn/k/bias": (28, 512),
        "llm/layers/attn/k/lora_b": (28, 128, 512),
        "llm/layers/mlp/down/lora_a": (28, 18_944, 128),
        "vision/pos_embed": (729, 1152),
        "vision/layers/mlp/fc1/kernel": (26, 1152, 4304),
        "audio/rel_pos/embedding": (320, 12),
        "audio/layers/attn/gate/kernel": (12, 64, 8),
        "connector/tlp/kernel": (129, 1024),
        "connector/visual_mlp/fc1/kernel": (1152, 1024),
        "connector/audio_mlp/fc1/kernel": (768, 1024),
        "connector/resampler/queries": (256, 1024),
        "connector/resampler/layer_1/cross/k/kernel": (1024, 1024),
        "connector/resampler/out/kernel": (1024, 3584),
    }
    assert {path: flat[path].shape for path in expected} == expected
    assert {leaf.dtype.name for leaf in flat.values()} == {"float32"}

    def apply(method: str, *arguments: int) -> Callable:
        return lambda params, batch: full_system.apply({"params": params}, batch, *arguments, method=method)

    sums = jax.eval_shape(apply("loss_sums", 256), full_params, full_batch)
    assert [(leaf.shape, leaf.dtype.name) for leaf in sums] == [((), "float32")] * 3
    media = jax.eval_shape(apply("media_tokens"), full_params, full_batch)
    assert media.embeddings.shape == (2, 256, 3584) and media.mask.shape == (2, 256)
    logits = jax.eval_shape(apply("logits"), full_params, full_batch)
    assert logits.shape == (2, 2048, 152_064) and logits.dtype == jnp.float32
    slots = 2048 + 100
    prefill = jax.eval_shape(apply("prefill", slots), full_params, full_batch)
    assert prefill[0].shape == (2, 152_064) and prefill[1].k.shape == (28, 2, slots, 4, 128)


def test_the_number_of_media_tokens_without_a_resampler(full_config: ConfigDict) -> None:
    def count(*overrides: str) -> int:
        config = apply_overrides(full_config, ("model.avts.resampler=mlp", *overrides))
        return build_system(config, 151_650).num_media_tokens

    # 16 frames of 27 x 27 patches, 16 windows of 64 steps, and two tokens for each of 8 intervals.
    assert count() == 16 * 729 + 16 * 64 + 16
    assert count("model.avts.visual_pool=bilinear2") == 16 * 14 * 14 + 16 * 64 + 16
    assert count("model.avts.freq_pool=none") == 16 * 729 + 16 * 64 * 8 + 16
    assert count("model.time.source=both") == 16 * 729 + 16 * 64 + 16 + 16


def test_sizes_that_do_not_fit_are_refused(full_config: ConfigDict) -> None:
    with pytest.raises(ConfigError, match=r"media\.image_size is 224 but model\.vision\.image_size is 384"):
        build_system(apply_overrides(full_config, ["media.image_size=224"]), 151_650)
    with pytest.raises(ConfigError, match="config.system is 'savenvide'; known systems: savenvideo"):
        build_system(apply_overrides(full_config, ["system=savenvide"]), 151_650)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", ["demo", "7b"])
def test_a_stage_trains_what_the_recipe_says(size: str, stage: str, full_params: Tree) -> None:
    config = load_config(f"{CONFIG}:size={size}")
    trainable, frozen = (set(flatten(t)) for t in split(full_params, config.stage[stage].trainable))
    paths = set(flatten(full_params))
    connector = {path for path in paths if path.startswith("connector/")}
    audio_mlp = {path for path in connector if path.startswith("connector/audio_mlp/")}
    lora = {path for path in paths if path.endswith(("/lora_a", "/lora_b"))}
    assert len(audio_mlp) == 4 and len(lora) == 14 and all(path.startswith("llm/") for path in lora)
    expected = {"1a": connector - audio_mlp, "1b": connector, "2a": connector | lora, "2b": connector | lora}
    assert trainable == expected[stage] and frozen == paths - trainable


@pytest.mark.parametrize("stage", STAGES)
def test_no_gradient_and_no_optimizer_leaf_for_a_frozen_path(
    stage: str, full_config: ConfigDict, full_system: System, full_params: Tree, full_batch: dict
) -> None:
    """The loop's own step on abstract arrays of the 7B system: what it differentiates and what it keeps."""
    trainable, frozen = split(full_params, full_config.stage[stage].trainable)
    optim = OptimConfig(lr=0.0)
    state = jax.eval_shape(lambda tree: TrainState.create(tree, make_optimizer(optim), 0), trainable)
    step = make_step(full_system, optim, full_config.loss_chunk)
    lr = jax.ShapeDtypeStruct((), np.float32)
    frozen_bf16 = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), frozen)
    after, metrics = jax.eval_shape(step, state, frozen_bf16, [full_batch], lr)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert metrics["loss"].shape == metrics["grad_norm"].shape == ()
    leaves = jax.tree_util.tree_leaves_with_path(after.opt_state)
    kept = Counter(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    moments = [path for path in kept if not path.endswith("count")]
    assert len(moments) == 2 * len(flatten(trainable))
    assert not [path for path in moments for wrong in flatten(frozen) if path.endswith(f"/{wrong}")]
    assert sum(leaf.size for _, leaf in leaves) == 2 * sum(x.size for x in flatten(trainable).values()) + 1


# The same system, tiny
# --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def assemblies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Assembly]:
    tokenizer = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return {name: assemble(tiny_config(tokenizer, *overrides)) for name, overrides in SYSTEMS.items()}


@pytest.fixture(scope="module")
def params(assemblies: dict[str, Assembly]) -> dict[str, Tree]:
    return {name: random_params(assembly) for name, assembly in assemblies.items()}


class Gradients(NamedTuple):
    """Of the summed loss.

    Attributes:
        sums: what `loss_sums` returned.
        trained: by path, of the trainable parameters.
        sound: of the audio windows' samples, [b w s].
    """

    sums: tuple[float, ...]
    trained: Batch
    sound: np.ndarray


def compile_quickly(function: Callable, static_argnums: tuple[int, ...] = ()) -> Callable:
    """`jax.jit` without LLVM's optimisations: here compiling takes a thousand times as long as running."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(function, static_argnums=static_argnums, compiler_options=options)


def make_row(assembly: Assembly, seed: int, question: str, **kept: int) -> Batch:
    """Arrays of one question; the last audio window holds only `VALID` samples."""
    builder = assembly.builder()
    media: LoadedMedia = make_media(builder.spec, seed, **kept)
    if media.windows:
        start, _, samples = media.windows[-1]
        media.windows[-1] = (start, start + VALID / 16_000, samples[:VALID])
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "b (B)"}]
    return builder.build(padded(media, builder.spec), {"id": f"s{seed}", "conversations": turns}).arrays


def make_batch(assembly: Assembly, question: str = "Which?") -> Batch:
    """Everything in row 0; half of the frames and two windows in row 1."""
    rows = [make_row(assembly, 0, question), make_row(assembly, 1, question, frames=2, windows=2)]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


@pytest.fixture(scope="module")
def batches(assemblies: dict[str, Assembly]) -> dict[str, Batch]:
    return {name: make_batch(assembly) for name, assembly in assemblies.items()}


@pytest.fixture(scope="module")
def gradients_of(assemblies: dict[str, Assembly], params: dict[str, Tree]) -> Callable[[Batch], Gradients]:
    """Of "per_frame", with the parameters of stage 2b."""
    assembly = assemblies["per_frame"]

    def loss(trainable: Tree, audio: jax.Array, frozen: Tree, batch: dict) -> tuple[jax.Array, tuple]:
        variables = {"params": merge(trainable, frozen)}
        sums = assembly.system.apply(variables, batch | {"audio": audio}, CHUNK, method="loss_sums")
        return sums[0], sums

    trees = split(params["per_frame"], assembly.config.stage["2b"].trainable)
    compiled = compile_quickly(jax.grad(loss, argnums=(0, 1), has_aux=True))

    def gradients(batch: Batch) -> Gradients:
        with pytest.MonkeyPatch.context() as patch:
            # The encoder is frozen; only through it can be seen which samples were read.
            patch.setattr(frozen_encoders, "stop_gradient", lambda features: features)
            (trained, sound), sums = jax.device_get(compiled(trees[0], batch["audio"], trees[1], batch))
        return Gradients(tuple(float(x) for x in sums), flatten(trained), sound)

    return gradients


@pytest.fixture(scope="module")
def loss_of(
    assemblies: dict[str, Assembly], params: dict[str, Tree], gradients_of: Callable[[Batch], Gradients]
) -> Callable[[str, Batch], tuple[float, ...]]:
    """(system, batch) -> sum of losses, number of targets, number predicted right."""

    def compiled(name: str) -> Callable[[Batch], tuple[float, ...]]:
        apply = compile_quickly(functools.partial(assemblies[name].system.apply, method="loss_sums"), (2,))
        return lambda batch: tuple(float(x) for x in apply({"params": params[name]}, batch, CHUNK))

    losses = {name: compiled(name) for name in SYSTEMS}
    losses["per_frame"] = lambda batch: gradients_of(batch).sums  # Has been compiled once already.
    return lambda name, batch: losses[name](batch)


@pytest.fixture(scope="module")
def outputs_of(assemblies: dict[str, Assembly], params: dict[str, Tree]) -> Callable[[Batch], Batch]:
    """Batch -> media tokens and logits of "per_frame"."""

    def method(system: System, batch: dict) -> dict:
        media = system.media_tokens(batch)
        return {"embeddings": media.embeddings, "mask": media.mask, "logits": system.logits(batch)}

    apply = compile_quickly(functools.partial(assemblies["per_frame"].system.apply, method=method))
    return lambda batch: jax.device_get(apply({"params": params["per_frame"]}, batch))


def garble(batch: Batch) -> Batch:
    """What no mask shows, replaced: white masked frames, NaN in masked windows and behind a window's end."""
    garbled = {key: value.copy() for key, value in batch.items()}
    hidden = ~batch["frame_mask"]
    garbled["frames"][hidden] = 255
    garbled["frame_times"][hidden] = 777.0
    garbled["intervals"][~batch["interval_mask"]] = 55.0
    garbled["audio"][~batch["audio_mask"]] = np.nan
    garbled["audio_spans"][~batch["audio_mask"]] = (300.0, 300.1)
    short = batch["audio_spans"][..., 1] - batch["audio_spans"][..., 0] < 0.3
    short &= batch["audio_mask"]
    garbled["audio"][short, VALID:] = np.nan
    return garbled


def hide(batch: Batch, modality: str) -> Batch:
    key = {"video": "frame_mask", "audio": "audio_mask"}[modality]
    return batch | {key: np.zeros_like(batch[key])}


def test_splicing_makes_padding_of_masked_media() -> None:
    placeholder, text = 9, jnp.arange(10.0).reshape(2, 5, 1)
    tokens = jnp.asarray([[1, 9, 9, 9, 2], [1, 2, 3, 0, 0]])  # Row 1 has no place for its media.
    segment_ids = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    media = MediaTokens(
        jnp.asarray([[[100.0], [jnp.nan], [102.0]]] * 2), jnp.asarray([[True, False, True]] * 2)
    )
    embeddings, segment_ids = splice(text, tokens, segment_ids, media, placeholder)
    np.testing.assert_array_equal(embeddings[..., 0], [[0, 100, 0, 102, 4], [5, 6, 7, 8, 9]])
    np.testing.assert_array_equal(segment_ids, [[1, 1, 0, 1, 1], [1, 1, 1, 0, 0]])


# Loss sum, targets, hits of `random_params` (numpy, seed 0) on `make_batch`, computed once in fp32 on a CPU with
# JAX 0.10.2 and read off this test. A parameter that is added, renamed or reshaped changes the draws and with
# them all three.
GOLDEN = {
    "per_frame": (106.060326, 14.0, 0.0),
    "global": (102.757225, 14.0, 0.0),
    "mlp": (108.720947, 14.0, 0.0),
}
# Other CPUs and compilers sum in another order, which moves the losses by some 1e-6 of their size; another eps
# in one norm moves them by more than this.
GOLDEN_TOLERANCE = 2e-5


@pytest.mark.parametrize("name", SYSTEMS)
def test_one_step_golden_losses(name: str, loss_of: Callable, batches: dict[str, Batch]) -> None:
    loss, targets, hits = loss_of(name, batches[name])
    assert (targets, hits) == GOLDEN[name][1:]
    np.testing.assert_allclose(loss, GOLDEN[name][0], rtol=GOLDEN_TOLERANCE)


@pytest.mark.parametrize("name", SYSTEMS)
def test_masked_media_cannot_change_the_loss(name: str, loss_of: Callable, batches: dict[str, Batch]) -> None:
    batch = batches[name]
    garbled = garble(batch)
    assert not batch["frame_mask"].all() and np.isnan(garbled["audio"]).any(axis=2).sum() == 3
    assert loss_of(name, garbled) == loss_of(name, batch)  # to the last bit
    for modality in ("video", "audio"):
        assert loss_of(name, garble(hide(batch, modality))) == loss_of(name, hide(batch, modality))
    # What is not masked does matter.
    louder = batch["audio"].copy()
    louder[0, 0] *= 0.5
    for changed in (batch | {"audio": louder}, batch | {"frames": 255 - batch["frames"]}):
        assert loss_of(name, changed)[0] != loss_of(name, batch)[0]


def test_masked_media_cannot_change_tokens_or_logits(
    outputs_of: Callable[[Batch], Batch], batches: dict[str, Batch]
) -> None:
    batch = batches["per_frame"]
    expected, found = outputs_of(batch), outputs_of(garble(batch))
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)
    assert np.isfinite(expected["logits"]).all()
    # Row 1 lacks the last two frames and the last window, which their groups of queries were to read.
    assert expected["mask"][0].all() and not expected["mask"][1].all()


def test_no_gradient_reaches_what_is_masked(
    gradients_of: Callable[[Batch], Gradients], batches: dict[str, Batch]
) -> None:
    batch = batches["per_frame"]
    shown = gradients_of(batch)
    assert [path for path, value in shown.trained.items() if not np.any(value)] == []  # No parameter is dead.
    for row, windows in ((0, 3), (1, 2)):
        sizes = np.abs(shown.sound[row])
        assert (sizes[: windows - 1].max(axis=1) > 0).all()
        assert sizes[windows - 1, :READ].max() > 0 and not sizes[windows - 1, READ:].any()
        assert not sizes[windows:].any()

    deaf, blind = gradients_of(hide(batch, "audio")), gradients_of(hide(batch, "video"))
    assert not deaf.sound.any() and blind.sound.any()
    for hidden, idle in ((deaf, "connector/audio_mlp/"), (blind, "connector/visual_mlp/")):
        assert all(np.isfinite(value).all() for value in hidden.trained.values())
        zero = {path for path, value in hidden.trained.items() if not np.any(value)}
        assert zero == {path for path in shown.trained if path.startswith(idle)}

    garbled = gradients_of(garble(batch))  # NaN in the sound costs the sound's own gradient, no parameter's.
    for path, value in shown.trained.items():
        np.testing.assert_array_equal(garbled.trained[path], value, err_msg=path)


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_a_row_without_a_modality_does_not_care_what_others_hold(
    modality: str, outputs_of: Callable[[Batch], Batch], batches: dict[str, Batch]
) -> None:
    """An encoder may be skipped where the whole batch lacks its modality; nothing may tell."""
    batch = batches["per_frame"]
    nowhere = hide(batch, modality)
    elsewhere = {key: np.stack([nowhere[key][0], batch[key][1]]) for key in batch}
    alone, mixed = outputs_of(nowhere), outputs_of(elsewhere)
    for key in alone:
        np.testing.assert_array_equal(mixed[key][0], alone[key][0], err_msg=key)
    assert np.any(mixed["logits"][1] != alone["logits"][1])


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_missing_modality_is_not_black_or_silence(
    name: str, loss_of: Callable, batches: dict[str, Batch]
) -> None:
    batch = batches[name]
    black = batch | {"frames": np.zeros_like(batch["frames"])}
    silence = batch | {"audio": np.zeros_like(batch["audio"])}
    losses = [
        loss_of(name, shown)[0]
        for shown in (
            batch,
            black,
            silence,
            hide(batch, "video"),
            hide(batch, "audio"),
            hide(hide(batch, "video"), "audio"),
        )
    ]
    assert len(set(losses)) == len(losses)


def test_the_parameters_do_not_depend_on_what_a_batch_holds(assemblies: dict[str, Assembly]) -> None:
    assembly = assemblies["per_frame"]
    full = {key: value[:1] for key, value in make_batch(assembly).items()}
    expected = {path: leaf.shape for path, leaf in flatten(assembly.abstract_params()).items()}
    for batch in (full, hide(full, "audio"), hide(full, "video"), hide(hide(full, "audio"), "video")):
        # The batch is concrete, so that a module which asks what it holds could answer differently.
        found = jax.eval_shape(lambda batch=batch: init_params(assembly.system, batch, 0))
        assert {path: leaf.shape for path, leaf in flatten(found).items()} == expected


def test_times_named_by_the_question_reach_the_media_tokens(
    outputs_of: Callable[[Batch], Batch], assemblies: dict[str, Assembly]
) -> None:
    def tokens(question: str, **changes: np.ndarray) -> np.ndarray:
        return outputs_of(make_batch(assemblies["per_frame"], question) | changes)["embeddings"][0]

    untimed = tokens("Which?")
    early, late = tokens("Which between 0.5 s and 1.2 s?"), tokens("Which between 1.1 s and 1.8 s?")
    for one, other in ((early, late), (early, untimed), (late, untimed)):
        assert (np.abs(one - other).max(axis=1) > 1e-3).all()  # Every query reads the times.
    # A question that names no time is about the whole: the media tokens know nothing else of the words.
    np.testing.assert_array_equal(tokens("Which between 0 s and 2 s?"), untimed)
    np.testing.assert_array_equal(tokens("What else?"), untimed)
    # The same seconds of a longer film are another share of it.
    longer = tokens("Which between 0.5 s and 1.2 s?", duration=np.full(2, 2.2, np.float32))
    assert np.abs(longer - early).max() > 1e-3


def test_encoders_in_micro_batches(
    assemblies: dict[str, Assembly], params: dict[str, Tree], batches: dict[str, Batch]
) -> None:
    """Both sections' `chunk` is obeyed, 3 of 4 frames and 2 of 3 windows at a time, and changes nothing."""
    system, batch = assemblies["per_frame"].system, batches["per_frame"]
    vision = dataclasses.replace(system.vision_config, chunk=3)
    audio = dataclasses.replace(system.audio_config, chunk=2)

    def encode(system: System) -> Callable:
        return lambda params, batch: system.apply({"params": params}, batch, method="encoded")

    chunked = encode(system.clone(vision_config=vision, audio_config=audio))
    assert str(jax.make_jaxpr(chunked)(params["per_frame"], batch)).count("length=2") == 2
    found = compile_quickly(chunked)(params["per_frame"], batch)
    expected = compile_quickly(encode(system))(params["per_frame"], batch)
    for ours, whole in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, whole, atol=1e-5)  # fp32 sums of other shapes, in another order.


def test_an_encoder_cannot_be_trained(assemblies: dict[str, Assembly]) -> None:
    with pytest.raises(
        ConfigError, match="stage 2b trains vision/pos_embed, but savenvideo keeps its encoders frozen"
    ):
        check_untrained(assemblies["per_frame"], "2b", ["connector/tlp/kernel", "vision/pos_embed"])
    check_untrained(assemblies["per_frame"], "2b", ["connector/tlp/kernel"])
