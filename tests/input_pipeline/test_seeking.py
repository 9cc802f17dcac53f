"""Seeking shows the frames that one pass from the start shows, whatever the container and codec claim."""

from __future__ import annotations

import av
import numpy as np
import pytest

from input_pipeline import containers, media, seeking
from input_pipeline.containers import Limits, MediaError, read_timeline
from input_pipeline.media import load_media
from input_pipeline.seeking import Entry, LandedElsewhereError, plan_runs, seek_cost, seeking_pays
from input_pipeline.spec import MediaSpec
from tests.input_pipeline.media_corpus import write_moving, write_spliced

SPEC = MediaSpec(num_frames=5, image_size=32)
COUNT, RATE = 120, 25
INTERVALS = [None, (0.0, 0.5), (1.31, 1.33), (0.7, 2.9), (3.0, 4.0), (4.05, 9.0)]

FILMS = {
    "gop12.mp4": ("libx264", {"x264-params": "bframes=3:b-adapt=0:keyint=12"}),
    "gop12.mkv": ("libx264", {"x264-params": "bframes=3:b-adapt=0:keyint=12"}),
    "gop12.avi": ("libx264", {"x264-params": "bframes=3:b-adapt=0:keyint=12"}),
    "gop2.mp4": ("libx264", {"x264-params": "bframes=1:b-adapt=0:keyint=2"}),
    "gop250.mp4": ("libx264", {"x264-params": "bframes=3:keyint=250"}),
    "open.mp4": ("libx264", {"x264-params": "bframes=3:keyint=12:open-gop=1"}),
    "refresh.mp4": ("libx264", {"x264-params": "keyint=24:intra-refresh=1"}),
    "open_hevc.mp4": ("libx265", {"x265-params": "keyint=12:open-gop=1:log-level=none"}),
    "closed_hevc.mkv": ("libx265", {"x265-params": "keyint=12:open-gop=0:log-level=none"}),
    "av1.mp4": ("libsvtav1", {"preset": "12", "g": "16"}),
    "av1.mkv": ("libsvtav1", {"preset": "12", "g": "16"}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "12"}),
    "vp8.webm": ("libvpx", {"deadline": "realtime", "auto-alt-ref": "1", "lag-in-frames": "8", "g": "12"}),
    "mpeg4.avi": ("mpeg4", {"g": "12"}),
    "mpeg4_b.avi": ("mpeg4", {"g": "12", "bf": "2"}),
    "mpeg4_b.mp4": ("mpeg4", {"g": "12", "bf": "2"}),
    "fragments.mp4": ("libx264", {"x264-params": "bframes=3:keyint=12"}),
    "edited.mp4": ("libx264", {"x264-params": "bframes=3:b-adapt=0:keyint=12"}),
    "late.mkv": ("libx264", {"x264-params": "bframes=3:keyint=12"}),
}
# All of these but gop250 have flagged keyframes further on; see `seeking.starts_afresh`. An AVI states no
# presentation times, so that those with B-frames cannot be planned.
NO_ENTRY_WITHIN = {"gop250.mp4", "open.mp4", "refresh.mp4", "gop12.avi", "mpeg4_b.avi"}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("films"), {}

    def film(name: str):
        if name == "edited.mp4" and name not in made:  # A copy: x264 does not promise the same bytes twice.
            made[name] = folder / name
            made[name].write_bytes(film("gop12.mp4").read_bytes())
            begin_later(made[name], 17)
        elif name not in made:
            codec, options = FILMS[name]
            container = {"movflags": "frag_keyframe+empty_moov"} if name == "fragments.mp4" else {}
            made[name] = write_moving(
                folder / name,
                COUNT,
                rate=RATE,
                codec=codec,
                codec_options=options,
                container_options=container,
                start=1.48 if name == "late.mkv" else 0.0,
            )
        return made[name]

    return film


def begin_later(path, frames: int) -> None:
    """Moves the start of an mp4's edit list (ISO/IEC 14496-12, 8.6.6) into a group: what lies before it is decoded
    and not shown, with times below zero."""
    data = bytearray(path.read_bytes())
    place = data.index(b"elst") + 4 + 4 + 4 + 4  # type, version, count, duration: the media time follows
    ticks = int.from_bytes(data[place : place + 4], "big")
    scale_at = data.index(b"mdhd") + 4 + 4 + 8
    scale = int.from_bytes(data[scale_at : scale_at + 4], "big")
    data[place : place + 4] = (ticks + frames * scale // RATE).to_bytes(4, "big")
    path.write_bytes(data)


def test_an_edit_list_that_begins_within_a_group(films, monkeypatch):
    whole, _ = load(films("gop12.mp4"), (17 / RATE, 40 / RATE), monkeypatch, seek=False)
    for seek in (False, True):
        edited, _ = load(films("edited.mp4"), (0.0, 23 / RATE), monkeypatch, seek=seek)
        np.testing.assert_array_equal(edited.frames, whole.frames)
        np.testing.assert_allclose(edited.frame_times, whole.frame_times, atol=1e-6)


CABAC, CAVLC = "keyint=12:bframes=0:scenecut=0", "keyint=12:bframes=0:scenecut=0:cabac=0:8x8dct=0"
HEVC = "keyint=12:bframes=0:scenecut=0:log-level=none:repeat-headers=1"
SPLICED = {
    "cavlc.mkv": ("libx264", [{"x264-params": f"{CAVLC}:qp={qp}"} for qp in (10, 22)]),
    "cabac.mkv": ("libx264", [{"x264-params": f"{CABAC}:qp={qp}"} for qp in (10, 22)]),
    "hevc.mkv": (
        "libx265",
        [{"x265-params": f"{HEVC}:{sign}"} for sign in ("sign-hide=1", "sign-hide=0:qp=20")],
    ),
}


@pytest.mark.parametrize("name", list(SPLICED))
def test_a_film_that_goes_on_with_other_parameter_sets(tmp_path, monkeypatch, name):
    """From there on the container's own lead to other pictures, or to none."""
    codec, options = SPLICED[name]
    path = write_spliced(tmp_path / name, COUNT // 2, codec=codec, options=options)
    sought_any = False
    for interval in INTERVALS:
        one_pass, _ = load(path, interval, monkeypatch, seek=False)
        sought, outcomes = load(path, interval, monkeypatch, seek=True)
        np.testing.assert_array_equal(sought.frames, one_pass.frames)
        np.testing.assert_array_equal(sought.frame_times, one_pass.frame_times)
        sought_any |= "sought" in outcomes
    assert sought_any
    entries = read_timeline(path, "video", Limits()).video.entries
    assert [entry.order for entry in entries] == [0, 12, 24, 36, 48, 60], "the second half has one, its first"


def test_a_start_that_cannot_be_decoded_is_no_damage_of_the_file(tmp_path, monkeypatch):
    codec, options = SPLICED["cabac.mkv"]
    path = write_spliced(tmp_path / "a.mkv", COUNT // 2, codec=codec, options=options)
    expected, _ = load(path, (3.0, 4.0), monkeypatch, seek=False)
    monkeypatch.setattr(containers.Track, "note_parameter_sets", lambda *args: None)
    got, outcomes = load(path, (3.0, 4.0), monkeypatch, seek=True)
    np.testing.assert_array_equal(got.frames, expected.frames)
    assert outcomes == ["damaged", "from the start"]


@pytest.mark.parametrize(
    ("suffix", "codec", "options", "count"),
    [
        ("mp4", "libx264", {"x264-params": "repeat-headers=1:keyint=5"}, 2),
        ("mp4", "libx265", {"x265-params": "repeat-headers=1:keyint=5:log-level=none"}, 3),
        ("avi", "libx264", {"x264-params": "keyint=5"}, 2),
        ("avi", "mpeg4", {"g": "5"}, 1),
    ],
)
def test_parameter_sets_that_are_repeated_are_the_containers(tmp_path, suffix, codec, options, count):
    path = write_moving(tmp_path / f"a.{suffix}", 20, codec=codec, codec_options=options)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        name, extradata = context.codec.canonical_name, context.extradata
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    given = seeking.parameter_sets(name, extradata)
    assert len(given) == count
    assert seeking.parameter_sets(name, extradata, packets[0]) == given
    assert sum(seeking.parameter_sets(name, extradata, packet) == given for packet in packets) >= 4
    assert all(seeking.parameter_sets(name, extradata, packet) <= given for packet in packets)


@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_behind_another_header_of_the_container_nothing_is_an_entry(codec):
    class Packet(bytes):
        changes = False

        def has_sidedata(self, kind: str) -> bool:
            return self.changes and kind == "new_extradata"

    key = Packet(b"\0\0\1\x65\1" if codec == "h264" else b"\x12\0\x0a\2\0\0\x32\1\x10")
    track = containers.Track(0, codec)
    track.note_parameter_sets(key)
    assert track.may_enter(key, 0.0)
    key.changes = True
    track.note_parameter_sets(key)
    assert not track.may_enter(key, 1.0)


def load(path, interval, monkeypatch, *, seek: bool):
    """What a decoder that always seeks, or never does, gives; and what became of its runs."""
    outcomes = []
    decode_runs = media._decode_runs

    def recorded(path, kind, track, runs, *args, **options):
        try:
            chosen = decode_runs(path, kind, track, runs, *args, **options)
        except LandedElsewhereError:
            outcomes.append("landed elsewhere")
            raise
        except MediaError:
            outcomes.append("damaged")
            raise
        outcomes.append("sought" if any(run.entry for run in runs) else "from the start")
        return chosen

    with monkeypatch.context() as patch:
        patch.setattr(media, "seeking_pays", lambda *args, **options: seek)
        patch.setattr(media, "_decode_runs", recorded)
        patch.setattr(seeking, "SEEK_PACKETS", 0)  # no run is merged with the next
        return load_media(path, SPEC, kind="video", interval=interval), outcomes


@pytest.mark.parametrize("name", list(FILMS))
def test_seeking_and_one_pass_give_the_same(films, name, monkeypatch):
    path = films(name)
    all_outcomes = set()
    for interval in INTERVALS:
        one_pass, (outcome,) = load(path, interval, monkeypatch, seek=False)
        assert outcome == "from the start"
        sought, outcomes = load(path, interval, monkeypatch, seek=True)
        np.testing.assert_array_equal(sought.frames, one_pass.frames)
        np.testing.assert_array_equal(sought.frame_times, one_pass.frame_times)
        assert sought.duration == one_pass.duration
        all_outcomes.update(outcomes)
    assert ("sought" in all_outcomes) == (name not in NO_ENTRY_WITHIN)
    assert "landed elsewhere" not in all_outcomes


def test_real_films(shared_media, monkeypatch):
    for path in sorted(shared_media.iterdir()):
        if path.suffix not in (".mp4", ".mov", ".mkv") or path.name == "corrupted.mp4":
            continue
        for interval in (None, (0.02, 0.09), (0.5, 0.9), (8.5, 12.0)):
            try:
                one_pass, _ = load(path, interval, monkeypatch, seek=False)
            except MediaError as error:
                assert error.stage == "interval"
                with pytest.raises(MediaError, match="beyond its end"):
                    load(path, interval, monkeypatch, seek=True)
                continue
            sought, _ = load(path, interval, monkeypatch, seek=True)
            np.testing.assert_array_equal(sought.frames, one_pass.frames)
            np.testing.assert_array_equal(sought.frame_times, one_pass.frame_times)


@pytest.mark.parametrize("name", ["open.mp4", "refresh.mp4", "open_hevc.mp4"])
def test_flagged_keyframes_are_not_believed(films, name):
    """x264's open groups and its intra refresh flag pictures on which later ones do not rest alone."""
    with av.open(str(films(name))) as container:
        flagged = sum(packet.is_keyframe for packet in container.demux(video=0))
    entries = read_timeline(films(name), "video", Limits()).video.entries
    assert flagged > 3
    if name == "open_hevc.mp4":  # CRA pictures: what is shown after them does rest on them alone
        assert len(entries) == flagged
    else:
        assert len(entries) == 1


@pytest.mark.parametrize("lie", ["late", "early", "fails", "wrong frames"])
def test_a_seek_that_goes_wrong_changes_nothing(films, monkeypatch, lie):
    path = films("gop12.mkv")
    expected, _ = load(path, (2.0, 4.0), monkeypatch, seek=False)
    real = av.container.InputContainer.seek
    if lie == "wrong frames":  # as if the packets' times were not those of the frames

        def plan(*args):
            runs = plan_runs(*args)
            for run in runs:
                run.shown = [time + 0.02 for time in run.shown]
            return runs

        monkeypatch.setattr(media, "plan_runs", plan)

    class Container:
        """A container that lands elsewhere; PyAV's own cannot be patched."""

        def __init__(self, container):
            self._container = container

        def __getattr__(self, name):
            return getattr(self._container, name)

        def seek(self, ticks, *, stream, backward):
            if lie == "fails":
                raise av.error.FFmpegError(1, "no index")
            moved = {"late": 1000, "early": -1000, "wrong frames": 0}[lie]  # ms
            real(self._container, max(ticks + moved, 0), stream=stream, backward=backward)

    decode_from = seeking.decode_from
    monkeypatch.setattr(
        "input_pipeline.containers.decode_from",
        lambda container, stream, entry: decode_from(Container(container), stream, entry),
    )
    got, outcomes = load(path, (2.0, 4.0), monkeypatch, seek=True)
    np.testing.assert_array_equal(got.frames, expected.frames)
    np.testing.assert_array_equal(got.frame_times, expected.frame_times)
    assert outcomes == (["sought"] if lie == "early" else ["landed elsewhere", "from the start"])


# Plans
# -------------------------------------------------------------------------------------------------------


def film_of(groups: int, size: int) -> tuple[list[float], list[float], list[Entry]]:
    """Frames at whole seconds, decoded in the order shown, an entry every `size` frames."""
    times = [float(i) for i in range(groups * size)]
    entries = [Entry(i, float(i), i, i, None, 1) for i in range(0, len(times), size)]
    return times, times, entries


def test_runs_begin_at_the_entry_before_and_are_merged_where_going_on_is_cheaper(monkeypatch):
    monkeypatch.setattr(seeking, "SEEK_PACKETS", 6)
    times, decoded, entries = film_of(10, 100)
    runs = plan_runs(times, decoded, entries, [50.2, 150.5, 197.0, 205.0, 850.0])
    # From the start; group 1 and, as only two packets lie between, group 2; group 8.
    assert [(run.entry.order if run.entry else 0, run.last) for run in runs] == [
        (0, 50),
        (100, 205),
        (800, 850),
    ]
    assert [run.shown for run in runs] == [[50.0], [150.0, 197.0, 205.0], [850.0]]
    assert seek_cost(runs) == 51 + 106 + 6 + 51 + 6
    assert seeking_pays(runs, 1000, whole_file=True) and seeking_pays(runs, 1000, whole_file=False)


def test_one_pass_where_every_group_is_wanted():
    times, decoded, entries = film_of(10, 12)
    runs = plan_runs(times, decoded, entries, [9.0 + 12 * i for i in range(10)])
    assert len(runs) == 1 and runs[0].entry is None
    assert not seeking_pays(runs, 120, whole_file=False)
    # The tail alone would be saved: a whole file is read to its end, for the damage that may be there.
    assert not seeking_pays(runs, 120, whole_file=True)
    halfway = plan_runs(times, decoded, entries[:1], [50.0])
    assert not seeking_pays(halfway, 120, whole_file=True)
    near_the_end = plan_runs(times, decoded, entries, [118.0])
    assert near_the_end[0].entry.order == 108 and seeking_pays(near_the_end, 120, whole_file=False)


def test_frames_decoded_out_of_order_are_counted_where_they_are_decoded():
    runs = plan_runs([0.0, 1.0, 2.0, 3.0], [0.0, 3.0, 1.0, 2.0], [Entry(0, 0.0, 0, 0, None, 1)], [3.0, 3.5])
    assert runs[0].last == 1
    assert plan_runs([0.0, 1.0, 2.0, 3.0], [0.0, 3.0, 1.0, 2.0], [], [2.0, 3.0])[0].last == 3


def test_the_picture_that_decides():
    record = b"\1" + bytes(3) + b"\3" + bytes(20)  # lengths of four bytes, as in mp4
    sei, idr, slice_ = b"\0\0\0\2\x06\1", b"\0\0\0\2\x65\1", b"\0\0\0\2\x41\1"
    assert seeking.starts_afresh("h264", record, sei + idr)
    assert not seeking.starts_afresh("h264", record, sei + slice_ + idr)
    assert seeking.starts_afresh("h264", None, b"\0\0\0\1\x06\1\0\0\1\x65\1")
    assert not seeking.starts_afresh("h264", None, b"\0\0\1\x06\1\0\0\1\x41\1")
    for kind, expected in ((1, False), (15, False), (16, True), (19, True), (21, True), (22, False)):
        unit = b"\0\0\1\x46\1\0\0\1" + bytes([kind << 1, 1])  # behind an access unit delimiter
        assert seeking.starts_afresh("hevc", None, unit) == expected
    sequence, delimiter = b"\x0a\2\0\0", b"\x12\0"
    for frame, expected in ((0x10, True), (0x00, False), (0x30, False), (0x90, False)):
        assert seeking.starts_afresh("av1", None, delimiter + sequence + bytes([0x32, 1, frame])) == expected
        assert not seeking.starts_afresh("av1", None, delimiter + bytes([0x32, 1, frame]))
    for byte, expected in ((0x82, True), (0x86, False), (0x8A, False), (0xB1, True), (0x42, False)):
        assert seeking.starts_afresh("vp9", None, bytes([byte])) == expected
    assert seeking.starts_afresh("vp8", None, b"\x10") and not seeking.starts_afresh("vp8", None, b"\x11")
    assert seeking.starts_afresh("mpeg4", None, b"\0\0\1\xb6\x10")
    assert not seeking.starts_afresh("mpeg4", None, b"\0\0\1\xb6\x50")
    assert not seeking.starts_afresh("mjpeg", None, b"\xff\xd8")  # not judged: one pass


def test_a_keyframe_behind_later_pictures_is_no_entry(films, monkeypatch):
    """What is decoded before an entry must be shown before it, else a seek would miss it."""
    path = films("gop12.mkv")
    plain = read_timeline(path, "video", Limits()).video
    assert len(plain.entries) > 5
    latest = plain.entries[5]
    # The same film, with every frame before the sixth entry shown ten seconds later.
    demux = av.container.InputContainer.demux

    class Container:
        def __init__(self, container):
            self._container = container

        def __getattr__(self, name):
            return getattr(self._container, name)

        def demux(self):
            for number, packet in enumerate(demux(self._container)):
                if packet.size and number < latest.order:
                    packet.pts += 10_000
                yield packet

    read_packets = containers._read_packets
    monkeypatch.setattr(
        containers,
        "_read_packets",
        lambda path, container, *args: read_packets(path, Container(container), *args),
    )
    moved = read_timeline(path, "video", Limits()).video
    assert [entry.order for entry in moved.entries] == [entry.order for entry in plain.entries[:5]]


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1", "vp9", "vp8", "mpeg4", "mjpeg"])
def test_any_bytes_are_judged_without_an_error(codec):
    rng = np.random.default_rng(0)
    for size in (0, 1, 2, 3, 4, 5, 7, 30):
        for _ in range(50):
            data, extra = rng.bytes(size), rng.bytes(int(rng.integers(0, 30)))
            assert seeking.starts_afresh(codec, b"\1" + extra, data) in (True, False)
            assert seeking.starts_afresh(codec, extra, b"\0\0\1" + data) in (True, False)
            for header in (b"\1" + extra, extra, b"\0\0\1" + extra):
                assert isinstance(seeking.parameter_sets(codec, header), frozenset)
                assert isinstance(seeking.parameter_sets(codec, header, data), frozenset)
