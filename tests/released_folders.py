"""Folders in the form of the released weights, with random numbers and a few kilobytes each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from avlm_jax.encoders.beats import BeatsConfig
from avlm_jax.encoders.siglip import SiglipConfig
from avlm_jax.weights import beats, qwen2, safetensors_io, siglip
from tests.tiny_system import save_tokenizer

SIGLIP = SiglipConfig(image_size=32, patch_size=8, width=16, depth=3, mlp_dim=24, num_heads=2)
BEATS = BeatsConfig(
    embed_dim=12, width=16, depth=2, num_heads=2, mlp_dim=24, conv_pos_kernel=6, conv_pos_groups=4,
    num_buckets=16, max_distance=40,
)  # fmt: skip
VOCAB_ROWS = 300  # for the 260 tokens of `save_tokenizer`
QWEN2 = dict(
    model_type="qwen2", vocab_size=VOCAB_ROWS, hidden_size=16, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=24, tie_word_embeddings=False, rope_theta=1e6, rms_norm_eps=1e-6,
    eos_token_id=256, pad_token_id=257,
)  # fmt: skip
TAGS = 5

# What Qwen2's says: a system text of its own where the conversation brings none.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif -%}"
    "{%- for m in messages -%}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def fill(shapes: Any, seed: int = 0, dtype: Any = np.float32) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(dtype), shapes)


def make_siglip(folder: Path, seed: int = 0) -> Path:
    """A whole SiglipModel: vision tower with its head, text tower, the loss's scalars."""
    siglip.save_siglip(folder, SIGLIP, fill(siglip.expected_params(SIGLIP, True), seed))
    text = {f"text_model.encoder.layers.{i}.mlp.fc1.weight": np.ones((24, 16), np.float32) for i in range(3)}
    edit(folder, text | {"logit_scale": np.ones(1, np.float32), "logit_bias": np.ones(1, np.float32)})
    vision = json.loads((folder / "config.json").read_text())
    del vision["feature_layer"]
    write_json(folder / "config.json", {"model_type": "siglip", "vision_config": vision, "text_config": {}})
    write_json(
        folder / "preprocessor_config.json",
        {
            "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5], "image_processor_type": "SiglipImageProcessor", "resample": 3,
            "rescale_factor": 0.00392156862745098, "size": {"height": 32, "width": 32},
        },
    )  # fmt: skip
    return folder


def make_beats(folder: Path, seed: int = 1) -> Path:
    """A fine-tuned checkpoint after its conversion."""
    beats.save_beats(folder, BEATS, fill(beats.expected_params(BEATS, TAGS), seed))
    return folder


def make_qwen2(folder: Path, seed: int = 2, **change: Any) -> Path:
    """In several shards, with tokenizer, chat template and generation_config.json."""
    hf = QWEN2 | change
    params = fill(qwen2.expected_params(hf), seed, ml_dtypes.bfloat16)
    qwen2.save_qwen2(folder, hf, params, max_shard_bytes=12_000)
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()))
    save_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    write_json(folder / "generation_config.json", {"eos_token_id": [256, 257], "pad_token_id": 257})
    return folder


def edit(folder: Path, change: dict[str, Any], drop: tuple[str, ...] = ()) -> None:
    """Adds, replaces and removes tensors."""
    stored = {name: np.array(t) for name, t in safetensors_io.read_folder(folder).items() if name not in drop}
    safetensors_io.write_folder(folder, stored | change)


def edit_json(file: Path, **change: Any) -> None:
    write_json(file, json.loads(file.read_text()) | change)


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value))
