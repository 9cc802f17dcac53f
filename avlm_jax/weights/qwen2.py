"""Qwen2 and LLaMA in Hugging Face form (transformers: models/qwen2/modeling_qwen2.py, models/llama/).

Parameter tree, L = layers, d = hidden_size, V = vocab_size with its padding rows:

    embed/embedding [V d]        norm/scale [d]        head/kernel [d V]  absent when embeddings are tied
    layers/attn/{q,k,v,o}/kernel [L in out]            layers/attn/{q,k,v}/bias [L out]  Qwen2 only
    layers/mlp/{gate,up,down}/kernel [L in out]        layers/norm1/scale, layers/norm2/scale [L d]

Adapters are no part of it: merge them first, or store them on their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from avlm_jax.weights import safetensors_io
from avlm_jax.weights.json_file import read_json_object
from avlm_jax.weights.table import (
    TRANSPOSE,
    Ignored,
    ImportPlan,
    LoadReport,
    Row,
    Table,
    WeightError,
    export_params,
    open_params,
    unflatten,
)

_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "intermediate_size",
)  # fmt: skip
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def has_qkv_bias(hf_config: Mapping[str, Any]) -> bool:
    """Qwen2 always has biases on q, k and v; LLaMA has none."""
    return hf_config["model_type"] == "qwen2"


def head_dim(hf_config: Mapping[str, Any]) -> int:
    """Width of one attention head."""
    return hf_config.get("head_dim") or hf_config["hidden_size"] // hf_config["num_attention_heads"]


def qwen2_table(hf_config: Mapping[str, Any]) -> Table:
    """Rows for a Hugging Face config; which ones exist depends on its model_type and tie_word_embeddings."""

    def kernel(ours: str, theirs: str) -> Row:
        return Row(f"{ours}/kernel", f"{theirs}.weight", TRANSPOSE)

    layer = "model.layers.{i}"
    rows = [
        Row("embed/embedding", _EMBEDDING),
        Row("norm/scale", "model.norm.weight"),
        Row("layers/norm1/scale", f"{layer}.input_layernorm.weight"),
        Row("layers/norm2/scale", f"{layer}.post_attention_layernorm.weight"),
        *(kernel(f"layers/attn/{name}", f"{layer}.self_attn.{name}_proj") for name in "qkvo"),
        *(kernel(f"layers/mlp/{name}", f"{layer}.mlp.{name}_proj") for name in ("gate", "up", "down")),
    ]
    if has_qkv_bias(hf_config):
        rows += [Row(f"layers/attn/{name}/bias", f"{layer}.self_attn.{name}_proj.bias") for name in "qkv"]
    ignored = [
        Ignored(
            r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "a constant buffer of older LLaMA files"
        )
    ]
    if hf_config["tie_word_embeddings"]:
        ignored.append(Ignored(r"lm_head\.weight", "tied: equal to the embedding table, which was checked"))
    else:
        rows.append(kernel("head", "lm_head"))
    return Table(hf_config["model_type"], tuple(rows), tuple(ignored), hf_config["num_hidden_layers"])


def expected_params(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameter tree as shapes."""
    d, mlp, vocab = (hf_config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    layers, heads = hf_config["num_hidden_layers"], hf_config["num_attention_heads"]
    q = heads * head_dim(hf_config)
    kv = hf_config["num_key_value_heads"] * head_dim(hf_config)
    shapes: dict[str, tuple[int, ...]] = {
        "embed/embedding": (vocab, d),
        "norm/scale": (d,),
        "layers/norm1/scale": (layers, d),
        "layers/norm2/scale": (layers, d),
        "layers/attn/q/kernel": (layers, d, q),
        "layers/attn/k/kernel": (layers, d, kv),
        "layers/attn/v/kernel": (layers, d, kv),
        "layers/attn/o/kernel": (layers, q, d),
        "layers/mlp/gate/kernel": (layers, d, mlp),
        "layers/mlp/up/kernel": (layers, d, mlp),
        "layers/mlp/down/kernel": (layers, mlp, d),
    }
    if has_qkv_bias(hf_config):
        shapes |= {f"layers/attn/{name}/bias": (layers, q if name == "q" else kv) for name in "qkv"}
    if not hf_config["tie_word_embeddings"]:
        shapes["head/kernel"] = (d, vocab)
    return unflatten({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()})


def read_config(directory: str | Path) -> dict[str, Any]:
    """The folder's config.json, checked, with the keys that a decoder needs filled in.

    Filled in where absent, with transformers' defaults (models/qwen2/configuration_qwen2.py, models/llama/):
    tie_word_embeddings false, rms_norm_eps 1e-6, rope_theta (from transformers 5's `rope_parameters`, else
    10000), and for LLaMA num_key_value_heads = num_attention_heads.

    Raises:
        ValueError: config.json is missing, lacks a size, or asks for something the decoder cannot do.
    """
    file = Path(directory) / "config.json"
    hf = read_json_object(file, "a language model's folder holds config.json beside its safetensors")
    if hf.get("model_type") not in ("qwen2", "llama"):
        raise ValueError(f"{file}: model_type is {hf.get('model_type')!r}; known: qwen2, llama")
    if hf["model_type"] == "llama":
        hf.setdefault("num_key_value_heads", hf.get("num_attention_heads"))
    for key in _SIZES:
        if type(hf.get(key)) is not int or hf[key] < 1:
            raise ValueError(f"{file}: {key} is {hf.get(key)!r}, expected a positive whole number")
    unsupported = {
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
    }  # fmt: skip
    for key, wanted in unsupported.items():
        if hf.get(key, wanted) != wanted:
            raise ValueError(f"{file}: {key} is {hf[key]!r}; only {wanted!r} is supported")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{file}: rope_parameters is {rope!r}, expected keys and values")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ValueError(f"{file}: rope type {rope_type!r} is not supported; only 'default' is")
    hf.setdefault("rope_theta", rope.get("rope_theta", 10_000.0))
    hf.setdefault("tie_word_embeddings", False)
    hf.setdefault("rms_norm_eps", 1e-6)
    for key in ("rope_theta", "rms_norm_eps"):
        if type(hf[key]) not in (int, float) or not hf[key] > 0:
            raise ValueError(f"{file}: {key} is {hf[key]!r}, expected a positive number")
    if type(hf["tie_word_embeddings"]) is not bool:
        raise ValueError(
            f"{file}: tie_word_embeddings is {hf['tie_word_embeddings']!r}, expected true or false"
        )
    if hf.get("head_dim") is not None and (type(hf["head_dim"]) is not int or hf["head_dim"] < 1):
        raise ValueError(f"{file}: head_dim is {hf['head_dim']!r}, expected a positive whole number")
    return hf


def open_qwen2(directory: str | Path) -> tuple[dict[str, Any], ImportPlan]:
    """The Hugging Face config of a folder and its parameters, checked and unread.

    Raises:
        ValueError: config.json, see `read_config`.
        SafetensorsError, WeightError: the files, or what is in them; also a tied model whose separate
            lm_head differs from its embedding table.
    """
    hf_config = read_config(directory)
    tensors = safetensors_io.read_folder(directory)
    if hf_config["tie_word_embeddings"] and _HEAD in tensors and _EMBEDDING in tensors:
        head, embedding = tensors[_HEAD], tensors[_EMBEDDING]
        pairs = zip(head.pieces(), embedding.pieces(), strict=False)
        if (head.dtype, head.shape) != (embedding.dtype, embedding.shape) or any(a != b for a, b in pairs):
            raise WeightError(
                hf_config["model_type"],
                [f"{_HEAD} ({head.file}) differs from {_EMBEDDING}; tie_word_embeddings is true"],
            )
    return hf_config, open_params(qwen2_table(hf_config), tensors, expected_params(hf_config))


def load_qwen2(directory: str | Path) -> tuple[dict[str, Any], dict[str, Any], LoadReport]:
    """The Hugging Face config, parameters (numpy, in the stored dtype) and report of a folder; see `open_qwen2`."""
    hf_config, plan = open_qwen2(directory)
    return hf_config, plan.read(), plan.report()


def save_qwen2(
    directory: str | Path,
    hf_config: Mapping[str, Any],
    params: Mapping[str, Any],
    max_shard_bytes: int = safetensors_io.MAX_SHARD_BYTES,
    label: str = "",
) -> None:
    """Writes config.json and (sharded) safetensors that transformers' `from_pretrained` reads.

    With a label it shows its progress.

    Raises:
        WeightError: the parameters are not those of hf_config, adapters included.
    """
    hf = {"tie_word_embeddings": False, **hf_config}
    architecture = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[hf["model_type"]]
    hf.setdefault("architectures", [architecture])
    # What transformers loads it as; releases before 5 know the key by its older name.
    hf["dtype"] = hf["torch_dtype"] = str(np.dtype(params["embed"]["embedding"].dtype))
    safetensors_io.write_folder(directory, export_params(qwen2_table(hf), params), max_shard_bytes, label)
    (Path(directory) / "config.json").write_text(json.dumps(hf, indent=2, sort_keys=True) + "\n")
