"""Panda-70M, InternVid and VGGSound: clips of videos, cut already or to be cut."""

import pytest

from input_pipeline.annotations import AnnotationError, import_annotations

PANDA_MEDIA = ("00000/0000000_00000.mp4", "own/aaaaaaaaaa1_00000.txt", "aaaaaaaaaa1.mp4", "aaaaaaaaaa3.webm")


def test_panda_takes_every_clip_of_a_row(load, shown, reasons):
    listing = load("panda70m", "panda70m.csv", PANDA_MEDIA)
    assert shown(listing) == {
        "panda70m-aaaaaaaaaa1-00000": ("00000/0000000_00000.mp4", None),  # cut by the downloader
        "panda70m-aaaaaaaaaa1-00001": ("aaaaaaaaaa1.mp4", (60.0, 63.5)),
        "panda70m-aaaaaaaaaa1-00002": ("aaaaaaaaaa1.mp4", (3723.004, 3730.0)),
        "panda70m-aaaaaaaaaa3-00001": ("aaaaaaaaaa3.webm", (6.0, 9.0)),
    }
    assert [line.conversations[1]["value"] for line in listing.lines[:3]] == [
        "A man, in a hat, rides a bike.", "It's a dog's bowl.", 'A "blue" boat sails.'
    ]  # fmt: skip
    refused = reasons(listing)
    assert "timestamp 2, caption 1, matching_score 2" in refused[""]  # Row 2: three lists, three lengths.
    assert "timestamp is no Python list" in refused[""]  # Row 4: code, which is not run.
    assert "begins at 9 s and ends at 5 s" in refused["panda70m-aaaaaaaaaa3-00000"]
    tried = refused["panda70m-aaaaaaaaaa5-00000"]
    assert tried.endswith("is named 0000004_00000, aaaaaaaaaa5_000001, aaaaaaaaaa5 or as 12 more\n")
    # 3 clips, 1 row, 2 clips, 1 row, 1 clip.
    assert listing.count == 8 and listing.left_out == {}
    line = listing.lines[0]
    assert (line.kind, line.task, line.source) == ("video", "visual_caption", "panda70m")
    assert line.extra == {"matching_score": 0.46}


def test_panda_options(load, shown):
    listing = load("Panda-70M", "panda70m.csv", PANDA_MEDIA, min_score="0.45")
    assert set(shown(listing)) == {
        "panda70m-aaaaaaaaaa1-00000", "panda70m-aaaaaaaaaa1-00002", "panda70m-aaaaaaaaaa3-00001"
    }  # fmt: skip
    assert listing.left_out == {"matching_score below 0.45": 2} and listing.count == 6
    cut = load("panda70m", "panda70m.csv", PANDA_MEDIA, bare_ids="clip")
    assert all(line.interval is None for line in cut.lines)
    with pytest.raises(AnnotationError, match="bare_ids is 'both'"):
        load("panda70m", "panda70m.csv", PANDA_MEDIA, bare_ids="both")
    with pytest.raises(
        AnnotationError, match="no option 'split'; its options are min_score, bare_ids, max_samples"
    ):
        load("panda70m", "panda70m.csv", PANDA_MEDIA, split="2m")
    with pytest.raises(AnnotationError, match="min_score is 'high'"):
        load("panda70m", "panda70m.csv", PANDA_MEDIA, min_score="high")


def test_panda_numbered_clips_must_be_of_this_csv(load, media, shown):
    names = ("00000/0000000_00000.mp4",)
    caption = media(*names) / "00000/0000000_00000.txt"
    caption.write_text("A man, in a hat, rides a bike.\n")
    assert len(load("panda70m", "panda70m.csv", names).lines) == 1
    caption.write_text("A horse jumps.")
    with pytest.raises(AnnotationError, match="downloaded from another csv"):
        load("panda70m", "panda70m.csv", names)


def test_panda_rows_longer_than_pythons_csv_limit(tmp_path, media):
    count = 5000
    times = [
        [f"0:{n // 60:02d}:{n % 60:02d}.000", f"0:{n // 60:02d}:{n % 60:02d}.900"] for n in range(count // 2)
    ]
    times += [
        [f"1:{n // 60:02d}:{n % 60:02d}.000", f"1:{n // 60:02d}:{n % 60:02d}.900"] for n in range(count // 2)
    ]
    captions = [f"caption {n}, of a very long video" for n in range(count)]
    cells = [f'"{value}"' for value in (times, captions, [0.5] * count)]
    assert min(map(len, cells[:2])) > 131_072
    path = tmp_path / "long.csv"
    path.write_text(f"videoID,url,timestamp,caption,matching_score\naaaaaaaaaa1,u,{','.join(cells)}\n")
    listing = import_annotations("panda70m", path, media("aaaaaaaaaa1.mp4"))
    assert len(listing.lines) == count and listing.rejections == []
    assert listing.lines[-1].interval == (3600 + 2499.0, 3600 + 2499.9)


def test_internvid(load, shown, reasons):
    files = ("ffffffffff1.mp4", "clips/-ffffffff_2_01:00:00.000_01:00:04.500.mp4")
    listing = load("internvid", "internvid.jsonl", files)
    assert shown(listing) == {
        "internvid-1-ffffffffff1": ("ffffffffff1.mp4", (10.677, 12.679)),
        "internvid-3-ffffffffff1": ("ffffffffff1.mp4", (10.677, 12.679)),
        "internvid-4--ffffffff_2": (files[1], None),
    }
    assert listing.left_out == {"same clip and caption as an earlier row": 1}
    refused = reasons(listing)[""]
    for reason in (
        "row 5: its clip begins at 15 s and ends at 12 s",
        "row 6: is no JSON",
        "row 7: its Start_timestamp",
    ):
        assert reason in refused
    assert listing.count + 1 == 7


def test_vggsound(load, shown, reasons):
    files = ("---gggggg_1_000030.mp4", "--ggggggg_2.mp4", "ggggggggg_3_000110.mp4", "ggggggggg_3.jpg")
    listing = load("vggsound", "vggsound.csv", files)
    assert shown(listing) == {
        "vggsound----gggggg_1-30": ("---gggggg_1_000030.mp4", None),
        "vggsound---ggggggg_2-0": ("--ggggggg_2.mp4", (0.0, 10.0)),
    }
    assert [line.extra["label"] for line in listing.lines] == ["people marching", "playing violin, fiddle"]
    assert "playing violin, fiddle" in listing.lines[1].conversations[1]["value"]
    assert listing.left_out == {"split test": 1}
    assert "ggggggggg_4_000005" in reasons(listing)[""] and "'validation'" in reasons(listing)[""]
    assert listing.count + 1 == 5
    assert [line.id for line in load("vggsound", "vggsound.csv", files, split="test").lines] == [
        "vggsound-ggggggggg_3-110"
    ]
    with pytest.raises(AnnotationError, match="split is 'val'"):
        load("vggsound", "vggsound.csv", files, split="val")


def test_two_files_of_one_name_are_not_guessed_between(load, reasons):
    listing = load(
        "vggsound", "vggsound.csv", ("a/--ggggggg_2.mp4", "b/--ggggggg_2.mkv", "b/--ggggggg_2.wav")
    )
    assert "2 files have its name, a/--ggggggg_2.mp4 and b/--ggggggg_2.mkv" in reasons(listing)[""]
