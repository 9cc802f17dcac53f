"""The tables of the three backbones: whole, invertible, and strict about what they read."""

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from avlm_jax.encoders.beats import BeatsConfig
from avlm_jax.encoders.siglip import SiglipConfig
from avlm_jax.weights import beats, qwen2, safetensors_io, siglip
from avlm_jax.weights.table import WeightError, flatten, plan_import

SIGLIP = SiglipConfig(image_size=30, patch_size=8, width=16, depth=3, mlp_dim=24, num_heads=2)
BEATS = BeatsConfig(
    embed_dim=12, width=16, depth=2, num_heads=2, mlp_dim=24, conv_pos_kernel=6, conv_pos_groups=4,
    num_buckets=16, max_distance=40,
)  # fmt: skip
QWEN2 = dict(
    model_type="qwen2", vocab_size=37, hidden_size=16, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=24, tie_word_embeddings=False, rope_theta=1e6, rms_norm_eps=1e-6,
)  # fmt: skip


def fill(shapes, seed: int = 0, dtype=np.float32) -> dict:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(dtype), shapes)


def assert_same(found: dict, expected: dict) -> None:
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype and found[path].shape == array.shape, path
        assert found[path].tobytes() == array.tobytes(), path


def edit(folder: Path, change: dict, drop: tuple[str, ...] = ()) -> None:
    stored = {name: np.array(t) for name, t in safetensors_io.read_folder(folder).items() if name not in drop}
    safetensors_io.write_folder(folder, stored | change)


def edit_config(folder: Path, **change) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_siglip_round_trip(tmp_path, pooled, dtype):
    params = fill(siglip.expected_params(SIGLIP, pooled), dtype=dtype)
    siglip.save_siglip(tmp_path, SIGLIP, params)
    config, again, report = siglip.load_siglip(tmp_path, pooled=pooled)
    assert config == SIGLIP and not report.ignored
    assert_same(again, params)


def test_siglip_encoder_out_of_a_whole_model(tmp_path):
    whole = fill(siglip.expected_params(SIGLIP, True))
    siglip.save_siglip(tmp_path, SIGLIP, whole)
    edit(tmp_path, {"logit_scale": np.ones(1, np.float32), "text_model.x": np.ones(1, np.float32)})
    vision = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": vision}))
    config, params, report = siglip.load_siglip(tmp_path)
    np.testing.assert_array_equal(
        params["layers"]["mlp"]["fc1"]["kernel"], whole["layers"]["mlp"]["fc1"]["kernel"][:2]
    )
    counts = {reason: len(names) for reason, names in report.ignored.items()}
    assert counts == {
        "text tower and contrastive loss": 2,
        "layers above hidden state -2, which is the feature": 16,
        "final norm and head above hidden state -2, which is the feature": 13,
    }
    assert siglip.load_siglip(tmp_path, feature_layer=1)[1]["layers"]["ln1"]["scale"].shape == (1, 16)
    assert "layers" not in siglip.load_siglip(tmp_path, feature_layer=0)[1]


def test_siglip_refuses_what_it_does_not_know(tmp_path):
    siglip.save_siglip(tmp_path, SIGLIP, fill(siglip.expected_params(SIGLIP)))
    with pytest.raises(WeightError, match="missing tensor vision_model.head.probe"):
        siglip.load_siglip(tmp_path, pooled=True)
    bias = "vision_model.encoder.layers.1.mlp.fc2.bias"
    edit(tmp_path, {"encoder.layers.3.mlp.fc2.bias": np.zeros(16, np.float32)}, drop=(bias,))
    with pytest.raises(WeightError) as error:
        siglip.load_siglip(tmp_path)
    assert len(error.value.problems) == 2
    assert f"missing tensor {bias}" in str(error.value)
    assert f"unknown tensor encoder.layers.3.mlp.fc2.bias ({tmp_path}/model.safetensors)" in str(error.value)
    edit_config(tmp_path, hidden_act="quick_gelu")
    with pytest.raises(ValueError, match="config.json: hidden_act is 'quick_gelu'"):
        siglip.load_siglip(tmp_path)
    edit_config(tmp_path, model_type="clip_vision_model")
    with pytest.raises(ValueError, match="'clip_vision_model'"):
        siglip.load_siglip(tmp_path)
    with pytest.raises(ValueError, match="nowhere/config.json: missing"):
        siglip.load_siglip(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change", [{}, dict(embed_dim=16), dict(gru_gate=False), dict(deep_norm=False, max_distance=77)]
)
@pytest.mark.parametrize("num_classes", [None, 5])
def test_beats_round_trip(tmp_path, change, num_classes):
    config = dataclasses.replace(BEATS, **change)
    params = fill(beats.expected_params(config, num_classes))
    beats.save_beats(tmp_path, config, params)
    assert beats.read_config(tmp_path) == (config, num_classes)
    found, again, report = beats.load_beats(tmp_path, classifier=num_classes is not None)
    assert found == config and not report.ignored
    assert_same(again, params)


def test_beats_predictor_is_ignored_by_design_and_names_are_unilms(tmp_path):
    params = fill(beats.expected_params(BEATS, 5))
    beats.save_beats(tmp_path, BEATS, params)
    stored = safetensors_io.read_folder(tmp_path)
    assert stored["encoder.pos_conv.0.weight_v"].shape == (16, 4, 6)
    assert stored["encoder.pos_conv.0.weight_g"].shape == (1, 1, 6)
    assert stored["encoder.layers.1.self_attn.grep_a"].shape == (1, 2, 1, 1)
    assert stored["encoder.layers.1.self_attn.relative_attention_bias.weight"].shape == (16, 2)
    assert stored["patch_embedding.weight"].shape == (12, 1, 16, 16)
    _, encoder, report = beats.load_beats(tmp_path)
    assert_same(encoder, {name: value for name, value in params.items() if name != "predictor"})
    (names,) = report.ignored.values()
    assert names == ("predictor.bias", "predictor.weight")


def test_beats_refuses_what_it_does_not_know(tmp_path):
    beats.save_beats(tmp_path, BEATS, fill(beats.expected_params(BEATS)))
    with pytest.raises(ValueError, match="finetuned_model is false"):
        beats.load_beats(tmp_path, classifier=True)
    other = np.zeros((16, 2), np.float32)
    name = "encoder.layers.1.self_attn.relative_attention_bias.weight"
    edit(tmp_path, {name: other})
    with pytest.raises(WeightError, match=f"{name} .* must equal encoder.layers.0"):
        beats.load_beats(tmp_path)
    for key, value in (
        ("layer_norm_first", True),
        ("conv_bias", True),
        ("relative_position_embedding", False),
    ):
        edit_config(tmp_path, **{key: value})
        with pytest.raises(ValueError, match=f"config.json: {key} is {value}"):
            beats.load_beats(tmp_path)
        edit_config(tmp_path, **{key: not value})
    # unilm's class default, which every released checkpoint overrides, counts where the cfg is silent.
    cfg = json.loads((tmp_path / "config.json").read_text())
    del cfg["max_distance"]
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    assert beats.read_config(tmp_path)[0].max_distance == 1280


@pytest.mark.parametrize(
    "change", [{}, dict(tie_word_embeddings=True), dict(model_type="llama"), dict(head_dim=6)]
)
def test_qwen2_round_trip_in_shards(tmp_path, change):
    hf_config = QWEN2 | change
    params = fill(qwen2.expected_params(hf_config), dtype=ml_dtypes.bfloat16)
    qwen2.save_qwen2(tmp_path, hf_config, params, max_shard_bytes=3000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    found, again, report = qwen2.load_qwen2(tmp_path)
    assert {key: found[key] for key in hf_config} == hf_config
    assert_same(again, params)
    flat = flatten(again)
    assert ("head/kernel" in flat) == (not hf_config["tie_word_embeddings"])
    assert ("layers/attn/q/bias" in flat) == (hf_config["model_type"] == "qwen2")
    assert "layers/attn/o/bias" not in flat
    assert not report.ignored


def test_a_tied_head_must_be_the_embedding_table(tmp_path):
    hf_config = QWEN2 | dict(tie_word_embeddings=True)
    params = fill(qwen2.expected_params(hf_config))
    qwen2.save_qwen2(tmp_path, hf_config, params)
    edit(tmp_path, {"lm_head.weight": params["embed"]["embedding"]})
    _, again, report = qwen2.load_qwen2(tmp_path)
    assert_same(again, params)
    assert sum(report.ignored.values(), ()) == ("lm_head.weight",)
    edit(tmp_path, {"lm_head.weight": params["embed"]["embedding"] + 1})
    with pytest.raises(WeightError, match="lm_head.weight .* differs"):
        qwen2.load_qwen2(tmp_path)


def test_qwen2_refuses_adapters_other_models_and_missing_tensors(tmp_path):
    params = fill(qwen2.expected_params(QWEN2))
    params["layers"]["attn"]["q"]["lora_a"] = np.zeros((3, 16, 2), np.float32)
    with pytest.raises(WeightError, match="layers/attn/q/lora_a"):
        qwen2.save_qwen2(tmp_path, QWEN2, params)
    assert not list(tmp_path.iterdir())
    del params["layers"]["attn"]["q"]["lora_a"]
    qwen2.save_qwen2(tmp_path, QWEN2, params)
    edit(tmp_path, {}, drop=("model.layers.2.self_attn.k_proj.bias",))
    with pytest.raises(WeightError, match="missing tensor model.layers.2.self_attn.k_proj.bias"):
        qwen2.load_qwen2(tmp_path)
    for change, message in (
        (dict(rope_scaling={"type": "yarn", "factor": 4}), "rope type 'yarn'"),
        (dict(rope_scaling=None, attention_bias=True), "attention_bias is True"),
        (dict(attention_bias=False, hidden_size="16"), "hidden_size is '16'"),
        (dict(hidden_size=16, model_type="qwen3"), "'qwen3'; known: qwen2, llama"),
    ):
        edit_config(tmp_path, **change)
        with pytest.raises(ValueError, match=message):
            qwen2.load_qwen2(tmp_path)


def test_rotary_base_of_old_and_new_configs(tmp_path):
    params = fill(qwen2.expected_params(QWEN2))
    plain = {key: value for key, value in QWEN2.items() if key != "rope_theta"}
    for keys, theta in (
        (dict(rope_theta=5e5), 5e5),
        (dict(rope_parameters={"rope_type": "default", "rope_theta": 2e6}), 2e6),
        ({}, 1e4),
    ):
        qwen2.save_qwen2(tmp_path, plain | keys, params)
        assert qwen2.load_qwen2(tmp_path)[0]["rope_theta"] == theta


# Tensor counts of the released index files; sizes of systems' published configs.
QWEN2_7B = dict(
    model_type="qwen2", vocab_size=152064, hidden_size=3584, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, intermediate_size=18944, tie_word_embeddings=False,
)  # fmt: skip


@dataclasses.dataclass
class Abstract:
    shape: tuple[int, ...]
    dtype: np.dtype = np.dtype(np.float32)


def test_full_sizes_in_the_abstract():
    """Every published tensor finds its place, by shape alone. 7,615,616,512 is Qwen2-7B's parameter count."""
    expected = qwen2.expected_params(QWEN2_7B)
    assert sum(int(np.prod(leaf.shape)) for leaf in flatten(expected).values()) == 7_615_616_512
    tensors = {
        "model.embed_tokens.weight": (152064, 3584), "lm_head.weight": (152064, 3584),
        "model.norm.weight": (3584,),
    }  # fmt: skip
    for i in range(28):
        layer = f"model.layers.{i}"
        for name, rows in (("q", 3584), ("k", 512), ("v", 512)):
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = (rows, 3584)
            tensors[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        tensors[f"{layer}.self_attn.o_proj.weight"] = (3584, 3584)
        tensors[f"{layer}.mlp.gate_proj.weight"] = tensors[f"{layer}.mlp.up_proj.weight"] = (18944, 3584)
        tensors[f"{layer}.mlp.down_proj.weight"] = (3584, 18944)
        tensors[f"{layer}.input_layernorm.weight"] = (3584,)
        tensors[f"{layer}.post_attention_layernorm.weight"] = (3584,)
    assert len(tensors) == 339
    plan = plan_import(qwen2.qwen2_table(QWEN2_7B), {n: Abstract(s) for n, s in tensors.items()}, expected)
    assert len(plan.leaves) == 15
    siglip_shapes, beats_shapes = (
        siglip.expected_params(SiglipConfig(), True), beats.expected_params(BeatsConfig(), 527)
    )  # fmt: skip
    assert flatten(siglip_shapes)["head/attn/q/kernel"].shape == (1152, 1152)
    assert flatten(beats_shapes)["predictor/kernel"].shape == (768, 527)
