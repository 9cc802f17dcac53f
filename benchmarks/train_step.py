"""Tokens per second, HFU and MFU of one training step, beside the same step in PyTorch.

    python benchmarks/train_step.py --what lora --peer      # Qwen2-7B, LoRA r=128 on all linears, 2,048 tokens; wants a GPU
    python benchmarks/train_step.py --what stage2 --peer    # SAVEnVideo's stage 2: 16 frames, 10 s to 160 s of sound a row
    python benchmarks/train_step.py --what stage2 --size tiny --peer   # seconds on a CPU; the same path

Weights are random and drawn on the device, batches lie there beforehand. Each side runs in a process of its own, one after the
other in turn, so that neither holds the other's memory:

    ours    `step.make_step` as `avlm train` runs it, over all devices; beside the peer, which knows one, over one
    peer    transformers and PEFT (train_step_peer.py): bf16 autocast over fp32 adapters, gradient checkpointing, SDPA or flash
            attention, full logits, fused AdamW: what the Hugging Face Trainer does with bf16=True; pictures and sound go
            through transformers' SigLIP and the PyTorch modules that `avlm export` ships, also with SDPA

A step's time is from its call to the arrival of its loss; the median is told. MFU and HFU are by avlm_jax/flops.py, the peer's
MFU by the same FLOPs. Both train the same number of parameters, or the benchmark fails. The targets, on an H200 at size 7b:
10,000 tokens/s for `lora`, and 1.3 times the peer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

TARGET_RATIO, TARGET_TOKENS = 1.3, 10_000
# configs/savenvideo.py's size, and the defaults of --rows, --length, --steps, --warmup.
SIZES = {"7b": ("7b", 4, 2048, 20, 3), "1.5b": ("1.5b", 4, 2048, 20, 3), "tiny": ("demo", 2, 160, 3, 1)}


def make_batch(spec: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """A batch of noise as the loader would make it; both sides draw the same. Rows are full, none is padded."""
    rng = np.random.default_rng(seed)
    rows, length, vocabulary = spec["rows"], spec["length"], spec["vocabulary"]
    batch = {
        "tokens": rng.integers(0, vocabulary, (rows, length), dtype=np.int32),
        "loss_mask": np.broadcast_to(np.arange(length) >= length // 2, (rows, length)).copy(),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": np.ones((rows, length), np.int32),
    }
    if spec["what"] == "lora":
        return batch
    m = spec["media"]
    batch["tokens"][:, 4 : 4 + spec["media_tokens"]] = vocabulary  # The placeholder's id needs no row.
    # From one window of sound in the first row to all of them in the last.
    windows = np.round(np.linspace(1, m["max_windows"], rows)) if rows > 1 else np.array([m["max_windows"]])
    samples = 400 + 160 * (m["window_frames"] - 1)
    starts = np.tile(np.arange(m["max_windows"]) * m["window_frames"] * 160, (rows, 1)) / 16_000
    size, frames = m["image_size"], m["num_frames"]
    duration = (windows * m["window_frames"] * 160 / 16_000).astype(np.float32)
    times = (np.arange(frames) + 0.5) / frames * duration[:, None]
    intervals = np.zeros((rows, m["max_intervals"], 2), np.float32)
    intervals[:, 0, 1] = duration
    return batch | {
        "frames": rng.integers(0, 256, (rows, frames, size, size, 3), dtype=np.uint8),
        "frame_times": times.astype(np.float32),
        "frame_mask": np.ones((rows, frames), bool),
        "audio": rng.normal(0, 0.1, (rows, m["max_windows"], samples)).astype(np.float32),
        "audio_spans": np.stack([starts, starts + samples / 16_000], axis=-1).astype(np.float32),
        "audio_mask": np.arange(m["max_windows"]) < windows[:, None],
        "intervals": intervals,
        "interval_mask": np.broadcast_to(np.arange(m["max_intervals"]) == 0, intervals.shape[:2]).copy(),
        "duration": duration,
    }


def time_steps(step: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """Runs step(number) -> loss, which returns when the loss is there; seconds of each timed one, and the first's."""
    seconds, loss = [], float("nan")
    for number in range(spec["warmup"] + spec["steps"]):
        begun = time.perf_counter()
        loss = step(number)
        seconds.append(time.perf_counter() - begun)
    if not np.isfinite(loss):
        raise SystemExit(f"the loss is {loss}: this would not be a step of training")
    return {"seconds": seconds[spec["warmup"] :], "first_seconds": seconds[0], "loss": loss}


def configured(args: argparse.Namespace) -> Any:
    """(configuration, system) of the arguments."""
    from avlm_jax.config import load_config
    from avlm_jax.models.api import build_system

    overrides = [f"model.llm.remat={args.remat}"] if args.remat else []
    overrides += [f"model.llm.attention_backend={args.attention}"] if args.attention else []
    overrides += [f"frozen_dtype={args.frozen_dtype}"] if args.frozen_dtype else []
    config = load_config(f"{ROOT}/configs/savenvideo.py:size={SIZES[args.size][0]}", overrides)
    return config, build_system(config, config.model.llm.vocab_size)


def text_only(system: Any) -> Any:
    """The language model of a system alone, as one that knows no media."""
    from avlm_jax.llm.decoder import Decoder, DecoderConfig
    from avlm_jax.models.api import System

    class TextOnly(System):
        llm_config: DecoderConfig

        def setup(self) -> None:
            self.llm = Decoder(self.llm_config)

        def spliced(self, batch: dict[str, Any]) -> tuple[Any, Any]:
            return self.llm.embed(batch["tokens"]), batch["segment_ids"]

    return TextOnly(system.media_token_id, system.llm_config)


def make_spec(args: argparse.Namespace) -> dict[str, Any]:
    """What both sides are told, as JSON values."""
    import dataclasses

    config, system = configured(args)
    parts = ("vision", "audio", "time", "avts", "llm")
    model = {part: dataclasses.asdict(getattr(system, f"{part}_config")) for part in parts}
    model["vision"]["depth"] = system.vision_config.feature_depth
    return {
        "what": args.what,
        "size": args.size,
        "rows": args.rows,
        "length": args.length,
        "steps": args.steps,
        "warmup": args.warmup,
        "vocabulary": system.llm_config.vocab_size,
        "media": dataclasses.asdict(system.spec),
        "media_tokens": system.num_media_tokens,
        "model": model,
        "loss_chunk": config.loss_chunk,
        "frozen_dtype": config.frozen_dtype,
        "peer_attention": args.peer_attention,
    }


def measure_ours(args: argparse.Namespace) -> dict[str, Any]:
    """Compiles and times the step in this process."""
    import jax

    from avlm_jax.chips import find_chip
    from avlm_jax.config import enable_compilation_cache
    from avlm_jax.flops import attention_kernel, step_flops
    from avlm_jax.models.api import init_params
    from avlm_jax.monitoring.meter import memory_in_use
    from avlm_jax.optim import OptimConfig
    from avlm_jax.quantize import abstract_frozen
    from avlm_jax.sharding import make_mesh, put_batch, replicated
    from avlm_jax.state import flatten, split
    from avlm_jax.step import create_state, make_step

    enable_compilation_cache()
    spec = make_spec(args)
    config, system = configured(args)
    patterns = config.stage["2a"].trainable
    if args.what == "lora":
        system, patterns = text_only(system), ("llm/.*/lora_[ab]",)
    devices = jax.devices()[:1] if args.peer else jax.devices()
    mesh, optim = make_mesh(data=1, fsdp=-1, devices=devices), OptimConfig()
    with jax.set_mesh(mesh):
        batches = [put_batch(make_batch(spec, seed), mesh) for seed in (0, 1)]
        abstract = jax.eval_shape(lambda batch: init_params(system, batch, 0), batches[0])
        paths = list(flatten(split(abstract, patterns)[0]))
        placed = abstract_frozen(abstract, config.frozen_dtype, fp32=paths)
        trainable, frozen = (draw(tree, mesh) for tree in split(placed, patterns))
        trained = sum(leaf.size for leaf in jax.tree.leaves(trainable))
        state = create_state(trainable, optim, 0, mesh)
        del trainable
        run = make_step(system, optim, config.loss_chunk, state)
        rate = jax.device_put(np.float32(1e-5), replicated(mesh))

        def step(number: int) -> float:
            nonlocal state
            state, metrics = run(state, frozen, [batches[number % 2]], rate)
            return float(metrics["loss"])

        timed = time_steps(step, spec)
    device = devices[0]
    llm, chip = system.llm_config, find_chip(device.device_kind)
    flops = step_flops(
        system,
        paths,
        rows=args.rows,
        length=args.length,
        clips=0 if args.what == "lora" else args.rows,
        backend=attention_kernel(llm.attention_backend, device.platform),
    )
    return timed | {
        "trained": trained,
        "device": device.device_kind,
        "devices": mesh.size,
        "peak_flops": chip.peak_flops if chip else None,
        "model_flops": flops.model,
        "hardware_flops": flops.hardware,
        "memory_gib": memory_in_use([device])["memory_peak_gib"],
        "versions": {"jax": jax.__version__},
    }


def draw(abstract: Any, mesh: Any) -> Any:
    """Parameters of a tree of shapes, drawn where they will lie; activations keep their size on the way through them."""
    import jax
    import jax.numpy as jnp

    from avlm_jax.sharding import param_shardings
    from avlm_jax.state import flatten, unflatten

    flat, shardings = flatten(abstract), flatten(param_shardings(abstract, mesh))

    def leaf(number: int, path: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        name = path.rpartition("/")[2]
        if name in ("scale", "bias", "gate_scale", "g", "lora_b"):
            return jnp.full(shape, name in ("scale", "gate_scale", "g"), dtype)
        key = jax.random.key(
            number, impl="rbg"
        )  # The generator of the hardware: 7 billion numbers in a second.
        if dtype == jnp.int8:
            return jax.random.randint(key, shape, -127, 128, dtype)
        if name == "kernel_scale":
            fan_in = flat[path.removesuffix("_scale")].shape[-2]
            return jnp.full(shape, (3 / fan_in) ** 0.5 / 127, dtype)
        spread = 0.02 if name == "embedding" else (3 / max(shape[-2:-1], default=1)) ** 0.5
        return jax.random.uniform(key, shape, dtype, -spread, spread)

    def all_leaves() -> dict[str, jax.Array]:
        return {path: leaf(n, path, x.shape, x.dtype) for n, (path, x) in enumerate(flat.items())}

    return unflatten(jax.jit(all_leaves, out_shardings=shardings)())


def run_side(side: str, args: argparse.Namespace, spec: dict[str, Any]) -> dict[str, Any]:
    """Measures one side in a fresh process."""
    if side == "ours":
        command = [sys.executable, __file__, *sys.argv[1:], "--measure"]
    else:
        script = Path(__file__).with_name("train_step_peer.py")
        command = [args.peer_python, str(script), json.dumps(spec)]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed with exit code {done.returncode}; its own words are above")
    return json.loads(done.stdout.splitlines()[-1])


def python_with_torch() -> str:
    """This Python if it has what the peer needs, else that of `make parity`."""
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft")):
        return sys.executable
    other = ROOT / ".venv-parity" / "bin" / "python"
    if not other.exists():
        raise SystemExit(
            "--peer needs torch, transformers and peft: `make .venv-parity/.installed` makes an environment that has them, "
            "--peer_python names another"
        )
    return str(other)


def summary(runs: list[dict[str, Any]], reference: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """One side's figures over all its runs; `reference` says what a step costs and what the device can do."""
    seconds = statistics.median(second for run in runs for second in run["seconds"])
    found = {
        "step_ms": 1e3 * seconds,
        "tokens_per_s": spec["rows"] * spec["length"] / seconds,
        "samples_per_s": spec["rows"] / seconds,
        "first_s": runs[0]["first_seconds"],
        "memory_gib": max(run["memory_gib"] for run in runs),
        "trained": runs[0]["trained"],
        "loss": runs[-1]["loss"],
        "versions": runs[0]["versions"],
    }
    if reference["peak_flops"]:
        peak = seconds * reference["devices"] * reference["peak_flops"]
        found["mfu"] = reference["model_flops"] / peak
        if "hardware_flops" in runs[0]:
            found["hfu"] = reference["hardware_flops"] / peak
    return found


def show(sides: dict[str, dict[str, Any]], reference: dict[str, Any], spec: dict[str, Any]) -> None:
    devices = f"{reference['devices']} x {reference['device']}"
    print(f"{spec['what']} {spec['size']} on {devices}: {spec['rows']} rows of {spec['length']} positions")
    model, hardware = (f"{reference[key] / 1e12:.4g}" for key in ("model_flops", "hardware_flops"))
    peak = reference["peak_flops"]
    told = f"{reference['devices']} x {peak / 1e12:g} TFLOP/s" if peak else "a peak that is not known: absent"
    print(f"MFU = {model} TFLOP / (seconds x {told}); HFU = {hardware} TFLOP / (the same)")
    print(
        f"{'':6}{'step ms':>10}{'tokens/s':>11}{'samples/s':>11}{'MFU':>7}{'HFU':>7}{'GiB':>8}{'first s':>9}"
    )
    for name, side in sides.items():
        shares = "".join(f"{side[key]:7.3f}" if key in side else f"{'-':>7}" for key in ("mfu", "hfu"))
        print(
            f"{name:6}{side['step_ms']:10.1f}{side['tokens_per_s']:11.0f}{side['samples_per_s']:11.3f}{shares}"
            f"{side['memory_gib']:8.2f}{side['first_s']:9.1f}"
        )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", default="lora", choices=("lora", "stage2"), help="default: %(default)s")
    parser.add_argument("--size", default="7b", choices=SIZES, help="default: %(default)s")
    parser.add_argument(
        "--rows", type=int, default=0, help="of a step over all devices (default: 4; tiny: 2)"
    )
    parser.add_argument("--length", type=int, default=0, help="text positions (default: 2048; tiny: 160)")
    parser.add_argument("--steps", type=int, default=0, help="timed (default: 20; tiny: 3)")
    parser.add_argument("--warmup", type=int, default=0, help="not timed (default: 3; tiny: 1)")
    parser.add_argument("--remat", default="", metavar="NAME", help="model.llm.remat in place of the size's")
    parser.add_argument(
        "--attention", default="", metavar="NAME", help="model.llm.attention_backend likewise"
    )
    parser.add_argument("--frozen_dtype", default="", metavar="DTYPE", help="of our frozen weights likewise")
    parser.add_argument("--peer", action="store_true", help="run PyTorch as well")
    parser.add_argument("--peer_python", default="", metavar="FILE", help="that has torch and PEFT")
    parser.add_argument("--peer_attention", default="sdpa", choices=("sdpa", "flash_attention_2", "eager"))
    parser.add_argument(
        "--rounds", type=int, default=0, help="processes of each side (default: 2 with --peer)"
    )
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, value in zip(("rows", "length", "steps", "warmup"), SIZES[args.size][1:], strict=True):
        setattr(args, name, getattr(args, name) or value)
    args.rounds = args.rounds or (2 if args.peer else 1)
    return args


def main() -> int:
    args = parse()
    if args.measure:
        print(json.dumps(measure_ours(args)))
        return 0
    if args.peer:
        args.peer_python = args.peer_python or python_with_torch()
    spec = make_spec(args)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in ("ours", *["peer"] * args.peer)}
    for round_number in range(1, args.rounds + 1):
        for side, done in runs.items():
            print(f"{side}, round {round_number} of {args.rounds} ...", file=sys.stderr, flush=True)
            done.append(run_side(side, args, spec))
    reference = runs["ours"][0]
    sides = {side: summary(done, reference, spec) for side, done in runs.items()}
    show(sides, reference, spec)
    result = {key: spec[key] for key in ("what", "size", "rows", "length", "frozen_dtype")} | {
        "remat": spec["model"]["llm"]["remat"],
        "device": reference["device"],
        "devices": reference["devices"],
        "model_flops": reference["model_flops"],
        "hardware_flops": reference["hardware_flops"],
        **sides,
    }
    reached = True
    if args.peer:
        counts = {side: found["trained"] for side, found in sides.items()}
        if counts["ours"] != counts["peer"]:
            raise SystemExit(f"the sides do not train the same: {counts} parameters")
        result |= {"ratio": sides["peer"]["step_ms"] / sides["ours"]["step_ms"], "target": TARGET_RATIO}
        print(f"ours is {result['ratio']:.2f} times as fast as the peer (target {TARGET_RATIO})")
        reached = result["ratio"] >= TARGET_RATIO
    if args.what == "lora" and "H200" in reference["device"]:
        reached &= sides["ours"]["tokens_per_s"] >= TARGET_TOKENS * reference["devices"]
    print(json.dumps(result))
    return 0 if reached or args.size != "7b" else 1


if __name__ == "__main__":
    sys.exit(main())
