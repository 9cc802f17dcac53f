"""An interval of a file is what a file would give that had been cut there."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from input_pipeline import sound
from input_pipeline.containers import Limits, MediaError, read_timeline
from input_pipeline.media import load_media
from input_pipeline.spec import MediaSpec
from tests.input_pipeline.media_corpus import grey_levels, write_sound, write_video

SPEC = MediaSpec(num_frames=8, image_size=16, window_frames=100, max_windows=4)  # windows of 1 s
LEVELS = grey_levels(100)
TENTHS = [i / 10 for i in range(100)]
NOISE = np.random.default_rng(0).integers(-9000, 9000, 160_000).astype(np.int16)


def film(path, levels, times, samples, **options):
    return write_video(path, levels, times, codec="ffv1", sound=samples, **options)


def same(got, expected):
    """Bit-equal pictures and samples, equal times."""
    np.testing.assert_array_equal(got.frames, expected.frames)
    np.testing.assert_allclose(got.frame_times, expected.frame_times, atol=1e-9)
    assert len(got.windows) == len(expected.windows)
    for (start, end, samples), (other_start, other_end, others) in zip(
        got.windows, expected.windows, strict=True
    ):
        assert (start, end) == (pytest.approx(other_start), pytest.approx(other_end))
        np.testing.assert_array_equal(samples, others)
    assert got.duration == pytest.approx(expected.duration, abs=1e-9)


@pytest.mark.parametrize("sampler", ["midpoint", "linspace"])
@pytest.mark.parametrize(("first", "last"), [(20, 60), (0, 10), (95, 100), (31, 32), (10, 95)])
def test_an_interval_is_a_file_that_was_cut_there(tmp_path, sampler, first, last):
    spec = MediaSpec(num_frames=8, image_size=16, window_frames=100, max_windows=4, sampler=sampler)
    whole = film(tmp_path / "whole.mkv", LEVELS, TENTHS, NOISE)
    cut = film(
        tmp_path / "cut.mkv",
        LEVELS[first:last],
        TENTHS[: last - first],
        NOISE[first * 1600 : last * 1600],
    )
    same(load_media(whole, spec, interval=(first / 10, last / 10)), load_media(cut, spec))


def test_the_whole_as_an_interval_is_the_whole(tmp_path, shared_media):
    path = film(tmp_path / "a.mkv", LEVELS, TENTHS, NOISE)
    same(load_media(path, SPEC, interval=(0, 10)), load_media(path, SPEC))
    same(load_media(path, SPEC, interval=(0, 1e6)), load_media(path, SPEC))  # clipped
    for name in ("nasa_13013.mp4", "nasa_13013.mp4.audio.mp3", "jfk.flac", "unordered.mov"):
        same(load_media(shared_media / name, SPEC, interval=(0, 99)), load_media(shared_media / name, SPEC))


def test_a_frame_on_screen_at_the_start_is_shown_from_there(tmp_path):
    path = film(tmp_path / "a.mkv", LEVELS[:4], [0.0, 1.0, 5.0, 6.0], NOISE)
    media = load_media(path, SPEC, interval=(2.5, 5.5))
    values = media.frames.reshape(len(media.frames), -1).mean(1)
    np.testing.assert_allclose(values, LEVELS[1:3], atol=2)
    np.testing.assert_allclose(media.frame_times, [0.0, 2.5])
    assert media.duration == 3.0
    np.testing.assert_array_equal(
        np.rint(media.windows[0][2] * 32768), NOISE[40_000 : 40_000 + SPEC.window_samples]
    )
    # One frame fills all of it.
    media = load_media(path, SPEC, interval=(2.5, 2.6))
    assert media.frame_times.tolist() == [0.0] and media.duration == pytest.approx(0.1)


def test_the_clock_is_the_medias_own(tmp_path):
    """Time zero is the first moment of picture or sound, whatever the container's clock says."""
    late = film(tmp_path / "late.mkv", LEVELS, [t + 3 for t in TENTHS], NOISE, sound_start=3.0)
    sooner = film(tmp_path / "sooner.mkv", LEVELS, TENTHS, NOISE)
    same(load_media(late, SPEC, interval=(2, 6)), load_media(sooner, SPEC, interval=(2, 6)))
    # The sound begins 1.5 s before the picture, and the other way round.
    path = film(tmp_path / "sound_first.mkv", LEVELS, [t + 1.5 for t in TENTHS], NOISE)
    media = load_media(path, SPEC, interval=(1.0, 2.0))
    assert media.frame_times[0] == pytest.approx(0.5) and media.windows[0][0] == 0.0
    path = film(tmp_path / "sound_last.mkv", LEVELS, TENTHS, NOISE, sound_start=1.5)
    media = load_media(path, SPEC, interval=(1.0, 2.0))
    assert media.frame_times[0] == 0.0
    ((start, end, samples),) = media.windows
    assert (start, end) == (0.5, 1.0)
    np.testing.assert_array_equal(np.rint(samples * 32768), NOISE[:8000])
    assert not load_media(path, SPEC, interval=(0.5, 1.0)).has_audio


def test_what_ended_before_is_missing(tmp_path):
    path = film(tmp_path / "a.mkv", LEVELS[:20], TENTHS[:20], NOISE)
    media = load_media(path, SPEC, interval=(3, 4))
    assert not media.has_video and media.frames.shape == (0, 16, 16, 3)
    assert [(start, end) for start, end, _ in media.windows] == [(0.0, 1.0)]
    path = film(tmp_path / "b.mkv", LEVELS, TENTHS, NOISE[:16_000])
    media = load_media(path, SPEC, interval=(3, 4))
    assert media.has_video and not media.has_audio and media.duration == 1.0


def test_samples_wholly_within(tmp_path):
    ramp = np.arange(32_000, dtype=np.int16)
    path = write_sound(tmp_path / "a.wav", ramp[None], 16_000)
    media = load_media(path, SPEC, interval=(0.50003, 1.00003))  # 8000.48 to 16000.48 samples
    ((start, end, samples),) = media.windows
    np.testing.assert_array_equal(np.rint(samples * 32768), ramp[8001:16_000])
    assert start == pytest.approx(0.52 / 16_000) and end == pytest.approx(7999.52 / 16_000)
    assert media.duration == pytest.approx(0.5) and end <= media.duration


def test_a_long_interval_has_windows_around_its_frames(tmp_path):
    spec = MediaSpec(num_frames=4, image_size=16, window_frames=100, max_windows=4)
    media = load_media(film(tmp_path / "a.mkv", LEVELS, TENTHS, NOISE), spec, interval=(2, 10))
    np.testing.assert_allclose(media.frame_times, [1, 3, 5, 7])
    for time, (start, end, samples) in zip(media.frame_times, media.windows, strict=True):
        assert (start + end) / 2 == pytest.approx(time, abs=1e-4)
        first = round((2 + start) * 16_000)
        np.testing.assert_array_equal(np.rint(samples * 32768), NOISE[first : first + len(samples)])


@pytest.mark.parametrize(
    ("interval", "reason"),
    [
        ((10.0, 11.0), "beyond its end at 10.000 s"),
        ((50, 51), "beyond its end"),
        ((2, 2), "0 <= start < end"),
        ((3, 2), "0 <= start < end"),
        ((-1, 2), "0 <= start < end"),
        ((0, float("inf")), "0 <= start < end"),
        ((float("nan"), 1), "0 <= start < end"),
    ],
)
def test_intervals_that_are_none(tmp_path, interval, reason):
    path = film(tmp_path / "a.mkv", LEVELS, TENTHS, NOISE)
    with pytest.raises(MediaError, match=reason) as caught:
        load_media(path, SPEC, interval=interval)
    assert caught.value.stage == "interval"


def test_an_interval_that_holds_nothing(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    with pytest.raises(MediaError, match="is an image") as caught:
        load_media(tmp_path / "a.png", SPEC, interval=(0, 1))
    assert caught.value.stage == "interval"
    song = write_sound(tmp_path / "a.wav", NOISE[None], 16_000)
    with pytest.raises(MediaError, match="neither picture nor 25 ms") as caught:
        load_media(song, SPEC, interval=(1.0, 1.02))
    assert caught.value.stage == "interval"


def test_damage_outside_the_interval_is_not_seen_and_within_it_is(shared_media):
    path = shared_media / "corrupted.mp4"  # cannot be decoded beyond 2.7 s
    media = load_media(path, SPEC, interval=(0.5, 1.5))
    assert media.duration == 1.0 and len(media.frames) == 8
    for interval in ((2.0, 4.0), (3.5, 4.5), None):
        with pytest.raises(MediaError, match="2.700 s") as caught:
            load_media(path, SPEC, interval=interval)
        assert caught.value.stage == "decode"


# Sound: a beginning in the middle
# -------------------------------------------------------------------------------------------------------


def song(path, codec, rate, layout="mono"):
    t = np.arange(rate * 12) / rate
    sweep = 0.3 * np.sin(2 * np.pi * (200 + 60 * t) * t)
    channels = [sweep, 0.5 * sweep + 0.01][: 1 if layout == "mono" else 2]
    samples = np.rint(32767 * np.stack(channels)).astype(np.int16)
    return write_sound(path, samples, rate, codec=codec, layout=layout)


@pytest.mark.parametrize(
    ("name", "codec", "rate", "seeks"),
    [
        ("a.wav", "pcm_s16le", 16_000, True),
        ("a.wav", "pcm_s24le", 44_100, True),
        ("a.wav", "pcm_s16le", 8_000, True),
        ("a.mov", "pcm_s16le", 48_000, True),
        ("a.flac", "flac", 44_100, True),
        ("a.flac", "flac", 48_000, True),
        ("a.mka", "flac", 44_100, False),  # its clock counts milliseconds
        ("a.wav", "pcm_s16le", 47_999, False),  # no period worth the name
        ("a.mp4", "aac", 44_100, False),
        ("a.mp3", "libmp3lame", 44_100, False),
        ("a.ogg", "libopus", 48_000, False),
    ],
)
def test_a_later_beginning_gives_the_same_samples(tmp_path, monkeypatch, name, codec, rate, seeks):
    path = song(tmp_path / name, codec, rate, "stereo")
    track = read_timeline(path, "audio", Limits()).audio
    whole = list(sound.read_sound(path, "audio", track, Limits()))
    samples = np.concatenate([chunk for _, chunk, _ in whole])
    monkeypatch.setattr(sound, "SKIPPED_PACKETS", 1)
    entries, inner = [], sound._mono_16k

    def recorded(path, container, track, limits, entry, begin):
        entries.append(entry)
        for chunk in inner(path, container, track, limits, entry, begin):
            entries.append("read")
            yield chunk

    monkeypatch.setattr(sound, "_mono_16k", recorded)
    for begin in (0.01, 1.7, 4.123457, 11.9):
        entries.clear()
        later = list(sound.read_sound(path, "audio", track, Limits(), whole[0][2] + begin))
        position, _, start = later[0]
        assert start == whole[0][2] and position <= begin * 16_000
        rest = np.concatenate([chunk for _, chunk, _ in later])
        wanted = int(begin * 16_000)  # what is resampled ahead of it need not be the same
        np.testing.assert_array_equal(rest[wanted - position :], samples[wanted:])
        assert (entries[entries.index("read") - 1] is not None) == (seeks and begin > 1.1)


def test_a_hole_before_the_beginning(tmp_path, monkeypatch):
    for name, rate in (("a.mka", 16_000), ("b.mka", 44_100)):
        samples = NOISE[None, : 3 * rate]
        path = write_sound(tmp_path / name, samples, rate, starts=(0.0, 4.5))
        track = read_timeline(path, "audio", Limits()).audio
        whole = list(sound.read_sound(path, "audio", track, Limits()))
        later = list(sound.read_sound(path, "audio", track, Limits(), 5.5))
        expected = np.zeros(16_000 * 8, np.float32)
        for position, chunk, _ in whole:
            expected[position : position + len(chunk)] = chunk
        assert later[0][0] > 4.4 * 16_000
        for position, chunk, _ in later:
            np.testing.assert_array_equal(
                chunk[max(88_000 - position, 0) :], expected[max(position, 88_000) : position + len(chunk)]
            )


def test_a_change_of_format_before_the_beginning_is_heard_from_the_start(tmp_path, monkeypatch):
    """How many samples a conversion that was left out would have given only the resampler knows."""
    path = tmp_path / "a.wav"
    write_sound(path, NOISE[None, :48_000], 16_000)
    decode_stream = sound.decode_stream

    def changing(*args):
        for number, frame in enumerate(decode_stream(*args)):
            if number >= 20:  # from here on the same bytes in stereo
                other = av.AudioFrame.from_ndarray(frame.to_ndarray(), format="s16", layout="stereo")
                other.sample_rate, other.time_base, other.pts = 16_000, Fraction(1, 16_000), frame.pts
                yield other
            else:
                yield frame

    monkeypatch.setattr(sound, "decode_stream", changing)
    track = read_timeline(path, "audio", Limits()).audio
    track.entries = []
    whole = list(sound.read_sound(path, "audio", track, Limits()))
    assert [position for position, _, _ in whole] == [
        position for position, _, _ in sound.read_sound(path, "audio", track, Limits(), 2.5)
    ]


# Another decoder for the sound
# -------------------------------------------------------------------------------------------------------


def test_another_reader_of_sound(tmp_path):
    path = film(tmp_path / "a.mkv", LEVELS, TENTHS, NOISE)
    asked = []

    def reader(name):
        asked.append(name)
        return NOISE.astype(np.float32) / 32768, 0.0

    for interval in (None, (2.05, 6.3)):
        same(
            load_media(path, SPEC, interval=interval, audio_reader=reader),
            load_media(path, SPEC, interval=interval),
        )
    assert asked == [path, path]
    silent = write_video(tmp_path / "silent.mkv", LEVELS[:5], TENTHS[:5])
    assert load_media(silent, SPEC, audio_reader=reader).has_video and asked == [path, path]
    late = load_media(path, SPEC, audio_reader=lambda name: (np.full(16_000, 0.5, np.float32), 1.25))
    assert [(start, end) for start, end, _ in late.windows] == [(1.25, 2.25)]


@pytest.mark.parametrize(
    "answer",
    [
        (np.zeros(10), 0.0),
        (np.zeros((2, 10), np.float32), 0.0),
        (np.full(10, 1.5, np.float32), 0.0),
        (np.full(10, np.nan, np.float32), 0.0),
        (np.zeros(10, np.float32), float("nan")),
    ],
)
def test_a_reader_must_keep_to_its_contract(tmp_path, answer):
    path = write_sound(tmp_path / "a.wav", NOISE[None], 16_000)
    with pytest.raises(ValueError, match="audio_reader"):
        load_media(path, SPEC, audio_reader=lambda name: answer)
