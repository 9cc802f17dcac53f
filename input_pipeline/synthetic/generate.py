"""Writes synthetic videos with annotations and a manifest:

    python -m input_pipeline.synthetic.generate --out DIR --count N --seed S

DIR/videos/<id>.mp4 hold H.264 and AAC, DIR/annotations.json SAVEn-Vid's form (annotate.py),
DIR/manifest.jsonl one line per training or test sample. Scenes depend on (seed, index) alone, so the number
of workers changes nothing and a larger count only adds videos.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np

from input_pipeline.errors import UserError
from input_pipeline.progress import track
from input_pipeline.synthetic.annotate import annotate, manifest_lines
from input_pipeline.synthetic.questions import Question, make_questions
from input_pipeline.synthetic.render import FPS, frame_rate, render_frame
from input_pipeline.synthetic.scene import LONGEST, SHORTEST, Scene, make_scene
from input_pipeline.synthetic.sounds import SAMPLE_RATE, synthesize

SIZE = 96  # Pixels.
NUM_TYPES = 5
# H.264: constant quality 20 is visually clean at this size, and "ultrafast" costs less than drawing does. One
# thread each: videos are made in parallel, and x264's output depends on its number of threads.
VIDEO_OPTIONS = {"preset": "ultrafast", "crf": "20", "threads": "1"}
# AAC: the fast quantiser without the tools for music at few bits halves the time and hisses less on pure
# tones.
AUDIO_OPTIONS = {"aac_coder": "fast", "aac_tns": "0", "aac_pns": "0", "aac_is": "0", "aac_ms": "0"}
AUDIO_BIT_RATE = 64_000
AAC_FRAME = 1024  # Samples.


def draw_scene(
    seed: int, scene_id: str | None = None, shortest: float = SHORTEST, longest: float = LONGEST
) -> tuple[Scene, list[Question]]:
    """A scene about which all five types of question can be asked, and the questions.

    Args:
        seed: any non-negative integer.
        scene_id: name of the video; default "scene-<seed>".
        shortest, longest: bounds of the duration in seconds.
    """
    attempt = 0
    while True:
        high, low = np.random.SeedSequence([seed, attempt]).generate_state(2)
        sub_seed = (int(high) << 32 | int(low)) >> 1  # 63 bits: two videos never share a scene.
        scene = make_scene(sub_seed, scene_id or f"scene-{seed:07d}", shortest, longest)
        questions = make_questions(scene)
        if len(questions) == NUM_TYPES:
            return scene, questions
        attempt += 1


def write_video(
    scene: Scene,
    path: str | os.PathLike[str],
    size: int = SIZE,
    fps: int = FPS,
    sample_rate: int = SAMPLE_RATE,
) -> None:
    """Writes a scene as mp4, H.264 (yuv420p) and AAC (mono); the same arguments give the same file.

    Args:
        scene: what to show.
        path: the file; written beside it first, so that a killed run leaves no half video under this name.
        size: width and height in pixels, even.
        fps: frames per second of a short video; see `frame_rate`.
        sample_rate: Hz.

    Raises:
        UserError: `size` is odd or too small for H.264.
    """
    if size % 2 or size < 16:
        raise UserError(
            f"size is {size}; H.264 with halved chroma needs an even number of at least 16 pixels"
        )
    path = Path(path)
    rate = frame_rate(scene.duration, fps)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with av.open(str(unfinished), "w", format="mp4", options={"fflags": "+bitexact"}) as container:
            video = container.add_stream("libx264", rate=rate, options=VIDEO_OPTIONS)
            video.width = video.height = size
            video.pix_fmt = "yuv420p"
            audio = container.add_stream("aac", rate=sample_rate, layout="mono", options=AUDIO_OPTIONS)
            audio.bit_rate = AUDIO_BIT_RATE
            sound = _audio_frames(synthesize(scene, sample_rate), sample_rate)
            heard = 0.0
            for index in range(max(round(scene.duration * rate), 1)):
                shown = index / rate
                # Sound goes ahead of the picture by a frame at most: the file is interleaved as it is played.
                while heard <= shown and (chunk := next(sound, None)) is not None:
                    container.mux(audio.encode(chunk))
                    heard += AAC_FRAME / sample_rate
                frame = av.VideoFrame.from_ndarray(render_frame(scene, shown, size), format="rgb24")
                frame.pts = index
                container.mux(video.encode(frame))
            for chunk in sound:
                container.mux(audio.encode(chunk))
            container.mux(video.encode(None))
            container.mux(audio.encode(None))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _audio_frames(track: np.ndarray, sample_rate: int) -> Iterator[av.AudioFrame]:
    for begin in range(0, len(track), AAC_FRAME):
        frame = av.AudioFrame.from_ndarray(
            track[None, begin : begin + AAC_FRAME], format="fltp", layout="mono"
        )
        frame.sample_rate, frame.pts = sample_rate, begin
        yield frame


def _make(
    job: tuple[str, str, int, int, int, int, float, float],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder, scene_id, seed, index, size, fps, shortest, longest = job
    state = np.random.SeedSequence([seed, index]).generate_state(1)
    scene, questions = draw_scene(int(state[0]), scene_id, shortest, longest)
    name = f"videos/{scene_id}.mp4"
    write_video(scene, Path(folder, name), size, fps)
    return annotate(scene, questions, fps), manifest_lines(scene, questions, name)


def generate(
    out_dir: str | os.PathLike[str],
    count: int,
    seed: int,
    *,
    workers: int | None = None,
    size: int = SIZE,
    fps: int = FPS,
    prefix: str | None = None,
    shortest: float = SHORTEST,
    longest: float = LONGEST,
) -> Path:
    """Writes `count` videos with annotations.json and manifest.jsonl.

    Args:
        out_dir: folder; made if missing.
        count: number of videos.
        seed: another seed gives other videos.
        workers: processes; default one per core that this process may use. 1 stays in this process.
        size, fps: see `write_video`.
        prefix: videos are called <prefix>-<index>; default "s<seed>", so that two seeds' names differ.
        shortest, longest: bounds of the duration in seconds, drawn log-uniformly.

    Returns:
        The manifest's path. It is written last: where it stands, everything it names is there.

    Raises:
        UserError: an argument is out of its range, or `out_dir` cannot be written.
    """
    if count < 1:
        raise UserError(f"count is {count}; ask for at least one video")
    if seed < 0:
        raise UserError(f"seed is {seed}; it must not be negative")
    if not 4.0 <= shortest <= longest:
        raise UserError(f"durations from {shortest} to {longest} s: need 4 <= shortest <= longest")
    out = Path(out_dir)
    try:
        (out / "videos").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made a folder for videos ({error.strerror})") from None
    prefix = f"s{seed}" if prefix is None else prefix
    jobs = [
        (str(out), f"{prefix}-{index:05d}", seed, index, size, fps, shortest, longest)
        for index in range(count)
    ]
    workers = min(workers or len(os.sched_getaffinity(0)), count)
    manifest = out / "manifest.jsonl"
    manifest.unlink(missing_ok=True)
    made = list(track(_results(jobs, workers), total=count, label="synthetic videos", unit="videos"))
    _write(out / "annotations.json", json.dumps([annotation for annotation, _ in made], indent=1) + "\n")
    _write(manifest, "".join(json.dumps(line) + "\n" for _, lines in made for line in lines))
    return manifest


def _results(jobs: list[Any], workers: int) -> Iterator[Any]:
    """What `_make` returns for each job, in their order."""
    if workers == 1:
        yield from map(_make, jobs)
        return
    # Not forked: the caller may run threads (JAX does), whose locks a fork would copy shut.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_make, jobs, chunksize=2)


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of this module; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m input_pipeline.synthetic.generate",
        description="Write synthetic videos with sound, SAVEn-Vid annotations, and a manifest for prepare.",
        epilog="example: python -m input_pipeline.synthetic.generate --out data --count 100 --seed 0",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--out", required=True, help="folder for videos/, annotations.json and manifest.jsonl"
    )
    parser.add_argument("--count", type=int, default=100, help="number of videos")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other videos")
    parser.add_argument("--workers", type=int, default=None, help="processes; None: one per core")
    parser.add_argument("--size", type=int, default=SIZE, help="width and height in pixels, even")
    parser.add_argument(
        "--fps", type=int, default=FPS, help="frames per second of short videos; long ones get fewer"
    )
    parser.add_argument(
        "--prefix", default=None, help="name of the videos before their number; None: s<seed>"
    )
    parser.add_argument("--shortest", type=float, default=SHORTEST, help="seconds")
    parser.add_argument("--longest", type=float, default=LONGEST, help="seconds")
    args = vars(parser.parse_args(argv))
    out, count, seed = args.pop("out"), args.pop("count"), args.pop("seed")
    try:
        manifest = generate(out, count, seed, **args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(manifest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
