"""Parts of files in manifests, and manifests written and read back."""

from __future__ import annotations

import json

import pytest

from input_pipeline.manifest import (
    Listing,
    ManifestError,
    MediaLine,
    Rejection,
    group_by_media,
    list_files,
    parse_line,
    parse_lines,
    read_manifest,
    write_manifest,
)
from tests import fake_gcs

TURNS = [{"from": "human", "value": "<video>\nWhat is heard?"}, {"from": "gpt", "value": "A bell."}]


def line(**fields) -> dict:
    return {"id": "x", "video": "clips/7.mp4", "conversations": TURNS, **fields}


@pytest.mark.parametrize(
    ("interval", "suffix"),
    [
        ([12, 22.0], "#12.000-22.000"),
        ((0, 0.5), "#0.000-0.500"),
        ([0.1, 10.677], "#0.100-10.677"),
        (
            [1.0001, 1.0004],
            "#1.0001-1.0004",
        ),  # Milliseconds would give both ends, and its neighbours, one name.
    ],
)
def test_an_interval_is_part_of_the_name(tmp_path, interval, suffix):
    parsed = parse_line(line(interval=interval, note="kept"), tmp_path)
    assert isinstance(parsed, MediaLine), parsed
    assert parsed.interval == tuple(interval) and parsed.name == f"clips/7.mp4{suffix}"
    assert parsed.path == str(tmp_path / "clips" / "7.mp4") and parsed.extra == {"note": "kept"}
    assert "interval" not in parsed.sample()
    assert parse_line(line(), tmp_path).interval is None


@pytest.mark.parametrize(
    "interval",
    [[], [1], [1, 2, 3], "12", {"start": 1}, 5, [2, 1], [1, 1], [-1, 2], ["1", "2"], [0, True], [None, 1],
     [0, float("inf")], [float("nan"), 1]],
)  # fmt: skip
def test_what_is_no_interval_is_refused(interval):
    parsed = parse_line(line(interval=interval), ".", where="line 3")
    assert isinstance(parsed, Rejection) and parsed.id == "x"
    assert 'line 3: "interval" is ' in parsed.reason and "0 <= start < end" in parsed.reason


def test_a_picture_has_no_interval():
    parsed = parse_line({"image": "a.jpg", "interval": [0, 1]}, ".")
    assert isinstance(parsed, Rejection) and "a picture has none" in parsed.reason
    assert isinstance(parse_line({"image": "a.jpg", "interval": None}, "."), MediaLine)
    assert parse_line({"audio": "a.wav", "interval": [0, 1]}, ".").interval == (0.0, 1.0)


def test_parts_of_one_file_are_different_media():
    listing = parse_lines([
        line(id="a", interval=[0, 5]), line(id="b"), line(id="c", interval=[0.0, 5.0]),
        line(id="d", interval=[0, 6]), line(id="e", video=None, audio="clips/7.mp4", interval=[0, 5]),
    ])  # fmt: skip
    groups = group_by_media(listing.lines)
    assert [[member.id for member in group] for group in groups] == [["a", "c"], ["b"], ["d"], ["e"]]
    assert len({(group[0].name, group[0].kind) for group in groups}) == 4


def test_a_listing_comes_back_unchanged(tmp_path):
    listing = parse_lines(
        [
            line(id="a", interval=[0.1, 5], answer="B", options=["x", "y"], task="mcq"),
            line(id="é\u2028", source="own"),
            {"image": "../b.jpg"},
            {"id": "c"},
        ],
        tmp_path / "media",
        source="all",
    )
    listing = Listing(
        listing.lines, [*listing.rejections, Rejection("p", "", "why", "open")], left_out={"split": 7}
    )
    path = tmp_path / "m.jsonl"
    path.write_text("old")
    write_manifest(listing, path)
    assert read_manifest(path, tmp_path / "media") == listing
    assert [file.name for file in tmp_path.iterdir()] == ["m.jsonl"]
    rows = [json.loads(row) for row in path.read_text().split("\n") if row]
    assert rows[0] == {
        "id": "a", "video": "clips/7.mp4", "interval": [0.1, 5.0], "task": "mcq", "source": "all",
        "conversations": TURNS, "answer": "B", "options": ["x", "y"],
    }  # fmt: skip
    assert rows[-1] == {"left_out": {"split": 7}} and rows[-2]["rejected"]["reason"] == "why"
    assert listing.count == 5


def test_an_id_belongs_to_one_conversation(tmp_path):
    entries = [line(id="a"), line(id="b"), {"id": "a", "video": "alone.mp4"}, line(id="a", video="b.mp4")]
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(["", *map(json.dumps, entries)]))
    for listing, second, first in (
        (read_manifest(path), "line 5", "line 2"),
        (parse_lines(entries, tmp_path), "entry 4", "entry 1"),
    ):
        assert [parsed.id for parsed in listing.lines] == ["a", "b", "a"]
        refused = Rejection(str(tmp_path / "b.mp4"), "a", f"{second}: {first} has the same id", "manifest")
        assert listing.rejections == [refused]


def test_notes_that_are_none_are_refused(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"rejected": {"path": "p"}}\n{"rejected": 3}\n{"left_out": 3}\n')
    assert len(read_manifest(path).rejections) == 3 and read_manifest(path).left_out == {}


def test_manifests_that_cannot_be_written(tmp_path):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ManifestError, match="whether it is video, audio or image"):
        write_manifest(list_files([tmp_path / "a.mp4"]), tmp_path / "m.jsonl")
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    with pytest.raises(ManifestError, match="cannot be written"):
        write_manifest(parse_lines([line()]), tmp_path / "none" / "m.jsonl")


def test_a_manifest_is_written_to_a_bucket(tmp_path, monkeypatch):
    monkeypatch.setenv(fake_gcs.ROOT, str(tmp_path))
    fake_gcs.register()
    listing = parse_lines([line(id="a")], "gs://bucket/media", source="all")
    (tmp_path / "bucket").mkdir()
    write_manifest(listing, "gs://bucket/m.jsonl")
    assert read_manifest("gs://bucket/m.jsonl", "gs://bucket/media") == listing
    assert [file.name for file in (tmp_path / "bucket").iterdir()] == ["m.jsonl"]


def test_a_bucket_is_no_folder_of_this_machine():
    parsed = parse_line(line(interval=[1, 2]), "gs://bucket/media/")
    assert parsed.path == "gs://bucket/media/clips/7.mp4" and parsed.name == "clips/7.mp4#1.000-2.000"
