"""Small media files whose every frame and sample is known, written with PyAV; and bad and odd ones."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import struct
import time
import zlib
from collections.abc import Sequence
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path

import av
import numpy as np
from PIL import Image

from input_pipeline.media import LoadedMedia, MediaError, load_media
from input_pipeline.spec import MediaSpec

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
        video.codec_context.thread_count = (
            1  # x264's threads and its mean bit rate make other files each time
        )
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


def write_spliced(path: Path, count: int, *, codec: str, options: Sequence[dict[str, str]]) -> Path:
    """Films of `count` frames each, one behind the other in one Matroska, whose header has the parameter sets of
    the first alone; the others bring their own along in their first packet and not again."""
    parts = []
    for number, codec_options in enumerate(options):
        part = path.with_name(f"part{number}.h264" if codec == "libx264" else f"part{number}.hevc")
        write_moving(part, count, codec=codec, codec_options=codec_options)
        with av.open(str(part)) as source:  # A byte stream: parameter sets lie in the packets.
            parts.append([(bytes(packet), packet.is_keyframe) for packet in source.demux() if packet.size])
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 48, "yuv420p", options[0]
        stream.codec_context.thread_count = 1
        for number, (data, flagged) in enumerate(packet for part in parts for packet in part):
            packet = av.Packet(data if number % count == 0 else _without_parameter_sets(data, codec))
            packet.stream, packet.pts, packet.dts = stream, number, number
            packet.time_base, packet.is_keyframe = Fraction(1, 25), flagged
            container.mux(packet)
    return path


def _without_parameter_sets(data: bytes, codec: str) -> bytes:
    units = [unit for unit in data.split(b"\0\0\1") if unit.strip(b"\0")]
    if codec == "libx264":
        kept = [unit for unit in units if unit[0] & 31 not in (7, 8)]
    else:
        kept = [unit for unit in units if not 32 <= unit[0] >> 1 & 63 <= 34]
    return b"".join(b"\0\0\0\1" + unit for unit in kept)


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
    layout = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}[len(samples)]
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


# Bad and odd files
# -------------------------------------------------------------------------------------------------------


def write_corpus(folder: Path) -> dict[str, Path]:
    """Bad and odd files, by name; `tests/input_pipeline/test_media_corpus.py` says what becomes of each."""
    folder.mkdir(parents=True, exist_ok=True)
    for write in (
        _write_films,
        _write_odd_films,
        _write_sounds,
        _write_pictures,
        _write_damaged,
        _write_impostors,
        _write_oversized,
        _write_no_files,
    ):
        write(folder)
    return {os.fsdecode(path.name): path for path in sorted(folder.iterdir())}


def _noise(seconds: float, rate: int = 16_000) -> np.ndarray:
    return np.random.default_rng(0).integers(-9000, 9000, round(seconds * rate)).astype(np.int16)


def _write_films(folder: Path) -> None:
    levels, times = grey_levels(20), [i / 10 for i in range(20)]
    sound = _noise(2)
    write_video(folder / "film.mp4", levels, times, sound=sound, sound_codec="aac")
    write_video(folder / "silent.mp4", levels, times)
    write_video(folder / "film.avi", levels, times, codec="mpeg4", sound=sound)
    write_video(folder / "film.webm", levels, times, codec="libvpx", sound=sound, sound_codec="libopus")
    write_moving(
        folder / "hevc.mp4", 20, rate=10, codec="libx265", codec_options={"x265-params": "log-level=none"}
    )
    write_moving(folder / "av1.mkv", 20, rate=10, codec="libsvtav1", codec_options={"preset": "12"})
    write_moving(folder / "vp9.webm", 20, rate=10, codec="libvpx-vp9", codec_options={"cpu-used": "8"})
    write_moving(folder / "loop.gif", 20, rate=10, codec="gif", pix_fmt="rgb8")
    write_moving(folder / "ten_bits.mp4", 20, rate=10, pix_fmt="yuv420p10le")
    write_moving(folder / "uncompressed.avi", 20, rate=10, codec="rawvideo", pix_fmt="bgr24")
    write_moving(
        folder / "fragments.mp4",
        20,
        rate=10,
        codec_options={"g": "10"},
        container_options={"movflags": "frag_keyframe+empty_moov"},
    )


def _write_odd_films(folder: Path) -> None:
    levels, times = grey_levels(20), [i / 10 for i in range(20)]
    write_moving(folder / "one_pixel.mkv", 20, rate=10, codec="ffv1", width=1, height=1, pix_fmt="bgr0")
    write_moving(folder / "odd_size.mp4", 20, rate=10, width=33, height=17, pix_fmt="yuv444p")
    write_moving(folder / "brief.mp4", 2, rate=40)
    write_video(folder / "one_frame.mp4", [128], [0.0])
    write_video(folder / "still.mp4", [128] * 20, times, sound=_noise(2), sound_codec="aac")
    write_video(folder / "uneven.mkv", levels[:6], [0.0, 0.04, 0.08, 1.0, 1.9, 1.95])
    write_video(folder / "late_sound.mkv", levels, times, sound=_noise(1), sound_start=1.5)
    write_video(folder / "late_picture.mkv", levels, [t + 1 for t in times], sound=_noise(2))
    write_video(folder / "starts_at_an_hour.mkv", levels, [t + 3600 for t in times])
    _write_rotated(folder / "rotated.mp4")
    _write_twice_the_same_time(folder / "same_times.mkv", levels)
    _write_two_pictures(folder / "two_pictures.mkv")
    shutil.copy(folder / "film.mp4", folder / "pipe:0 %03d ünïcode 片.mp4")
    shutil.copy(folder / "film.mp4", os.fsencode(folder) + b"/not_utf8_\xff\xfe.mp4")
    shutil.copy(folder / "film.mp4", folder / "FILM_WITHOUT_SUFFIX")


def _write_rotated(path: Path) -> None:
    """A film whose track header says: turn by 90 degrees."""
    write_moving(path, 20, rate=10, width=64, height=32)
    set_display_matrix(path, (0, 1, -1, 0), (64, 32))


def set_display_matrix(path: Path, matrix: tuple[int, int, int, int], size: tuple[int, int]) -> None:
    """Writes a b c d into the track header of an mp4 of `size` (the matrix of ISO/IEC 14496-12, 8.3.2), and the
    shift that brings the picture back to where columns and rows are positive."""
    a, b, c, d = matrix
    across, down = -min(a, 0) * size[0] - min(c, 0) * size[1], -min(b, 0) * size[0] - min(d, 0) * size[1]
    data = bytearray(path.read_bytes())
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    place = data.index(identity, data.index(b"tkhd"))
    values = (a << 16, b << 16, 0, c << 16, d << 16, 0, across << 16, down << 16, 1 << 30)
    data[place : place + 36] = struct.pack(">9i", *values)
    path.write_bytes(data)


def _write_twice_the_same_time(path: Path, levels: Sequence[int]) -> None:
    """Every two frames have one time: the second of them is seen."""
    write_video(path, levels, [i / 10 for i in range(len(levels))], codec="ffv1")
    with av.open(str(path)) as source:
        packets = [
            (bytes(packet), packet.pts // 200 * 200) for packet in source.demux(video=0) if packet.size
        ]
        with av.open(str(path.with_suffix(".tmp.mkv")), "w") as container:
            stream = container.add_stream_from_template(source.streams.video[0])
            for data, pts in packets:
                packet = av.Packet(data)
                packet.stream, packet.pts, packet.dts = stream, pts, pts
                packet.time_base, packet.is_keyframe = Fraction(1, 1000), True
                container.mux(packet)
    path.with_suffix(".tmp.mkv").rename(path)


def _write_two_pictures(path: Path) -> None:
    """A small black picture first, then a large white one."""
    with av.open(str(path), "w") as container:
        streams = []
        for size in (32, 64):
            stream = container.add_stream("ffv1", rate=10)
            stream.width = stream.height = size
            stream.pix_fmt = "bgr0"
            streams.append(stream)
        for i in range(20):
            for stream, level in zip(streams, (0, 255), strict=True):
                picture = np.full((stream.height, stream.width, 3), level, np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, 10)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))


def _write_sounds(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, codec, rate, channels in (
        ("mono.wav", "pcm_s16le", 16_000, 1),
        ("stereo.wav", "pcm_s16le", 44_100, 2),
        ("surround.wav", "pcm_s16le", 48_000, 6),
        ("cinema.wav", "pcm_s16le", 48_000, 8),
        ("rate_8000.wav", "pcm_s16le", 8_000, 1),
        ("rate_48000.wav", "pcm_s16le", 48_000, 1),
        ("bits_24.wav", "pcm_s24le", 16_000, 1),
        ("song.flac", "flac", 44_100, 2),
        ("song.mp3", "libmp3lame", 44_100, 2),
        ("song.ogg", "libopus", 48_000, 2),
        ("song.m4a", "aac", 44_100, 2),
    ):
        samples = rng.integers(-9000, 9000, (channels, 2 * rate)).astype(np.int16)
        layout = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}[channels]
        write_sound(folder / name, samples, rate, codec=codec, layout=layout)
    _write_commented_song(folder / "commented.mp3")
    bad = np.zeros((1, 16_000), np.float32)
    bad[0, 8000] = np.nan
    write_sound(folder / "not_a_number.wav", bad, 16_000, codec="pcm_f32le")
    write_sound(folder / "loud.wav", 1e6 * _noise(2)[None].astype(np.float32), 16_000, codec="pcm_f32le")
    write_sound(folder / "hole.mka", _noise(0.5)[None], 16_000, starts=(0.0, 1.5))
    write_sound(folder / "short.wav", _noise(0.02)[None], 16_000)
    write_song_with_cover(folder / "cover.mp3")
    with av.open(str(folder / "subtitles.mkv"), "w") as container:
        stream = container.add_stream("subrip")
        stream.codec_context.subtitle_header = b"[Script Info]\r\nScriptType: v4.00+\r\n"
        packet = av.Packet(b"Only words.")
        packet.stream, packet.pts, packet.dts, packet.duration = stream, 0, 0, 1000
        packet.time_base = Fraction(1, 1000)
        container.mux(packet)


def _write_commented_song(path: Path) -> None:
    """An mp3 without the tag that counts its frames, whose title says "Info". Its bit rate rises, so that FFmpeg takes
    it for longer than it is."""
    data = b""
    for rate in (32_000, 128_000):
        with av.open(str(path), "w", options={"write_xing": "0"}) as container:
            container.metadata["title"] = "Info"
            stream = container.add_stream("libmp3lame", rate=16_000, layout="mono")
            stream.bit_rate = rate
            _encode_sound(container, stream, _noise(4), 16_000, 0)
        part = path.read_bytes()
        data += part[part.index(b"\xff\xf3") :] if data else part
    path.write_bytes(data)


def write_song_with_cover(path: Path) -> Path:
    """Two seconds of sound with a picture attached, which players show as the cover."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("libmp3lame", rate=16_000, layout="mono")
        cover = container.add_stream("mjpeg")
        cover.width = cover.height = 64
        cover.pix_fmt, cover.codec_context.time_base = "yuvj420p", Fraction(1, 25)
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 200, np.uint8), format="rgb24")
        picture = picture.reformat(format="yuvj420p")
        picture.pts = 0
        container.mux(cover.encode(picture) + cover.encode(None))
        frame = av.AudioFrame.from_ndarray(np.ones((1, 32_000), np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16_000, 0, Fraction(1, 16_000)
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    return path


def _write_pictures(folder: Path) -> None:
    noise = Image.effect_noise((70, 30), 60)
    noise.convert("RGB").save(folder / "photo.jpg")
    noise.convert("RGBA").save(folder / "transparent.png")
    noise.save(folder / "grey.webp")
    noise.convert("1").save(folder / "black_and_white.bmp")
    shutil.copy(folder / "photo.jpg", folder / "photo.mp4")
    shutil.copy(folder / "film.mp4", folder / "film.jpg")


def _write_damaged(folder: Path) -> None:
    """Interrupted downloads and flipped bits."""
    levels, times = grey_levels(20), [i / 10 for i in range(20)]
    fast = write_video(
        folder / "moov_first.mp4",
        levels,
        times,
        sound=_noise(2),
        sound_codec="aac",
        container_options={"movflags": "faststart"},
    )
    write_video(folder / "film.mkv", levels, times, sound=_noise(2))
    for percent in (1, 10, 50, 90):
        cut(fast, percent / 100, f"cut_{percent}_moov_first.mp4")
        cut(folder / "film.mp4", percent / 100, f"cut_{percent}_moov_last.mp4")
        cut(folder / "film.mkv", percent / 100, f"cut_{percent}.mkv")
    for name in ("film.avi", "film.webm", "song.mp3", "stereo.wav", "song.flac", "song.m4a", "photo.jpg"):
        cut(folder / name, 0.5)
    _cut_at(folder / "mono.wav", 78 + 10 * 2048, "cut_at_packet.wav")
    ogg = (folder / "song.ogg").read_bytes()
    _cut_at(folder / "song.ogg", ogg.rindex(b"OggS"), "cut_at_page.ogg")
    _cut_at(folder / "song.ogg", len(ogg) - 10, "cut_last_page.ogg")
    fragments = (folder / "fragments.mp4").read_bytes()
    _cut_at(folder / "fragments.mp4", fragments.rindex(b"moof") - 4, "cut_at_fragment.mp4")
    for place in (0.2, 0.5, 0.8):
        flip(folder / "song.flac", place, f"flipped_{place * 10:.0f}.flac")
        flip(fast, place, f"flipped_{place * 10:.0f}.mp4")
    data = bytearray(fast.read_bytes())
    data[4:8] = b"ptyf"  # the first box is no ftyp
    (folder / "no_ftyp.mp4").write_bytes(data)
    data = bytearray(fast.read_bytes())
    place = data.index(b"stsz") + 12
    data[place : place + 4] = struct.pack(">I", 2**31 - 1)  # number of samples
    (folder / "too_many_samples.mp4").write_bytes(data)
    with av.open(
        str(folder / "no_frames.mp4"), "w", options={"movflags": "frag_keyframe+empty_moov"}
    ) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        container.start_encoding()


def _cut_at(path: Path, size: int, name: str) -> None:
    path.with_name(name).write_bytes(path.read_bytes()[:size])


def flip(path: Path, place: float, name: str) -> Path:
    """A copy with eight bytes of noise at a fraction of its length."""
    data = bytearray(path.read_bytes())
    first = int(len(data) * place)
    data[first : first + 8] = bytes(byte ^ 0x5A for byte in data[first : first + 8])
    target = path.with_name(name)
    target.write_bytes(data)
    return target


def _write_impostors(folder: Path) -> None:
    """No media, by whatever name."""
    for name, content in {
        "empty.mp4": b"",
        "zeros.mp4": bytes(5000),
        "noise.mp4": np.random.default_rng(0).bytes(50_000),
        "text.mp4": b"Dear reader,\nthis is no film.\n" * 50,
        "page.mp4": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "concat.mp4": b"ffconcat version 1.0\nfile film.mp4\n",
        "concat.wav": b"ffconcat version 1.0\nfile mono.wav\n",
        "hls.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfilm.mp4\n#EXT-X-ENDLIST\n",
        "dash.mp4": b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        b'mediaPresentationDuration="PT2S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period>'
        b'<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>film.mp4</BaseURL>'
        b"</Representation></AdaptationSet></Period></MPD>",
        "archive.mp4": b"PK\x03\x04" + bytes(200),
    }.items():
        (folder / name).write_bytes(content)


def _write_oversized(folder: Path) -> None:
    """Headers that announce more than this machine should be asked for."""
    for name, side in (("large.png", 10_000), ("huge.png", 100_000)):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        body = _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", zlib.compress(bytes(1000)))
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n" + body + _png_chunk(b"IEND", b""))
    write_moving(folder / "huge.avi", 5, codec="ffv1", pix_fmt="bgr0")
    data = bytearray((folder / "huge.avi").read_bytes())
    place = data.index(b"strf") + 8  # BITMAPINFOHEADER: size, width, height
    data[place + 4 : place + 12] = struct.pack("<ii", side, side)
    (folder / "huge.avi").write_bytes(data)
    write_moving(folder / "huge.gif", 5, codec="gif", pix_fmt="rgb8")
    data = bytearray((folder / "huge.gif").read_bytes())
    data[6:10] = struct.pack("<HH", 65_535, 65_535)
    (folder / "huge.gif").write_bytes(data)
    times = [0.0, 5 * 3600.0]
    write_video(folder / "five_hours.mkv", grey_levels(2), times)
    channels, rate = 200, 16_000
    pcm = bytes(2 * channels * 2000)
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * channels * 2, channels * 2, 16)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(pcm)) + pcm
    (folder / "many_channels.wav").write_bytes(
        b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks
    )


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _write_no_files(folder: Path) -> None:
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    (folder / "circle.mp4").symlink_to("circle.mp4")
    (folder / "dangling.mp4").symlink_to("nowhere.mp4")
    (folder / "link.mp4").symlink_to("film.mp4")


# Loading in a process that may hang or crash
# -------------------------------------------------------------------------------------------------------


class Loader:
    """`load_media` in another process: a file that hangs or crashes the decoder fails one test alone.

    Args:
        spec: for all files.
        seconds: what one file may take.
    """

    def __init__(self, spec: MediaSpec, seconds: float = 10.0) -> None:
        self._spec, self.seconds = spec, seconds
        self._process = None

    def __call__(self, path: str | os.PathLike[str], **options: object) -> dict:
        """What `summary` gives, or {"stage", "reason"} of a MediaError, or {"defect": anything else}."""
        if self._process is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._pipe, other = context.Pipe()
            self._process = context.Process(target=_serve, args=(other, self._spec), daemon=True)
            self._process.start()
            other.close()
            self._pipe.recv()
        self._pipe.send((path, options))
        try:
            if self._pipe.poll(self.seconds):
                return self._pipe.recv()
            self.close()
            return {"defect": f"took more than {self.seconds} s"}
        except EOFError:
            self._process.join()
            return {"defect": f"ended its process with exit code {self._process.exitcode}"}

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()


def crash(path: str | os.PathLike[str]) -> None:
    """An `audio_reader` that ends its process."""
    os._exit(3)


def hang(path: str | os.PathLike[str]) -> None:
    """An `audio_reader` that does not come back."""
    time.sleep(600)


def _serve(pipe: Connection, spec: MediaSpec) -> None:
    pipe.send("ready")
    while True:
        path, options = pipe.recv()
        try:
            answer = summary(load_media(path, spec, **options), spec)
        except MediaError as error:
            answer = {"stage": error.stage, "reason": error.reason}
        except Exception as error:
            answer = {"defect": f"{type(error).__name__}: {error}"}
        pipe.send(answer)


def summary(media: LoadedMedia, spec: MediaSpec) -> dict:
    """Pictures' mean levels, windows and duration, after a check that it keeps what LoadedMedia promises."""
    frames, times = media.frames, media.frame_times
    assert frames.dtype == np.uint8 and frames.shape[1:] == (spec.image_size, spec.image_size, 3)
    assert len(frames) == len(times) <= spec.num_frames and (np.diff(times) > 0).all()
    assert len(media.windows) <= spec.max_windows and (media.has_video or media.has_audio)
    assert np.isfinite(media.duration) and (media.duration >= 0)
    assert ((times >= 0) & (times <= media.duration)).all()
    for start, end, samples in media.windows:
        assert samples.dtype == np.float32 and np.isfinite(samples).all() and (np.abs(samples) <= 1).all()
        assert 400 <= len(samples) <= spec.window_samples
        assert abs((end - start) * 16_000 - len(samples)) < 1e-3
        assert -1e-6 <= start and end <= media.duration + 1e-6
    return {
        "levels": [round(float(frame.mean())) for frame in frames],
        "times": [round(float(time), 3) for time in times],
        "windows": [(round(start, 3), round(end, 3)) for start, end, _ in media.windows],
        "duration": round(media.duration, 3),
    }
