"""BEATs under the names of its checkpoints (microsoft/unilm: beats/BEATs.py, backbone.py).

The published checkpoint is a pickle {"cfg": ..., "model": ...}; the folder read here holds the same two
things as config.json (the cfg) and model.safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from avlm_jax.encoders.beats import BeatsClassifier, BeatsConfig, BeatsEncoder
from avlm_jax.weights import safetensors_io
from avlm_jax.weights.table import (
    IDENTITY,
    TRANSPOSE,
    Ignored,
    LoadReport,
    Row,
    Table,
    Transform,
    export_params,
    import_params,
    patch_kernel,
    permute,
    reshape,
)

# Our field -> (cfg key, value where the cfg leaves it out: BEATsConfig's own default in BEATs.py).
_CONFIG_KEYS: dict[str, tuple[str, Any]] = {
    "patch_size": ("input_patch_size", -1),
    "embed_dim": ("embed_dim", 512),
    "width": ("encoder_embed_dim", 768),
    "depth": ("encoder_layers", 12),
    "num_heads": ("encoder_attention_heads", 12),
    "mlp_dim": ("encoder_ffn_embed_dim", 3072),
    "conv_pos_kernel": ("conv_pos", 128),
    "conv_pos_groups": ("conv_pos_groups", 16),
    "num_buckets": ("num_buckets", 320),
    "max_distance": ("max_distance", 1280),
    "gru_gate": ("gru_rel_pos", False),
    "deep_norm": ("deep_norm", False),
}
# cfg key -> (the only value supported, BEATsConfig's default). All released checkpoints have these values.
_REQUIRED: dict[str, tuple[Any, Any]] = {
    "conv_bias": (False, False),
    "layer_norm_first": (False, False),
    "activation_fn": ("gelu", "gelu"),
    "relative_position_embedding": (True, False),
}


def beats_table(config: BeatsConfig, classifier: bool = False) -> Table:
    """Rows of `BeatsEncoder`'s parameters, or of `BeatsClassifier`'s."""

    def linear(ours: str, theirs: str) -> list[Row]:
        return [Row(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSE), Row(f"{ours}/bias", f"{theirs}.bias")]

    def norm(ours: str, theirs: str) -> list[Row]:
        return [Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")]

    def weight_norm(ours: str, old: str, new: str, transform: Transform = IDENTITY) -> Row:
        # torch renamed weight norm's tensors when it became a parametrization (torch 2.0).
        conv = "encoder.pos_conv.0"
        return Row(ours, f"{conv}.{old}", transform, aliases=(f"{conv}.parametrizations.weight.{new}",))

    taps, heads = config.conv_pos_kernel, config.num_heads
    layer, attn = "encoder.layers.{i}", "encoder.layers.{i}.self_attn"
    rows = [
        Row("patch_embed/kernel", "patch_embedding.weight", patch_kernel(config.patch_size, 1)),
        *norm("patch_ln", "layer_norm"),
        weight_norm("pos_conv/g", "weight_g", "original0", reshape((1, 1, taps), (taps,))),
        weight_norm("pos_conv/v", "weight_v", "original1", permute(2, 1, 0)),
        Row("pos_conv/bias", "encoder.pos_conv.0.bias"),
        *norm("pos_ln", "encoder.layer_norm"),
        Row("rel_pos/embedding", f"{attn}.relative_attention_bias.weight", shared=True),
        *norm("layers/ln1", f"{layer}.self_attn_layer_norm"),
        *norm("layers/ln2", f"{layer}.final_layer_norm"),
        *linear("layers/mlp/fc1", f"{layer}.fc1"),
        *linear("layers/mlp/fc2", f"{layer}.fc2"),
    ]
    if config.embed_dim != config.width:
        rows += linear("proj", "post_extract_proj")
    for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
        rows += linear(f"layers/attn/{ours}", f"{attn}.{theirs}")
    if config.gru_gate:
        rows += linear("layers/attn/gate", f"{attn}.grep_linear")
        rows.append(Row("layers/attn/gate_scale", f"{attn}.grep_a", reshape((1, heads, 1, 1), (heads,))))
    ignored: tuple[Ignored, ...] = ()
    if classifier:
        rows += linear("predictor", "predictor")
    else:
        ignored = (Ignored(r"predictor\.(weight|bias)", "the tagging head; features are read before it"),)
    return Table("BEATs", tuple(rows), ignored, config.depth)


def read_config(directory: str | Path) -> tuple[BeatsConfig, int | None]:
    """`BeatsConfig` and number of classes (None if not fine-tuned) of a folder's config.json.

    Raises:
        ValueError: config.json is missing, is no cfg of BEATs, or asks for something this encoder cannot do.
    """
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{file}: missing; a BEATs folder holds its cfg as config.json beside model.safetensors"
        )
    try:
        cfg = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: no valid JSON ({error})") from None
    for key, (wanted, default) in _REQUIRED.items():
        if cfg.get(key, default) != wanted:
            raise ValueError(f"{file}: {key} is {cfg.get(key, default)!r}; only {wanted!r} is supported")
    sizes = {ours: cfg.get(theirs, default) for ours, (theirs, default) in _CONFIG_KEYS.items()}
    try:
        config = BeatsConfig(**sizes, num_mel=cfg.get("num_mel_bins", 128))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from None
    return config, cfg.get("predictor_class", 527) if cfg.get("finetuned_model", False) else None


def expected_params(config: BeatsConfig, num_classes: int | None = None) -> dict[str, Any]:
    """The parameter tree as shapes; `BeatsClassifier`'s if num_classes is given."""
    model = BeatsEncoder(config) if num_classes is None else BeatsClassifier(config, num_classes=num_classes)
    fbank = jax.ShapeDtypeStruct((1, config.patch_size, config.num_mel), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, config.patch_size), jnp.bool_)
    return jax.eval_shape(model.init, jax.random.key(0), fbank, mask)["params"]


def load_beats(
    directory: str | Path, *, classifier: bool = False
) -> tuple[BeatsConfig, dict[str, Any], LoadReport]:
    """Config, parameters (numpy, in the stored dtype) and report of a folder.

    Args:
        directory: config.json with the checkpoint's cfg, and its tensors as safetensors.
        classifier: load `BeatsClassifier`'s parameters; the checkpoint must be a fine-tuned one.

    Raises:
        ValueError: config.json, see `read_config`; or a classifier is wanted from a checkpoint without one.
        SafetensorsError, WeightError: the files, or what is in them.
    """
    config, num_classes = read_config(directory)
    if classifier and num_classes is None:
        raise ValueError(f"{directory}: finetuned_model is false, so there is no classifier to load")
    tensors = safetensors_io.read_folder(directory)
    expected = expected_params(config, num_classes if classifier else None)
    params, report = import_params(beats_table(config, classifier), tensors, expected)
    return config, params, report


def save_beats(directory: str | Path, config: BeatsConfig, params: Mapping[str, Any]) -> None:
    """Writes config.json and safetensors, of `BeatsClassifier` if the parameters have a predictor.

    torch reads them with `BEATs(BEATsConfig(cfg)).load_state_dict(...)`.

    Raises:
        WeightError: the parameters are neither model's for this config.
    """
    classifier = "predictor" in params
    tensors = export_params(beats_table(config, classifier), params)
    cfg = {theirs: getattr(config, ours) for ours, (theirs, _) in _CONFIG_KEYS.items()}
    cfg |= {key: wanted for key, (wanted, _) in _REQUIRED.items()}
    cfg |= {"model_type": "beats", "num_mel_bins": config.num_mel, "finetuned_model": classifier}
    if classifier:
        cfg["predictor_class"] = int(params["predictor"]["bias"].shape[0])
    safetensors_io.write_folder(directory, tensors)
    (Path(directory) / "config.json").write_text(json.dumps(cfg, indent=2, sort_keys=True) + "\n")
