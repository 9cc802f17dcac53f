"""LCS-558K, VideoInstruct100K and SAVEn-Vid: pictures, dialogues, and this project's own form."""

import dataclasses

import pytest

from avlm_jax.evals.predictions import reference_of_sample
from input_pipeline.annotations import import_annotations
from input_pipeline.conversation import split_rounds
from input_pipeline.manifest import group_by_media
from input_pipeline.prepare import prepare
from input_pipeline.records import RecordReader, unpack_record
from input_pipeline.spec import MediaSpec
from input_pipeline.synthetic.generate import generate
from input_pipeline.transforms.intervals import interval_source, parse_intervals


def test_lcs_keeps_the_place_of_the_picture(load, reasons):
    listing = load("LCS-558K", "blip_laion_cc_sbu_558k.json", ("other.jpg",))
    assert [line.conversations[0]["value"] for line in listing.lines] == [
        "Tell briefly what the picture holds.\n<image>", "<image>\nDescribe this in a few words."
    ]  # fmt: skip
    line = listing.lines[0]
    assert (line.kind, line.name, line.task) == ("image", "00000/000000001.jpg", "visual_caption")
    refused = reasons(listing)
    assert "row 3: its conversation must be exactly two turns" in refused[""]
    assert "row 4: its request holds no <image>" in refused[""]
    assert "answer 0 is empty" in refused["lcs558k-000000005"]
    assert "row 6: row 1 has the same id" in refused["lcs558k-000000001"]
    assert listing.count == 6


def test_videoinstruct_alternates_and_gathers_on_one_video(load, reasons):
    listing = load("VideoInstruct100K", "VideoInstruct100K.json", ("v_k_ZXmr8pmrs.mkv", "eeeeeeeeee2.mp4"))
    assert [line.conversations[0]["value"] for line in listing.lines] == [
        "<video>\nWhat does the woman do?", "Where is she?\n<video>", "<video>\nWhat is thrown?"
    ]  # fmt: skip
    assert [len(group) for group in group_by_media(listing.lines)] == [2, 1]
    refused = reasons(listing)
    assert "row 4: its q is '  '" in refused[""] and "row 7: has no 'video_id'" in refused[""]
    assert "named v_eeeeeeeeee3, eeeeeeeeee3, v_v_eeeeeeeeee3" in refused[""]
    assert "2 media placeholders" in refused["videoinstruct-5"]  # The question spells a tag out.
    assert listing.count == 7


def test_saven_vid(load, reasons):
    listing = load("saven_vid", "saven_vid.json", ("videos/hike.mp4",))
    tasks = [(line.id, line.task) for line in listing.lines]
    assert tasks == [
        ("hike-visual", "visual_caption"),
        ("hike-av", "av_caption"),
        ("hike-clip1-visual", "visual_caption"),
        ("hike-clip1-av", "av_caption"),
        ("hike-q1", "mcq"),
    ]
    clip = listing.lines[3].conversations
    assert "What happens between 00:00:00.000 and 00:00:12.480?" in clip[0]["value"]
    assert clip[1]["value"] == "From 00:00:00.000 to 00:00:12.480, we can see a lake, and hear silence."
    assert listing.lines[4].conversations == [
        {
            "from": "human",
            "value": "<video>\nSelect the best answer to the following multiple-choice question based on the video. "
            "Respond with only the letter (A, B, C, or D) of the correct option.\nWhat goes with the lake?\n"
            "A. silence\nB. a bell\nC. wind\nD. rain\nThe best answer is:",
        },
        {"from": "gpt", "value": "A"},
    ]
    assert listing.left_out == {"review pending": 1, "review rejected": 1}
    refused = reasons(listing)
    assert "clip 2 has no start and end" in refused["hike-clip2"]
    assert "its answer is 'E'" in refused["hike-q2"] and "its review is 'fine'" in refused["hike-q4"]


def test_avbench_takes_accepted_questions_only(load, fixtures, media, tmp_path, reasons):
    listing = load("AVBench", "saven_vid.json", ("hike.mp4",))
    assert [line.id for line in listing.lines] == ["hike-q1"] and listing.lines[0].source == "avbench"
    assert listing.count + sum(listing.left_out.values()) == 5
    unseen = tmp_path / "unseen.json"
    text = (fixtures / "saven_vid.json").read_text()
    unseen.write_text(text.replace('"review": {"status": "accepted", "reason": ""}', '"note": ""'))
    listing = import_annotations("avbench", unseen, media("hike.mp4"))
    assert listing.lines == [] and "its review is None" in reasons(listing)["hike-q1"]


def test_a_missing_video_refuses_each_of_its_samples(fixtures, tmp_path, load):
    with_video = load("saven_vid", "saven_vid.json", ("hike.mp4",))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "lake.mp4").touch()
    without = import_annotations("saven_vid", fixtures / "saven_vid.json", tmp_path / "other")
    assert without.lines == [] and without.left_out == with_video.left_out
    assert without.count == with_video.count == 8
    assert {line.id for line in with_video.lines} < {rejection.id for rejection in without.rejections}
    assert sum("is named hike" in rejection.reason for rejection in without.rejections) == 5


def test_times_in_options_are_not_told_to_the_model(tmp_path, load, fixtures, media):
    text = (fixtures / "saven_vid.json").read_text().replace('"status": "pending"', '"status": "accepted"')
    (tmp_path / "all.json").write_text(text)
    listing = import_annotations("saven_vid", tmp_path / "all.json", media("hike.mp4"))
    (question,) = [line for line in listing.lines if line.id == "hike-q5"]
    assert parse_intervals(interval_source(question.conversations[0]["value"]), 60.0, 8) == []


def test_texts_that_look_lettered_stay_whole(tmp_path, fixtures, media):
    """This project's form has options without letters; a name with an initial is none."""
    text = (fixtures / "saven_vid.json").read_text().replace('"a bell"', '"B. Smith"')
    (tmp_path / "names.json").write_text(text)
    listing = import_annotations("saven_vid", tmp_path / "names.json", media("hike.mp4"))
    (question,) = [line for line in listing.lines if line.id == "hike-q1"]
    assert question.extra["options"] == ["silence", "B. Smith", "wind", "rain"]
    assert "\nB. B. Smith\n" in question.conversations[0]["value"]


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    generate(folder, 1, seed=3, workers=1, size=32, fps=8)
    return folder


def test_synthetic_videos_come_through_to_records(synthetic, tmp_path):
    """The annotations of `synthetic/annotate.py` are SAVEn-Vid's form, and what becomes of them can be scored."""
    listing = import_annotations("saven_vid", synthetic / "annotations.json", synthetic)
    assert listing.rejections == [] and listing.left_out == {}
    spec = MediaSpec(num_frames=2, image_size=16, window_frames=64, max_windows=2)
    report = prepare(listing, tmp_path / "records", spec, workers=1)
    assert (report.exit_code, report.records, report.samples) == (0, 1, len(listing.lines))
    reader = RecordReader(tmp_path / "records")
    samples = unpack_record(reader[0])["samples"]
    questions = [sample for sample in samples if sample["task"] == "mcq"]
    assert [reference_of_sample(sample, "v").type for sample in questions] == ["1", "2", "3", "4", "5"]
    for line in listing.lines:
        system, rounds = split_rounds(line.conversations, has_media=True)
        assert system is None and len(rounds) == 1
    assert dataclasses.asdict(listing.lines[0])["name"].startswith("videos/")
