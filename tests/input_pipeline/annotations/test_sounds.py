"""AudioSet, AudioCaps and Auto-ACD: sounds, as sound files or out of videos."""

import shutil

import pytest

from input_pipeline.annotations import AnnotationError, import_annotations
from input_pipeline.annotations.auto_acd import reading
from input_pipeline.manifest import group_by_media


def test_audioset(load, shown, reasons):
    files = ("Y--bbbbbbbb1.wav", "video/--bbbbbbbb1.mp4", "-bbbbbbbbb2.mp4", "bbbbbbbbbb3_20500_28500.flac")
    listing = load("audioset", "segments.csv", files)
    assert shown(listing) == {
        "audioset---bbbbbbbb1-30.000": ("Y--bbbbbbbb1.wav", None),
        "audioset--bbbbbbbbb2-0.000": ("-bbbbbbbbb2.mp4", (0.0, 10.0)),
        "audioset-bbbbbbbbbb3-20.500": ("bbbbbbbbbb3_20500_28500.flac", None),
    }
    assert [line.conversations[1]["value"] for line in listing.lines] == [
        "Sounds: Speech; Human sounds.", "Sounds: Speech.", "Sounds: Male speech, man speaking."
    ]  # fmt: skip
    assert listing.lines[0].extra == {"labels": ["/m/09x0r", "/m/0dgw9r"]}
    assert {(line.kind, line.task) for line in listing.lines} == {("audio", "audio_caption")}
    assert "row 4: its label '/m/unknown' is not in class_labels_indices.csv" in reasons(listing)[""]
    assert "row 5: no audio or video file" in reasons(listing)[""] and listing.count == 5


def test_audioset_needs_its_labels(fixtures, tmp_path, media):
    alone = shutil.copy(fixtures / "segments.csv", tmp_path)
    root = media("Y--bbbbbbbb1.wav")
    with pytest.raises(AnnotationError, match="no such annotation file; .*labels="):
        import_annotations("audioset", alone, root)
    labels = fixtures / "class_labels_indices.csv"
    assert len(import_annotations("audioset", alone, root, labels=str(labels)).lines) == 1


def test_audiocaps_has_five_captions_a_clip(load, shown, reasons):
    files = ("cccccccccc1.wav", "Y-_ccccccc_2.wav")
    listing = load("audiocaps", "audiocaps_val.csv", files)
    found = shown(listing)
    assert [found[f"audiocaps-{number}"] for number in range(97151, 97156)] == [
        ("cccccccccc1.wav", (30.0, 40.0))
    ] * 5
    assert found["audiocaps-97200"] == ("Y-_ccccccc_2.wav", None) and len(found) == 6
    assert [len(group) for group in group_by_media(listing.lines)] == [5, 1]
    assert listing.lines[0].conversations[1]["value"] == "A bell rings, then a door shuts"
    refused = reasons(listing)[""]
    assert "row 7: its start_time is 'soon'" in refused and listing.count == 8
    assert "is named 97202, cccccccccc4_000000, cccccccccc4 or as 10 more" in refused


def test_audiocaps_files_named_by_caption(load, shown):
    listing = load("audiocaps", "audiocaps_val.csv", ("97151.wav", "97200.flac"))
    assert shown(listing) == {"audiocaps-97151": ("97151.wav", None), "audiocaps-97200": ("97200.flac", None)}


def test_auto_acd(load, shown, reasons):
    files = (
        "oddddddddd1_000117.wav", "-_dddddddd2.flac", "Y_dddddddd_3_30000_40000.wav", "Yddddddddd4.wav",
        "Yddddddddd4.jpg",
    )  # fmt: skip
    listing = load("auto_acd", "auto_acd.csv", files)
    assert shown(listing) == {
        "auto_acd-1-oddddddddd1_000117": (files[0], None),
        "auto_acd-2-Y-_dddddddd2": (files[1], None),
        "auto_acd-3-oddddddddd1_000117": (files[0], None),
        "auto_acd-4-_dddddddd_3": (files[2], None),
        "auto_acd-5-Yddddddddd4": (files[3], None),  # eleven characters: here the Y is the id's own
    }
    assert "'short_id' holds no id" in reasons(listing)[""]
    assert "dddddddddd5" in reasons(listing)[""] and listing.count == 7


def test_auto_acd_in_whole_videos(load, shown, reasons):
    files = ("oddddddddd1.mp4", "-_dddddddd2.mp4", "_dddddddd_3_1.wav", "_dddddddd_3_2.wav")
    listing = load("auto_acd", "auto_acd.csv", files, bare_ids="source")
    assert set(shown(listing).values()) == {("oddddddddd1.mp4", (117.0, 127.0))}
    refused = reasons(listing)[""]
    assert "-_dddddddd2 holds the whole video and the row does not tell the clip's time" in refused
    assert "its time is not told and 2 files are clips of it" in refused


@pytest.mark.parametrize(
    ("names", "untimed", "timed"),
    [
        (["abcdefghijk", "abcdefghijk_000117"], "abcdefghijk", "abcdefghijk_000117"),
        (["Yabcdefghijk", "abcdefghijk_117_127"], "Yabcdefghijk", "abcdefghijk_117_127"),
        (
            ["abcdefghijk_000117"],
            "abcdefghijk_000117 is the clip of a row that tells it",
            "abcdefghijk_000117",
        ),
        (["abcdefghijk"], "abcdefghijk", "abcdefghijk.wav is the clip of a row without a start"),
        (["abcdefghijk_30_40", "abcdefghijk_000117"], "abcdefghijk_30_40", "abcdefghijk_000117"),
    ],
)
def test_auto_acd_gives_no_clip_to_two_different_rows(tmp_path, media, shown, names, untimed, timed):
    root, path = media(*(f"{name}.wav" for name in names)), tmp_path / "a.csv"
    written = ("abcdefghijk", "abcdefghijk_000117")
    for order in (written, written[::-1]):
        path.write_text("youtube_id,caption\n" + "".join(f"{name},A bell.\n" for name in order))
        listing = import_annotations("auto_acd", path, root)
        found = {line.id.partition("-")[2].partition("-")[2]: line.name for line in listing.lines}
        for name, expected in zip(written, (untimed, timed), strict=True):
            if " " in expected:
                assert name not in found and any(expected in row.reason for row in listing.rejections)
            else:
                assert found[name] == f"{expected}.wav"
    # Of one row alone nobody else claims the file.
    path.write_text("youtube_id,caption\nabcdefghijk_000117,A bell.\n")
    assert len(import_annotations("auto_acd", path, root).lines) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("oPRC3zComfA_000117", ("oPRC3zComfA", 117.0)),
        ("oPRC3zComfA", ("oPRC3zComfA", None)),
        ("YoPRC3zComfA", ("oPRC3zComfA", None)),
        ("YPRC3zComfA", ("YPRC3zComfA", None)),
        ("Y-_RC3zComf_", ("-_RC3zComf_", None)),
        ("_-RC3zComf-_30.000_40.000", ("_-RC3zComf-", 30.0)),
        # An id that ends in _ behind a Y, and ids that begin with Y.
        ("YPRC3zComfA__30", ("PRC3zComfA_", 30.0)),
        ("YPRC3zComf__30", ("YPRC3zComf_", 30.0)),
        ("YPRC3zComfA_30", ("YPRC3zComfA", 30.0)),
        ("short", None),
        ("oPRC3zComfA_late", None),
    ],
)
def test_auto_acd_ids(text, expected):
    assert reading(text) == expected
