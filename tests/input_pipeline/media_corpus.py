"""Small media files whose every frame and sample is known, written with PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SIZE = 32  # pixels; large enough for every encoder
FRAME_RATE = 10  # how long the last frame lasts, and the rate in the headers; the times are free


def grey_levels(count: int) -> list[int]:
    """One level per frame, far enough apart to survive lossy coding: frame i can be read off its picture."""
    return [20 + round(i * 215 / max(count - 1, 1)) for i in range(count)]


def write_video(
    path: Path,
    levels: Sequence[int],
    times: Sequence[float],
    *,
    codec: str = "libx264",
    sound: np.ndarray | None = None,
    sound_start: float = 0.0,
    rate: int = 16_000,
    sound_codec: str = "pcm_s16le",
    container_options: dict[str, str] | None = None,
    codec_options: dict[str, str] | None = None,
) -> Path:
    """A film of plain grey frames shown at `times`, with int16 mono `sound` [n] at `rate` from `sound_start`
    on.

    Matroska keeps these times to a millisecond; mp4 wants pictures that start at 0.
    """
    with av.open(str(path), "w", options=container_options or {}) as container:
        video = container.add_stream(codec, rate=FRAME_RATE)
        video.width = video.height = SIZE
        video.pix_fmt = "yuv420p"
        video.time_base = video.codec_context.time_base = Fraction(1, 1000)
        video.options = codec_options or {}
        audio = container.add_stream(sound_codec, rate=rate, layout="mono") if sound is not None else None
        for level, time in zip(levels, times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.full((SIZE, SIZE, 3), level, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            _encode_sound(container, audio, sound[None], rate, sound_start)
    return path


def write_moving(
    path: Path,
    count: int,
    *,
    rate: int = 25,
    codec: str = "libx264",
    width: int = 64,
    height: int = 48,
    pix_fmt: str = "yuv420p",
    start: float = 0.0,
    codec_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """A film of a texture that moves, so that frames are predicted from each other."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (height // 8 + 20, width // 8 + 20, 3), dtype=np.uint8)
    texture = texture.repeat(8, 0).repeat(8, 1)
    first = round(start * rate)
    with av.open(str(path), "w", options=container_options or {}) as container:
        video = container.add_stream(codec, rate=rate)
        video.width, video.height, video.pix_fmt = width, height, pix_fmt
        video.options = codec_options or {}
        for i in range(count):
            x = 3 * i % 150
            picture = np.ascontiguousarray(texture[x // 2 : x // 2 + height, x : x + width])
            picture[:4, :4] = i % 256
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = first + i, Fraction(1, rate)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return path


def write_sound(
    path: Path,
    samples: np.ndarray,
    rate: int,
    *,
    codec: str = "pcm_s16le",
    layout: str = "mono",
    starts: Sequence[float] = (0.0,),
) -> Path:
    """Sound alone: `samples` [channels n], int16 or float32, played at each of `starts`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        for number, start in enumerate(starts):
            _encode_sound(container, stream, samples, rate, start, last=number == len(starts) - 1)
    return path


def _encode_sound(container, stream, samples, rate, start, *, last=True):
    samples = np.atleast_2d(samples)
    kind = "s16" if samples.dtype == np.int16 else "flt"
    packed = np.ascontiguousarray(samples.T.reshape(1, -1))
    layout = "mono" if len(samples) == 1 else "stereo"
    frame = av.AudioFrame.from_ndarray(packed, format=kind, layout=layout)
    frame.sample_rate, frame.pts, frame.time_base = rate, round(start * rate), Fraction(1, rate)
    container.mux(stream.encode(frame))
    if last:
        container.mux(stream.encode(None))


def cut(path: Path, fraction: float, name: str | None = None) -> Path:
    """The first part of a file, as an interrupted download leaves it."""
    data = path.read_bytes()
    target = path.with_name(name or f"cut_{path.name}")
    target.write_bytes(data[: int(len(data) * fraction)])
    return target
