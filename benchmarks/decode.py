"""CPU time from a film to its 16 frames of 384 x 384: one pass, seeking, and what `load_media` chooses.

    python benchmarks/decode.py                      # some minutes
    python benchmarks/decode.py --size small         # seconds; the same path

The films are H.264 with B-frames, a texture that moves, without sound. Each way decodes the same frames, which is
checked bit for bit; the figure is the best of several rounds, in which the ways take turns, in milliseconds of the
process's CPU time, which other work on the machine disturbs least (one thread decodes). `planned` is what the plan of
a seeking decoder costs in packets (seeking.SEEK_PACKETS counted for each seek), to be held against the film's packets or,
of an interval, those up to its last wanted frame. At the end the cost of one seek is measured in packets.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from input_pipeline import media  # noqa: E402
from input_pipeline.containers import Limits, read_timeline  # noqa: E402
from input_pipeline.seeking import plan_runs, seek_cost  # noqa: E402
from input_pipeline.spec import MediaSpec  # noqa: E402

RATE = 30
# name: width, height, frames, frames of a group, interval in seconds
SIZES: dict[str, dict[str, tuple[int, int, int, int, tuple[float, float] | None]]] = {
    "full": {
        "360p, 10 s, GOP 60": (640, 360, 300, 60, None),
        "1080p, 10 s, GOP 250": (1920, 1080, 300, 250, None),
        "360p, 10 min, GOP 250": (640, 360, 18_000, 250, None),
        "360p, 10 min, GOP 250, 10 s at the end": (640, 360, 18_000, 250, (580.0, 590.0)),
        "360p, 10 min, GOP 250, 10 s at 0:05": (640, 360, 18_000, 250, (5.0, 15.0)),
    },
    "small": {
        "180p, 4 s, GOP 12": (320, 180, 120, 12, None),
        "180p, 40 s, GOP 60": (320, 180, 1200, 60, None),
        "180p, 40 s, GOP 60, 2 s at the end": (320, 180, 1200, 60, (36.0, 38.0)),
    },
}
WAYS = ("sequential", "seeking", "chosen")


def write_film(path: Path, width: int, height: int, frames: int, group: int) -> None:
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (height // 8 + 12, width // 8 + 12, 3), dtype=np.uint8)
    texture = texture.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=RATE)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.options = {"preset": "ultrafast", "x264-params": f"keyint={group}:bframes=3"}
        for i in range(frames):
            x = i % 90
            picture = np.ascontiguousarray(texture[x // 2 : x // 2 + height, x : x + width])
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, RATE)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))


def load(path: Path, spec: MediaSpec, interval: tuple[float, float] | None, way: str) -> tuple[float, Any]:
    """CPU seconds and the medium, loaded one way."""
    began = time.process_time()
    if way == "chosen":
        loaded = media.load_media(path, spec, interval=interval)
    else:
        with mock.patch.object(media, "seeking_pays", lambda *args, **options: way == "seeking"):
            loaded = media.load_media(path, spec, interval=interval)
    return time.process_time() - began, loaded


def planned_packets(path: Path, spec: MediaSpec, interval: tuple[float, float] | None) -> tuple[int, int]:
    """What a seeking decoder costs, and one pass, in packets."""
    track = read_timeline(path, "video", Limits()).video
    times, end = media._times_within(track, *(interval or (-np.inf, np.inf)))
    runs = plan_runs(track.times, track.decoded, track.entries, media.sample_times(times, end, spec))
    return seek_cost(runs), len(track.times) if interval is None else runs[-1].last + 1


def measure_seek(path: Path) -> float:
    """One seek to a keyframe and its first frame, in packets decoded one after the other."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type, stream.codec_context.thread_count = "SLICE", 1
        began = time.process_time()
        count = sum(1 for _ in zip(range(300), container.decode(stream), strict=False))
        packet = (time.process_time() - began) / count
        began = time.process_time()
        for _ in range(20):
            container.seek(0, stream=stream)
            next(container.decode(stream))
        return (time.process_time() - began) / 20 / packet


def main() -> int:
    parser = argparse.ArgumentParser(
        "decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--rounds", type=int, default=3, help="of which the best counts (%(default)d)")
    args = parser.parse_args()
    spec, rows = MediaSpec(), []
    print(f"{'CPU milliseconds':42}" + "".join(f"{way:>12}" for way in WAYS) + f"{'planned':>10}{'of':>8}")
    with tempfile.TemporaryDirectory() as folder:
        films: dict[tuple[int, int, int, int], Path] = {}
        for name, (*shape, interval) in SIZES[args.size].items():
            path = films.get(tuple(shape))
            if path is None:
                path = films[tuple(shape)] = Path(folder) / f"{len(films)}.mp4"
                write_film(path, *shape)
            best, frames = dict.fromkeys(WAYS, np.inf), []
            for _ in range(args.rounds):
                for way in WAYS:
                    seconds, loaded = load(path, spec, interval, way)
                    best[way] = min(best[way], seconds)
                    frames.append((loaded.frames.tobytes(), loaded.frame_times.tobytes()))
            if len(set(frames)) != 1:
                print(f"error: the ways differ on {name}", file=sys.stderr)
                return 1
            planned, of = planned_packets(path, spec, interval)
            rows.append({"film": name, **{way: round(1000 * best[way], 1) for way in WAYS}})
            rows[-1].update(planned_packets=planned, packets=of)
            print(f"{name:42}" + "".join(f"{1000 * best[way]:12.1f}" for way in WAYS) + f"{planned:10}{of:8}")
        seeks = {path: round(measure_seek(path), 1) for path in films.values()}
    names = {
        films[tuple(shape)]: name.split(", 10 s at")[0] for name, (*shape, _) in SIZES[args.size].items()
    }
    packets = {names[path]: value for path, value in seeks.items()}
    print(f"one seek costs, in packets: {packets}")
    print(
        json.dumps(
            {"benchmark": "decode", "size": args.size, "cpu_milliseconds": rows, "seek_packets": packets}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
