"""What `avlm export` writes, read by transformers and PEFT themselves: the language model, the adapter, the tokenizer."""

import dataclasses
import json
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from avlm_jax.assembly import assemble  # noqa: E402
from avlm_jax.config import apply_overrides  # noqa: E402
from avlm_jax.export import export_model  # noqa: E402
from avlm_jax.layers.mask import causal_mask  # noqa: E402
from avlm_jax.llm.decoder import Decoder  # noqa: E402
from avlm_jax.lora import LoraConfig, is_lora, retire  # noqa: E402
from avlm_jax.state import flatten, unflatten  # noqa: E402
from avlm_jax.weights.peft import AdapterError, adapter_table, open_adapter, read_config, save_adapter  # noqa: E402
from avlm_jax.weights.qwen2 import load_qwen2  # noqa: E402
from avlm_jax.weights.tokenizer_folder import PROBES  # noqa: E402
from input_pipeline.conversation import encode_text, load_tokenizer  # noqa: E402
from tests.exported_system import METADATA, demo_assembly, learnt_of, scale_of  # noqa: E402
from tests.parity.peers import relative_error  # noqa: E402

pytestmark = pytest.mark.parity

# fp32 on both sides, four layers; sums are ordered differently, and merged kernels were rounded to fp32 once.
TOLERANCE = 1e-4
TEXTS = (
    "What is heard between 0:02 and 0:05?",
    "The red circle appears; then a low tone is heard.",
    "A: a dog barks\nB: a bell rings",
)


@pytest.fixture(scope="module")
def demo():
    return demo_assembly()


@pytest.fixture(scope="module")
def learnt(demo):
    return learnt_of(demo)


@pytest.fixture(scope="module")
def exported(demo, learnt, tmp_path_factory):
    """Folders "merged" and "adapter"."""
    root = tmp_path_factory.mktemp("exported")
    for name in ("merged", "adapter"):
        export_model(demo.config, learnt, root / name, adapter=name == "adapter", metadata=METADATA)
    return root


def rows(assembly) -> np.ndarray:
    """Ids of the texts, cut to one length."""
    ids = [encode_text(assembly.tokenizer, text, assembly.system.media_token_id) for text in TEXTS]
    return np.array([row[: min(map(len, ids))] for row in ids], np.int32)


def our_logits(assembly, learnt, tokens: np.ndarray) -> np.ndarray:
    """Of the base with the adapter beside it, as training runs it."""
    config = assembly.system.llm_config
    if "llm" not in learnt:
        config = dataclasses.replace(config, lora=LoraConfig(rank=0))
    base = load_qwen2(assembly.config.init.llm)[1]
    params = unflatten(flatten(base) | flatten(learnt.get("llm", {})))

    def run(llm: Decoder, tokens: jax.Array) -> jax.Array:
        segments = jnp.ones(tokens.shape, jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden, _ = llm(llm.embed(tokens), positions, causal_mask(segments))
        return hidden @ llm.head_kernel()

    return np.asarray(Decoder(config).apply({"params": params}, tokens, method=run))


def their_logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens).long()).logits.float().numpy()


def load_llm(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


def load_adapter(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns of adapter tensors that it misses.
        return peft.PeftModel.from_pretrained(base, folder)


def test_transformers_runs_the_merged_language_model(demo, learnt, exported):
    model, tokens = load_llm(exported / "merged" / "llm"), rows(demo)
    found, expected = their_logits(model, tokens), our_logits(demo, learnt, tokens)
    error = relative_error(found, expected)
    change = relative_error(expected, our_logits(demo, {}, tokens))
    print(f"merged LLM in transformers: {error:.1e} of the scale; the adapter changes {change:.1e}")
    assert error < TOLERANCE and change > 100 * TOLERANCE
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))
    stops = model.generation_config.eos_token_id
    assert not model.generation_config.do_sample and stops == [638, 636]


def test_peft_runs_the_adapter_on_the_base(demo, learnt, exported):
    model = load_adapter(load_llm(exported / "adapter" / "llm"), exported / "adapter" / "adapter")
    tokens = rows(demo)
    error = relative_error(their_logits(model, tokens), our_logits(demo, learnt, tokens))
    print(f"base and adapter in PEFT: {error:.1e} of the scale")
    assert error < TOLERANCE
    stored = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    assert len(stored) == 2 * 7 * demo.system.llm_config.depth
    flat = flatten(learnt["llm"])
    down = stored["base_model.model.model.layers.3.mlp.down_proj.lora_B.default.weight"]
    np.testing.assert_array_equal(down.numpy(), flat["layers/mlp/down/lora_b"][3].T)


def test_peft_merges_to_what_the_merged_export_holds(exported):
    merged = load_adapter(
        load_llm(exported / "adapter" / "llm"), exported / "adapter" / "adapter"
    ).merge_and_unload()
    found, expected = merged.state_dict(), load_llm(exported / "merged" / "llm").state_dict()
    assert found.keys() == expected.keys()
    worst = max(
        relative_error(found[name].numpy(), expected[name].numpy()) for name in expected if "proj" in name
    )
    print(f"PEFT's merge against ours: {worst:.1e} of a kernel's largest entry")
    assert worst < 1e-6  # fp32, sums of 16 products.


@pytest.mark.parametrize("adapter", [True, False])
def test_an_adapter_of_an_earlier_stage_is_part_of_the_base(demo, tmp_path, adapter):
    """A lineage that merged one adapter and trained another on top of it."""
    first, second = learnt_of(demo, seed=1), learnt_of(demo, seed=2)
    out = export_model(
        demo.config, retire(first, scale_of(demo)) | {"llm": second["llm"]}, tmp_path / "out", adapter=adapter
    )
    model, tokens = load_llm(out / "llm"), rows(demo)
    if adapter:
        model = load_adapter(model, out / "adapter")
    # Two adapters of rank r are one of rank 2 r with twice the alpha.
    ours, theirs = flatten(first["llm"]), flatten(second["llm"])
    both = {
        path: np.concatenate([ours[path], theirs[path]], axis=-1 if path.endswith("a") else -2)
        for path in ours
    }
    lora = demo.config.model.llm.lora
    wide = apply_overrides(
        demo.config, [f"model.llm.lora.rank={2 * lora.rank}", f"model.llm.lora.alpha={2 * lora.alpha}"]
    )
    error = relative_error(
        their_logits(model, tokens), our_logits(assemble(wide), {"llm": unflatten(both)}, tokens)
    )
    print(f"two adapters, the last {'apart' if adapter else 'merged'}: {error:.1e} of the scale")
    assert error < TOLERANCE


@pytest.mark.parametrize("targets", [("q", "v"), ("gate", "up", "down", "o")])
def test_an_adapter_made_by_peft_is_read(demo, tmp_path, targets):
    names = [module.rpartition(".")[2] for module in modules(targets)]
    config = peft.LoraConfig(
        r=6, lora_alpha=9, lora_dropout=0.05, target_modules=names, task_type="CAUSAL_LM",
        init_lora_weights="gaussian",
    )  # fmt: skip
    model = peft.get_peft_model(load_llm(demo.config.init.llm), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    model.save_pretrained(tmp_path / "theirs")
    overrides = ["rank=6", "alpha=9", "dropout=0.05"]
    wanted = apply_overrides(demo.config, [f"model.llm.lora.{item}" for item in overrides]).unlock()
    wanted.model.llm.lora.targets = targets
    assembly = assemble(wanted)
    expected = flatten(assembly.abstract_params()["llm"])
    expected = unflatten({path: leaf for path, leaf in expected.items() if is_lora(path)})
    lora, plan = open_adapter(tmp_path / "theirs", expected)
    assert (lora.rank, lora.alpha, lora.dropout, set(lora.targets)) == (6, 9.0, 0.05, set(targets))
    learnt = unflatten({path: leaf.read() for path, leaf in plan.leaves.items()})
    tokens = rows(demo)
    error = relative_error(our_logits(assembly, {"llm": learnt}, tokens), their_logits(model, tokens))
    print(f"PEFT's adapter on {', '.join(names)} in JAX: {error:.1e} of the scale")
    assert error < TOLERANCE
    # And back to PEFT, to the bit.
    save_adapter(tmp_path / "ours", lora, learnt)
    theirs, ours = (peft.utils.load_peft_weights(str(tmp_path / name)) for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name].to(theirs[name].device)) for name in theirs)


def modules(targets) -> list[str]:
    return [row.theirs.removesuffix(".lora_A.weight") for row in adapter_table(targets, 1).rows[::2]]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layers_to_transform": [0, 1]}, "layers_to_transform"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"exclude_modules": ["k_proj"]}, "exclude_modules"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_modules": ".*q_proj"}, "target_modules"),
    ],
)
def test_what_peft_can_and_the_decoder_cannot_is_refused_by_key(tmp_path, options, key):
    peft.LoraConfig(
        **{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options
    ).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=f": {key} is "):
        read_config(tmp_path)


def test_peft_s_own_defaults_are_a_plain_lora(tmp_path):
    peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]).save_pretrained(tmp_path)
    assert read_config(tmp_path) == LoraConfig(rank=4, alpha=8.0, dropout=0.0, targets=("q", "down"))


def test_auto_tokenizer_gives_the_ids_of_training(demo, exported):
    folder = exported / "merged" / "llm"
    auto, plain = (
        transformers.AutoTokenizer.from_pretrained(folder),
        load_tokenizer(demo.config.text.tokenizer),
    )
    for text in (*TEXTS, *PROBES):
        assert auto(text).input_ids == plain(text).input_ids, text
        ours = encode_text(plain, text, demo.system.media_token_id)
        assert auto(text, split_special_tokens=True).input_ids == ours, text
    turns = [{"role": "user", "content": "What is heard?"}]
    assert auto.apply_chat_template(turns, tokenize=False) == plain.apply_chat_template(turns, tokenize=False)
    assert (auto.eos_token_id, auto.pad_token_id) == (638, 636)
    # Without the added keys it would be another tokenizer, so the test can fail.
    source = transformers.AutoTokenizer.from_pretrained(demo.config.text.tokenizer)
    assert any(source(text).input_ids != plain(text).input_ids for text in TEXTS)
    added = json.loads((folder / "tokenizer_config.json").read_text())
    original = json.loads(open(f"{demo.config.text.tokenizer}/tokenizer_config.json").read())
    assert {key: added[key] for key in original} == original and added.keys() - original.keys() == {
        "auto_map"
    }
