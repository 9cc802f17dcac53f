"""Generation: cached equals uncached, batched equals single, rows end on their own, NaN is refused."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from avlm_jax.assembly import Assembly, assemble
from avlm_jax.generate import GenerationError, Generator, checkpoint_config, find_stop_ids, load_model
from avlm_jax.state import flatten, unflatten
from input_pipeline.conversation import PlainTemplate, VicunaTemplate
from input_pipeline.errors import UserError
from tests.input_pipeline.llama_tokenizer import make_llama_tokenizer
from tests.tiny_system import make_media, padded, publish, random_params, save_tokenizer, tiny_config

NEW_TOKENS = 8
# Prompts of different length, each with other media: all, no sound, no picture, little of both.
PROMPTS = (
    ("What is heard?", {}),
    ("Between 0.5 s and 1.2 s, who moves the longest way?", {"windows": 0}),
    ("Why?", {"frames": 0}),
    ("Is it there at all", {"frames": 2, "windows": 1}),
)


@pytest.fixture(scope="module")
def assembly(tmp_path_factory: pytest.TempPathFactory) -> Assembly:
    return assemble(tiny_config(save_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture(scope="module")
def params(assembly: Assembly) -> dict:
    return random_params(assembly)


@pytest.fixture(scope="module")
def batch(assembly: Assembly) -> dict[str, np.ndarray]:
    builder = assembly.builder(prompt=True)
    rows = [
        builder.build(
            padded(make_media(builder.spec, seed, **kept), builder.spec),
            {"id": f"s{seed}", "conversations": [{"from": "human", "value": question}]},
        )
        for seed, (question, kept) in enumerate(PROMPTS)
    ]
    arrays = {key: np.stack([row.arrays[key] for row in rows]) for key in rows[0].arrays}
    assert len({int(count) for count in arrays["segment_ids"].sum(axis=1)}) == len(PROMPTS)
    return arrays


@pytest.fixture(scope="module")
def expected(assembly: Assembly, params: dict, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Greedy continuation without a cache, the whole prompt read anew for every token: (tokens, logits)."""
    logits_of = jax.jit(functools.partial(assembly.system.apply, method="logits"))
    text = {key: batch[key].copy() for key in ("tokens", "positions", "segment_ids")}
    tokens, logits = [], []
    for _ in range(NEW_TOKENS):
        lengths = text["segment_ids"].sum(axis=1)
        rows = np.arange(len(lengths))
        logits.append(np.asarray(logits_of({"params": params}, batch | text))[rows, lengths - 1])
        tokens.append(logits[-1].argmax(axis=-1))
        text["tokens"][rows, lengths] = tokens[-1]
        text["positions"][rows, lengths] = lengths
        text["segment_ids"][rows, lengths] = 1
    return np.stack(tokens, axis=1), np.stack(logits, axis=1)


def test_answers_depend_on_the_prompt(expected: tuple[np.ndarray, np.ndarray]) -> None:
    assert len({tuple(row) for row in expected[0].tolist()}) == len(
        PROMPTS
    )  # Else the tests below prove little.


def test_cached_equals_uncached(
    assembly: Assembly, params: dict, batch: dict[str, np.ndarray], expected: tuple[np.ndarray, np.ndarray]
) -> None:
    found = Generator(assembly, params, NEW_TOKENS, stop_ids=(299,))(batch)
    np.testing.assert_array_equal(found.tokens, expected[0])
    assert found.lengths.tolist() == [NEW_TOKENS] * len(PROMPTS) and not found.stopped.any()


def test_cached_logits_equal_uncached(
    assembly: Assembly, params: dict, batch: dict[str, np.ndarray], expected: tuple[np.ndarray, np.ndarray]
) -> None:
    tokens, logits = expected
    variables = {"params": params}
    slots = batch["tokens"].shape[1] + NEW_TOKENS - 1
    prefill = jax.jit(functools.partial(assembly.system.apply, method="prefill"), static_argnums=2)
    extend = jax.jit(functools.partial(assembly.system.apply, method="extend"))
    found, cache, seen = prefill(variables, batch, slots)
    lengths = batch["segment_ids"].sum(axis=1)
    # fp32 on a CPU: the two differ only in the order of sums.
    np.testing.assert_allclose(found, logits[:, 0], atol=1e-4)
    for step in range(1, NEW_TOKENS):
        positions = (lengths + step - 1).astype(np.int32)
        found, cache, seen = extend(variables, tokens[:, step - 1], positions, cache, seen)
        np.testing.assert_allclose(found, logits[:, step], atol=1e-4)


def test_batched_equals_single(assembly: Assembly, params: dict, batch: dict[str, np.ndarray]) -> None:
    generator = Generator(assembly, params, NEW_TOKENS, stop_ids=(299,))
    together = generator(batch)
    for row in range(len(PROMPTS)):
        alone = generator({key: value[row : row + 1] for key, value in batch.items()})
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


def test_rows_stop_on_their_own(
    assembly: Assembly, params: dict, batch: dict[str, np.ndarray], expected: tuple[np.ndarray, np.ndarray]
) -> None:
    stop = int(expected[0][1, 2])  # Row 1 ends there at the latest, others later or not at all.
    found = Generator(assembly, params, NEW_TOKENS, stop_ids=(stop,))(batch)
    for row, tokens in enumerate(expected[0].tolist()):
        length = tokens.index(stop) if stop in tokens else NEW_TOKENS
        assert found.lengths[row] == length and bool(found.stopped[row]) == (stop in tokens)
        assert found.tokens[row, :length].tolist() == tokens[:length]
        assert set(found.tokens[row, length:].tolist()) <= {stop}  # What comes after the end is not made up.
    assert found.lengths[1] <= 2


def test_padding_rows_get_no_answer(assembly: Assembly, params: dict, batch: dict[str, np.ndarray]) -> None:
    padding = assembly.builder(prompt=True).padding_row().arrays
    mixed = {key: np.concatenate([value[:3], padding[key][None]]) for key, value in batch.items()}
    generator = Generator(assembly, params, NEW_TOKENS, stop_ids=(299,))
    assert generator(mixed).lengths.tolist() == [NEW_TOKENS] * 3 + [0]
    assert generator.texts(mixed)[3] == ""


def test_masked_media_cannot_change_the_answer(
    assembly: Assembly, params: dict, batch: dict[str, np.ndarray]
) -> None:
    generator = Generator(assembly, params, NEW_TOKENS, stop_ids=(299,))
    garbled = dict(batch)
    hidden = ~batch["frame_mask"], ~batch["audio_mask"]
    garbled["frames"] = np.where(hidden[0][:, :, None, None, None], np.uint8(255), batch["frames"])
    garbled["audio"] = np.where(hidden[1][:, :, None], np.float32(0.9), batch["audio"])
    assert hidden[0].any() and hidden[1].any()
    np.testing.assert_array_equal(generator(garbled).tokens, generator(batch).tokens)
    shown = dict(batch, frames=255 - batch["frames"])
    assert (generator(shown).tokens != generator(batch).tokens).any()  # What is not masked does matter.


def test_not_finite_logits_are_an_error(
    assembly: Assembly, params: dict, batch: dict[str, np.ndarray]
) -> None:
    flat = flatten(params)
    flat["llm/norm/scale"] = flat["llm/norm/scale"] * np.nan
    with pytest.raises(GenerationError, match=r"row 0 \(s0\): the logits of new token 0 are not finite"):
        Generator(assembly, unflatten(flat), NEW_TOKENS, stop_ids=(299,))(batch, ["s0", "s1"])


def test_stop_tokens(assembly: Assembly) -> None:
    def names(tokenizer, template) -> list[str]:
        return tokenizer.convert_ids_to_tokens(find_stop_ids(tokenizer, template))

    qwen, llama = assembly.tokenizer, make_llama_tokenizer("prepend")
    assert names(qwen, assembly.template) == ["<|im_end|>", "<|endoftext|>"]
    assert names(qwen, PlainTemplate()) == [
        "\u010a",
        "<|endoftext|>",
        "<|im_end|>",
    ]  # A newline's byte token.
    assert names(llama, VicunaTemplate()) == ["</s>"]
    assert names(llama, PlainTemplate()) == ["<0x0A>", "</s>"]
    with pytest.raises(UserError, match="no control token '</s>', which text.template needs"):
        find_stop_ids(qwen, VicunaTemplate())
    with pytest.raises(UserError, match="at least 1"):
        Generator(assembly, {}, 0)


def test_load_model(assembly: Assembly, params: dict, tmp_path: Path) -> None:
    folder = publish(assembly, params, tmp_path / "2b" / "final")
    assert checkpoint_config(folder).text.max_length == assembly.config.text.max_length
    model = load_model(folder)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    assert model.name.startswith("savenvideo/2b/")
    assert model.assembly.stage == "2b" and model.assembly.template == assembly.template
    with pytest.raises(UserError, match="does not fit the configuration: checkpoint holds connector"):
        load_model(folder, overrides=["model.avts.d_model=16"])
    with pytest.raises(UserError, match="make demo"):
        load_model(tmp_path / "nothing")
    own = load_model(folder, overrides=["stage.2b.template=plain"])
    assert own.assembly.builder(prompt=True).template == PlainTemplate()
    generator = Generator(own.assembly, own.params, 1)
    assert own.assembly.tokenizer.convert_ids_to_tokens(generator.stop_ids[0]) == "\u010a"
    damaged = folder / "trainable.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"trainable\.safetensors"):
        load_model(folder)
