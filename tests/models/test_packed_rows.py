"""Several samples in a row of text: each is read as if it stood alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avlm_jax.assembly import Assembly, assemble
from avlm_jax.state import Tree
from input_pipeline.rows import pack_row, stack_rows
from input_pipeline.spec import TEXT_KEYS, check_batch
from input_pipeline.transforms.sample import Row, SampleBuilder
from tests.tiny_system import make_media, padded, random_params, save_tokenizer, tiny_config

CLIPS, LENGTH = 3, 512
# Frames and audio windows: both, no sound, no picture, neither, less of both.
MEDIA = ((4, 3), (4, 0), (0, 3), (0, 0), (2, 1))


@pytest.fixture(scope="module")
def assembly(tmp_path_factory: pytest.TempPathFactory) -> Assembly:
    tokenizer = save_tokenizer(tmp_path_factory.mktemp("packed") / "tokenizer")
    return assemble(tiny_config(tokenizer))


@pytest.fixture(scope="module")
def params(assembly: Assembly) -> Tree:
    return jax.tree.map(jnp.asarray, random_params(assembly))


@pytest.fixture(scope="module")
def builder(assembly: Assembly) -> SampleBuilder:
    return assembly.builder(max_length=LENGTH)


@pytest.fixture(scope="module")
def samples(builder: SampleBuilder) -> list[Row]:
    def build(number: int, frames: int, windows: int) -> Row:
        media = padded(make_media(builder.spec, number, frames=frames, windows=windows), builder.spec)
        question = f"<video>\nAt 00:01, which of {'the ' * number}{number}?"
        turns = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": f"answer {number} " * (number + 1)},
        ]
        return builder.build(media, {"id": str(number), "conversations": turns})

    return [build(number, *shown) for number, shown in enumerate(MEDIA)]


def packed(builder: SampleBuilder, rows: Sequence[Sequence[Row]]) -> dict[str, np.ndarray]:
    empty = builder.padding_row()
    batch = stack_rows([pack_row(row, empty, CLIPS, LENGTH) for row in rows]).batch
    check_batch(batch, builder.spec, len(rows), LENGTH, clips_per_row=CLIPS)
    return batch


def alone(samples: Sequence[Row]) -> dict[str, np.ndarray]:
    return stack_rows([pack_row([sample], None, 1, LENGTH) for sample in samples]).batch


@functools.cache
def _apply(system, method: str):
    arguments = {"chunk": 64} if method == "loss_sums" else {}
    return jax.jit(lambda params, batch: system.apply({"params": params}, batch, method=method, **arguments))


def apply(assembly: Assembly, params: Tree, batch: dict[str, np.ndarray], method: str):
    return _apply(assembly.system, method)(params, batch)


def test_segments_lie_end_to_end(builder: SampleBuilder, samples: list[Row]) -> None:
    batch = packed(builder, [samples[:3], samples[3:]])
    assert len(batch["frames"]) == 2 * CLIPS and len(batch["tokens"]) == 2
    for row, members in enumerate((samples[:3], samples[3:])):
        start = 0
        for segment, sample in enumerate(members, 1):
            stop = start + sample.plan.total
            here = slice(start, stop)
            assert (batch["segment_ids"][row, here] == segment).all()
            assert batch["positions"][row, here].tolist() == list(range(sample.plan.total))
            for key in ("tokens", "loss_mask"):
                assert (batch[key][row, here] == sample.arrays[key][: sample.plan.total]).all()
            clip = row * CLIPS + segment - 1
            for key in ("frames", "audio", "frame_mask", "audio_mask", "intervals", "duration"):
                assert (batch[key][clip] == sample.arrays[key]).all()
            start = stop
        assert not batch["segment_ids"][row, start:].any() and not batch["loss_mask"][row, start:].any()
        assert (batch["tokens"][row, start:] == builder.padding_id).all()
    for key in ("frame_mask", "audio_mask", "interval_mask"):
        assert not batch[key][-1].any()  # The second row has two samples.


def test_the_loss_is_that_of_the_samples_alone(assembly, params, builder, samples) -> None:
    rows = [samples[:3], samples[3:]]
    total, count, hits = apply(assembly, params, packed(builder, rows), "loss_sums")
    expected = apply(assembly, params, alone(samples), "loss_sums")
    assert (int(count), int(hits)) == (int(expected[1]), int(expected[2])) and count > 100
    # fp32 sums over as many positions as before, in another order.
    np.testing.assert_allclose(total, expected[0], rtol=1e-5)
    turned = apply(assembly, params, packed(builder, [samples[3:], samples[2::-1]]), "loss_sums")
    np.testing.assert_allclose(turned[0], expected[0], rtol=1e-5)


def test_gradients_are_those_of_the_samples_alone(assembly, params, builder, samples) -> None:
    def loss(connector, batch):
        tree = {**params, "connector": connector}
        return assembly.system.apply({"params": tree}, batch, 64, method="loss_sums")[0]

    gradient = functools.partial(jax.jit(jax.grad(loss)), params["connector"])
    found, expected = gradient(packed(builder, [samples[:3], samples[3:]])), gradient(alone(samples))
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5 * scale)


def test_no_segment_sees_another(assembly, params, builder, samples) -> None:
    """Another sample with other media takes the middle place; to the outer ones nothing changes, bit for bit."""
    first, middle, last = samples[0], samples[4], samples[2]
    other = samples[1]
    # Its text is as long as the one it replaces, so that the last segment stays where it is.
    arrays = {**other.arrays, **{key: middle.arrays[key] for key in TEXT_KEYS}}
    text = (arrays["segment_ids"] > 0) & (arrays["tokens"] != builder.media_token_id)
    arrays["tokens"] = np.where(text, (arrays["tokens"] + 1) % 200, arrays["tokens"]).astype(np.int32)
    replaced = Row(arrays, other.sample, middle.plan)
    before, after = (packed(builder, [[first, third, last]]) for third in (middle, replaced))
    assert (before["tokens"] != after["tokens"]).any() and (before["frames"] != after["frames"]).any()
    logits = [np.asarray(apply(assembly, params, batch, "logits")[0]) for batch in (before, after)]
    segments = before["segment_ids"][0]
    for segment in (1, 3):
        np.testing.assert_array_equal(*(x[segments == segment] for x in logits))
    changed = np.abs(logits[0] - logits[1])[segments == 2]
    assert changed.max() > 1e-2


def test_a_system_gets_its_own_clips(assembly, params, builder, samples) -> None:
    """Exchanging two clips' media but not their texts changes both: media go to the segment they belong to."""
    a, b = samples[0], samples[4]
    media = [key for key in a.arrays if key not in TEXT_KEYS]
    swapped = [
        Row({**x.arrays, **{key: y.arrays[key] for key in media}}, x.sample, x.plan)
        for x, y in ((a, b), (b, a))
    ]
    right, wrong = (packed(builder, [rows]) for rows in ([a, b], swapped))
    one = np.asarray(apply(assembly, params, right, "logits")[0])
    two = np.asarray(apply(assembly, params, wrong, "logits")[0])
    segments = right["segment_ids"][0]
    for segment in (1, 2):
        assert np.abs(one - two)[segments == segment].max() > 1e-3
    expected = np.asarray(apply(assembly, params, alone([b]), "logits")[0])[: b.plan.total]
    np.testing.assert_allclose(one[segments == 2], expected, rtol=1e-4, atol=1e-4)
