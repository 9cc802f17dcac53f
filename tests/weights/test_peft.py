"""Adapters in PEFT's form: written, read back to the bit, and refused by key where they are no plain LoRA."""

import json

import numpy as np
import pytest

from avlm_jax.lora import ALL_TARGETS, LoraConfig
from avlm_jax.state import flatten, unflatten
from avlm_jax.weights import safetensors_io
from avlm_jax.weights.peft import AdapterError, open_adapter, read_config, save_adapter
from avlm_jax.weights.table import WeightError

DEPTH = 3
SIZES = {  # target -> (module, in, out)
    "q": ("attn", 16, 16), "k": ("attn", 16, 8), "v": ("attn", 16, 8), "o": ("attn", 16, 16),
    "gate": ("mlp", 16, 24), "up": ("mlp", 16, 24), "down": ("mlp", 24, 16),
}  # fmt: skip


def adapter(lora: LoraConfig, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    flat = {}
    for name in lora.targets:
        module, width, features = SIZES[name]
        flat[f"layers/{module}/{name}/lora_a"] = rng.normal(size=(DEPTH, width, lora.rank))
        flat[f"layers/{module}/{name}/lora_b"] = rng.normal(size=(DEPTH, lora.rank, features))
    return unflatten({path: leaf.astype(np.float32) for path, leaf in flat.items()})


@pytest.mark.parametrize("targets", [ALL_TARGETS, ("q", "v"), ("down",)])
def test_round_trip_to_the_bit(tmp_path, targets):
    lora = LoraConfig(rank=4, alpha=6.5, dropout=0.1, targets=targets)
    params = adapter(lora)
    save_adapter(tmp_path, lora, params, base="Qwen/Qwen2-7B-Instruct")
    found, plan = open_adapter(tmp_path, params)
    assert found == lora
    assert {path: leaf.read().tobytes() for path, leaf in plan.leaves.items()} == {
        path: leaf.tobytes() for path, leaf in flatten(params).items()
    }


def test_names_are_peft_s(tmp_path):
    lora = LoraConfig(rank=4, alpha=8.0, targets=("q", "down"))
    params = adapter(lora)
    save_adapter(tmp_path, lora, params)
    stored = safetensors_io.read_file(tmp_path / "adapter_model.safetensors")
    names = {
        f"base_model.model.model.layers.{i}.{module}.lora_{half}.weight"
        for i in range(DEPTH)
        for module in ("self_attn.q_proj", "mlp.down_proj")
        for half in "AB"
    }
    assert stored.keys() == names
    name = "base_model.model.model.layers.2.mlp.down_proj.lora_A.weight"
    np.testing.assert_array_equal(np.asarray(stored[name]), params["layers"]["mlp"]["down"]["lora_a"][2].T)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, ["q_proj", "down_proj"])


def stored_config(tmp_path, **changes):
    lora = LoraConfig(rank=4, alpha=8.0)
    save_adapter(tmp_path, lora, adapter(lora))
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_rslora", True),
        ("use_dora", True),
        ("use_qalora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("modules_to_save", ["lm_head"]),
        ("layers_to_transform", [0]),
        ("layers_pattern", "layers"),
        ("layer_replication", [[0, 2]]),
        ("exclude_modules", ["v_proj"]),
        ("trainable_token_indices", [5]),
        ("target_parameters", ["experts"]),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("an_option_of_tomorrow", "on"),
        ("peft_type", "IA3"),
        ("target_modules", "all-linear"),
        ("target_modules", ["q_proj", "lm_head"]),
        ("target_modules", []),
        ("r", 0),
        ("r", "absent"),
        ("lora_alpha", None),
        ("lora_alpha", -1.0),
        ("lora_alpha", float("nan")),
        ("lora_dropout", 1.0),
    ],
)
def test_what_a_plain_lora_cannot_do_is_refused_by_key(tmp_path, key, value):
    stored_config(tmp_path, **{key: value})
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: {key} is "):
        read_config(tmp_path)


def test_what_says_nothing_about_the_numbers_is_passed_over(tmp_path):
    stored_config(
        tmp_path, peft_version="0.99", revision="main", rank_pattern={}, use_dora=False, megatron_core="megatron.core",
        layers_to_transform=None, init_lora_weights="gaussian", lora_dropout="absent",
    )  # fmt: skip
    assert read_config(tmp_path) == LoraConfig(rank=4, alpha=8.0, dropout=0.0)


def test_all_faults_are_told_at_once(tmp_path):
    stored_config(tmp_path, use_dora=True, use_rslora=True, bias="all")
    with pytest.raises(AdapterError) as caught:
        read_config(tmp_path)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("content", ["{", "[]", "null"])
def test_a_damaged_configuration_is_named(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        read_config(tmp_path)


def test_no_adapter_at_all(tmp_path):
    with pytest.raises(AdapterError, match=r"adapter_config\.json: missing"):
        read_config(tmp_path)


def test_tensors_that_are_not_the_models(tmp_path):
    lora = LoraConfig(rank=4, alpha=8.0)
    save_adapter(tmp_path, lora, adapter(lora))
    with pytest.raises(WeightError, match=r"lora_A\.weight .* has shape \[4, 16\]"):
        open_adapter(tmp_path, adapter(LoraConfig(rank=2, alpha=8.0)))
    with pytest.raises(WeightError, match="the model has it, but no row sets it"):
        save_adapter(
            tmp_path, LoraConfig(rank=4, targets=("q",)), adapter(LoraConfig(rank=4, targets=("q",)))
        )
        open_adapter(tmp_path, adapter(lora))
    with pytest.raises(WeightError, match="is not of rank 8"):
        save_adapter(tmp_path, LoraConfig(rank=8), adapter(lora))
