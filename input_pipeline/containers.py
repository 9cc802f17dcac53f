"""Media files as containers: which may be opened and by what, where their streams end, how they are decoded.

Nothing a header says about length is trusted: `read_timeline` reads every packet without decoding, and what
is missing, cut off or damaged is an error that says where. What is missing is known wherever the container
announces its end (see EXACT_LENGTH_FORMATS).

Which streams: `container.streams.best` (FFmpeg's av_find_best_stream: one that is flagged as the default
before one that is not, then that of the highest bit rate, then the first), except that a cover picture
attached to a song is no video.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import stat
from array import array
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer

from input_pipeline.announced import mp3_states_length, ogg_is_ended, wav_bytes_missing
from input_pipeline.errors import UserError
from input_pipeline.seeking import PARAMETRIC_CODECS, Entry, decode_from, parameter_sets, starts_afresh

# Demuxers that may read a file. A text file named .mp4 that is a playlist (ffconcat, HLS, DASH) would make
# FFmpeg open other files; only what is named here is ever opened, and only by the `file` protocol.
VIDEO_FORMATS = ("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "gif")
AUDIO_FORMATS = ("wav", "flac", "mp3", "ogg", "aac", *VIDEO_FORMATS)
# The `_pipe` demuxers read one picture from bytes; `image2` is left out because it expands %d in file names.
IMAGE_FORMATS = ("jpeg_pipe", "png_pipe", "webp_pipe", "bmp_pipe", "gif")
ALLOWED_FORMATS = {
    "auto": tuple(dict.fromkeys(VIDEO_FORMATS + AUDIO_FORMATS)),
    "video": VIDEO_FORMATS,
    "audio": AUDIO_FORMATS,
    "image": IMAGE_FORMATS,
}

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".3gp", ".3g2", ".gif"})
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aac", ".m4a", ".mka"})
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
MEDIA_SUFFIXES = VIDEO_SUFFIXES | AUDIO_SUFFIXES | IMAGE_SUFFIXES

# Containers whose header states the length exactly, so that an earlier end means a truncated file. AVI states
# it in frames, mp3 in a tag that not all have, WAV in bytes, Ogg by a flag on the last page (announced.py).
# Nothing states it in AAC without a container and mp3 without the tag, in a fragmented mp4 and a Matroska that
# were written to a pipe: cut between two packets these pass as shorter files, no reader can tell.
EXACT_LENGTH_FORMATS = frozenset({"mov", "matroska", "flac"})
# Decoders told to fail at a wrong checksum or a cut-off picture. Others (H.264, mp3, ...) would then refuse
# files that merely begin in the middle of something, and report what they had to conceal anyway.
STRICT_CODECS = frozenset({"flac"})  # and whatever decodes single pictures
MEMORYLESS_SOUND = ("pcm_", "flac")  # Codecs whose packets are decoded each for itself.
PICTURE_ENTRY_SECONDS, SOUND_ENTRY_SECONDS = 0.15, 1.0  # Where decoding may begin is noted this often.
NEW_EXTRADATA = b""  # Stands for parameter sets that no packet can bring along.
MISSING_SECONDS = 0.5  # An end earlier than announced by this much ...
MISSING_FRACTION = 0.02  # ... and by this share of the file counts as truncation; muxers round by less.


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a media file may ask of this machine; checked before decoding and again while decoding.

    Attributes:
        max_bytes: size of the file.
        max_pixels: width times height of one picture (default 8192 x 4320, DCI 8K).
        max_duration: seconds.
        max_frame_rate: frames per second on average.
        max_channels: audio channels.
    """

    max_bytes: int = 8 * 2**30
    max_pixels: int = 8192 * 4320
    max_duration: float = 4 * 3600.0
    max_frame_rate: float = 1000.0
    max_channels: int = 64


class MediaError(UserError):
    """A media file that cannot be used.

    Attributes:
        path: the file.
        reason: what is wrong with it and, where there is one, the remedy.
        stage: "open" (not a readable media file), "limit" (too large; the limit is named), "decode"
            (damaged) or "interval" (there is no such part of it).
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, stage: str = "decode") -> None:
        super().__init__(f"{os.fspath(path)}: {reason}")
        self.path = os.fspath(path)
        self.reason = reason
        self.stage = stage

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.path, self.reason, self.stage)


def _doubles() -> array[float]:
    return array("d")


@dataclasses.dataclass
class Track:
    """One stream's packets: when they are shown, and where a decoder that seeks may start.

    Attributes:
        index, codec, extradata: of the stream.
        times: seconds at which each packet is shown, ascending.
        decoded: the same in the order of decoding.
        entries: where decoding may begin; none without `timed`.
        timed: the container says when each packet is shown; else frames are timed by their number.
        end: seconds, of the last packet.
        samples_per_tick: of a sound.
        next_ticks: where the next packet of a sound follows without a hole.
        given: the container's parameter sets, see `seeking.parameter_sets`.
        changed: those that packets so far carried beside or in place of them.
    """

    index: int
    codec: str = ""
    extradata: bytes | None = None
    times: array[float] = dataclasses.field(default_factory=_doubles)
    decoded: array[float] = dataclasses.field(default_factory=_doubles)
    entries: list[Entry] = dataclasses.field(default_factory=list)
    timed: bool = True
    end: float = -np.inf
    samples_per_tick: Fraction = Fraction(0)
    next_ticks: int | None = None
    given: frozenset[bytes] = frozenset()
    changed: frozenset[bytes] = frozenset()

    def __post_init__(self) -> None:
        self.given = parameter_sets(self.codec, self.extradata)

    @property
    def start(self) -> float:
        return self.times[0]

    def may_enter(self, packet: av.Packet, time: float) -> bool:
        """Whether decoding that starts with this packet is the same as decoding from the start.

        A few a second are noted; of a sound only those until the first hole, as its samples are counted. Once
        there were other parameter sets than the container's, an entry must bring all of them along.
        """
        spacing = SOUND_ENTRY_SECONDS if self.samples_per_tick else PICTURE_ENTRY_SECONDS
        spaced = not self.entries or time >= self.entries[-1].time + spacing
        if not self.samples_per_tick:
            if not spaced or not starts_afresh(self.codec, self.extradata, bytes(packet)):
                return False
            return not self.changed or self.changed <= self._sets(packet)
        follows = not self.times or packet.pts == self.next_ticks
        self.next_ticks = packet.pts + packet.duration if follows and packet.duration else None
        return follows and spaced and self.samples_per_tick <= 1 and self.codec.startswith(MEMORYLESS_SOUND)

    def note_parameter_sets(self, packet: av.Packet) -> None:
        """Every packet must pass here, in the order of decoding."""
        if found := self._sets(packet) - self.given:
            self.changed |= found
        if packet.has_sidedata("new_extradata"):  # An mp4 of several: which one holds, an entry does not say.
            self.changed |= {NEW_EXTRADATA}

    def _sets(self, packet: av.Packet) -> frozenset[bytes]:
        if self.codec not in PARAMETRIC_CODECS:
            return frozenset()
        return parameter_sets(self.codec, self.extradata, bytes(packet))


@dataclasses.dataclass
class Timeline:
    """The streams that are used, None where a file has none of that kind."""

    video: Track | None
    audio: Track | None


def check_file(path: str | os.PathLike[str], kind: str, limits: Limits) -> str:
    """The kind, with "auto" settled by suffix if it is an image's; MediaError if this is no ordinary file."""
    if kind not in ALLOWED_FORMATS:
        raise ValueError(f"kind is {kind!r}; use one of {', '.join(ALLOWED_FORMATS)}")
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise MediaError(path, "no such file", "open") from None
    except OSError as error:
        raise MediaError(path, f"cannot be read: {error.strerror}", "open") from None
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(path, "is no regular file", "open")
    if status.st_size == 0:
        raise MediaError(path, "is empty", "open")
    if status.st_size > limits.max_bytes:
        raise MediaError(
            path, f"has {status.st_size} bytes; the limit max_bytes is {limits.max_bytes}", "limit"
        )
    if kind == "auto" and Path(path).suffix.lower() in IMAGE_SUFFIXES:
        return "image"
    return kind


@contextlib.contextmanager
def open_container(path: str | os.PathLike[str], kind: str, limits: Limits) -> Iterator[InputContainer]:
    """A container opened by an allowed demuxer alone; one per pass, never shared."""
    formats = ALLOWED_FORMATS[kind]
    # `file:` keeps a colon in a name from being read as a protocol; a picture has no name at all (see
    # IMAGE_FORMATS).
    try:
        source = io.BytesIO(Path(path).read_bytes()) if kind == "image" else f"file:{os.path.abspath(path)}"
        container = av.open(
            source,
            metadata_errors="replace",
            # reaches the decoders that FFmpeg uses for probing
            options={"max_pixels": str(limits.max_pixels)},
            container_options={"format_whitelist": ",".join(formats), "protocol_whitelist": "file"},
        )
    except av.error.ArgumentError:
        known = ", ".join(dict.fromkeys(formats))
        raise MediaError(path, f"is in no format allowed for {kind} (allowed: {known})", "open") from None
    except PermissionError:
        raise MediaError(path, "cannot be read: this user lacks the permission to", "open") from None
    except av.error.FFmpegError as error:
        reason = f"is no media file, or its header is damaged or cut off ({error.strerror})"
        raise MediaError(path, reason, "open") from None
    with container:
        yield container


def _best_stream(container: InputContainer, kind: str) -> int | None:
    """Index of FFmpeg's best stream of a kind; cover pictures do not count as video."""
    best = container.streams.best(kind)
    if kind == "audio" or best is None:
        usable = [best] if best is not None else []
    else:
        covers = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
        usable = [s for s in (best, *container.streams.video) if not s.disposition & covers]
    return usable[0].index if usable else None


def read_timeline(path: str | os.PathLike[str], kind: str, limits: Limits) -> Timeline:
    """Reads every packet without decoding: when each frame is shown, where the streams really end.

    Raises:
        MediaError: nothing to see or hear, a limit is passed, or the file is cut off.
    """
    with open_container(path, kind, limits) as container:
        video = _best_stream(container, "video") if kind != "audio" else None
        audio = _best_stream(container, "audio")
        if video is None and audio is None:
            raise MediaError(
                path, "has no sound" if kind == "audio" else "has neither picture nor sound", "open"
            )
        _check_headers(path, container, video, audio, limits)
        _check_end(path, container)
        tracks = {}
        for index in (video, audio):
            if index is not None:
                context = container.streams[index].codec_context
                track = Track(index, context.codec.canonical_name, context.extradata)
                if index == audio:
                    track.samples_per_tick = container.streams[index].time_base * context.sample_rate
                tracks[index] = track
        _read_packets(path, container, tracks, _announced_seconds(path, container, video), limits)
    timeline = Timeline(*(tracks[i] if i is not None and tracks[i].times else None for i in (video, audio)))
    if timeline.video is None and timeline.audio is None:
        raise MediaError(path, "its streams hold no data")
    if timeline.video is not None:
        seconds = timeline.video.end - timeline.video.start
        rate = len(timeline.video.times) / max(seconds, 1.0)  # A short burst of frames is no rate.
        if rate > limits.max_frame_rate:
            reason = (
                f"has {rate:.0f} frames per second; the limit max_frame_rate is {limits.max_frame_rate:g}"
            )
            raise MediaError(path, reason, "limit")
    return timeline


def _check_headers(
    path: str | os.PathLike[str],
    container: InputContainer,
    video: int | None,
    audio: int | None,
    limits: Limits,
) -> None:
    for index in (video, audio):
        if index is not None and container.streams[index].codec_context is None:
            raise MediaError(path, f"this FFmpeg has no decoder for its stream {index}", "open")
    if audio is not None:
        channels = container.streams[audio].codec_context.channels
        if channels > limits.max_channels:
            reason = f"has {channels} audio channels; the limit max_channels is {limits.max_channels}"
            raise MediaError(path, reason, "limit")


def _read_packets(
    path: str | os.PathLike[str],
    container: InputContainer,
    tracks: dict[int, Track],
    announced: float,
    limits: Limits,
) -> None:
    """Fills the tracks; `announced` is the length in seconds that the header states, 0 if it states none."""
    first, last = np.inf, -np.inf  # over all streams: a subtitle may outlast the picture
    latest = dict.fromkeys(tracks, -np.inf)  # s; nothing decoded before an entry is shown after it
    # Of an AVI FFmpeg makes presentation times up; true are those of decoding, one frame after the other.
    guessed = "avi" in container.format.name.split(",")
    seconds = {stream.index: float(stream.time_base or 0) for stream in container.streams}
    try:
        for packet in container.demux():
            ticks = packet.pts
            if ticks is None or (guessed and packet.dts is not None):
                ticks = packet.dts
            if packet.size == 0 or ticks is None:
                continue
            index = packet.stream_index
            time = ticks * seconds[index]
            end = (ticks + (packet.duration or 0)) * seconds[index]
            first, last = min(first, time), max(last, end)
            track = tracks.get(index)
            if track is None or packet.is_discard:
                continue
            if packet.is_corrupt:
                raise MediaError(
                    path, f"is cut off in the middle of a packet at {time:.3f} s (truncated file)"
                )
            track.note_parameter_sets(packet)
            if packet.pts is None or (guessed and packet.pts != packet.dts):
                track.timed = False
            elif packet.is_keyframe and time > latest[index] and track.may_enter(packet, time):
                position = (packet.pts, packet.dts, packet.pos, packet.size)
                track.entries.append(Entry(len(track.times), time, *position))
            latest[index] = max(latest[index], time)
            track.times.append(time)
            track.end = max(track.end, end)
            if time - track.times[0] > limits.max_duration:
                reason = f"is longer than the limit max_duration of {limits.max_duration:g} s"
                raise MediaError(path, reason, "limit")
    except av.error.FFmpegError as error:
        raise MediaError(path, f"cannot be read beyond {max(last, 0.0):.3f} s ({error.strerror})") from None
    missing = announced - (last - min(first, 0.0) if first < np.inf else 0.0)
    if missing > max(MISSING_SECONDS, MISSING_FRACTION * announced):
        reached = max(last, 0.0)
        reason = f"its header announces {announced:.3f} s, its data end at {reached:.3f} s (truncated file)"
        raise MediaError(path, reason)
    for track in tracks.values():
        if not track.timed:
            track.entries = []
        track.decoded = track.times
        track.times = array("d", sorted(track.times))  # B-frames are stored out of order
        # the last packet does not say how long it is
        if len(track.times) > 1 and track.end <= track.times[-1]:
            track.end = track.times[-1] + (track.times[-1] - track.times[0]) / (len(track.times) - 1)


def _announced_seconds(path: str | os.PathLike[str], container: InputContainer, video: int | None) -> float:
    """The length in the header where that is a statement and not FFmpeg's estimate, else 0."""
    names = set(container.format.name.split(","))
    if names & EXACT_LENGTH_FORMATS:
        return (container.duration or 0) / av.time_base
    if "avi" in names and video is not None:
        stream = container.streams[video]
        return float(stream.frames / stream.average_rate) if stream.average_rate else 0.0
    if "mp3" in names:
        with open(path, "rb") as file:
            if mp3_states_length(file):
                return (container.duration or 0) / av.time_base
    return 0.0


def _check_end(path: str | os.PathLike[str], container: InputContainer) -> None:
    """MediaError if a WAV or Ogg file lacks the end that it announces."""
    names = container.format.name.split(",")
    with open(path, "rb") as file:
        if "wav" in names and (missing := wav_bytes_missing(file)):
            reason = (
                f"its header announces {missing} bytes of sound more than there are (truncated file); if it was "
                "never longer, write its header anew: ffmpeg -i FILE -c copy NEW.wav"
            )
            raise MediaError(path, reason)
        if "ogg" in names and not ogg_is_ended(file):
            reason = (
                "has no last page (truncated file); if it was never longer, as a recording that was broken off, "
                "write it anew: ffmpeg -i FILE -c copy NEW.ogg"
            )
            raise MediaError(path, reason)


def _check_picture(path: str | os.PathLike[str], width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        reason = f"has pictures of {width} x {height} pixels; the limit max_pixels is {limits.max_pixels}"
        raise MediaError(path, reason, "limit")


def decode_stream(
    path: str | os.PathLike[str],
    container: InputContainer,
    index: int,
    limits: Limits,
    entry: Entry | None = None,
) -> Iterator[av.VideoFrame | av.AudioFrame]:
    """Decodes one stream from its start, or from an entry, to its end; damage on the way raises MediaError.

    A container that was just opened stands at its start. LandedElsewhereError: an entry was not reached.
    """
    stream = container.streams[index]
    context = stream.codec_context
    if not context.is_open:
        _set_up_decoder(path, container, index, limits)
    time = 0.0
    try:
        for frame in container.decode(stream) if entry is None else decode_from(container, stream, entry):
            time = time if frame.time is None else frame.time
            if frame.is_corrupt:
                raise MediaError(path, f"{stream.type} stream {index} is damaged at {time:.3f} s")
            if stream.type == "video":
                _check_picture(path, frame.width, frame.height, limits)
            yield frame
    except av.error.FFmpegError as error:
        if stream.type == "video" and isinstance(error, av.error.ArgumentError):
            # What FFmpeg says to a size beyond max_pixels that only the picture itself announces.
            reason = f"announces pictures beyond the limit max_pixels of {limits.max_pixels}, or of no size"
            raise MediaError(path, reason, "limit") from None
        reason = f"{stream.type} stream {index} cannot be decoded after {time:.3f} s ({error.strerror})"
        raise MediaError(path, reason) from None


def _set_up_decoder(
    path: str | os.PathLike[str], container: InputContainer, index: int, limits: Limits
) -> None:
    stream = container.streams[index]
    context = stream.codec_context
    # Frame threads deadlock in worker processes (PyAV issue 1962); parallelism here is one process per file.
    context.thread_type = "SLICE"
    context.thread_count = 1
    if stream.type == "video":
        _check_picture(path, context.width, context.height, limits)
        context.options = {"max_pixels": str(limits.max_pixels)}
    if container.format.name.endswith("_pipe") or context.name in STRICT_CODECS:
        context.options = {**context.options, "err_detect": "crccheck+explode"}
