"""How fast samples reach a training step: records and cached features against decoding videos on the fly.

    make parity ARGS=--collect-only                        # once: an environment that has torch, for the peer
    .venv-parity/bin/python benchmarks/loader.py           # everything, about five minutes on two cores
    .venv/bin/python benchmarks/loader.py --size tiny      # seconds; without torch the peer's rows are missing

Four measurements, all in one run and over the same clips:

    clips      records through `input_pipeline.loader.Loader`, against torch's DataLoader that opens, decodes, samples
               and resizes each mp4 with PyAV when it is asked for. Both get two worker slots; rounds alternate, medians
               count. The loader also tokenises and masks a conversation; the peer does not have to.
    one core   the record path pinned to one core, one thread
    features   cached SigLIP and BEATs features, 16 x 729 x 1152 and one 10.24-s window of 512 x 768 per sample, bf16
    scale      opening and reading 1,000 and 100,000 records of the same size: seconds, memory, cost per clip

The clips are ten seconds of 640 x 360 at 30 frames per second, H.264 with a keyframe every two seconds and AAC sound; the
pictures are panned over noise whose spectrum falls as a photograph's does. As JPEG their frames take about 30 KiB; two real
films (nasa_13013.mp4, bt709_full_range.mp4 of torchcodec's tests) take 25 and 26 KiB a frame at the same size and quality.
Files are read from the page cache. Linux only (/proc, CPU affinity).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"times_peer": 8.0, "clips_per_core": 40.0, "features_per_second": 25.0}
TOKENIZER = ROOT / "avlm_jax" / "demo_backbones" / "qwen2"
BATCH = 8
SIZES: dict[str, dict[str, Any]] = {
    "full": dict(
        clips=24, seconds=10, width=640, height=360, frames=16, image=384, rounds=3, batches=12,
        samples=48, patches=729, vision=1152, tokens=512, audio=768, records=(1_000, 100_000), reads=4_000,
    ),
    "tiny": dict(
        clips=8, seconds=2, width=160, height=96, frames=4, image=64, rounds=1, batches=2,
        samples=8, patches=16, vision=32, tokens=16, audio=16, records=(100, 1_000), reads=200,
    ),
}  # fmt: skip
FPS, KEYFRAME_EVERY = 30, 60


# The clips -----------------------------------------------------------------------------------------------------------


def photograph(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [h w 3] of noise with a 1/f amplitude spectrum, mostly grey, as natural images have it."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    noise = rng.normal(size=(3, 2, *frequency.shape))
    # Optics and compression leave little beyond a thirtieth of the sampling rate.
    amplitude = np.exp(-((frequency / 0.03) ** 2)) / frequency
    picture = np.fft.irfft2((noise[:, 0] + 1j * noise[:, 1]) * amplitude, s=(height, width)).transpose(
        1, 2, 0
    )
    grey = picture.mean(axis=2, keepdims=True)
    picture = grey + 0.35 * (picture - grey)
    return np.clip(128 + 52 * picture / picture.std(), 0, 255).astype(np.uint8)


def write_clip(path: Path, size: dict[str, Any], seed: int) -> None:
    """One mp4 with picture and sound."""
    import av

    rng = np.random.default_rng(seed)
    width, height, seconds = size["width"], size["height"], size["seconds"]
    scene = photograph(2 * height, 2 * width, rng)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS)
        video.width, video.height, video.pix_fmt, video.gop_size = width, height, "yuv420p", KEYFRAME_EVERY
        video.options = {"preset": "veryfast", "crf": "23"}
        audio = container.add_stream("aac", rate=44_100, layout="stereo")
        for i in range(seconds * FPS):
            x, y = (i * 2) % width, (i * 1) % height
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(scene[y : y + height, x : x + width]), "rgb24"
            )
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        time_axis = np.arange(seconds * 44_100) / 44_100
        tone = 0.3 * np.sin(2 * np.pi * (300 + 40 * seed) * time_axis) + 0.02 * rng.normal(
            size=len(time_axis)
        )
        sound = av.AudioFrame.from_ndarray(np.stack([tone, tone]).astype(np.float32), "fltp", "stereo")
        sound.sample_rate, sound.pts, sound.time_base = 44_100, 0, Fraction(1, 44_100)
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))


def media_spec(size: dict[str, Any]) -> Any:
    from input_pipeline.spec import MediaSpec

    return MediaSpec(num_frames=size["frames"], image_size=size["image"], max_windows=1)


def make_records(folder: Path, size: dict[str, Any]) -> None:
    """Clips in folder/media, records of them in folder/records."""
    from input_pipeline.manifest import parse_lines
    from input_pipeline.prepare import prepare

    media = folder / "media"
    media.mkdir()
    entries = []
    for number in range(size["clips"]):
        write_clip(media / f"{number}.mp4", size, number)
        turns = [{"from": "human", "value": "<video>\nWhat is heard?"}, {"from": "gpt", "value": "A tone."}]
        entries.append({"id": f"clip-{number}", "video": f"{number}.mp4", "conversations": turns})
    report = prepare(parse_lines(entries, media, source="benchmark"), folder / "records", media_spec(size))
    if report.rejected:
        raise SystemExit(f"a clip was rejected: {report.rejected[0]}")


# What is timed, each in a process of its own ----------------------------------------------------------------------------


def make_loader(records: Path, size: dict[str, Any], spec: Any = None, **options: Any) -> Any:
    from input_pipeline.conversation import find_media_token_id, load_tokenizer
    from input_pipeline.loader import Loader
    from input_pipeline.mixture import SourceConfig
    from input_pipeline.transforms.sample import SampleBuilder

    tokenizer = load_tokenizer(TOKENIZER)
    builder = SampleBuilder(
        spec=spec or media_spec(size),
        tokenizer=tokenizer,
        media_token_id=find_media_token_id(tokenizer, 640),
        num_media_tokens=256,
        max_length=512,
    )
    return Loader([SourceConfig(str(records))], builder, **{"batch_size": BATCH, **options})


def time_batches(batches: Any, count: int, rows: int = BATCH) -> float:
    """Samples per second over `count` batches, after one that does not count."""
    next(batches)
    begun = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * rows / (time.perf_counter() - begun)


def run_loader(folder: Path, size: dict[str, Any], *, workers: int = 0, threads: int = 2) -> dict[str, float]:
    with make_loader(folder, size, workers=workers, threads=threads) as loader:
        return {"per_second": time_batches(loader, size["batches"])}


def run_one_core(folder: Path, size: dict[str, Any]) -> dict[str, float]:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    begun, used = time.perf_counter(), time.process_time()
    with make_loader(folder, size, threads=1) as loader:
        next(loader)
        begun, used = time.perf_counter(), time.process_time()
        for _ in range(size["batches"]):
            next(loader)
        wall, used = time.perf_counter() - begun, time.process_time() - used
    samples = size["batches"] * BATCH
    return {"per_second": samples / wall, "per_cpu_second": samples / used}


class OnTheFly:
    """The peers' way, as a torch data set: one mp4 per item, decoded from its start, frames resized by Pillow."""

    def __init__(self, folder: Path, size: dict[str, Any]):
        self.paths, self.size = sorted(folder.glob("*.mp4")), size

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        import av
        from PIL import Image

        path, size = self.paths[number % len(self.paths)], self.size
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "SLICE"  # Two workers on two cores: frame threads would only compete.
            total = stream.frames
            wanted = {int((i + 0.5) * total / size["frames"]) for i in range(size["frames"])}
            pictures = [
                np.asarray(frame.to_image().resize((size["image"], size["image"]), Image.Resampling.BICUBIC))
                for i, frame in enumerate(container.decode(stream))
                if i in wanted
            ]
        resampler, parts = av.AudioResampler("s16", "mono", 16_000), []
        with av.open(str(path)) as container:
            for frame in container.decode(audio=0):
                parts += [part.to_ndarray()[0] for part in resampler.resample(frame)]
        sound = np.zeros(16_000 * size["seconds"], np.float32)
        samples = np.concatenate(parts)[: len(sound)]
        sound[: len(samples)] = samples / 32768.0
        return {"frames": np.stack(pictures), "audio": sound}


def run_peer(folder: Path, size: dict[str, Any]) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(
        OnTheFly(folder, size), batch_size=BATCH, num_workers=2, prefetch_factor=2
    )
    # The workers have begun on two batches each when the clock starts; over so few they would count for much.
    return {"per_second": time_batches(iter(loader), max(size["batches"] // 2, 2))}


def write_folder(folder: Path, spec: Any, records: Iterator[bytes], count: int, **manifest: Any) -> None:
    """Records in shards of at most 64 MB or so, as `avlm prepare` and `avlm cache-features` leave them."""
    from input_pipeline.records import finish_records, write_shard
    from input_pipeline.working_folder import WorkingFolder

    shards = max(1, min(count // 8, 16))
    with WorkingFolder(folder, "benchmark") as work:
        entries = []
        for index in range(shards):
            share = itertools.islice(records, (index + 1) * count // shards - index * count // shards)
            entries.append(write_shard(work.path, index, shards, share))
        finish_records(work.path, spec, entries, plan="benchmark", manifest_lines=count, **manifest)
        work.put_in_place()


def conversation(number: int) -> list[dict[str, Any]]:
    turns = [{"from": "human", "value": "<video>\nWhat is heard?"}, {"from": "gpt", "value": "A tone."}]
    return [{"id": f"sample-{number}", "task": "qa", "source": "benchmark", "conversations": turns}]


def write_features(folder: Path, size: dict[str, Any]) -> None:
    """Records of random features in the form that `avlm cache-features` writes."""
    from input_pipeline.features import replace_media
    from input_pipeline.media import LoadedMedia
    from input_pipeline.records import encode_record, unpack_record
    from input_pipeline.spec import FEATURE_DTYPE

    spec, rng = media_spec(size), np.random.default_rng(0)
    window = (0.0, spec.window_samples / 16_000, np.zeros(spec.window_samples, np.float32))
    pictures = np.zeros((spec.num_frames, spec.image_size, spec.image_size, 3), np.uint8)
    media = LoadedMedia(pictures, np.arange(spec.num_frames) * 0.64, [window], window[1])
    shapes = {"video": (size["patches"], size["vision"]), "audio": (size["tokens"], size["audio"])}
    # Random bits of finite numbers; made once, drawing a gigabyte takes longer than writing it.
    bits = rng.integers(0, 2**14, (spec.num_frames + 7, *shapes["video"]), np.uint16).view(FEATURE_DTYPE)
    sound = rng.normal(size=(1, *shapes["audio"])).astype(FEATURE_DTYPE)

    def records() -> Iterator[bytes]:
        for number in range(size["samples"]):
            samples = conversation(number)
            record = unpack_record(
                encode_record(media, media_id=f"{number}", source="benchmark", samples=samples)
            )
            first = number % 7
            yield replace_media(record, video=bits[first : first + spec.num_frames], audio=sound)

    features = {name: {"shape": list(shape)} for name, shape in shapes.items()}
    write_folder(folder, spec, records(), size["samples"], features=features)


def small_spec(size: dict[str, Any]) -> Any:
    return dataclasses.replace(media_spec(size), num_frames=1, image_size=32, window_frames=16)


def write_many(folder: Path, size: dict[str, Any], count: int) -> None:
    """So many records of one small picture and 0.16 s of sound each: index and access, hardly any decoding."""
    from input_pipeline.media import LoadedMedia
    from input_pipeline.records import encode_record

    spec, rng = small_spec(size), np.random.default_rng(0)
    picture = rng.integers(0, 255, (1, 32, 32, 3)).astype(np.uint8)
    samples = np.zeros(spec.window_samples, np.float32)
    media = LoadedMedia(picture, np.zeros(1), [(0.0, len(samples) / 16_000, samples)], 1.0)
    records = (
        encode_record(media, media_id=f"{number}.mp4", source="benchmark", samples=conversation(number))
        for number in range(count)
    )
    write_folder(folder, spec, records, count)


def resident() -> int:
    """Bytes of memory of this process, now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark reads /proc/self/status, which only Linux has")


def run_scale(folder: Path, size: dict[str, Any]) -> dict[str, float]:
    """Opens a folder of small records and reads at random places of an epoch; best of three, costs are small."""
    spec = small_spec(size)
    with make_loader(folder, size, spec=spec, threads=0) as warm:
        next(warm)  # Imports and first calls are not the records'.
    before, begun = resident(), time.perf_counter()
    with make_loader(folder, size, spec=spec, threads=0) as loader:
        opened = time.perf_counter() - begun
        memory, samples = resident() - before, len(loader.mixture)
        per_clip, per_position = [], []
        for _ in range(3):
            begun, count = time.perf_counter(), 0
            while count < size["reads"]:
                next(loader)
                count += BATCH
            per_clip.append((time.perf_counter() - begun) / count)
            begun = time.perf_counter()
            for batch in range(100):
                loader.sample_numbers(batch * 1_009)
            per_position.append((time.perf_counter() - begun) / 100 / BATCH)
    return {
        "samples": samples,
        "open_seconds": opened,
        "memory_bytes": memory,
        "clip_microseconds": min(per_clip) * 1e6,
        "position_microseconds": min(per_position) * 1e6,
    }


MEASUREMENTS: dict[str, Callable[..., dict[str, float]]] = {
    "threads": functools.partial(run_loader, threads=2),
    "workers": functools.partial(run_loader, threads=1, workers=2),
    "peer": run_peer,
    "one core": run_one_core,
    "features": functools.partial(run_loader, threads=2),
    "scale": run_scale,
}


def measure(name: str, folder: Path, size: str) -> dict[str, float]:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, "--measure", name, str(folder), "--size", size]
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **threads, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: failed\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def median_rate(found: list[dict[str, float]]) -> float:
    return statistics.median(one["per_second"] for one in found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="full", choices=SIZES, help="default: %(default)s")
    parser.add_argument(
        "--scratch", metavar="DIR", help="where clips and records are made (4 GB; default: /tmp)"
    )
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = SIZES[args.size]
    if args.measure:
        name, folder = args.measure
        print(json.dumps(MEASUREMENTS[name](Path(folder), size)))
        return 0
    peer = importlib.util.find_spec("torch") is not None
    names = ("threads", "workers", "peer") if peer else ("threads", "workers")
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        print("writing clips, records and features ...", file=sys.stderr, flush=True)
        make_records(folder, size)
        write_features(folder / "features", size)
        for count in size["records"]:
            write_many(folder / f"many-{count}", size, count)
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in (*names, "one core", "features")}
        for number in range(size["rounds"]):
            print(f"round {number + 1} of {size['rounds']} ...", file=sys.stderr, flush=True)
            for name, found in rounds.items():
                place = {"peer": "media", "features": "features"}.get(name, "records")
                found.append(measure(name, folder / place, args.size))
        scale = [measure("scale", folder / f"many-{count}", args.size) for count in size["records"]]
        stored = sum(path.stat().st_size for path in (folder / "records").iterdir()) / size["clips"]
        coded = sum(path.stat().st_size for path in (folder / "media").iterdir()) / size["clips"]
    rates = {name: median_rate(found) for name, found in rounds.items()}
    result: dict[str, Any] = {"size": args.size, "targets": TARGETS, "per_second": rates, "scale": scale}
    result |= {"record_bytes": stored, "clip_bytes": coded, "torch": peer, "rounds": rounds}
    print_table(result, size)
    if peer:
        ours = max(rates["threads"], rates["workers"])
        result["times_peer"] = ours / rates["peer"]
        print(
            f"records against decoding on the fly: {result['times_peer']:.1f} times (target {TARGETS['times_peer']:g})"
        )
    else:
        print(
            "torch is not installed here, so the peer was not timed; `make parity` builds an environment with it"
        )
    met = {
        "clips_per_core": rates["one core"] >= TARGETS["clips_per_core"],
        "features_per_second": rates["features"] >= TARGETS["features_per_second"],
        **({"times_peer": result["times_peer"] >= TARGETS["times_peer"]} if peer else {}),
    }
    print(json.dumps({**result, "met": met if args.size == "full" else None}))
    return 0 if all(met.values()) or args.size != "full" else 1


def print_table(result: dict[str, Any], size: dict[str, Any]) -> None:
    labels = {
        "threads": "records, two threads",
        "workers": "records, two worker processes",
        "peer": "torch DataLoader, PyAV on the fly",
        "one core": "records, one core and one thread",
        "features": f"cached features, {size['frames']} x {size['patches']} x {size['vision']}",
    }
    print(
        f"clips of {size['seconds']} s, {size['width']} x {size['height']}: {result['clip_bytes'] / 2**20:.2f} MiB;",
        end=" ",
    )
    print(
        f"as records of {size['frames']} frames at {size['image']}²: {result['record_bytes'] / 2**20:.2f} MiB"
    )
    print(f"{'':40} {'samples/s':>10} {'from':>8} {'to':>8}")
    for name, found in result["rounds"].items():
        rates = sorted(one["per_second"] for one in found)
        print(f"{labels[name]:40} {statistics.median(rates):10.1f} {rates[0]:8.1f} {rates[-1]:8.1f}")
    print(f"{'records':>10} {'open s':>8} {'MB':>8} {'bytes each':>11} {'us/clip':>9} {'us/position':>12}")
    for row in result["scale"]:
        print(
            f"{row['samples']:10,} {row['open_seconds']:8.2f} {row['memory_bytes'] / 1e6:8.1f}"
            f" {row['memory_bytes'] / row['samples']:11.0f} {row['clip_microseconds']:9.0f}"
            f" {row['position_microseconds']:12.1f}"
        )


if __name__ == "__main__":
    sys.exit(main())
