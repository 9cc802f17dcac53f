"""A system on a LLaMA whose tokenizer uses every row of the table, as Vicuna's: the placeholder of media has none."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avlm_jax.assembly import Assembly, assemble
from avlm_jax.config import ConfigError
from avlm_jax.generate import Generator
from avlm_jax.llm.decoder import Decoder
from avlm_jax.models.api import MediaTokens
from avlm_jax.optim import OptimConfig, make_optimizer
from avlm_jax.state import TrainState, flatten, merge, split, unflatten
from avlm_jax.step import make_step
from input_pipeline.conversation import ConversationError, PlainTemplate, VicunaTemplate
from input_pipeline.errors import UserError
from tests.input_pipeline.llama_tokenizer import make_llama_tokenizer
from tests.tiny_system import make_media, padded, random_params, tiny_config

TURNS = {
    "vicuna": [{"from": "human", "value": "<video>\nWhat is heard?"}, {"from": "gpt", "value": "A bell."}],
    "plain": [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "A red circle."}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama")
    make_llama_tokenizer("prepend").save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def make(folder: Path):
    def build(template: str, *overrides: str) -> Assembly:
        sizes = (f"model.llm.vocab_size={len(make_llama_tokenizer('prepend'))}", "model.llm.qkv_bias=false")
        sizes += ("model.llm.tie_embeddings=false", f"text.template={template}")
        return assemble(tiny_config(folder, *sizes, *overrides))

    return build


@pytest.fixture(scope="module")
def vicuna(make) -> Assembly:
    return make("vicuna")


@pytest.fixture(scope="module")
def params(vicuna: Assembly) -> dict:
    return jax.tree.map(jnp.asarray, random_params(vicuna))


def batch_of(assembly: Assembly, turns: list, *, prompt: bool = False) -> dict[str, np.ndarray]:
    """Two rows with the same text, one of them without sound, so that some media tokens are masked."""
    builder = assembly.builder(prompt=prompt)
    rows = [
        builder.build(
            padded(make_media(builder.spec, 0, windows=windows), builder.spec),
            {"id": "s", "conversations": turns},
        ).arrays
        for windows in (3, 0)
    ]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


@pytest.fixture(scope="module")
def batch(vicuna: Assembly) -> dict[str, np.ndarray]:
    return batch_of(vicuna, TURNS["vicuna"])


def test_the_placeholder_lies_behind_the_table(vicuna: Assembly, batch: dict[str, np.ndarray]) -> None:
    rows = vicuna.config.model.llm.vocab_size
    assert vicuna.system.media_token_id == rows == len(vicuna.tokenizer)
    assert (batch["tokens"] == rows).sum(axis=1).tolist() == [vicuna.system.num_media_tokens] * 2


def test_logits_are_those_with_a_row_for_it(
    make, vicuna: Assembly, params: dict, batch: dict[str, np.ndarray]
) -> None:
    """A table with one row more, NaN, and a head with one column more: no logit of the vocabulary changes."""
    rows = vicuna.config.model.llm.vocab_size
    larger = make("vicuna", f"model.llm.vocab_size={rows + 1}")
    assert larger.system.media_token_id == rows
    flat = flatten(params)
    table, kernel = flat["llm/embed/embedding"], flat["llm/head/kernel"]
    flat["llm/embed/embedding"] = np.pad(table, ((0, 1), (0, 0)), constant_values=np.nan)
    flat["llm/head/kernel"] = np.pad(kernel, ((0, 0), (0, 1)), constant_values=1.0)

    def logits(assembly: Assembly, tree: dict) -> np.ndarray:
        return np.asarray(
            jax.jit(functools.partial(assembly.system.apply, method="logits"))({"params": tree}, batch)
        )

    found, expected = logits(vicuna, params), logits(larger, unflatten(flat))[..., :rows]
    assert np.isfinite(found).all()
    # fp32: the two heads' products may be summed in another order.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_placeholder_is_never_looked_up(
    vicuna: Assembly, params: dict, batch: dict[str, np.ndarray], monkeypatch
) -> None:
    """Not even to be overwritten: what a gather gives for an id without a row is nothing to build on."""
    seen, embed = [], Decoder.embed

    def record(self: Decoder, tokens: jax.Array) -> jax.Array:
        seen.append(np.asarray(tokens))
        return embed(self, tokens)

    media = jnp.ones((2, vicuna.system.num_media_tokens, vicuna.config.model.llm.width))
    monkeypatch.setattr(Decoder, "embed", record)
    monkeypatch.setattr(type(vicuna.system), "media_tokens", lambda *_: MediaTokens(media, media[..., 0] > 0))
    vicuna.system.apply({"params": params}, batch, method="spliced")
    (tokens,) = seen
    text = batch["tokens"] != vicuna.system.media_token_id
    np.testing.assert_array_equal(tokens[text], batch["tokens"][text])
    assert tokens.max() < vicuna.config.model.llm.vocab_size


def test_no_gradient_is_lost_or_made_up(vicuna: Assembly, params: dict, batch: dict[str, np.ndarray]) -> None:
    trainable, frozen = split(params, ("llm/.*", "connector/.*"))

    def loss(tree: dict) -> jax.Array:
        return vicuna.system.apply({"params": merge(tree, frozen)}, batch, 64, method="loss_sums")[0]

    flat = flatten(jax.jit(jax.grad(loss))(trainable))
    assert all(np.isfinite(leaf).all() for leaf in flat.values())
    assert np.abs(flat["connector/visual_mlp/fc1/kernel"]).max() > 0  # Through the media tokens.
    read = np.abs(flat["llm/embed/embedding"]).max(axis=1) > 0
    ids = set(batch["tokens"][batch["segment_ids"] > 0].tolist())
    # The last token of a row is read for nothing. Row 0, which stands in for the placeholder, learns nothing.
    assert set(np.flatnonzero(read).tolist()) == ids - {vicuna.system.media_token_id, 2}


@pytest.mark.parametrize("name", TURNS)
def test_training_and_generation_end_alike(make, params: dict, name: str) -> None:
    """What was learnt is generated up to the token that ends the template's turns."""
    assembly = make(name)
    stage = OptimConfig(lr=0.0)  # As `run_stage`: the rate is an argument of the step.
    step = make_step(assembly.system, stage, 64)
    trainable, frozen = split(params, ("llm/.*", "connector/.*"))
    state = TrainState.create(jax.tree.map(jnp.array, trainable), make_optimizer(stage), 0)
    batch = batch_of(assembly, TURNS[name])
    losses = []
    for rate in np.linspace(4e-3, 0, 120, dtype=np.float32):
        state, metrics = step(state, frozen, [batch], rate)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 2 and losses[-1] < 0.1 and metrics["accuracy"] == 1
    generator = Generator(assembly, unflatten(flatten(state.trainable) | flatten(frozen)), 12)
    prompt = batch_of(assembly, TURNS[name], prompt=True)
    assert generator.texts(prompt) == [TURNS[name][1]["value"]] * 2
    found = generator(prompt)
    ends = found.tokens[np.arange(2), found.lengths].tolist()
    assert found.stopped.all()
    assert assembly.tokenizer.convert_ids_to_tokens(ends) == [{"vicuna": "</s>", "plain": "<0x0A>"}[name]] * 2


def test_template_options(make) -> None:
    lcs = [
        {"from": "human", "value": "<image>\nDescribe it briefly."},
        {"from": "gpt", "value": "A red circle."},
    ]
    with pytest.raises(ConversationError, match=r"sample 's': .*drop_question=True in text.template_options"):
        batch_of(make("plain"), lcs)
    dropping = make("plain", "text.template_options={'drop_question': True}")
    assert dropping.template == PlainTemplate(drop_question=True)
    bare = batch_of(make("plain"), [{**lcs[0], "value": "<image>"}, lcs[1]])
    np.testing.assert_array_equal(batch_of(dropping, lcs)["tokens"], bare["tokens"])
    assert make("vicuna").template == VicunaTemplate()


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        ("vicunna", "", "text.template is 'vicunna'; did you mean 'vicuna'"),
        ("chatml", "", "no control token '<|im_end|>', which text.template needs"),
        ("plain", "{'drop_questions': True}", "text.template_options has no field 'drop_questions'; did you mean 'drop_q"),
        ("vicuna", "{'drop_question': True}", "has no field 'drop_question'; VicunaTemplate knows: system"),
        ("plain", "{'drop_question': 'no'}", "text.template_options.drop_question is str"),
        ("plain", "drop_question=True", "text.template_options is .*'drop_question=True'"),
        ("plain", "False", "text.template_options is .*False"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_fit(make, template: str, options: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("|", r"\|")) as error:
        make(template, *([f"text.template_options={options}"] if options else []))
    assert template == "chatml" or isinstance(error.value, ConfigError)


def test_a_stage_may_have_a_template_of_its_own(make) -> None:
    own = (
        "stage.1a.template=plain",
        "stage.1a.template_options={'drop_question': True}",
        "text.system=Hear.",
    )
    assembly = make("vicuna", *own)
    stages = assembly.of_stage("1a"), assembly.of_stage("1b")
    aligned, tuned = (each.builder() for each in stages)
    assert (aligned.template, aligned.system) == (PlainTemplate(drop_question=True), None)
    assert (tuned.template, tuned.system) == (VicunaTemplate(), "Hear.")
    assert [each.template for each in stages] == [aligned.template, tuned.template]
    with pytest.raises(ConfigError, match=r"no stage 'x', .*\(stages: 1a, 1b, "):
        assembly.of_stage("x")
    for wrong, message in (
        (("template=plane",), "stage.1a.template is 'plane'; did you mean 'plain'"),
        (
            ("template=plain", "template_options={'drop_questions': 1}"),
            "stage.1a.template_options has no field 'drop_questions'; did you",
        ),
        (
            ("template_options={'drop_question': True}",),
            "stage.1a.template_options is set, but stage.1a.template is",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            make("vicuna", *(f"stage.1a.{override}" for override in wrong)).of_stage("1a")
