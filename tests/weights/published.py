"""Sizes of the released checkpoints (their config.json; BEATs' cfg) and their numbers of parameters."""

from __future__ import annotations

from typing import Any

from avlm_jax.llm.decoder import DecoderConfig
from avlm_jax.lora import LoraConfig
from avlm_jax.weights.qwen2 import has_qkv_bias


def _language(
    kind: str, width: int, depth: int, heads: int, kv: int, mlp: int, vocab: int, tied: bool
) -> dict[str, Any]:
    eps, theta = (1e-6, 1e6) if kind == "qwen2" else (1e-5, 1e4)
    return dict(
        model_type=kind, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        num_key_value_heads=kv, intermediate_size=mlp, vocab_size=vocab, tie_word_embeddings=tied,
        rms_norm_eps=eps, rope_theta=theta,
    )  # fmt: skip


# Hugging Face config, parameters.
LANGUAGE = {
    "Qwen2-0.5B": (_language("qwen2", 896, 24, 14, 2, 4864, 151_936, True), 494_032_768),
    "Qwen2-1.5B": (_language("qwen2", 1536, 28, 12, 2, 8960, 151_936, True), 1_543_714_304),
    "Qwen2-7B": (_language("qwen2", 3584, 28, 28, 4, 18_944, 152_064, False), 7_615_616_512),
    "LLaMA-2-7B": (_language("llama", 4096, 32, 32, 32, 11_008, 32_000, False), 6_738_415_616),
    "LLaMA-2-13B": (_language("llama", 5120, 40, 40, 40, 13_824, 32_000, False), 13_015_864_320),
}

_BASE = dict(width=768, depth=12, mlp_dim=3072, num_heads=12, patch_size=16)
# Our sizes, parameters of the vision tower with its head, tokens per image.
SIGLIP = {
    "so400m-patch14-384": (dict(image_size=384), 428_225_600, 729),
    "base-patch16-224": (_BASE | dict(image_size=224), 92_884_224, 196),
    "base-patch16-256": (_BASE | dict(image_size=256), 92_930_304, 256),
    "base-patch16-384": (_BASE | dict(image_size=384), 93_176_064, 576),
}

# Classes -> parameters of iter3 and iter3+ (None: pretrained only). The position bias, which files repeat in every layer,
# counts once.
BEATS = {None: 90_311_792, 527: 90_717_055}


def decoder_config(config: dict[str, Any]) -> DecoderConfig:
    """Our config of a Hugging Face config, without adapters."""
    return DecoderConfig(
        vocab_size=config["vocab_size"], width=config["hidden_size"], depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"], num_kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim"), mlp_dim=config["intermediate_size"], rope_theta=config["rope_theta"],
        norm_eps=config["rms_norm_eps"], qkv_bias=has_qkv_bias(config),
        tie_embeddings=config["tie_word_embeddings"], dtype="float32", remat="none", lora=LoraConfig(rank=0),
    )  # fmt: skip
