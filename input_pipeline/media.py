"""Media files become arrays: frames, their true times, and 16 kHz audio windows. PyAV is the only decoder.

Which files are opened and how their packets are read is containers.py. The timeline of the packets comes
first; then one pass decodes the picture and keeps the chosen frames alone, another decodes the sound and
keeps the windows alone. Memory is therefore bounded by the MediaSpec, not by the length of the file.

Time zero is the first moment anything is shown or heard: the smaller of the first frame's and the first
sample's presentation time. An audio file that starts at 0.138 s therefore starts at 0; a sound that starts
half a second after the picture has its first window at 0.5 s.
"""

from __future__ import annotations

import bisect
import dataclasses
import os
from array import array
from collections.abc import Iterator

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Interpolation
from PIL import Image

from input_pipeline.containers import (
    STRICT_CODECS,
    Limits,
    MediaError,
    Track,
    check_file,
    decode_stream,
    open_container,
    read_timeline,
)
from input_pipeline.spec import FBANK_FRAME_LENGTH, SAMPLE_RATE, MediaSpec

__all__ = [
    "Limits",
    "LoadedMedia",
    "MediaError",
    "MediaInfo",
    "load_media",
    "probe",
    "sample_times",
    "window_starts",
]

GAP_SECONDS = 0.1  # A hole this long between audio timestamps is real: a player is silent. Less is rounding.
STRICT_GAP_SECONDS = 0.005  # The same for codecs that number their samples; Matroska rounds to 0.001 s.
TIME_DIGITS = 9  # Decimals of a second that are kept: a sample at 16 kHz is a multiple of 0.0000625 s.
SAME_TIME = 1e-6  # s; timestamps are rationals with denominators up to 90,000 and more, compared as floats.

# Exact YCbCr to RGB, the same on every CPU. FFmpeg's default is faster and darker by half a level to one.
RGB_CONVERSION = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT
RGB_CONVERSION |= Interpolation.ACCURATE_RND | Interpolation.BITEXACT


@dataclasses.dataclass(frozen=True)
class MediaInfo:
    """What a file holds, read from its packets and its first frame.

    Attributes:
        duration: seconds from the first to the last moment of picture or sound; 0 for an image.
        width, height: pixels of the upright picture, rotation applied; 0 without picture.
        rotation: degrees counter-clockwise by which the coded picture is turned to stand upright.
        fps: mean frames per second, 0 without picture or for an image.
        num_frames: coded pictures in the file.
        sample_rate, channels: of the sound as stored; 0 without sound.
    """

    duration: float
    has_video: bool
    has_audio: bool
    width: int = 0
    height: int = 0
    rotation: int = 0
    fps: float = 0.0
    num_frames: int = 0
    video_codec: str = ""
    audio_codec: str = ""
    sample_rate: int = 0
    channels: int = 0


@dataclasses.dataclass(frozen=True)
class LoadedMedia:
    """One media file as arrays, unpadded.

    Attributes:
        frames: uint8 [t h w 3] RGB, h = w = image_size; t <= num_frames, 0 without picture.
        frame_times: f64 [t], seconds from the media's start at which the chosen frames are shown.
        windows: (start, end, f32 [n] samples at 16 kHz in [-1, 1]) with end - start = n / 16000 seconds,
            n <= window_samples; empty without sound.
        duration: seconds; 0 for an image.
    """

    frames: np.ndarray
    frame_times: np.ndarray
    windows: list[tuple[float, float, np.ndarray]]
    duration: float

    @property
    def has_video(self) -> bool:
        return len(self.frames) > 0

    @property
    def has_audio(self) -> bool:
        return len(self.windows) > 0


def sample_times(times: array[float], end: float, spec: MediaSpec) -> list[float]:
    """Times in seconds to show, `spec.num_frames` of them or, in a shorter video, those of all its frames.

    Args:
        times: presentation times of the video's frames, ascending.
        end: when the last frame ends.
        spec: "midpoint" gives the middle of each of num_frames equal segments of the duration (the rule of
            Video-ChatGPT and VideoLLaMA2); "linspace" includes the first and the last frame (VTimeLLM,
            LongVALE).
    """
    if len(times) <= spec.num_frames:
        return list(times)
    if spec.sampler == "linspace":
        return [float(t) for t in np.linspace(times[0], times[-1], spec.num_frames)]
    segment = (end - times[0]) / spec.num_frames
    return [times[0] + (i + 0.5) * segment for i in range(spec.num_frames)]


def window_starts(total: int, centres: list[float] | None, spec: MediaSpec) -> list[int]:
    """First sample of each audio window of a sound of `total` samples at 16 kHz.

    A sound that fits (total <= max_windows * window_hop) is cut into contiguous windows whose filterbank
    frames join without a seam. A longer one gets max_windows whole windows, centred on `centres` (seconds
    from the sound's start: the times of the frames) if there are as many of them, else on the midpoints of
    max_windows equal segments; windows that would leave the sound are moved inside, and those that then
    coincide are given once.
    """
    if total <= spec.max_windows * spec.window_hop:
        return [i * spec.window_hop for i in range(spec.max_windows)]
    if centres is None or len(centres) != spec.max_windows:
        segment = total / SAMPLE_RATE / spec.max_windows
        centres = [(i + 0.5) * segment for i in range(spec.max_windows)]
    last = total - spec.window_samples
    starts = [round(c * SAMPLE_RATE) - spec.window_samples // 2 for c in centres]
    return sorted({min(max(s, 0), last) for s in starts})


def probe(path: str | os.PathLike[str], *, kind: str = "auto", limits: Limits | None = None) -> MediaInfo:
    """Reads what a file holds: all packets, one decoded frame. Raises MediaError as `load_media` does."""
    limits = limits or Limits()
    kind = check_file(path, kind, limits)
    if kind == "image":
        width, height, rotation, codec = _probe_frame(path, kind, 0, limits)
        return MediaInfo(0.0, True, False, width, height, rotation, 0.0, 1, codec)
    timeline = read_timeline(path, kind, limits)
    video, audio = timeline.video, timeline.audio
    start = min(track.start for track in (video, audio) if track is not None)
    end = max(track.end for track in (video, audio) if track is not None)
    info = MediaInfo(0.0, video is not None, audio is not None)
    if video is not None:
        width, height, rotation, codec = _probe_frame(path, kind, video.index, limits)
        info = dataclasses.replace(
            info,
            width=width,
            height=height,
            rotation=rotation,
            video_codec=codec,
            num_frames=len(video.times),
            fps=len(video.times) / (video.end - video.start) if video.end > video.start else 0.0,
        )
    if audio is not None:
        with open_container(path, kind, limits) as container:
            context = container.streams[audio.index].codec_context
            info = dataclasses.replace(
                info, audio_codec=context.name, sample_rate=context.sample_rate, channels=context.channels
            )
            first = next(decode_stream(path, container, audio.index, limits), None)
            if first is not None and first.time is not None and video is None:
                start = first.time  # An encoder's priming is in the packets but not in the sound.
    return dataclasses.replace(info, duration=end - start)


def load_media(
    path: str | os.PathLike[str],
    spec: MediaSpec,
    *,
    kind: str = "auto",
    interval: tuple[float, float] | None = None,
    limits: Limits | None = None,
) -> LoadedMedia:
    """Decodes a media file into the frames and audio windows a MediaSpec asks for.

    Args:
        path: a local file.
        spec: how many frames and windows, and how large.
        kind: "video" (picture and sound, whichever are there), "audio" (the sound alone, even of a video),
            "image" (one picture, time 0, duration 0), or "auto": image by the file's suffix, else whatever
            streams it has.
        limits: what the file may ask for; default `Limits()`.

    Raises:
        MediaError: the file is missing, no allowed media format, beyond a limit, truncated, or damaged
            anywhere. A damaged file is never returned as a shorter one.
    """
    if interval is not None:
        raise NotImplementedError("intervals of a file")
    limits = limits or Limits()
    kind = check_file(path, kind, limits)
    empty = np.zeros((0, spec.image_size, spec.image_size, 3), np.uint8)
    if kind == "image":
        with open_container(path, kind, limits) as container:
            frame = _first_frame(path, container, 0, limits)
            return LoadedMedia(_upright_square(frame, spec.image_size)[None], np.zeros(1), [], 0.0)
    timeline = read_timeline(path, kind, limits)
    starts, ends, frames, times, audio = [], [], [], [], None
    if timeline.video is not None:
        frames, times = _choose_frames(path, kind, timeline.video, spec, limits)
        starts.append(timeline.video.start)
        ends.append(timeline.video.end)
    if timeline.audio is not None:
        audio = _cut_windows(path, kind, timeline.audio, times or None, spec, limits)
        if audio.windows:
            starts.append(audio.start)
            ends.append(audio.end)
    if not starts:
        raise MediaError(path, "its sound is shorter than 25 ms, one filterbank frame, and it has no picture")
    start = min(starts)
    cut = audio.windows if audio else []
    return LoadedMedia(
        frames=np.stack(frames) if frames else empty,
        frame_times=np.round(np.asarray(times, np.float64) - start, TIME_DIGITS),
        windows=[
            (round(begin - start, TIME_DIGITS), round(end - start, TIME_DIGITS), samples)
            for begin, end, samples in cut
        ],
        duration=round(max(ends) - start, TIME_DIGITS),
    )


def _first_frame(
    path: str | os.PathLike[str], container: InputContainer, index: int, limits: Limits
) -> av.VideoFrame:
    frame = next(decode_stream(path, container, index, limits), None)
    if frame is None:
        raise MediaError(path, "no picture could be decoded")
    return frame


def _probe_frame(
    path: str | os.PathLike[str], kind: str, index: int, limits: Limits
) -> tuple[int, int, int, str]:
    """Upright width, upright height, rotation and codec of a stream's first frame."""
    with open_container(path, kind, limits) as container:
        frame = _first_frame(path, container, index, limits)
        turned = round(frame.rotation / 90) % 2
        size = (frame.height, frame.width) if turned else (frame.width, frame.height)
        return *size, frame.rotation, container.streams[index].codec_context.name


def _choose_frames(
    path: str | os.PathLike[str], kind: str, track: Track, spec: MediaSpec, limits: Limits
) -> tuple[list[np.ndarray], list[float]]:
    """The frames on screen at the sampled times, each once, with the times in seconds at which they appear.

    One sequential pass to the very end, so that damage is found wherever it is; only chosen frames are
    converted. A frame is on screen from its own time to the next frame's.
    """
    targets = sample_times(track.times, track.end, spec)
    chosen, times = [], []
    shown, shown_time, count, next_target = None, 0.0, 0, 0
    with open_container(path, kind, limits) as container:
        rate = float(container.streams[track.index].average_rate or 25)

        def keep_if_wanted(until: float) -> None:
            nonlocal next_target
            wanted = bisect.bisect_left(targets, until - SAME_TIME, lo=next_target)
            if wanted > next_target and shown is not None:
                chosen.append(_upright_square(shown, spec.image_size))
                times.append(shown_time)
                next_target = wanted

        for frame in decode_stream(path, container, track.index, limits):
            time = frame.time if frame.time is not None else track.start + count / rate
            count += 1
            keep_if_wanted(time)
            shown, shown_time = frame, time
        keep_if_wanted(np.inf)
    if not chosen:
        raise MediaError(path, "no frame could be decoded")
    return chosen, times


def _upright_square(frame: av.VideoFrame, size: int) -> np.ndarray:
    """uint8 [size size 3] RGB, upright.

    The colour matrix and range are the frame's own; where it names none, FFmpeg's rule holds (BT.601,
    limited), as in every tool the released checkpoints were trained with. The resize is SigLIP's: straight to
    the square, bicubic with antialiasing, aspect ratio not kept (google/siglip-so400m-patch14-384,
    preprocessor_config.json).
    """
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        # Under transparency lies white, as in transformers' own processor (image_transforms.py, `convert_to_rgb`).
        rgba = Image.fromarray(frame.to_ndarray(format="rgba", interpolation=RGB_CONVERSION, threads=1))
        rgb = np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    else:
        rgb = frame.to_ndarray(format="rgb24", interpolation=RGB_CONVERSION, threads=1)
    quarters = round(frame.rotation / 90) % 4  # PyAV reports the display matrix but does not apply it
    if quarters:
        rgb = np.ascontiguousarray(np.rot90(rgb, quarters))
    return np.asarray(Image.fromarray(rgb).resize((size, size), Image.Resampling.BICUBIC))


@dataclasses.dataclass
class _CutAudio:
    windows: list[tuple[float, float, np.ndarray]]  # times on the file's own clock
    start: float
    end: float


def _cut_windows(
    path: str | os.PathLike[str],
    kind: str,
    track: Track,
    centres: list[float] | None,
    spec: MediaSpec,
    limits: Limits,
) -> _CutAudio:
    """Decodes a sound stream and keeps the samples that fall into windows; the rest is dropped at once."""
    start, total, starts, buffers = 0.0, 0, [], []
    with open_container(path, kind, limits) as container:
        for position, chunk, begin in _mono_16k(path, container, track.index, limits):
            if not starts:
                start = begin
                # From packets, not samples: off by the encoder's delay, a small fraction of a window.
                estimate = round((track.end - start) * SAMPLE_RATE)
                on_sound = [c - start for c in centres] if centres else None
                starts = window_starts(estimate, on_sound, spec)
                buffers = [None] * len(starts)
            total = max(total, position + len(chunk))
            for i in range(bisect.bisect_right(starts, position - spec.window_samples), len(starts)):
                offset = position - starts[i]
                if offset + len(chunk) <= 0:
                    break
                if buffers[i] is None:
                    buffers[i] = np.zeros(spec.window_samples, np.float32)
                low = max(offset, 0)
                high = min(offset + len(chunk), spec.window_samples)
                buffers[i][low:high] = chunk[low - offset : high - offset]
    windows = []
    for first, buffer in zip(starts, buffers, strict=True):
        valid = min(total - first, spec.window_samples)
        # Less than one filterbank frame is no input: Kaldi's snip_edges drops it at a sound's end as well.
        if buffer is not None and valid >= FBANK_FRAME_LENGTH:
            begin = start + first / SAMPLE_RATE
            windows.append((begin, begin + valid / SAMPLE_RATE, buffer[:valid]))
    return _CutAudio(windows, start, start + total / SAMPLE_RATE)


def _mono_16k(
    path: str | os.PathLike[str], container: InputContainer, index: int, limits: Limits
) -> Iterator[tuple[int, np.ndarray, float]]:
    """Yields (position in samples, f32 [n] samples, start in seconds) of a sound as 16 kHz mono.

    The resampler keeps the channels and the mean is taken here: FFmpeg's own downmix of float stereo is
    (L + R) / sqrt(2), 1.41 times too loud and out of range. A hole in the timestamps moves the position on.
    """
    resampler, setup = None, None
    start, written, expected = None, 0, 0.0
    strict = container.streams[index].codec_context.name in STRICT_CODECS

    def drain(frame: av.AudioFrame | None) -> Iterator[tuple[int, np.ndarray, float]]:
        nonlocal written
        for part in resampler.resample(frame):
            samples = part.to_ndarray()
            mono = samples[0] if len(samples) == 1 else samples.mean(axis=0, dtype=np.float32)
            yield written, np.clip(mono, -1.0, 1.0), start
            written += len(mono)

    for frame in decode_stream(path, container, index, limits):
        if start is None:
            start = expected = frame.time if frame.time is not None else 0.0
        time = expected if frame.time is None else frame.time
        if strict and (frame.time is None or abs(time - expected) > STRICT_GAP_SECONDS):
            raise MediaError(path, f"its sound is damaged at {expected:.3f} s, samples are missing")
        now = (frame.sample_rate, frame.format.name, frame.layout.nb_channels, frame.layout.name)
        if now != setup or time - expected > GAP_SECONDS:
            if resampler is not None:
                yield from drain(None)
            resampler, setup = av.AudioResampler(format="fltp", layout=frame.layout, rate=SAMPLE_RATE), now
            written = max(written, round((time - start) * SAMPLE_RATE))
        expected = max(time, expected) + frame.samples / frame.sample_rate
        yield from drain(frame)
    if resampler is not None:
        yield from drain(None)
