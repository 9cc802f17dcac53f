"""Systems with backbones in folders, and checkpoints of random numbers: what the tests of export begin from."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from avlm_jax.assembly import Assembly, assemble, load_backbones
from avlm_jax.config import apply_overrides, load_config
from avlm_jax.lora import is_lora
from avlm_jax.state import flatten, unflatten
from avlm_jax.weights.beats import save_beats
from avlm_jax.weights.qwen2 import save_qwen2
from avlm_jax.weights.siglip import save_siglip
from tests.tiny_system import random_params, save_tokenizer, tiny_config

DEMO = Path(__file__).parents[1] / "configs" / "savenvideo.py"
METADATA = {"stage": "2b", "hash": "ab" * 32, "parent": "cd" * 32, "steps": 60, "versions": {"jax": "0"}}


def demo_assembly() -> Assembly:
    """The demo's system on its own backbones, wherever the tests run."""
    config = load_config(f"{DEMO}:size=demo")
    root = DEMO.parents[1]  # The configuration's folders are relative to the repository.
    places = {f"init.{part}": config.init[part] for part in ("vision", "audio", "llm")}
    places["text.tokenizer"] = config.text.tokenizer
    return assemble(apply_overrides(config, [f"{key}={root / place}" for key, place in places.items()]))


def tiny_assembly(folder: Path, dtype=np.float32) -> Assembly:
    """The tiny system on random backbones, with separate embeddings, which the demo has not."""
    return assemble(tiny_config(folder / "tokenizer", *write_backbones(folder, dtype)))


def learnt_of(assembly: Assembly, seed: int = 0) -> dict:
    """Connector and adapters of random numbers, as a last stage publishes them."""
    flat = flatten(random_params(assembly, seed))
    return unflatten({p: x for p, x in flat.items() if p.startswith("connector/") or is_lora(p)})


def scale_of(assembly: Assembly) -> float:
    """alpha / rank of the adapters."""
    return assembly.config.model.llm.lora.alpha / assembly.config.model.llm.lora.rank


def write_backbones(folder: Path, dtype=np.float32, **llm) -> dict[str, str]:
    """Overrides for random backbones of the tiny system's sizes; `llm` changes the language model's config."""
    assembly = assemble(tiny_config(save_tokenizer(folder / "tokenizer"), "model.llm.tie_embeddings=false"))
    params = random_params(assembly, seed=7)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    system, c = assembly.system, assembly.system.llm_config
    save_siglip(folder / "vision", system.vision_config, params["vision"])
    save_beats(folder / "audio", system.audio_config, params["audio"])
    bare = {path: leaf for path, leaf in flatten(params["llm"]).items() if not is_lora(path)}
    hf = {
        "model_type": "qwen2", "vocab_size": c.vocab_size, "hidden_size": c.width, "num_hidden_layers": c.depth,
        "num_attention_heads": c.num_heads, "num_key_value_heads": c.num_kv_heads, "intermediate_size": c.mlp_dim,
        "rope_theta": c.rope_theta, "rms_norm_eps": c.norm_eps, "tie_word_embeddings": False,
    }  # fmt: skip
    save_qwen2(folder / "llm", hf | llm, unflatten(bare))
    return [f"init.{part}={folder / part}" for part in ("vision", "audio", "llm")] + [
        "model.llm.tie_embeddings=false"
    ]


def bits(tree) -> dict[str, tuple[str, bytes]]:
    return {path: (str(leaf.dtype), np.asarray(leaf).tobytes()) for path, leaf in flatten(tree).items()}


def backbones(config) -> dict[str, tuple[str, bytes]]:
    return {
        path: (str(leaf.dtype), leaf.read().tobytes()) for path, leaf in load_backbones(config)[0].items()
    }
