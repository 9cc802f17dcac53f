"""Media files become arrays: frames, their true times, and 16 kHz audio windows. PyAV is the only decoder.

Which files are opened and how their packets are read is containers.py. The timeline of the packets comes
first, and with it the plan: one pass over the picture or a few seeks, whichever decodes less (seeking.py).
The chosen frames alone are kept, and of the sound the windows alone (sound.py). Memory is therefore bounded
by the MediaSpec, not by the length of the file.

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
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import Interpolation
from PIL import ExifTags, Image, ImageOps

from input_pipeline.containers import (
    Limits,
    MediaError,
    Track,
    check_file,
    decode_stream,
    open_container,
    read_timeline,
)
from input_pipeline.seeking import (
    SAME_TIME,
    LandedElsewhereError,
    Run,
    on_screen,
    plan_runs,
    seeking_pays,
)
from input_pipeline.sound import (
    AudioReader,
    Chunk,
    cut_windows,
    read_sound,
    read_with,
    sound_start,
    window_starts,
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

TIME_DIGITS = 9  # Decimals of a second that are kept: a sample at 16 kHz is a multiple of 0.0000625 s.

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
        frame_times: f64 [t], seconds from the start of the media, or of its interval, at which the chosen
            frames are shown.
        windows: (start, end, f32 [n] samples at 16 kHz in [-1, 1]) with end - start = n / 16000 seconds,
            n <= window_samples; empty without sound.
        duration: seconds of the media or its interval; 0 for an image.
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
    audio_reader: AudioReader | None = None,
) -> LoadedMedia:
    """Decodes a media file, or an interval of it, into the frames and audio windows a MediaSpec asks for.

    What is checked: every packet of the whole file is read, so truncation is found wherever it is, provided
    that the container announces its end (see containers.py, EXACT_LENGTH_FORMATS), and whatever is decoded
    must be sound. Without an interval that is the whole sound and the whole picture to its last frame, unless
    seeking saves a quarter of that or more (`seeking.seeking_pays`). With an interval decoding ends where it
    does. Not seen is damage in parts that are not decoded, and what a codec without
    checksums decodes all the same: a changed bit of H.264 or mp3 may be a changed picture or sound.

    Args:
        path: a local file.
        spec: how many frames and windows, and how large.
        kind: "video" (picture and sound, whichever are there), "audio" (the sound alone, even of a video),
            "image" (one picture, time 0, duration 0), or "auto": image by the file's suffix, else whatever
            streams it has.
        interval: (start, end) in seconds on the media's own clock, see above (with kind "audio" that of the
            sound, even of a video). The result is as if the file had been cut there: times count from
            `start`; a frame that is on screen then although it appeared earlier has time 0; of the sound
            there are the samples that lie wholly within. An end beyond the file's is the file's. A modality
            that has nothing in it is missing.
        limits: what the file may ask for; default `Limits()`.
        audio_reader: decodes the sound in place of PyAV: a function of the path that gives f32 [n] samples at
            16 kHz, mono, in [-1, 1], and the time of the first on the file's own clock in seconds. It is
            called for files in which PyAV finds sound; their packets are checked all the same.

    Raises:
        MediaError: the file is missing, no allowed media format, beyond a limit, truncated, or damaged where
            it is decoded; the interval is empty, begins beyond the end, holds nothing, or is one of an image.
            A damaged file is never returned as a shorter one, except for one that announces no end and is
            cut between two packets.
    """
    limits = limits or Limits()
    kind = check_file(path, kind, limits)
    if interval is not None:
        _check_interval(path, kind, interval)
    empty = np.zeros((0, spec.image_size, spec.image_size, 3), np.uint8)
    if kind == "image":
        with open_container(path, kind, limits) as container:
            frame = _first_frame(path, container, 0, limits)
            square = _upright_square(frame, spec.image_size, _exif_orientation(path))
            return LoadedMedia(square[None], np.zeros(1), [], 0.0)
    timeline = read_timeline(path, kind, limits)
    video, audio = timeline.video, timeline.audio
    given = read_with(path, audio_reader) if audio is not None and audio_reader is not None else None
    part = None
    if interval is not None:
        heard = None
        if audio is not None:
            heard = _sound_span(audio, sound_start(path, kind, audio, limits) if given is None else given)
        part = _part_of_file(path, video, heard, interval)
    starts, ends, frames, times, sound = [], [], [], [], None
    if video is not None:
        frames, times = _choose_frames(path, kind, video, spec, limits, part)
        starts.append(video.start)
        ends.append(video.end)
    if audio is not None and (part is None or audio.end > part[0]):
        if given is None:
            chunks = read_sound(path, kind, audio, limits, *(part[:1] if part else ()))
            sound = cut_windows(chunks, audio.end, times or None, spec, part)
        else:
            sound = cut_windows([given], _sound_span(audio, given)[1], times or None, spec, part)
        if sound.windows:
            starts.append(sound.start)
            ends.append(sound.end)
    cut = sound.windows if sound else []
    if not frames and not cut:
        if part is not None:
            reason = f"holds neither picture nor 25 ms of sound between {interval[0]:g} and {interval[1]:g} s"
            raise MediaError(path, reason, "interval")
        raise MediaError(path, "its sound is shorter than 25 ms, one filterbank frame, and it has no picture")
    start, end = min(starts), max(ends)
    if part is not None:
        start, end = part[0], min(end, part[1])
    return LoadedMedia(
        frames=np.stack(frames) if frames else empty,
        frame_times=np.round(np.asarray(times, np.float64) - start, TIME_DIGITS),
        windows=[
            (round(begin - start, TIME_DIGITS), round(end - start, TIME_DIGITS), samples)
            for begin, end, samples in cut
        ],
        duration=round(end - start, TIME_DIGITS),
    )


def _check_interval(path: str | os.PathLike[str], kind: str, interval: tuple[float, float]) -> None:
    start, end = interval
    if kind == "image":
        raise MediaError(path, "is an image; an interval of one has no meaning, leave it out", "interval")
    if not (0 <= start < end < np.inf):
        reason = f"interval [{start:g}, {end:g}] s is none; use 0 <= start < end"
        raise MediaError(path, reason, "interval")


def _sound_span(track: Track, first: float | Chunk) -> tuple[float, float]:
    """Start and end of a sound: the first sample's time and the packets' end, or those of a given sound."""
    if isinstance(first, tuple):
        _, samples, start = first
        return start, start + len(samples) / SAMPLE_RATE
    return first, track.end


def _part_of_file(
    path: str | os.PathLike[str],
    video: Track | None,
    heard: tuple[float, float] | None,
    interval: tuple[float, float],
) -> tuple[float, float]:
    """An interval on the media's clock, which starts at 0, on the file's own."""
    spans = [(video.start, video.end)] if video is not None else []
    # A sound too short to be used does not start the media's clock either.
    if heard is not None and (heard[1] - heard[0]) * SAMPLE_RATE >= FBANK_FRAME_LENGTH:
        spans.append(heard)
    if not spans:
        raise MediaError(path, "its sound is shorter than 25 ms, one filterbank frame, and it has no picture")
    start, end = min(s for s, _ in spans), max(e for _, e in spans)
    if start + interval[0] >= end - SAME_TIME:
        reason = f"interval [{interval[0]:g}, {interval[1]:g}] s begins beyond its end at {end - start:.3f} s"
        raise MediaError(path, reason, "interval")
    return start + interval[0], start + interval[1]


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
    path: str | os.PathLike[str],
    kind: str,
    track: Track,
    spec: MediaSpec,
    limits: Limits,
    part: tuple[float, float] | None = None,
) -> tuple[list[np.ndarray], list[float]]:
    """The frames on screen at the sampled times, each once, with the times in seconds at which they appear.

    A frame is on screen from its own time to the next frame's; in a part of the file from the part's start.
    Seeking and one pass from the start give the same; a file in which they would not is read from the start.
    """
    begin, end = part or (-np.inf, np.inf)
    times, end = _times_within(track, begin, end)
    if not times:
        return [], []
    targets = sample_times(times, end, spec)
    runs = plan_runs(track.times, track.decoded, track.entries, targets)
    chosen = None
    if seeking_pays(runs, len(track.decoded), whole_file=part is None):
        try:
            chosen = _decode_runs(path, kind, track, runs, spec, limits)
        except LandedElsewhereError:
            pass
        except MediaError as error:  # The file's own damage, or that of having come from elsewhere.
            if error.stage != "decode":
                raise
    if chosen is None:
        whole = Run(None, targets, [], len(track.decoded) - 1)
        chosen = _decode_runs(path, kind, track, [whole], spec, limits, to_the_end=part is None)
    if not chosen:
        raise MediaError(path, "no frame could be decoded")
    return [frame for frame, _ in chosen], [max(time, begin) for _, time in chosen]


def _times_within(track: Track, begin: float, end: float) -> tuple[list[float], float]:
    """When the frames of [begin, end) appear within it, and when the last of them ends."""
    if track.end <= begin + SAME_TIME:
        return [], end
    last = bisect.bisect_left(track.times, end - SAME_TIME)
    times = [max(time, begin) for time in track.times[on_screen(track.times, begin) : last]]
    return times, min(track.end, end)


def _decode_runs(
    path: str | os.PathLike[str],
    kind: str,
    track: Track,
    runs: list[Run],
    spec: MediaSpec,
    limits: Limits,
    *,
    to_the_end: bool = False,
) -> list[tuple[np.ndarray, float]]:
    """The pictures at the runs' targets, each once, and their times; only these are converted.

    Raises:
        LandedElsewhereError: a run states what is shown when, and it is not.
    """
    chosen = []
    with open_container(path, kind, limits) as container:
        for run in runs:
            done = 0
            frames = decode_stream(path, container, track.index, limits, run.entry)
            for frame, time, wanted in _frames_at(frames, run.targets, track, to_the_end):
                if any(abs(time - shown) > SAME_TIME for shown in run.shown[done:wanted]):
                    raise LandedElsewhereError
                done = wanted
                chosen.append((_upright_square(frame, spec.image_size), time))
            if done < len(run.shown):
                raise LandedElsewhereError
    return chosen


def _frames_at(
    frames: Iterator[av.VideoFrame], targets: list[float], track: Track, to_the_end: bool
) -> Iterator[tuple[av.VideoFrame, float, int]]:
    """Yields the frames on screen at `targets`, their times, and how many targets are served by then.

    Frames without a time have that of the packet of their number. With `to_the_end` the rest is decoded, for
    its damage.
    """
    shown, shown_time, served = None, 0.0, 0
    for number, frame in enumerate(frames):
        time = frame.time if track.timed else None
        if time is None:
            time = track.times[min(number, len(track.times) - 1)]
        wanted = bisect.bisect_left(targets, time - SAME_TIME, lo=served)
        if wanted > served and shown is not None:
            yield shown, shown_time, wanted
            served = wanted
        if served == len(targets) and not to_the_end:
            return
        shown, shown_time = frame, time
    if served < len(targets) and shown is not None:
        yield shown, shown_time, len(targets)


def _upright_square(frame: av.VideoFrame, size: int, orientation: int | None = None) -> np.ndarray:
    """uint8 [size size 3] RGB, upright: by the EXIF orientation, or (None) by the frame's display matrix.

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
    if orientation is None:
        picture = Image.fromarray(_as_displayed(frame, rgb))
    else:
        picture = Image.fromarray(rgb)
        picture.getexif()[ExifTags.Base.Orientation] = orientation
        picture = ImageOps.exif_transpose(picture)
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))


def _exif_orientation(path: str | os.PathLike[str]) -> int | None:
    """Which of EXIF's eight orientations a picture has, 1 if it names none; None where Pillow does not read it."""
    try:
        with Image.open(path, formats=("JPEG", "PNG", "WEBP", "BMP", "GIF")) as picture:
            return picture.getexif().get(ExifTags.Base.Orientation, 1)
    # Pillow's errors for what is no such file, a damaged one, or one larger than its own limit.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _as_displayed(frame: av.VideoFrame, rgb: np.ndarray) -> np.ndarray:
    """A frame's picture [h w 3] turned and mirrored as its display matrix says; PyAV does not apply it.

    Column p and row q of the coded picture are shown at column a p + c q and row b p + d q, up to a shift
    (ISO/IEC 14496-12, 8.3.2: the matrix is a b u c d v x y w). Of other angles the nearest right one is taken.
    """
    try:
        matrix = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    except ValueError:
        # PyAV 18.1 lists no side data at all if it does not know the kind of one (a picture's EXIF, the second
        # view of MV-HEVC); it still gives the rotation, but mirroring is not told from it.
        return np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90) % 4))
    if matrix is None:
        return rgb
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].astype(np.int64)
    if abs(a) + abs(d) < abs(b) + abs(c):
        rgb, across, down = rgb.swapaxes(0, 1), c, b
    else:
        across, down = a, d
    return np.ascontiguousarray(rgb[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])
