"""SigLIP's vision tower in Hugging Face form (transformers: models/siglip/modeling_siglip.py)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from avlm_jax.encoders.siglip import SiglipConfig, SiglipEncoder, SiglipPooledModel
from avlm_jax.weights import safetensors_io
from avlm_jax.weights.json_file import read_json_object
from avlm_jax.weights.table import (
    IDENTITY,
    TRANSPOSE,
    Ignored,
    ImportPlan,
    LoadReport,
    Row,
    Table,
    Transform,
    export_params,
    open_params,
    patch_kernel,
    reshape,
    split,
)

PREFIX = "vision_model."  # in every released file; transformers 5 saves a lone vision tower without it
_CONFIG_KEYS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "mlp_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "ln_eps": "layer_norm_eps",
}
# For keys a file leaves out: SiglipVisionConfig's (transformers: models/siglip/configuration_siglip.py).
_CONFIG_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}


def siglip_table(config: SiglipConfig, pooled: bool = False) -> Table:
    """Rows of `SiglipEncoder`'s parameters, or of `SiglipPooledModel`'s."""

    def row(ours: str | tuple[str, ...], theirs: str, transform: Transform = IDENTITY) -> Row:
        return Row(ours, PREFIX + theirs, transform, aliases=(theirs,))

    def linear(ours: str, theirs: str) -> list[Row]:
        return [
            row(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSE),
            row(f"{ours}/bias", f"{theirs}.bias"),
        ]

    def norm(ours: str, theirs: str) -> list[Row]:
        return [row(f"{ours}/scale", f"{theirs}.weight"), row(f"{ours}/bias", f"{theirs}.bias")]

    layer = "encoder.layers.{i}"
    rows = [
        row("patch_embed/kernel", "embeddings.patch_embedding.weight", patch_kernel(config.patch_size, 3)),
        row("patch_embed/bias", "embeddings.patch_embedding.bias"),
        row("pos_embed", "embeddings.position_embedding.weight"),
    ]
    depth = config.depth if pooled else config.feature_depth
    if depth:
        rows += norm("layers/ln1", f"{layer}.layer_norm1") + norm("layers/ln2", f"{layer}.layer_norm2")
        for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
            rows += linear(f"layers/attn/{ours}", f"{layer}.self_attn.{theirs}")
        for name in ("fc1", "fc2"):
            rows += linear(f"layers/mlp/{name}", f"{layer}.mlp.{name}")
    prefix = f"(?:{re.escape(PREFIX)})?"
    ignored = [
        Ignored(r"text_model\..*|logit_scale|logit_bias", "text tower and contrastive loss"),
        Ignored(prefix + r"embeddings\.position_ids", "a constant buffer 0..p-1 of older files"),
    ]
    if pooled:
        qkv = ("head/attn/q", "head/attn/k", "head/attn/v")
        rows += norm("post_ln", "post_layernorm") + norm("head/ln", "head.layernorm")
        rows += [
            row("head/probe", "head.probe", reshape((1, 1, config.width), (1, config.width))),
            row(tuple(f"{p}/kernel" for p in qkv), "head.attention.in_proj_weight", split(3, transpose=True)),
            row(tuple(f"{p}/bias" for p in qkv), "head.attention.in_proj_bias", split(3, transpose=False)),
        ]
        rows += linear("head/attn/o", "head.attention.out_proj")
        rows += linear("head/mlp/fc1", "head.mlp.fc1") + linear("head/mlp/fc2", "head.mlp.fc2")
    else:
        above = "|".join(str(layer) for layer in range(depth, config.depth))
        reason = f"above hidden state {config.feature_layer}, which is the feature"
        if above:
            ignored.append(Ignored(rf"{prefix}encoder\.layers\.(?:{above})\..*", f"layers {reason}"))
        ignored.append(Ignored(rf"{prefix}(?:post_layernorm|head)\..*", f"final norm and head {reason}"))
    return Table("SigLIP", tuple(rows), tuple(ignored), depth)


def read_config(directory: str | Path, feature_layer: int | None = None) -> SiglipConfig:
    """`SiglipConfig` of a folder's config.json, of a whole SiglipModel or of its vision tower.

    Args:
        directory: of the folder.
        feature_layer: overrides config.json's own `feature_layer`, which only this project writes; without
            either it is -2.

    Raises:
        ValueError: config.json is missing or no SigLIP's, or asks for something this tower cannot do.
    """
    file = Path(directory) / "config.json"
    hf = read_json_object(file, "a SigLIP folder holds config.json beside its safetensors")
    if not isinstance(hf.get("vision_config", {}), dict):
        raise ValueError(f"{file}: vision_config is {hf['vision_config']!r}, not the keys of a model")
    hf = {**hf.get("vision_config", {}), "model_type": "siglip_vision_model"} if "vision_config" in hf else hf
    if hf.get("model_type") != "siglip_vision_model":
        raise ValueError(
            f"{file}: model_type is {hf.get('model_type')!r}, expected siglip or siglip_vision_model"
        )
    for key, wanted in (("hidden_act", "gelu_pytorch_tanh"), ("num_channels", 3)):
        if hf.get(key, wanted) != wanted:
            raise ValueError(f"{file}: {key} is {hf[key]!r}; only {wanted!r} is supported")
    sizes = {ours: hf.get(theirs, _CONFIG_DEFAULTS[theirs]) for ours, theirs in _CONFIG_KEYS.items()}
    if feature_layer is None:
        feature_layer = hf.get("feature_layer", -2)
    try:
        return SiglipConfig(**sizes, feature_layer=feature_layer)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None


def expected_params(config: SiglipConfig, pooled: bool = False) -> dict[str, Any]:
    """The parameter tree as shapes; `SiglipPooledModel`'s if pooled."""
    model = (SiglipPooledModel if pooled else SiglipEncoder)(config)
    image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.uint8)
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def open_siglip(
    directory: str | Path, *, feature_layer: int | None = None, pooled: bool = False
) -> tuple[SiglipConfig, ImportPlan]:
    """Config of a Hugging Face folder and its parameters, checked and unread.

    Args:
        directory: SiglipModel's or SiglipVisionModel's, single or sharded safetensors.
        feature_layer: see `read_config`.
        pooled: load `SiglipPooledModel`'s parameters instead of `SiglipEncoder`'s.

    Raises:
        ValueError: config.json, see `read_config`.
        SafetensorsError, WeightError: the files, or what is in them.
    """
    config = read_config(directory, feature_layer)
    tensors = safetensors_io.read_folder(directory)
    return config, open_params(siglip_table(config, pooled), tensors, expected_params(config, pooled))


def load_siglip(
    directory: str | Path, *, feature_layer: int | None = None, pooled: bool = False
) -> tuple[SiglipConfig, dict[str, Any], LoadReport]:
    """Config, parameters (numpy, in the stored dtype) and report of a folder; see `open_siglip`."""
    config, plan = open_siglip(directory, feature_layer=feature_layer, pooled=pooled)
    return config, plan.read(), plan.report()


def save_siglip(
    directory: str | Path, config: SiglipConfig, params: Mapping[str, Any], label: str = ""
) -> None:
    """Writes config.json and safetensors as SiglipVisionModel's.

    Parameters of `SiglipPooledModel` give a complete model. Those of `SiglipEncoder` give the layers they
    have: `load_siglip` reads them back, and transformers would report the rest as newly initialised. With a label it shows
    its progress.

    Raises:
        WeightError: the parameters are neither's for this config.
    """
    pooled = "head" in params
    tensors = export_params(siglip_table(config, pooled), params)
    hf = {theirs: getattr(config, ours) for ours, theirs in _CONFIG_KEYS.items()}
    hf |= {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "num_channels": 3,
        "attention_dropout": 0.0,
        "vision_use_head": True,
        "feature_layer": config.feature_layer,
    }
    safetensors_io.write_folder(directory, tensors, label=label)
    (Path(directory) / "config.json").write_text(json.dumps(hf, indent=2, sort_keys=True) + "\n")
