"""Frames and sound of known files come out at their true times; damaged and hostile files are refused."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path
from unittest.mock import Mock

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from input_pipeline.media import RGB_CONVERSION, Limits, MediaError, load_media, probe, window_starts
from input_pipeline.spec import MediaSpec
from tests.input_pipeline.media_corpus import (
    cut,
    grey_levels,
    set_display_matrix,
    write_moving,
    write_song_with_cover,
    write_sound,
    write_video,
)

SPEC = MediaSpec(num_frames=8, image_size=16, window_frames=100, max_windows=4)  # windows of 1 s
TENTHS = [i / 10 for i in range(40)]
LEVELS = grey_levels(40)
VIDEO = "nasa_13013.mp4"


def shown(media) -> list[int]:
    """Which frames of a film of LEVELS were chosen."""
    values = media.frames.reshape(len(media.frames), -1).mean(1)
    return [int(np.argmin(np.abs(np.array(LEVELS) - value))) for value in values]


# Frames
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"x264-params": "bframes=3:b-adapt=0"}),
        ("a.mkv", "ffv1", {}),
        ("a.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "10"}),
        ("a.avi", "mpeg4", {}),
        ("b.avi", "libx264", {"x264-params": "bframes=3:b-adapt=0"}),
        ("c.avi", "mpeg4", {"bf": "2", "qmax": "2"}),
    ],
)
def test_midpoint_frames_and_their_times(tmp_path, name, codec, options):
    media = load_media(write_video(tmp_path / name, LEVELS, TENTHS, codec=codec, codec_options=options), SPEC)
    # Segments of 0.5 s, their middles at 0.25, 0.75, ...: the frames on screen then.
    assert shown(media) == [2, 7, 12, 17, 22, 27, 32, 37]
    np.testing.assert_allclose(media.frame_times, np.arange(8) * 0.5 + 0.2, atol=1e-6)
    assert media.frames.dtype == np.uint8 and media.frames.shape == (8, 16, 16, 3)
    assert media.duration == pytest.approx(4.0) and not media.has_audio


def test_linspace_includes_both_ends(tmp_path):
    spec = MediaSpec(num_frames=4, image_size=16, sampler="linspace")
    media = load_media(write_video(tmp_path / "a.mkv", LEVELS, TENTHS), spec)
    assert shown(media) == [0, 13, 26, 39]
    np.testing.assert_allclose(media.frame_times, [0, 1.3, 2.6, 3.9], atol=1e-6)


def test_a_frame_that_stays_on_screen_is_given_once(tmp_path):
    times = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 4.0, 7.9]
    media = load_media(write_video(tmp_path / "a.mkv", LEVELS[:10], times), SPEC)
    assert shown(media) == [5, 7, 8]  # at 0.5; 1.5, 2.5, 3.5; 4.5, ... s
    np.testing.assert_allclose(media.frame_times, [0.5, 0.7, 4.0], atol=1e-6)


def test_a_short_video_gives_all_its_frames_once(tmp_path):
    media = load_media(write_video(tmp_path / "a.mkv", LEVELS[::8], TENTHS[:5]), SPEC)
    assert shown(media) == [0, 8, 16, 24, 32]
    uneven = write_video(tmp_path / "b.mkv", LEVELS[::8], [0, 0.1, 0.2, 0.3, 7.0])
    assert shown(load_media(uneven, SPEC)) == [0, 8, 16, 24, 32]


def test_short_real_videos(shared_media):
    real = load_media(shared_media / "h265_video.mp4", MediaSpec(image_size=16))
    np.testing.assert_allclose(real.frame_times, np.arange(10) / 10, atol=1e-6)
    # Stored in the order 0, 3, 1, 2.
    real = load_media(shared_media / "unordered.mov", MediaSpec(image_size=16))
    np.testing.assert_allclose(real.frame_times, np.arange(4) / 32, atol=1e-6)


def test_matroska_without_frame_count(shared_media):
    info = probe(shared_media / "av1_video.mkv")
    assert (info.num_frames, info.width, info.height, info.has_audio) == (125, 640, 360, False)
    assert info.duration == pytest.approx(5.0) and info.fps == pytest.approx(25.0)
    media = load_media(shared_media / "av1_video.mkv", MediaSpec(image_size=16))
    # Middles of 16 segments of 5 s, down to the frame (1/25 s) that is on screen.
    expected = np.floor((np.arange(16) + 0.5) * 5 / 16 * 25) / 25
    np.testing.assert_allclose(media.frame_times, expected, atol=1e-6)


def test_best_streams_are_taken(shared_media):
    info = probe(shared_media / VIDEO)
    # Streams 3 and 4, not 0 (320 x 180) and 1 (8 kHz); the subtitles' 16.57 s do not count.
    assert (info.width, info.height, info.sample_rate) == (480, 270, 16_000)
    assert info.duration == pytest.approx(13.056)
    media = load_media(shared_media / VIDEO, MediaSpec(image_size=16))
    assert len(media.frames) == 16 and media.duration == pytest.approx(13.056)
    assert [len(samples) for _, _, samples in media.windows] == [164_080, 208_896 - 163_840]


@pytest.mark.parametrize(("name", "quarters"), [("0", 0), ("90", -1), ("180", -2), ("270", 1)])
def test_rotation_is_applied(shared_media, name, quarters):
    path = shared_media / f"video_{name}.mov"
    with av.open(str(path)) as container:
        coded = next(container.decode(video=0)).to_ndarray(format="rgb24").astype(float)
    upright = np.rot90(coded, quarters)
    info = probe(path)
    assert (info.height, info.width) == upright.shape[:2]
    frame = load_media(path, MediaSpec(image_size=8)).frames[0].astype(float)
    block = np.array(Image.fromarray(upright.astype(np.uint8)).resize((8, 8), Image.Resampling.BICUBIC))
    assert np.abs(frame - block).mean() < 2
    if quarters:
        wrong = np.array(Image.fromarray(coded.astype(np.uint8)).resize((8, 8), Image.Resampling.BICUBIC))
        assert np.abs(frame - wrong).mean() > 10


@pytest.mark.parametrize(
    ("name", "matrix", "full", "depth"),
    [
        ("bt709_full_range.mp4", "bt709", True, 8),
        ("video_0.mov", "bt709", False, 8),
        ("h264_10bits.mp4", "bt601", False, 10),  # names no matrix
    ],
)
def test_colours_follow_matrix_range_and_depth(shared_media, name, matrix, full, depth):
    with av.open(str(shared_media / name)) as container:
        frame = next(container.decode(container.streams.best("video")))
        planes = frame.to_ndarray().astype(float) / 2 ** (depth - 8)
    h, w = frame.height, frame.width
    blue, red = (p.reshape(h // 2, w // 2).repeat(2, 0).repeat(2, 1) for p in planes[h:].reshape(2, -1))

    def convert(matrix: str, full: bool) -> np.ndarray:  # ITU-R BT.601 and BT.709, their RGB equations
        kr, kb = {"bt709": (0.2126, 0.0722), "bt601": (0.299, 0.114)}[matrix]
        offset, luma, chroma = (0, 255, 255) if full else (16, 219, 224)
        y, cb, cr = (planes[:h] - offset) / luma, (blue - 128) / chroma, (red - 128) / chroma
        r, b = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
        rgb = np.clip(np.stack([r, (y - kr * r - kb * b) / (1 - kr - kb), b], -1), 0, 1) * 255
        image = Image.fromarray(np.uint8(np.rint(rgb)))
        return np.array(image.resize((64, 64), Image.Resampling.BICUBIC)).astype(float)

    spec = MediaSpec(num_frames=1, image_size=64, sampler="linspace")  # the first frame
    got = load_media(shared_media / name, spec).frames[0]
    error = {(m, f): np.abs(got - convert(m, f)).mean() for m in ("bt601", "bt709") for f in (False, True)}
    right = error.pop((matrix, full))
    assert right < 3 and 2 * right < min(error.values())


def test_picture_is_resized_straight_to_the_square(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (30, 70, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    media = load_media(tmp_path / "a.png", SPEC)
    expected = np.array(Image.fromarray(picture).resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(media.frames, expected[None])
    assert media.frame_times.tolist() == [0.0] and media.duration == 0.0 and not media.has_audio
    info = probe(tmp_path / "a.png")
    assert (info.width, info.height, info.duration) == (70, 30, 0.0)


def test_camera_orientation_of_a_photograph(tmp_path):
    picture = Image.fromarray(np.zeros((40, 80, 3), np.uint8))
    picture.paste((255, 255, 255), (0, 0, 40, 40))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    picture.save(tmp_path / "a.jpg", exif=exif)
    frame = load_media(tmp_path / "a.jpg", SPEC).frames[0]
    assert frame[:6].mean() > 240 and frame[-6:].mean() < 15  # upper half white


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_every_exif_orientation(tmp_path, suffix, orientation):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8))
    picture = picture.resize((80, 48), Image.Resampling.NEAREST)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    picture.save(path, exif=exif, quality=95)
    expected = (
        ImageOps.exif_transpose(Image.open(path)).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
    )
    frame = load_media(path, SPEC).frames[0].astype(float)
    assert np.abs(frame - np.asarray(expected)).mean() < 4
    info = probe(path)
    assert (info.width, info.height) == ((48, 80) if orientation in (5, 6, 7, 8) else (80, 48))


# Rows of the matrix's first two columns (a b, c d), and what it makes of a picture.
MATRICES = {
    "mirrored": ((-1, 0, 0, 1), lambda picture: picture[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda picture: picture[::-1]),
    "turned": ((-1, 0, 0, -1), lambda picture: picture[::-1, ::-1]),
    "clockwise": ((0, 1, -1, 0), lambda picture: np.rot90(picture, -1)),
    "counter-clockwise": ((0, -1, 1, 0), lambda picture: np.rot90(picture)),
    "transposed": ((0, 1, 1, 0), lambda picture: picture.swapaxes(0, 1)),
    "transversed": ((0, -1, -1, 0), lambda picture: picture[::-1, ::-1].swapaxes(0, 1)),
}


@pytest.mark.parametrize("name", list(MATRICES))
def test_the_display_matrix_of_a_film(tmp_path, name):
    (a, b, c, d), transform = MATRICES[name]
    path = write_moving(tmp_path / "a.mp4", 3, width=64, height=48)
    with av.open(str(path)) as container:
        coded = next(container.decode(video=0)).to_ndarray(format="rgb24", interpolation=RGB_CONVERSION)
    set_display_matrix(path, (a, b, c, d), (64, 48))
    frame = load_media(path, MediaSpec(num_frames=3, image_size=16)).frames[0]
    upright = Image.fromarray(np.ascontiguousarray(transform(coded)))
    np.testing.assert_array_equal(frame, upright.resize((16, 16), Image.Resampling.BICUBIC))
    info = probe(path)
    assert (info.width, info.height) == upright.size


# Sound
# --------------------------------------------------------------------------------------------------------


def test_16_khz_int16_passes_unchanged(tmp_path, shared_media):
    samples = np.random.default_rng(0).integers(-32768, 32768, (1, 20_000)).astype(np.int16)
    ((start, end, got),) = load_media(write_sound(tmp_path / "a.wav", samples, 16_000), MediaSpec()).windows
    np.testing.assert_array_equal(np.rint(got * 32768), samples[0])
    assert (start, end) == (0.0, 1.25) and got.dtype == np.float32
    ((_, end, got),) = load_media(shared_media / "sine_mono_s16.wav", MediaSpec()).windows
    assert end == 4.0 and len(got) == 64_000 and np.abs(got).max() == pytest.approx(0.3, abs=1e-3)


def test_channels_are_averaged(tmp_path):
    t = np.arange(16_000) / 16_000
    tone = np.sin(2 * np.pi * 440 * t).astype(np.float32)
    paths = [tmp_path / name for name in ("same.wav", "one.wav", "opposite.wav")]
    for path, right in zip(paths, (tone, 0 * tone, -tone), strict=True):
        write_sound(path, np.stack([tone, right]), 16_000, codec="pcm_f32le", layout="stereo")
    same, one, opposite = (load_media(path, MediaSpec()).windows[0][2] for path in paths)
    np.testing.assert_allclose(same, tone, atol=1e-6)  # FFmpeg's downmix would give 1.41 times this
    np.testing.assert_allclose(one, tone / 2, atol=1e-6)
    np.testing.assert_allclose(opposite, 0, atol=1e-6)
    loud = load_media(
        write_sound(tmp_path / "loud.wav", 2 * tone[None], 16_000, codec="pcm_f32le"), MediaSpec()
    )
    assert np.abs(loud.windows[0][2]).max() == 1.0


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_resampling_keeps_length_pitch_and_loudness(tmp_path, rate):
    t = np.arange(rate * 2) / rate
    tone = np.rint(0.5 * 32767 * np.sin(2 * np.pi * 1000 * t)).astype(np.int16)[None]
    ((_, end, got),) = load_media(write_sound(tmp_path / "a.wav", tone, rate), MediaSpec()).windows
    assert len(got) == pytest.approx(32_000, abs=2) and end == pytest.approx(2.0, abs=2e-4)
    expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(len(got)) / 16_000)
    np.testing.assert_allclose(got[500:-500], expected[500:-500], atol=5e-3)  # also no delay


def test_encoder_delay_and_start_time_are_no_silence(shared_media):
    """The mp3 starts at 0.138 s, the aac stream with a priming packet; they are the same sound at lag 0."""
    spec = MediaSpec(window_frames=1300)
    song = load_media(shared_media / "nasa_13013.mp4.audio.mp3", spec).windows[0]
    film = load_media(shared_media / VIDEO, spec, kind="audio").windows[0]
    assert song[0] == film[0] == 0.0 and song[1] == pytest.approx(13.0, abs=0.06)
    a, b = (window[2][16_000:160_000] for window in (song, film))
    lags = range(-40, 41)
    scores = [np.corrcoef(a[100:-100], b[100 + lag : len(b) - 100 + lag])[0, 1] for lag in lags]
    assert abs(lags[int(np.argmax(scores))]) <= 4 and max(scores) > 0.9


def test_short_sound_is_cut_into_contiguous_windows(tmp_path):
    ramp = np.arange(16_000 * 3 + 8_000, dtype=np.int16)[None]
    windows = load_media(write_sound(tmp_path / "a.wav", ramp, 16_000), SPEC).windows
    # Hop 1 s; each window has 240 samples of the next, so that no filterbank frame is lost at the seam.
    spans = [(start, end) for start, end, _ in windows]
    assert spans == [(0, 1.015), (1, 2.015), (2, 3.015), (3, 3.5)]
    for start, end, samples in windows:
        np.testing.assert_array_equal(
            np.rint(samples * 32768), ramp[0, round(start * 16_000) : round(end * 16_000)]
        )
        assert len(samples) == round((end - start) * 16_000)


def test_long_sound_has_windows_around_the_frames(tmp_path):
    spec = MediaSpec(num_frames=4, image_size=16, window_frames=100, max_windows=4)
    ramp = (np.arange(16_000 * 10) // 8).astype(np.int16)
    path = write_video(tmp_path / "a.mkv", grey_levels(100), [i / 10 for i in range(100)], sound=ramp)
    media = load_media(path, spec)
    np.testing.assert_allclose(media.frame_times, [1.2, 3.7, 6.2, 8.7], atol=1e-6)
    for time, (start, end, samples) in zip(media.frame_times, media.windows, strict=True):
        assert (start + end) / 2 == pytest.approx(time, abs=1e-4) and len(samples) == spec.window_samples
        first = round(start * 16_000)
        np.testing.assert_array_equal(np.rint(samples * 32768), ramp[first : first + len(samples)])
    # Sound alone: middles of equal segments.
    alone = load_media(path, spec, kind="audio")
    assert not alone.has_video
    assert [(a + b) / 2 for a, b, _ in alone.windows] == pytest.approx([1.25, 3.75, 6.25, 8.75], abs=1e-3)


def test_window_starts():
    hop, length = SPEC.window_hop, SPEC.window_samples
    assert window_starts(4 * hop, [0.1, 0.2, 0.3, 0.4], SPEC) == [0, hop, 2 * hop, 3 * hop]
    long = 10 * hop
    assert window_starts(long, None, SPEC) == [
        round(c * 16_000) - length // 2 for c in (1.25, 3.75, 6.25, 8.75)
    ]
    # Moved inside at both ends, once where two would coincide, also when the picture outlasts the sound.
    assert window_starts(long, [0.0, 0.1, 5.0, 99.0], SPEC) == [0, 80_000 - length // 2, long - length]
    assert window_starts(long, [5.0], SPEC) == window_starts(long, None, SPEC)
    # Longer than a hop and shorter than a window: it begins with the sound.
    single = MediaSpec(max_windows=1)
    assert window_starts(single.window_hop + 1, None, single) == [0]
    assert window_starts(single.window_samples + 9, None, single) in ([4], [5])


def test_one_clock_for_picture_and_sound(tmp_path):
    sound = np.full(16_000, 1000, np.int16)
    late = load_media(write_video(tmp_path / "a.mkv", LEVELS, [t + 0.5 for t in TENTHS], sound=sound), SPEC)
    assert late.frame_times[0] == pytest.approx(0.7) and late.windows[0][0] == 0.0
    assert late.duration == pytest.approx(4.5)
    early = load_media(write_video(tmp_path / "b.mkv", LEVELS, TENTHS, sound=sound, sound_start=1.5), SPEC)
    assert early.frame_times[0] == pytest.approx(0.2)
    assert [(a, b) for a, b, _ in early.windows] == [(pytest.approx(1.5), pytest.approx(2.5))]


def test_a_hole_in_the_sound_keeps_what_follows_in_its_place(tmp_path):
    path = write_sound(tmp_path / "a.mka", np.full((1, 8000), 8192, np.int16), 16_000, starts=(0.0, 1.5))
    windows = load_media(path, SPEC).windows
    whole = np.zeros(32_000)
    for start, _, samples in windows:
        whole[round(start * 16_000) : round(start * 16_000) + len(samples)] = samples
    np.testing.assert_array_equal(whole, np.repeat([0.25, 0, 0, 0.25], 8000))


def test_small_holes_and_a_slow_clock_add_up(tmp_path):
    """What is played stays within 0.1 s of its time."""
    for name, length, every in (("holes.mka", 1600, 0.19), ("slow.mka", 16_000, 1.01)):
        count = round(19 / every)
        pieces = np.zeros((1, length), np.int16)
        pieces[0, :160] = 8192  # a click
        path = write_sound(
            tmp_path / name, pieces, 16_000, codec="pcm_s16le", starts=[i * every for i in range(count)]
        )
        media = load_media(path, MediaSpec(max_windows=2))
        assert media.duration == pytest.approx((count - 1) * every + length / 16_000, abs=0.1)
        whole = np.zeros(20 * 16_000)
        for start, _, samples in media.windows:
            whole[round(start * 16_000) :][: len(samples)] = samples
        clicks = np.flatnonzero(np.diff(whole, prepend=0) > 0.2) / 16_000
        late = np.arange(count)[: len(clicks)] * every - clicks
        assert len(clicks) == count and late.min() > -0.001 and late.max() < 0.101


def test_a_cover_picture_is_no_video(tmp_path):
    write_song_with_cover(tmp_path / "a.mp3")
    with av.open(str(tmp_path / "a.mp3")) as container:
        assert container.streams.best("video") is not None
    media = load_media(tmp_path / "a.mp3", SPEC)
    assert media.has_audio and not media.has_video
    assert media.duration == pytest.approx(2.0, abs=0.1)


# Refusals
# -----------------------------------------------------------------------------------------------------


def refused(path: Path, **options) -> MediaError:
    with pytest.raises(MediaError) as caught:
        load_media(path, SPEC, **options)
    assert caught.value.path == os.fspath(path) and str(path) in str(caught.value)
    return caught.value


def test_damage_in_the_middle_is_an_error(shared_media):
    assert probe(shared_media / "corrupted.mp4").num_frames == 50  # its header is fine
    error = refused(shared_media / "corrupted.mp4")
    assert error.stage == "decode" and "2.700 s" in error.reason


@pytest.mark.parametrize("name", ["a.mp4", "fast.mp4", "a.mkv", "a.webm", "a.avi"])
def test_truncated_video_is_an_error(tmp_path, name):
    options = {"movflags": "faststart"} if name == "fast.mp4" else {}
    codec = {".webm": "libvpx", ".avi": "mpeg4"}.get(Path(name).suffix, "libx264")
    rng = np.random.default_rng(0)
    sound = rng.integers(-9000, 9000, 64_000).astype(np.int16)
    path = write_video(
        tmp_path / name,
        LEVELS,
        TENTHS,
        codec=codec,
        sound=sound,
        sound_codec={".webm": "libopus", ".mp4": "aac"}.get(Path(name).suffix, "pcm_s16le"),
        container_options=options,
    )
    assert load_media(path, SPEC).has_audio
    refused(cut(path, 0.5))


@pytest.mark.parametrize(
    ("name", "codec"), [("a.wav", "pcm_s16le"), ("a.flac", "flac"), ("a.mp3", "libmp3lame")]
)
def test_truncated_sound_is_an_error(tmp_path, name, codec):
    noise = np.random.default_rng(0).integers(-9000, 9000, (1, 64_000)).astype(np.int16)
    path = write_sound(tmp_path / name, noise, 16_000, codec=codec)
    assert load_media(path, SPEC).duration == pytest.approx(4.0, abs=0.1)
    refused(cut(path, 0.52))


def test_sound_that_ends_where_a_packet_does_is_truncated_all_the_same(tmp_path):
    noise = np.random.default_rng(0).integers(-9000, 9000, (1, 64_000)).astype(np.int16)
    wav = write_sound(tmp_path / "a.wav", noise, 16_000).read_bytes()
    for size in range(78 + 2048, len(wav), 20 * 2048):
        (tmp_path / "b.wav").write_bytes(wav[:size])
        assert f"announces {len(wav) - size} bytes" in refused(tmp_path / "b.wav").reason
    ogg = write_sound(tmp_path / "a.ogg", noise.repeat(3, 1), 48_000, codec="libopus").read_bytes()
    places = [place for place in range(len(ogg)) if ogg.startswith(b"OggS", place)]
    assert len(places) > 4
    for size in (*places[3:], places[-1] + 30, len(ogg) - 1):
        (tmp_path / "b.ogg").write_bytes(ogg[:size])
        assert "truncated" in refused(tmp_path / "b.ogg").reason


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
def test_a_wav_that_does_not_state_its_length_is_read_to_its_end(tmp_path, size):
    path = write_sound(tmp_path / "a.wav", np.full((1, 32_768), 999, np.int16), 16_000)  # whole packets
    data = bytearray(path.read_bytes())
    place = data.index(b"data") + 4
    data[place : place + 4] = struct.pack("<I", size)
    path.write_bytes(data)
    assert load_media(path, SPEC).duration == pytest.approx(2.048)


def test_the_sizes_of_long_wavs_and_tags_after_an_ogg(tmp_path):
    form = struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16)
    sound = np.full(32_000, 999, "<i2").tobytes()
    for stated, fits in ((len(sound), True), (len(sound) + 2, False)):
        chunks = b"ds64" + struct.pack("<IQQQI", 28, 72 + stated, stated, stated // 2, 0)
        chunks += b"fmt " + struct.pack("<I", 16) + form + b"data\xff\xff\xff\xff" + sound
        (tmp_path / "a.wav").write_bytes(b"RF64\xff\xff\xff\xffWAVE" + chunks)
        if fits:
            assert load_media(tmp_path / "a.wav", SPEC).duration == pytest.approx(2.0)
        else:
            assert "announces 2 bytes" in refused(tmp_path / "a.wav").reason
    ogg = write_sound(tmp_path / "a.ogg", np.full((1, 96_000), 999, np.int16), 48_000, codec="libopus")
    ogg.write_bytes(ogg.read_bytes() + b"TAG" + bytes(125))
    assert load_media(ogg, SPEC).duration == pytest.approx(2.0, abs=0.01)


def test_flipped_bits_in_flac_are_an_error(tmp_path):
    noise = np.random.default_rng(0).integers(-9000, 9000, (1, 64_000)).astype(np.int16)
    path = write_sound(tmp_path / "a.flac", noise, 16_000, codec="flac")
    sound = path.read_bytes()
    for place in range(len(sound) // 10, len(sound), len(sound) // 10):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 16]) + sound[place + 1 :])
        refused(path)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_truncated_picture_is_an_error(tmp_path, name):
    Image.effect_noise((200, 200), 60).convert("RGB").save(tmp_path / name)
    assert load_media(tmp_path / name, SPEC).has_video
    refused(cut(tmp_path / name, 0.5))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html><body>404</body></html>",
        np.random.default_rng(0).bytes(50_000),
        b"ffconcat version 1.0\nfile target.mp4\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ntarget.mp4\n#EXT-X-ENDLIST\n",
    ],
    ids=["empty", "html", "random", "ffconcat", "hls"],
)
def test_what_is_no_media_is_refused(tmp_path, content):
    write_video(tmp_path / "target.mp4", LEVELS[:3], TENTHS[:3])
    (tmp_path / "a.mp4").write_bytes(content)
    for kind in ("auto", "video", "audio"):
        assert refused(tmp_path / "a.mp4", kind=kind).stage == "open"
    if content.startswith(
        b"ffconcat"
    ):  # The danger is real: without a list of formats it opens the other file.
        with av.open(str(tmp_path / "a.mp4")) as container:
            assert container.streams.video


def test_what_is_no_file_is_refused(tmp_path):
    assert "no such file" in refused(tmp_path / "missing.mp4").reason
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it would wait for ever
    for name in ("folder.mp4", "pipe.mp4"):
        assert "no regular file" in refused(tmp_path / name).reason


@pytest.mark.parametrize("name", ["a.mp4", "a.png"])
def test_a_file_without_the_right_to_read_it(tmp_path, monkeypatch, name):
    write_video(tmp_path / "a.mp4", LEVELS[:3], TENTHS[:3])
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    if os.geteuid() == 0:  # To root nothing is forbidden.
        denied = av.error.PermissionError(13, "Permission denied")
        monkeypatch.setattr(av, "open", Mock(side_effect=denied))
        monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=PermissionError(13, "Permission denied")))
    else:
        (tmp_path / name).chmod(0)
    error = refused(tmp_path / name)
    assert error.stage == "open" and "permission" in error.reason


def test_a_media_error_passes_between_processes(tmp_path):
    error = refused(tmp_path / "missing.mp4")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert (copy.path, copy.reason, copy.stage) == (error.path, error.reason, error.stage)


def test_kind_must_fit(tmp_path):
    film = write_video(tmp_path / "a.mp4", LEVELS[:3], TENTHS[:3])
    assert "no sound" in refused(film, kind="audio").reason
    assert "allowed for image" in refused(film, kind="image").reason
    song = write_sound(tmp_path / "a.wav", np.zeros((1, 16_000), np.int16), 16_000)
    assert "allowed for video" in refused(song, kind="video").reason
    blip = write_sound(tmp_path / "b.wav", np.zeros((1, 399), np.int16), 16_000)
    assert "25 ms" in refused(blip).reason
    with pytest.raises(ValueError, match="kind"):
        load_media(film, SPEC, kind="film")


@pytest.mark.parametrize(
    "limits",
    [
        Limits(max_bytes=1000),
        Limits(max_pixels=32 * 32 - 1),
        Limits(max_duration=3.0),
        Limits(max_frame_rate=9.0),
        Limits(max_channels=0),
    ],
    ids=lambda limits: next(k for k, v in vars(limits).items() if v != vars(Limits())[k]),
)
def test_limits_are_named(tmp_path, limits):
    path = write_video(tmp_path / "a.mkv", LEVELS, TENTHS, sound=np.zeros(16_000, np.int16))
    name = next(k for k, v in vars(limits).items() if v != vars(Limits())[k])
    error = refused(path, limits=limits)
    assert error.stage == "limit" and name in error.reason


def test_a_picture_too_large_is_refused_before_it_is_decoded(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    refused(tmp_path / "a.png")


def test_names_are_never_patterns_or_protocols(tmp_path):
    path = write_video(tmp_path / "a.mp4", LEVELS[:3], TENTHS[:3])
    for name in ("pipe:0.mp4", "50%03d.mp4", "ünïcode 片.mp4"):
        shutil.copy(path, tmp_path / name)
        assert load_media(tmp_path / name, SPEC).has_video
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(buffer, "PNG")
    (tmp_path / "50%03d.png").write_bytes(buffer.getvalue())
    assert load_media(tmp_path / "50%03d.png", SPEC).has_video
