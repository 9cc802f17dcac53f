"""What the int8 base (`frozen_dtype=int8`, see avlm_jax/quantize.py) costs in accuracy, for any language model's folder.

    python benchmarks/int8_accuracy.py --llm weights/llm       # as `avlm import-weights` made it, or as released
    python benchmarks/int8_accuracy.py                         # the demo's, seconds
    python benchmarks/int8_accuracy.py --size 7b               # random weights: one layer at Qwen2-7B's full width

Kernels: the error's root mean square over the kernel's, by name over all layers, and of the worst output channel. Model: the
same text goes through three decoders side by side, one layer in memory at a time:

    exact    weights as stored, products in fp32
    bf16     weights and products in bf16, what frozen_dtype=bfloat16 computes
    int8     the blocks' kernels in int8, products in bf16, what frozen_dtype=int8 computes

and bf16 and int8 are held against exact: the residual stream's relative difference after the last layer, the logits' (over
their standard deviation), the mean divergence of the next token's distribution (KL), how often the likeliest next token is
another, and the loss in nats. The text is the README unless --text names another; random weights read random tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from avlm_jax.layers.mask import causal_mask  # noqa: E402
from avlm_jax.llm.decoder import Block, DecoderConfig, RMSNorm  # noqa: E402
from avlm_jax.lora import LoraConfig  # noqa: E402
from avlm_jax.quantize import SCALE, dequantise, is_quantised, quantise  # noqa: E402
from avlm_jax.state import flatten, unflatten  # noqa: E402
from avlm_jax.weights import qwen2  # noqa: E402
from avlm_jax.weights.stored import StoredLeaf  # noqa: E402
from input_pipeline.conversation import load_tokenizer  # noqa: E402

WAYS = ("exact", "bf16", "int8")
LAYERS = "layers/"
# Qwen/Qwen2-7B, config.json, with one of its 28 layers and few of its 152,064 words.
ONE_LAYER = dict(
    model_type="qwen2", vocab_size=4096, hidden_size=3584, num_hidden_layers=1, num_attention_heads=28,
    num_key_value_heads=4, intermediate_size=18_944, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=False,
)  # fmt: skip

Read = Callable[[str, int | None], np.ndarray]  # (path, layer or None) -> a parameter


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--llm", type=Path, default=ROOT / "avlm_jax" / "demo_backbones" / "qwen2", metavar="DIR"
    )
    parser.add_argument("--size", choices=("7b",), help="random weights in place of --llm")
    parser.add_argument("--text", type=Path, default=ROOT / "README.md", metavar="FILE")
    parser.add_argument(
        "--tokens", type=int, default=256, metavar="N", help="of the text (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.size:
        hf, read = ONE_LAYER, random_weights(ONE_LAYER)
        tokens = np.random.default_rng(0).integers(0, hf["vocab_size"], args.tokens)
    else:
        hf, plan = qwen2.open_qwen2(args.llm)
        read = stored_weights(plan.leaves)
        text = args.text.read_text(encoding="utf-8")
        tokens = np.asarray(load_tokenizer(str(args.llm))(text)["input_ids"][: args.tokens])
    errors, model = compare(hf, read, tokens)
    print(f"{'kernel':<30}{'error':>14}{'worst channel':>14}")
    for name, error in errors.items():
        print(f"{name:<30}" + "".join(f"{value:>14.5f}" for value in error.figures().values()))
    print(f"\n{f'{len(tokens)} tokens':<30}{'bf16':>14}{'int8':>14}")
    for name, value in model["bf16"].items():
        print(f"{name.replace('_', ' '):<30}{value:>14.6f}{model['int8'][name]:>14.6f}")
    source = f"random, size {args.size}" if args.size else str(args.llm)
    kernels = {name: error.figures() for name, error in errors.items()}
    print(json.dumps({"weights": source, "tokens": len(tokens), "kernels": kernels, **model}))


def stored_weights(leaves: dict[str, StoredLeaf]) -> Read:
    def read(path: str, layer: int | None) -> np.ndarray:
        return np.asarray(leaves[path] if layer is None else leaves[path].layer(layer))

    return read


def random_weights(hf: dict[str, Any]) -> Read:
    """Gaussian kernels that keep a vector's size, as a released model's nearly do."""
    shapes = flatten(qwen2.expected_params(hf))

    def read(path: str, layer: int | None) -> np.ndarray:
        shape = shapes[path].shape if layer is None else shapes[path].shape[1:]
        rng = np.random.default_rng([sorted(shapes).index(path), layer or 0])
        if path.endswith("scale"):
            return np.ones(shape, np.float32)
        spread = {"embedding": 1.0, "bias": 0.1}.get(path.rpartition("/")[2], shape[0] ** -0.5)
        return rng.standard_normal(shape, np.float32) * np.float32(spread)

    return read


@dataclasses.dataclass
class KernelError:
    """Of one name's kernels: squares summed over layers, and the worst channel's relative error."""

    off: float = 0.0
    size: float = 0.0
    worst: float = 0.0

    def add(self, kernel: np.ndarray) -> None:
        off, size = map(np.asarray, _squares(kernel))
        self.off, self.size = self.off + float(off.sum()), self.size + float(size.sum())
        self.worst = max(self.worst, float((off[size > 0] / size[size > 0]).max()) ** 0.5)

    def figures(self) -> dict[str, float]:
        return {"error": (self.off / self.size) ** 0.5, "worst_channel": self.worst}


@jax.jit
def _squares(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the error and of the kernel, summed over each channel's inputs."""
    kernel = kernel.astype(jnp.float32)
    off = dequantise(*quantise(kernel)) - kernel
    return jnp.square(off).sum(axis=0), jnp.square(kernel).sum(axis=0)


def compare(
    hf: dict[str, Any], read: Read, tokens: np.ndarray
) -> tuple[dict[str, KernelError], dict[str, dict[str, float]]]:
    """Errors by kernel's name, and "bf16" and "int8" -> figures of the model, for a Hugging Face config and tokens [l]."""
    decoder = DecoderConfig(
        vocab_size=hf["vocab_size"], width=hf["hidden_size"], depth=1, num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"], head_dim=qwen2.head_dim(hf), mlp_dim=hf["intermediate_size"],
        rope_theta=hf["rope_theta"], norm_eps=hf["rms_norm_eps"], qkv_bias=qwen2.has_qkv_bias(hf),
        tie_embeddings=hf["tie_word_embeddings"], lora=LoraConfig(rank=0),
    )  # fmt: skip
    configs = {
        way: dataclasses.replace(decoder, dtype="float32" if way == "exact" else "bfloat16") for way in WAYS
    }
    of_layer = [path for path in flatten(qwen2.expected_params(hf)) if path.startswith(LAYERS)]
    rows = read("embed/embedding", None)[tokens][None]
    streams = {way: jnp.asarray(rows, configs[way].dtype) for way in WAYS}
    errors: dict[str, KernelError] = {}
    for layer in range(hf["num_hidden_layers"]):
        weights = {path.removeprefix(LAYERS): read(path, layer) for path in of_layer}
        for path in filter(_in_int8, weights):
            errors.setdefault(path.split("/")[-2], KernelError()).add(weights[path])
        for way in WAYS:
            streams[way] = run_layer(configs[way], as_kept(weights, way), streams[way])
    head = read("embed/embedding", None).T if decoder.tie_embeddings else read("head/kernel", None)
    logits = {way: end(configs[way], read("norm/scale", None), head, streams[way]) for way in WAYS}
    return errors, {
        way: {
            "residual_difference": relative(streams[way], streams["exact"]),
            **differences(logits[way], logits["exact"], jnp.asarray(tokens)),
        }
        for way in WAYS[1:]
    }


def _in_int8(path: str) -> bool:
    return is_quantised(f"llm/{LAYERS}{path}", "int8")


def as_kept(weights: dict[str, np.ndarray], way: str) -> dict[str, Any]:
    """One layer's parameters, nested, in the precision that `way` keeps them in."""
    kept: dict[str, jax.Array] = {}
    for path, leaf in weights.items():
        if way == "int8" and _in_int8(path):
            kept[path], kept[path + SCALE] = jax.jit(quantise)(leaf)
        else:
            kept[path] = jnp.asarray(leaf, jnp.float32 if way == "exact" else jnp.bfloat16)
    return unflatten(kept)


@functools.partial(jax.jit, static_argnums=0)
def run_layer(config: DecoderConfig, params: dict[str, Any], x: jax.Array) -> jax.Array:
    """The residual stream [1 l d] after one block."""
    positions = jnp.arange(x.shape[1])[None]
    mask = causal_mask(jnp.ones_like(positions))
    return Block(config).apply({"params": params}, x, None, jnp.zeros((), jnp.int32), positions, mask)[0]


@functools.partial(jax.jit, static_argnums=0)
def end(config: DecoderConfig, scale: jax.Array, head: jax.Array, x: jax.Array) -> jax.Array:
    """fp32 logits [l v]."""
    hidden = RMSNorm(config.norm_eps).apply({"params": {"scale": scale.astype(config.dtype)}}, x)
    return jnp.dot(hidden[0], head.astype(config.dtype), preferred_element_type=jnp.float32)


def relative(found: jax.Array, exact: jax.Array) -> float:
    """Root mean square of the difference over that of `exact`."""
    off = found.astype(jnp.float32) - exact
    return float(jnp.sqrt(jnp.square(off).sum() / jnp.square(exact).sum()))


@jax.jit
def _differences(found: jax.Array, exact: jax.Array, tokens: jax.Array) -> dict[str, jax.Array]:
    ours, theirs = jax.nn.log_softmax(found), jax.nn.log_softmax(exact)
    following = jnp.take_along_axis(ours[:-1], tokens[1:, None], axis=1)
    return {
        "logits_difference": jnp.sqrt(jnp.square(found - exact).mean()) / exact.std(),
        "next_token_kl": (jnp.exp(theirs) * (theirs - ours)).sum(axis=-1).mean(),
        "other_likeliest": (found.argmax(-1) != exact.argmax(-1)).mean(),
        "loss": -following.mean(),
        "loss_exact": -jnp.take_along_axis(theirs[:-1], tokens[1:, None], axis=1).mean(),
    }


def differences(found: jax.Array, exact: jax.Array, tokens: jax.Array) -> dict[str, float]:
    found_by_name = _differences(found, exact, tokens)
    order = ("logits_difference", "next_token_kl", "other_likeliest", "loss_exact", "loss")
    return {name: float(found_by_name[name]) for name in order}


if __name__ == "__main__":
    main()
