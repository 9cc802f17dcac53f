"""Video-MME and MUSIC-AVQA: what evaluation reads."""

import json
import re

import pytest

from avlm_jax.evals.predictions import reference_of_sample
from input_pipeline.annotations import AnnotationError, import_annotations
from input_pipeline.annotations.choices import answer_letter, without_letters
from input_pipeline.annotations.music_avqa import fill
from input_pipeline.annotations.rows import RowError

PROMPT = """<video>
Select the best answer to the following multiple-choice question based on the video. \
Respond with only the letter (A, B, C, or D) of the correct option.
How many flags are shown?
A. 1.
B. 2.
C. 3.
D. 4.
The best answer is:"""


def test_videomme_flat(load, reasons):
    listing = load(
        "videomme", "videomme_flat.jsonl", ("data/kkkkkkkkkk1.mp4", "kkkkkkkkkk2.mp4", "kkkkkkkkkk3.mp4")
    )
    first, last = listing.lines
    assert first.id == "videomme-001-1" and first.name == "data/kkkkkkkkkk1.mp4" and first.task == "mcq"
    assert first.conversations == [{"from": "human", "value": PROMPT}, {"from": "gpt", "value": "C"}]
    assert first.extra == {
        "qa_type": "short", "answer": "C", "options": ["1.", "2.", "3.", "4."], "question_id": "001-1",
        "task_type": "Counting Problem", "duration_class": "short", "domain": "Knowledge",
        "sub_category": "Humanity & History", "video_id": "001",
    }  # fmt: skip
    assert (
        reference_of_sample(last.sample(), last.name).answer == "B" and last.extra["duration_class"] == "long"
    )
    refused = reasons(listing)
    assert "lettered ACBD, not ABCD" in refused["videomme-001-2"]
    assert "its answer is 'b'" in refused["videomme-602-1"] and listing.count == 4


def test_videomme_nested(load, reasons):
    listing = load("videomme", "videomme_nested.json", ("001.mp4", "kkkkkkkkkk2.mp4"))
    assert [(line.id, line.name) for line in listing.lines] == [
        ("videomme-001-1", "001.mp4"), ("videomme-001-2", "001.mp4"), ("videomme-002-1", "kkkkkkkkkk2.mp4")
    ]  # fmt: skip
    assert listing.lines[0].conversations[0]["value"] == PROMPT
    # The names that the older script used, and the file found by its url.
    assert [listing.lines[2].extra[key] for key in ("duration_class", "domain", "sub_category")] == [
        "medium", "Life Record", "Travel"
    ]  # fmt: skip


def test_videomme_missing_videos_are_refused_by_question(fixtures, tmp_path, reasons):
    (tmp_path / "002.mp4").touch()
    listing = import_annotations("videomme", fixtures / "videomme_nested.json", tmp_path)
    assert [line.id for line in listing.lines] == ["videomme-002-1"]
    assert set(reasons(listing)) == {"videomme-001-1", "videomme-001-2"}


def test_videomme_template_is_no_json(load):
    with pytest.raises(
        AnnotationError, match=r"template.json, line 1[45]: is no JSON .*a comma stands ahead"
    ):
        load("videomme", "videomme_template.json", ("001.mp4",))


def test_videomme_trailing_comma_of_the_array(fixtures, tmp_path, media):
    text = (fixtures / "videomme_nested.json").read_text().rstrip().removesuffix("]") + ",\n]"
    (tmp_path / "comma.json").write_text(text)
    with pytest.raises(AnnotationError, match="comma stands ahead of a closing bracket"):
        import_annotations("videomme", tmp_path / "comma.json", media("001.mp4"))


def test_music_avqa(load, reasons):
    listing = load("music_avqa", "avqa-test.json", ("00000001.mp4", "va00001.mp4"))
    questions = {line.id: line.extra["question"] for line in listing.lines}
    assert questions == {
        "music_avqa-0": "Is the acoustic_guitar on the left louder than the acoustic_guitar on the right?",
        "music_avqa-1": "What is the leftest instrument of the first sounding instrument?",
        "music_avqa-2": "How many instruments play?",
        "music_avqa-3": "How many instruments play?",  # the same id and question, another answer
    }
    first, second, third, fourth = listing.lines
    assert first.conversations[0]["value"].startswith(
        "<video>\nIs the acoustic guitar on the left louder than"
    )
    assert second.extra["answer"] == "electric_bass" and second.conversations[1]["value"] == "electric bass"
    assert (third.extra["answer"], fourth.extra["answer"]) == ("more than ten", "ten")
    assert third.extra["question_id"] == fourth.extra["question_id"] == 4
    assert first.extra["qa_type"] == "Audio-Visual Comparative" and first.task == "open_qa"
    assert listing.left_out == {"question_deleted": 1}
    refused = reasons(listing)[""]
    for reason in ("row 5: its type", "row 6: its question has 1 slots but 0", "row 8: no video file"):
        assert reason in refused
    assert listing.count + 1 == 8


def test_music_avqa_slots_are_filled_from_left_to_right():
    """Replacing all of one name at once, as others do, gives another question."""
    template, values = (
        "Is the <Object> on the <LR> before the <Object> on the <LR>?",
        ["a", "left", "b", "right"],
    )
    wrong = template
    for slot, value in zip(re.findall(r"<\w+>", template), values, strict=True):
        wrong = wrong.replace(slot, value)
    assert fill(template, values) == "Is the a on the left before the b on the right?" != wrong
    assert (
        fill("Is <Object> near <Object>?", ["<Object>", "b"]) == "Is <Object> near b?"
    )  # A value is no slot.
    for values in ([], ["a", "b"]):
        with pytest.raises(RowError):
            fill("Where is <Object>?", values)


def test_extras_survive_as_json(load):
    for line in load("music_avqa", "avqa-test.json", ("00000001.mp4",)).lines:
        assert json.loads(json.dumps(line.sample())) == line.sample()


def test_a_question_has_the_four_options_of_its_instruction():
    assert without_letters(["A. a", "B. b", "C. c", "D. d"]) == ["a", "b", "c", "d"]
    for options in (["A. a", "B. b", "C. c"], ["A. a", "B. b", "C. c", "D. d", "E. e"], []):
        with pytest.raises(RowError, match="a list of four texts is expected"):
            without_letters(options)
    with pytest.raises(RowError, match="lettered ABCE, not ABCD"):
        without_letters(["A. a", "B. b", "C. c", "E. e"])
    with pytest.raises(RowError, match="a letter of ABCD is expected"):
        answer_letter("E")
