"""What `avlm cache-features` reaches of the rate at which the encoders alone could run.

    python benchmarks/cache_features.py                 # SigLIP so400m/14-384 and BEATs, random weights; wants a GPU or TPU
    python benchmarks/cache_features.py --size demo     # seconds on a CPU; the same path

Clips of sixteen noise frames and one 10.24-s window of noise are written as records. Then, in one run:

    encoders   the compiled steps alone, on inputs that lie on the device: the bound
    disk       as many bytes as the clips' features take, written and flushed: the other bound
    command    what the verb does: JPEG decoded, encoded, brought back, written as records
    again      the verb over what is there already

The target is nine tenths of the bound.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from avlm_jax.assembly import assemble  # noqa: E402
from avlm_jax.cache_features import Encoders, Tally, cache_features, make_encoders  # noqa: E402
from avlm_jax.config import apply_overrides, enable_compilation_cache, load_config  # noqa: E402
from input_pipeline.media import LoadedMedia  # noqa: E402
from input_pipeline.records import encode_record, finish_records, write_shard  # noqa: E402
from input_pipeline.spec import MediaSpec  # noqa: E402
from input_pipeline.working_folder import WorkingFolder  # noqa: E402

TARGET = 0.9
CLIPS = {"7b": 96, "demo": 16}
STEPS = 20


def write_records(folder: Path, spec: MediaSpec, clips: int) -> None:
    """So many records in four shards; eight different ones, in turn."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (8, spec.num_frames, spec.image_size // 8, spec.image_size // 8, 3))
    frames = coarse.astype(np.uint8).repeat(8, axis=2).repeat(8, axis=3)
    side = spec.image_size - frames.shape[2]
    frames = np.pad(frames, ((0, 0), (0, 0), (0, side), (0, side), (0, 0)))
    sound = (0.1 * rng.normal(size=spec.window_samples)).astype(np.float32)
    window = (0.0, spec.window_samples / 16_000, sound)
    turns = [{"from": "human", "value": "<video>\nWhat is heard?"}, {"from": "gpt", "value": "Noise."}]

    def record(number: int) -> bytes:
        media = LoadedMedia(frames[number % 8], np.arange(spec.num_frames) * 0.64, [window], window[1])
        sample = {"id": f"{number}", "task": "qa", "conversations": turns}
        return encode_record(media, media_id=f"{number}", source="benchmark", samples=[sample])

    with WorkingFolder(folder, "benchmark") as work:
        bounds = np.linspace(0, clips, 5).astype(int)
        shares = [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
        entries = [write_shard(work.path, i, 4, map(record, share)) for i, share in enumerate(shares)]
        finish_records(work.path, spec, entries, plan="benchmark", manifest_lines=clips)
        work.put_in_place()


def time_encoders(encoders: Encoders, spec: MediaSpec) -> dict[str, float]:
    """Frames and windows per second of the compiled steps, inputs on the device, outputs left there."""
    rng = np.random.default_rng(1)
    n, size = encoders.size, spec.image_size
    end = np.float32(spec.window_samples / 16_000)
    inputs = {
        "video": (rng.integers(0, 255, (n, size, size, 3)).astype(np.uint8),),
        "audio": (
            (0.1 * rng.normal(size=(n, spec.window_samples))).astype(np.float32),
            np.tile(np.array([0, end], np.float32), (n, 1)),
            np.ones(n, np.bool_),
        ),
    }
    rates = {}
    for name, arrays in inputs.items():
        placed = [jax.device_put(array, encoders.sharding) for array in arrays]
        step = encoders._steps[name]
        jax.block_until_ready(step(encoders.params, *placed))
        begun = time.perf_counter()
        for _ in range(STEPS):
            out = step(encoders.params, *placed)
        jax.block_until_ready(out)
        rates[name] = STEPS * n / (time.perf_counter() - begun)
    return rates


def time_disk(folder: Path, size: int) -> float:
    """Bytes per second of writing one file of at most 2 GB and flushing it."""
    block = np.random.default_rng(2).bytes(2**24)
    count = max(min(size, 2 * 10**9) // len(block), 1)
    begun = time.perf_counter()
    with open(folder / "disk", "wb") as file:
        for _ in range(count):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    rate = count * len(block) / (time.perf_counter() - begun)
    (folder / "disk").unlink()
    return rate


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="7b", choices=CLIPS, help="default: %(default)s")
    parser.add_argument("--clips", type=int, default=0, help="default: 96, 16 at size demo")
    parser.add_argument("--batch-size", type=int, default=16, help="frames or windows per device and step")
    parser.add_argument("--scratch", metavar="DIR", help="where records and features are written (3 GB)")
    args = parser.parse_args()
    enable_compilation_cache()
    config = load_config(f"{ROOT}/configs/savenvideo.py:size={args.size}")
    overrides = [f"init.{part}=" for part in ("vision", "audio", "llm")]
    overrides.append(f"text.tokenizer={ROOT}/avlm_jax/demo_backbones/qwen2")
    config = apply_overrides(config, [f"--config.{override}" for override in overrides])
    assembly = assemble(config)
    spec, clips = assembly.system.spec, args.clips or CLIPS[args.size]
    encoders = make_encoders(assembly, ("video", "audio"), args.batch_size)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        records = Path(scratch) / "records"
        write_records(records, spec, clips)
        rates = time_encoders(encoders, spec)
        bound = 1 / (spec.num_frames / rates["video"] + 1 / rates["audio"])
        cache_features(encoders, str(records))  # Compiles, and fills the page cache.
        shutil.rmtree(f"{records}.features")
        tally = Tally()
        manifest = cache_features(encoders, str(records), tally=tally)
        begun = time.perf_counter()
        cache_features(encoders, str(records))
        again = time.perf_counter() - begun
        size = sum(shard["bytes"] for shard in manifest["shards"])
        disk = time_disk(Path(scratch), size)
    reached = tally.clips / tally.seconds
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(
        f"{args.size} on {devices}: {clips} clips of {spec.num_frames} frames and one window, {size / 1e9:.2f} GB"
    )
    print(
        f"encoders alone   {rates['video']:9.1f} frames/s {rates['audio']:9.1f} windows/s {bound:8.2f} clips/s"
    )
    print(
        f"cache-features   {'':34} {reached:8.2f} clips/s = {reached / bound:.2f} of the bound (target {TARGET})"
    )
    print(f"disk             {disk / 1e6:9.0f} MB/s {'':22} {disk * clips / size:8.2f} clips/s")
    print(f"over features that are there: {again:.2f} s")
    result: dict[str, Any] = {
        "size": args.size,
        "device": devices,
        "clips": clips,
        "batch_size": args.batch_size,
    }
    result |= {"rates": rates, "bound": bound, "reached": reached, "share": reached / bound, "target": TARGET}
    print(json.dumps({**result, "bytes": size, "disk_bytes_per_second": disk, "again_seconds": again}))
    return 0 if reached >= TARGET * bound or args.size != "7b" else 1


if __name__ == "__main__":
    sys.exit(main())
