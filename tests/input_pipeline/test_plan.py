"""The cut into shards follows from the listing alone, loses nothing, and suits small sets and large ones."""

from __future__ import annotations

import dataclasses

import pytest

from input_pipeline.manifest import MediaLine, group_by_media
from input_pipeline.plan import make_plan, read_groups


def lines(count: int, kind: str = "video", **fields) -> list[MediaLine]:
    return [MediaLine(f"/m/{i}", f"{i}", kind, f"id{i}", **fields) for i in range(count)]


def sizes(listing, tmp_path) -> list[int]:
    """Media files per shard."""
    plan = make_plan(listing, {})
    plan.write(tmp_path / "plan")
    return [len(read_groups(tmp_path / "plan", shard)) for shard in plan.shards]


@pytest.mark.parametrize(
    "kind, count, shards, largest",
    [
        ("video", 1, 1, 1),
        ("video", 24, 24, 1),  # a video is worth a shard: it may be an hour long
        ("video", 100, 64, 2),
        ("video", 1000, 64, 16),
        ("audio", 10, 3, 4),
        ("image", 40, 3, 16),
    ],
)
def test_small_sets_are_cut_for_the_cores_of_a_machine(tmp_path, kind, count, shards, largest):
    found = sizes(lines(count, kind), tmp_path)
    assert (len(found), max(found), sum(found)) == (shards, largest, count)
    assert max(found) - min(found[:-1] or found) <= 1  # even


@pytest.mark.parametrize("kind, count, largest", [("video", 20_000, 256), ("image", 300_000, 4096)])
def test_large_sets_have_shards_of_some_hundred_megabytes(kind, count, largest):
    plan = make_plan(lines(count, kind), {})
    assert len(plan.shards) == -(-count // largest)


def test_files_without_a_manifest_are_weighed_by_their_suffix(tmp_path):
    listing = [MediaLine(f"/m/{i}{suffix}", f"{i}") for i, suffix in enumerate([".jpg"] * 32 + [".mp4"] * 2)]
    assert sizes(listing, tmp_path) == [16, 16, 1, 1]


def test_a_shard_is_read_back_as_it_was_planned(tmp_path):
    turns = [{"from": "human", "value": "Läuft?"}, {"from": "gpt", "value": "Ja."}]
    listing = lines(100, conversations=turns, extra={"options": ["a", "b"], "score": 0.1})
    listing += [dataclasses.replace(line, id=f"again{line.id}", task="qa") for line in listing[::3]]
    listing.append(dataclasses.replace(listing[0], interval=(1.5, 2.25)))
    plan = make_plan(listing, {})
    plan.write(tmp_path / "plan")
    read = [group for shard in plan.shards for group in read_groups(tmp_path / "plan", shard)]
    expected = [[dataclasses.asdict(line) for line in group] for group in group_by_media(listing)]
    assert read[-1][0].pop("interval") == [1.5, 2.25] and expected[-1][0].pop("interval") == (1.5, 2.25)
    assert read == expected and len(read) == 101


def test_whatever_shapes_the_records_changes_the_plan():
    listing, settings = lines(5), {"size": 16, "limit": {"bytes": 9}}
    plan = make_plan(listing, settings)
    assert plan.sha256 == make_plan(lines(5), dict(reversed(settings.items()))).sha256
    others = [
        make_plan(listing[:4], settings),
        make_plan(listing[::-1], settings),
        make_plan([*listing[:4], dataclasses.replace(listing[4], task="qa")], settings),
        make_plan([*listing[:4], dataclasses.replace(listing[4], path="/n/4")], settings),
        make_plan(listing, {**settings, "limit": {"bytes": 8}}),
    ]
    assert len({plan.sha256, *(other.sha256 for other in others)}) == 6


def test_nothing_to_do_is_no_shard():
    assert make_plan([], {}).shards == []
