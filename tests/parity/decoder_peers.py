"""Random language models on both sides, and one call each for their logits."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import torch
import transformers

from avlm_jax.llm.decoder import Decoder
from avlm_jax.lora import LoraConfig
from tests.parity.peers import randomise
from tests.weights.published import decoder_config

SIZES = dict(
    vocab_size=90, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    tie_word_embeddings=False,
)  # fmt: skip


def make_peer(kind: str, sizes: dict, seed: int = 0) -> torch.nn.Module:
    """transformers' model of kind "qwen2" or "llama" with random weights, in fp32."""
    config, model = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }[kind]
    peer = model._from_config(config(**sizes), attn_implementation="eager").eval()
    randomise(peer, seed)
    return peer


def decoder_of(hf: dict, lora: LoraConfig | None = None) -> Decoder:
    """Our decoder of the sizes that `load_qwen2` returns."""
    config = decoder_config(hf)
    return Decoder(config if lora is None else dataclasses.replace(config, lora=lora))


@functools.partial(jax.jit, static_argnums=0)
def our_logits(decoder: Decoder, params, tokens, positions, mask, cache=None):
    """(logits, the advanced cache)."""

    def run(model: Decoder):
        hidden, filled = model(model.embed(tokens), positions, mask, cache)
        return hidden @ model.head_kernel(), filled

    return decoder.apply({"params": params}, method=run)


def their_logits(peer, tokens, positions, mask, **cache):
    """Their output; `mask` [b s] says which keys are valid."""
    with torch.no_grad():
        return peer(
            input_ids=torch.from_numpy(tokens),
            position_ids=torch.from_numpy(positions),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            **cache,
        )


def tokens_of(vocab: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random ids below `vocab`."""
    return np.random.default_rng(seed).integers(0, vocab, shape)


def places(mask: np.ndarray) -> np.ndarray:
    """Rotary positions that count the valid tokens."""
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0)
