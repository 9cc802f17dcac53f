"""`avlm demo --make-backbones`: trains the three stand-ins and writes them as released weights are written.

<out>/siglip  config.json, model.safetensors (Hugging Face SiglipVisionModel)
<out>/beats   config.json (the checkpoint's cfg), model.safetensors (unilm's names)
<out>/qwen2   config.json, model.safetensors, tokenizer (Hugging Face Qwen2)
<out>/training_log.jsonl, <out>/hashes.json
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from avlm_jax.backbones.language import LanguageRecipe, train, train_tokenizer
from avlm_jax.backbones.perception import PerceptionRecipe, train_audio, train_vision
from avlm_jax.config import to_dataclass
from avlm_jax.encoders.beats import BeatsConfig
from avlm_jax.encoders.siglip import SiglipConfig
from avlm_jax.llm.decoder import DecoderConfig
from avlm_jax.lora import LoraConfig
from avlm_jax.weights.beats import save_beats
from avlm_jax.weights.qwen2 import save_qwen2
from avlm_jax.weights.siglip import save_siglip

LOG, HASHES = "training_log.jsonl", "hashes.json"
PARTS = ("vision", "audio", "language")


@dataclasses.dataclass(frozen=True)
class Recipes:
    """The three recipes; the defaults made the shipped backbones."""

    vision: PerceptionRecipe = PerceptionRecipe(steps=4000, batch_size=64)
    audio: PerceptionRecipe = PerceptionRecipe(steps=1000, batch_size=32)
    language: LanguageRecipe = LanguageRecipe()


def make_backbones(
    config: ConfigDict, out: Path, recipes: Recipes = Recipes(), parts: tuple[str, ...] = PARTS
) -> None:
    """Trains `parts` at the sizes of `config` and writes them below `out`; a part's folder and log lines are replaced.

    Args:
        config: configs/savenvideo.py:size=demo.
        out: folder of the backbones.
        recipes: steps, rates and seeds.
        parts: which of "vision", "audio", "language".
    """
    out.mkdir(parents=True, exist_ok=True)
    log_file = out / LOG
    kept = [x for x in _lines(log_file) if x["part"] not in parts]
    log_file.write_text("".join(json.dumps(x) + "\n" for x in kept))

    def log(line: dict[str, Any]) -> None:
        with log_file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(" ".join(f"{key} {value}" for key, value in line.items()), flush=True)

    if "vision" in parts:
        vision = to_dataclass(SiglipConfig, config.model.vision, "model.vision")
        save_siglip(out / "siglip", vision, jax.device_get(train_vision(recipes.vision, vision, log)))
    if "audio" in parts:
        audio = to_dataclass(BeatsConfig, config.model.audio, "model.audio")
        params = train_audio(recipes.audio, audio, config.media.window_frames, log)
        save_beats(out / "beats", audio, jax.device_get(params))
    if "language" in parts:
        decoder = to_dataclass(DecoderConfig, config.model.llm, "model.llm")
        decoder = dataclasses.replace(decoder, lora=LoraConfig(rank=0))
        tokenizer = train_tokenizer(recipes.language.seed, decoder.vocab_size)
        tokenizer.save_pretrained(out / "qwen2")

        def keep(step: int, params: dict) -> None:
            save_qwen2(out / "qwen2", hf_config(decoder, tokenizer), jax.device_get(params))

        train(recipes.language, decoder, tokenizer, log, keep=keep)
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name != HASHES]
    hashes = {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (out / HASHES).write_text(json.dumps(hashes, indent=2) + "\n")


def hf_config(decoder: DecoderConfig, tokenizer: Any) -> dict[str, Any]:
    """The decoder's sizes as Hugging Face's Qwen2Config writes them."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.width,
        "num_hidden_layers": decoder.depth,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "intermediate_size": decoder.mlp_dim,
        "rope_theta": decoder.rope_theta,
        "rms_norm_eps": decoder.norm_eps,
        "tie_word_embeddings": decoder.tie_embeddings,
        "hidden_act": "silu",
        "max_position_embeddings": tokenizer.model_max_length,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": "float32",
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
