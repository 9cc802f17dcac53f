"""Host memory that loading a Qwen2-1.5B takes onto eight devices: what is needed beyond the arrays themselves.

    python benchmarks/import_weights.py                      # 3.1 GB of random bfloat16 in shards, eight CPU devices
    python benchmarks/import_weights.py --size tiny          # seconds; the same path

A folder in Hugging Face's form is written (several shards, random weights), then read in a fresh process each way:

    streamed    what `avlm train` does: `open_qwen2`, then `weights.placement.place` leaf by leaf
    whole       what a plain loader does: `load_qwen2` into numpy, then `jax.device_put`

On the CPU "device" arrays are host memory too. The figure is therefore the peak of the process's resident memory, less
what was resident before, less the arrays: `excess`. The target is 1.3 times the largest tensor in the files; the largest
slice that one device holds is printed beside it. Linux only (/proc/self/status).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

DEVICES = 8
TARGET = 1.3
# Qwen/Qwen2-1.5B, config.json; tiny has the same form.
SIZES: dict[str, dict[str, Any]] = {
    "1.5b": dict(
        vocab_size=151_936, hidden_size=1536, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, intermediate_size=8960, rope_theta=1e6, tie_word_embeddings=True,
    ),
    "tiny": dict(
        vocab_size=16_384, hidden_size=512, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=2, intermediate_size=2048, rope_theta=1e6, tie_word_embeddings=True,
    ),
}  # fmt: skip


def write_checkpoint(folder: Path, size: str, shards: int) -> int:
    """Random weights in about so many shards; returns their bytes."""
    import ml_dtypes

    from avlm_jax.weights import qwen2, safetensors_io
    from avlm_jax.weights.stored import Deferred
    from avlm_jax.weights.table import export_params, flatten, unflatten

    hf = {"model_type": "qwen2", **SIZES[size]}

    class Random:
        """Random bits of small numbers, one layer at a time."""

        def __init__(self, shape: tuple[int, ...], seed: int):
            self.shape, self.seed, self.dtype = shape, seed, np.dtype(ml_dtypes.bfloat16)

        def __getitem__(self, layer: int) -> np.ndarray:
            bits = np.random.default_rng([self.seed, layer]).integers(0, 2**14, self.shape[1:], np.uint16)
            return bits.view(self.dtype)

        def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
            bits = np.random.default_rng(self.seed).integers(0, 2**14, self.shape, np.uint16)
            return bits.view(self.dtype)

    leaves = {
        path: Random(leaf.shape, seed)
        for seed, (path, leaf) in enumerate(flatten(qwen2.expected_params(hf)).items())
    }
    tensors: dict[str, Deferred] = export_params(qwen2.qwen2_table(hf), unflatten(leaves))
    total = sum(tensor.nbytes for tensor in tensors.values())
    safetensors_io.write_folder(folder, tensors, max_shard_bytes=total // shards)
    (folder / "config.json").write_text(json.dumps(hf))
    return total


def resident(field: str) -> int:
    """Bytes of /proc/self/status: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark reads /proc/self/status, which only Linux has")


def measure(folder: Path, way: str) -> dict[str, Any]:
    """Loads once, in this process; returns seconds and bytes."""
    import jax
    import jax.numpy as jnp

    from avlm_jax.sharding import make_mesh, param_shardings
    from avlm_jax.weights import qwen2
    from avlm_jax.weights.placement import place
    from avlm_jax.weights.table import flatten

    mesh = make_mesh(data=1, fsdp=-1)
    jnp.zeros(8).block_until_ready()  # The backend's own memory is not the loader's.
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # The peak is counted from here.
    begun = time.perf_counter()
    if way == "streamed":
        hf, plan = qwen2.open_qwen2(folder)
        shardings = flatten(param_shardings(qwen2.expected_params(hf), mesh))
        arrays = {path: place(leaf, shardings[path]) for path, leaf in plan.leaves.items()}
        loaded = time.perf_counter() - begun
        report = plan.report()
    else:
        hf, params, report = qwen2.load_qwen2(folder)
        shardings = flatten(param_shardings(qwen2.expected_params(hf), mesh))
        flat = flatten(params)
        del params
        arrays = {path: jax.device_put(leaf, shardings[path]) for path, leaf in flat.items()}
        jax.block_until_ready(arrays)
        loaded = time.perf_counter() - begun
        plan = qwen2.open_qwen2(folder)[1]
    peak = resident("VmHWM")
    held = sum(shard.data.nbytes for array in arrays.values() for shard in array.addressable_shards)
    tensors = {name: plan.tensors[name] for leaf in plan.leaves.values() for name in leaf.names}
    return {
        "seconds": loaded,
        "seconds_with_hash": time.perf_counter() - begun,
        "arrays": held,
        "excess": peak - before - held,
        "largest_tensor": max(tensor.nbytes for tensor in tensors.values()),
        "largest_slice": max(array.addressable_shards[0].data.nbytes for array in arrays.values()),
        "tensors": report.count,
        "sha256": report.sha256,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="1.5b", choices=SIZES, help="default: %(default)s")
    parser.add_argument("--shards", type=int, default=4, metavar="N", help="files (default: %(default)s)")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), args.measure[1])))
        return 0
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        # glibc would keep freed buffers for later, which would count as the loader's.
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
    }
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "qwen2"
        print(f"writing Qwen2 {args.size} ...", file=sys.stderr, flush=True)
        total = write_checkpoint(folder, args.size, args.shards)
        files = len(list(folder.glob("*.safetensors")))
        for way in ("streamed", "whole"):
            print(f"loading, {way} ...", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--measure", str(folder), way]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            results[way] = json.loads(done.stdout.splitlines()[-1])
    largest = results["streamed"]["largest_tensor"]
    print(f"Qwen2 {args.size}: {total / 1e6:,.0f} MB in {files} shards, onto {DEVICES} CPU devices")
    print(
        f"largest tensor {largest / 1e6:,.1f} MB, largest slice {results['streamed']['largest_slice'] / 1e6:,.1f} MB"
    )
    print(
        f"{'':10} {'arrays MB':>10} {'excess MB':>10} {'/ slice':>8} {'/ tensor':>8} {'s':>7} {'s with hash':>12}"
    )
    for way, found in results.items():
        found["excess_of_slice"] = found["excess"] / found["largest_slice"]
        found["excess_of_tensor"] = found["excess"] / found["largest_tensor"]
        print(
            f"{way:10} {found['arrays'] / 1e6:10,.0f} {found['excess'] / 1e6:10,.1f} {found['excess_of_slice']:8.2f}"
            f" {found['excess_of_tensor']:8.2f} {found['seconds']:7.1f} {found['seconds_with_hash']:12.1f}"
        )
    same = results["streamed"]["sha256"] == results["whole"]["sha256"]
    met = results["streamed"]["excess_of_slice"] <= TARGET if args.size != "tiny" else None
    print(json.dumps({"size": args.size, "target": TARGET, "met": met, "same_hash": same, **results}))
    return 0 if same and met in (True, None) else 1


if __name__ == "__main__":
    sys.exit(main())
