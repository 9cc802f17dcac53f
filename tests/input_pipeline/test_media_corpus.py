"""What becomes of bad and odd files: an error that says what is wrong, or exactly what is documented."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from input_pipeline.containers import AUDIO_SUFFIXES, IMAGE_SUFFIXES
from input_pipeline.manifest import parse_lines
from input_pipeline.media import probe
from input_pipeline.prepare import prepare
from input_pipeline.records import RecordReader, unpack_record
from input_pipeline.spec import MediaSpec
from tests.input_pipeline.media_corpus import Loader, crash, hang, write_corpus

SPEC = MediaSpec(num_frames=4, image_size=16, window_frames=100, max_windows=4)  # windows of 1 s
MUTATIONS = 300


@dataclasses.dataclass(frozen=True)
class Refused:
    stage: str
    reason: str  # a part of it


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Times of the frames, spans of the windows, duration; and, where it matters, levels and upright size."""

    times: list[float]
    windows: list[tuple[float, float]]
    duration: float
    levels: list[int] | None = None
    size: tuple[int, int] | None = None


NO_MEDIA = Refused("open", "is no media file")
NOT_ALLOWED = Refused("open", "is in no format allowed")
CUT_OFF = Refused("decode", "truncated file")
NO_FILE = Refused("open", "is no regular file")

QUARTERS = [0.2, 0.7, 1.2, 1.7]  # frames every 0.1 s on screen at 0.25, 0.75, 1.25 and 1.75 s
LEVELS = [43, 99, 156, 212]  # of `grey_levels(20)`
SECONDS = [(0.0, 1.015), (1.0, 2.0)]  # two seconds of sound in windows of 1.015 s every second
AAC = [(0.0, 1.015), (1.0, 2.015), (2.0, 2.048)]  # the same in whole AAC frames of 64 ms
FILM = Loaded(QUARTERS, AAC, 2.048, LEVELS)
SILENT = Loaded(QUARTERS, [], 2.0)
SONG = Loaded([], SECONDS, 2.0)
PICTURE = Loaded([0.0], [], 0.0)

FILES: dict[str, Refused | Loaded] = {
    # films
    "film.mp4": FILM,
    "moov_first.mp4": FILM,
    "film.mkv": Loaded(QUARTERS, SECONDS, 2.0, LEVELS),
    "film.avi": Loaded(QUARTERS, SECONDS, 2.0),
    "film.webm": Loaded(QUARTERS, SECONDS, 2.0),
    "silent.mp4": Loaded(QUARTERS, [], 2.0, LEVELS),
    "fragments.mp4": SILENT,
    "hevc.mp4": SILENT,
    "av1.mkv": SILENT,
    "vp9.webm": SILENT,
    "ten_bits.mp4": SILENT,
    "uncompressed.avi": SILENT,
    "loop.gif": SILENT,
    # odd films
    "one_pixel.mkv": dataclasses.replace(SILENT, size=(1, 1)),
    "odd_size.mp4": dataclasses.replace(SILENT, size=(33, 17)),
    "rotated.mp4": dataclasses.replace(SILENT, size=(32, 64)),
    "brief.mp4": Loaded([0.0, 0.025], [], 0.05),
    "one_frame.mp4": Loaded([0.0], [], 0.1),
    "still.mp4": Loaded(QUARTERS, AAC, 2.048, [128] * 4),
    "uneven.mkv": Loaded([0.08, 1.0], [], 2.05, [43, 54]),  # on screen at 0.26, 0.77; 1.28, 1.79 s
    "late_sound.mkv": Loaded(QUARTERS, [(1.5, 2.5)], 2.5, LEVELS),
    "late_picture.mkv": Loaded([1.2, 1.7, 2.2, 2.7], SECONDS, 3.0, LEVELS),
    "starts_at_an_hour.mkv": Loaded(QUARTERS, [], 2.0, LEVELS),
    # the second of every two at one time; how long the last one lasts is not said
    "same_times.mkv": Loaded([0.2, 0.6, 1.0, 1.6], [], 1.895, [54, 99, 145, 212]),
    "two_pictures.mkv": Loaded(QUARTERS, [], 2.0, [0] * 4, (32, 32)),  # flagged as the default one
    "pipe:0 %03d ünïcode 片.mp4": FILM,
    "not_utf8_\udcff\udcfe.mp4": FILM,
    "FILM_WITHOUT_SUFFIX": FILM,
    "link.mp4": FILM,
    # sounds
    "mono.wav": SONG,
    "stereo.wav": SONG,
    "surround.wav": SONG,
    "cinema.wav": SONG,  # eight planes of samples would crash PyAV 18.1
    "rate_8000.wav": SONG,
    "rate_48000.wav": SONG,
    "bits_24.wav": SONG,
    "song.flac": SONG,
    "song.mp3": SONG,
    "song.ogg": SONG,
    "commented.mp3": Loaded([], [(0.519, 1.534), (2.571, 3.586), (4.623, 5.638), (6.675, 7.69)], 8.208),
    "song.m4a": Loaded([], [(0.0, 1.015), (1.0, 2.015)], 2.02),
    "hole.mka": SONG,
    "cover.mp3": SONG,
    "loud.wav": SONG,  # clipped
    "not_a_number.wav": Refused("decode", "no number at 0.5"),
    "short.wav": Refused("decode", "shorter than 25 ms"),
    "subtitles.mkv": Refused("open", "neither picture nor sound"),
    # pictures
    "photo.jpg": PICTURE,
    "transparent.png": PICTURE,
    "grey.webp": PICTURE,
    "black_and_white.bmp": PICTURE,
    "photo.mp4": NOT_ALLOWED,
    "film.jpg": NOT_ALLOWED,
    # interrupted downloads
    "cut_1_moov_first.mp4": Refused("open", "neither picture nor sound"),
    "cut_10_moov_first.mp4": CUT_OFF,
    "cut_50_moov_first.mp4": CUT_OFF,
    "cut_90_moov_first.mp4": CUT_OFF,
    "cut_1_moov_last.mp4": NO_MEDIA,
    "cut_10_moov_last.mp4": NO_MEDIA,
    "cut_50_moov_last.mp4": NO_MEDIA,
    "cut_90_moov_last.mp4": NO_MEDIA,
    "cut_1.mkv": NO_MEDIA,
    "cut_10.mkv": CUT_OFF,
    "cut_50.mkv": CUT_OFF,
    "cut_90.mkv": CUT_OFF,
    "cut_film.avi": CUT_OFF,
    "cut_film.webm": CUT_OFF,
    "cut_song.mp3": CUT_OFF,
    "cut_song.flac": CUT_OFF,
    "cut_stereo.wav": CUT_OFF,
    "cut_song.m4a": NO_MEDIA,
    "cut_at_packet.wav": CUT_OFF,
    "cut_at_page.ogg": CUT_OFF,
    "cut_last_page.ogg": CUT_OFF,
    "cut_at_fragment.mp4": Loaded([0.1, 0.3, 0.6, 0.8], [], 1.0),  # nothing in it says that there was more
    "cut_photo.jpg": Refused("decode", "cannot be decoded"),
    # flipped bits and bent headers
    "flipped_2.flac": Refused("decode", "its sound is damaged at 0.4"),
    "flipped_5.flac": Refused("decode", "its sound is damaged at 0.6"),
    "flipped_8.flac": Refused("decode", "its sound is damaged at 1.3"),
    "flipped_2.mp4": Refused("decode", "audio stream 1 cannot be decoded"),
    "flipped_5.mp4": Refused("decode", "audio stream 1 cannot be decoded"),
    "flipped_8.mp4": Refused("decode", "video stream 0 cannot be decoded after 1.4"),
    "no_ftyp.mp4": FILM,  # nothing in it is needed
    "too_many_samples.mp4": NO_MEDIA,
    "no_frames.mp4": Refused("decode", "its streams hold no data"),
    # by name only
    "empty.mp4": Refused("open", "is empty"),
    "zeros.mp4": NO_MEDIA,
    "noise.mp4": NO_MEDIA,
    "text.mp4": NO_MEDIA,
    "page.mp4": NO_MEDIA,
    "archive.mp4": NO_MEDIA,
    "concat.mp4": NOT_ALLOWED,  # would open film.mp4 and mono.wav, which are there
    "concat.wav": NOT_ALLOWED,
    "hls.mp4": NO_MEDIA,
    "dash.mp4": NO_MEDIA,
    # too large; beyond 2**31 bits FFmpeg itself takes no notice of the announced size
    "large.png": Refused("limit", "max_pixels"),
    "huge.png": Refused("decode", "cannot be decoded"),
    "huge.avi": Refused("decode", "cannot be decoded"),
    "huge.gif": Refused("limit", "max_pixels"),
    "five_hours.mkv": Refused("limit", "max_duration"),
    "many_channels.wav": Refused("limit", "max_channels"),
    # no ordinary files
    "folder.mp4": NO_FILE,
    "pipe.mp4": NO_FILE,  # opening it would wait for ever
    "circle.mp4": Refused("open", "symbolic links"),
    "dangling.mp4": Refused("open", "no such file"),
}

SHARED: dict[str, Refused | Loaded] = {
    "nasa_13013.mp4": Loaded(
        # of its two pictures that of the higher bit rate, on screen at 1.627, 4.880, 8.133 and 11.386 s
        [1.602, 4.872, 8.108, 11.378],
        [(1.094, 2.109), (4.364, 5.379), (7.601, 8.616), (10.871, 11.886)],
        13.056,
        size=(480, 270),
    ),
    "nasa_13013.mp4.audio.mp3": Loaded(
        # around the middles of four parts of 13.11 s, the length by its packets
        [],
        [(1.131, 2.146), (4.409, 5.424), (7.686, 8.701), (10.964, 11.979)],
        13.056,
    ),
    "av1_video.mkv": Loaded([0.6, 1.84, 3.12, 4.36], [], 5.0, size=(640, 360)),
    "h265_video.mp4": Loaded([0.1, 0.3, 0.6, 0.8], [], 1.0, size=(128, 128)),
    "h264_10bits.mp4": Loaded([0.1, 0.367, 0.6, 0.867], [], 1.0, size=(200, 200)),
    "bt709_full_range.mp4": Loaded([0.1, 0.367, 0.6, 0.867], [], 1.0, size=(1280, 720)),
    "sine_mono_s16.wav": Loaded([], [(0, 1.015), (1, 2.015), (2, 3.015), (3, 4)], 4.0),
    "sine_mono_s32_8000.wav": Loaded([], [(0, 1.015), (1, 2.015), (2, 3.015), (3, 4)], 4.0),
    "jfk.flac": Loaded([], [(0.868, 1.883), (3.618, 4.633), (6.368, 7.383), (9.118, 10.133)], 11.0),
    "corrupted.mp4": Refused("decode", "cannot be decoded after 2.700 s"),
    "unordered.mov": Loaded([0.0, 0.031, 0.062, 0.094], [], 0.125, size=(50, 50)),
    "video_0.mov": Loaded([0.0, 0.033, 0.067], [], 0.1, size=(568, 320)),
    "video_90.mov": Loaded([0.0, 0.033, 0.067], [], 0.1, size=(320, 568)),
    "video_180.mov": Loaded([0.0, 0.033, 0.067], [], 0.1, size=(568, 320)),
    "video_270.mov": Loaded([0.0, 0.033, 0.067], [], 0.1, size=(320, 568)),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "files")


@pytest.fixture(scope="module")
def load():
    """`load_media` under a limit of ten seconds that holds even inside the decoder."""
    loader = Loader(SPEC, seconds=10)
    yield loader
    loader.close()


def check(got: dict, expected: Refused | Loaded, path: Path) -> None:
    assert "defect" not in got, got
    if isinstance(expected, Refused):
        assert got.get("stage") == expected.stage and expected.reason in got["reason"], got
        return
    assert "reason" not in got, got
    assert got["times"] == pytest.approx(expected.times, abs=2e-3)
    assert np.array(got["windows"]).reshape(-1, 2) == pytest.approx(
        np.array(expected.windows).reshape(-1, 2), abs=2e-3
    )
    assert got["duration"] == pytest.approx(expected.duration, abs=2e-3)
    if expected.levels is not None:
        assert got["levels"] == pytest.approx(expected.levels, abs=3)  # 8-bit video range, lossy coding
    if expected.size is not None:
        info = probe(path)
        assert (info.width, info.height) == expected.size


def test_every_file_is_in_the_table(corpus):
    assert set(corpus) == set(FILES) and len(FILES) >= 30


@pytest.mark.parametrize("name", [pytest.param(name, id=ascii(name)) for name in FILES])
def test_what_becomes_of_it(corpus, load, name):
    check(load(corpus[name]), FILES[name], corpus[name])


@pytest.mark.parametrize("name", list(SHARED))
def test_what_becomes_of_real_files(shared_media, load, name):
    check(load(shared_media / name), SHARED[name], shared_media / name)


def test_the_good_ones_come_through_beside_all_the_others(corpus, tmp_path):
    def line(name: str) -> dict[str, str]:
        suffix = Path(name).suffix
        kind = "image" if suffix in IMAGE_SUFFIXES else "audio" if suffix in AUDIO_SUFFIXES else "video"
        return {"id": f"line {sorted(corpus).index(name)}", kind: name}

    listing = parse_lines([line(name) for name in sorted(corpus)], corpus["film.mp4"].parent)
    report = prepare(listing, tmp_path / "records", SPEC, workers=2, timeout=10)
    # A record cannot hold a name that is no UTF-8.
    good = {name for name, expected in FILES.items() if isinstance(expected, Loaded)}
    good -= {name for name in corpus if not name.isprintable()}
    reader = RecordReader(tmp_path / "records")
    assert {unpack_record(reader[i])["id"] for i in range(len(reader))} == good
    assert report.manifest_lines == len(corpus) == report.records + len(report.rejected)
    assert {rejection.stage for rejection in report.rejected} <= {"open", "limit", "decode", "manifest"}
    assert report.exit_code == 1


# Random damage
# -------------------------------------------------------------------------------------------------------


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Flipped bits, overwritten, lost, repeated or cut-off bytes; in half of the cases near the start, where
    the headers are."""
    changed = bytearray(data)
    end = len(data) if rng.random() < 0.5 else min(len(data), 1500)
    for _ in range(int(rng.integers(1, 5))):
        place, length = int(rng.integers(end)), int(rng.integers(1, 64))
        match int(rng.integers(5)):
            case 0:
                changed[place % len(changed)] ^= 1 << int(rng.integers(8))
            case 1:
                changed[place : place + length] = rng.bytes(length)
            case 2:
                del changed[place : place + length]
            case 3:
                changed[place:place] = changed[place : place + length]
            case 4:
                changed[place : place + 4] = b"\xff\xff\xff\xff" if length % 2 else bytes(4)
        if not changed:
            break
    if rng.random() < 0.1:
        del changed[int(rng.integers(len(changed) + 1)) :]
    return bytes(changed)


@pytest.mark.parametrize("name", ["moov_first.mp4", "film.webm", "song.flac"])
def test_random_damage_is_an_error_or_does_no_harm(corpus, load, tmp_path, name):
    rng = np.random.default_rng(sum(name.encode()))
    source, refused = corpus[name].read_bytes(), 0
    path = tmp_path / name
    for number in range(MUTATIONS // 3):
        path.write_bytes(mutate(source, rng))
        options = {"interval": (0.3, 1.4)} if number % 3 == 0 else {}
        got = load(path, **options)
        if "defect" in got:
            kept = path.rename(path.with_stem(f"{path.stem}_{number}"))
            pytest.fail(f"{kept} {options}: {got['defect']}")
        refused += "reason" in got
    assert MUTATIONS / 3 > refused > MUTATIONS / 10


def test_a_file_that_hangs_or_crashes_the_decoder_is_noticed(corpus):
    """The limit of these tests can fail, and the next file finds another process."""
    loader = Loader(SPEC, seconds=10)
    assert "exit code 3" in loader(corpus["film.mp4"], audio_reader=crash)["defect"]
    assert "levels" in loader(corpus["film.mp4"])
    loader.seconds = 0.2
    assert "more than 0.2 s" in loader(corpus["film.mp4"], audio_reader=hang)["defect"]
    loader.seconds = 10
    assert "levels" in loader(corpus["film.mp4"])
    loader.close()
